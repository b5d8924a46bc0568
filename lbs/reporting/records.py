"""Record: everything a run folder, or a packed file and its benchmark, tell of a network; each part may be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbs.cost import FULL_PRECISION_BITS, bops, float_weight_bytes, full_precision, weight_bytes
from lbs.packing.checkpoint import load
from lbs.plan import LayerPlan, Plan
from lbs.run_folder import RunFolder, read_json, read_sealed, read_sections
from lbs_kernels.errors import CheckpointError, LbsError

PHASES = ("float", "search", "finetune")
PACKED, BEFORE, EVEN8 = "packed", "torch float32", "packed uniform 8-bit"  # rows of the benchmark
# Row of the benchmark -> section and key of results.json.
_ACCURACY = {
    PACKED: ("verify", "packed_accuracy"),
    BEFORE: ("float", "accuracy"),
    EVEN8: ("uniform8", "accuracy"),
}
_BYTES = {PACKED: ("pack", "bytes"), BEFORE: ("float", "bytes"), EVEN8: ("uniform8", "bytes")}


@dataclass(frozen=True)
class LayerRow:
    """One layer of the plan, with what it cost before and costs now."""

    layer: LayerPlan
    inputs: int  # input channels that live
    full_bops: int  # 32 x 32 bits, nothing pruned
    bops: int
    full_bytes: int  # float32 weights, nothing pruned
    bytes: int  # planes, multiplier and bias; float32 weights where the layer computes in float


@dataclass(frozen=True)
class Record:
    """What is known of a run. Sections of results.json, rows of metrics.jsonl by phase, layers of the plan."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    layers: tuple[LayerRow, ...] = ()
    made: dict[str, Any] = field(default_factory=dict)  # record.json of a row that was reproduced
    path: str = ""  # the folder or file, as it was named
    packed_alone: bool = False  # a packed file, not a run folder

    def epochs(self, phase: str) -> list[dict[str, Any]]:
        """Rows written at the end of each epoch."""
        return [row for row in self.metrics.get(phase, []) if row.get("kind") == "epoch"]

    def gates(self) -> list[dict[str, Any]]:
        """Rows of the search that show gates, one per step, in step order."""
        rows = {row["step"]: row for row in self.metrics.get("search", []) if row.get("gates")}
        return [rows[step] for step in sorted(rows)]

    def value(self, section: str, key: str) -> Any:
        """A value of results.json, or None."""
        return self.results.get(section, {}).get(key)

    def targets(self) -> dict[str, dict[str, Any]]:
        """Targets of the search by name, in base units: `target`, `value`, and `thresholds`, what the trained
        thresholds had reached before the projection. None where a run of an older release does not say. `modelled`:
        the model that told the seconds, "" where they were measured."""
        section = self.results.get("search", {})
        rows = section.get("targets") or {}
        if not rows and section.get("target_bops"):
            now = sum(row.bops for row in self.layers) or section.get("bops")
            rows = {"bops": {"target": section["target_bops"], "value": now}}
        numbers = ("target", "value", "thresholds")
        return {
            name: {**{key: row.get(key) for key in numbers}, "modelled": row.get("modelled", "")}
            for name, row in rows.items()
        }

    def seed(self, phase: str = "") -> int | None:
        """The seed of a phase, or of the last one that was begun; a float network within a search has the search's."""
        order = {"float": ("float", "search"), "": PHASES[::-1]}.get(phase, (phase,))
        sections = (self.config.get(name) for name in order)
        return next((section["seed"] for section in sections if section and "seed" in section), None)

    def accuracy(self, contender: str) -> float | None:
        """Share of the test images that a row of the benchmark gets right, where that was measured: by the benchmark,
        which asks all for the same images, else by the stage that made the network."""
        found = (self.value("bench", "accuracy") or {}).get(contender)
        if found is None:
            found = self.value(*_ACCURACY.get(contender, ("", "")))
        return None if found is None else float(found)

    def agreement(self, contender: str) -> float | None:
        """Share of the images of the benchmark that a row of it gives the class of float32, where that was measured."""
        found = (self.value("bench", "agreement") or {}).get(contender)
        return None if found is None else float(found)

    def bytes(self, contender: str) -> int | None:
        """Bytes of the file or the weights of a row of the benchmark."""
        found = (self.value("bench", "bytes") or {}).get(contender)
        if found is None:
            found = self.value(*_BYTES.get(contender, ("", "")))
        return None if found is None else int(found)

    def seconds(self, contender: str, batch: int) -> float | None:
        """Median of a call of a row of the benchmark."""
        rows = self.bench_rows()
        return next((float(x["median"]) for x in rows if (x["contender"], x["batch"]) == (contender, batch)), None)

    def layer_times(self) -> list[dict[str, Any]]:
        """By layer: `name`, and `seconds` by row of the benchmark, of calls at its first batch."""
        return list(self.results.get("bench", {}).get("layers", []))

    def rivals(self) -> list[tuple[int, str, float]]:
        """(batch, fastest other contender, how many times faster than it the packed network is), batch by batch."""
        return [
            (row["batch"], *min(row["ratios"].items(), key=lambda item: item[1]))
            for row in self.bench_rows()
            if row["contender"] == "packed" and row.get("ratios")
        ]

    def bench_rows(self) -> list[dict[str, Any]]:
        """Rows of the benchmark."""
        return list(self.results.get("bench", {}).get("rows", []))


def read(path: str | Path, bench: str | Path | None = None, budget: float | None = 1.0) -> Record:
    """Read a run folder, or a packed file; bench: what `lbs bench --json` printed of it; budget: as `lbs.load` has it.

    Raises:
        CheckpointError: there is nothing, it holds nothing of a run, or a file is damaged.
    """
    if Path(path).is_file():
        return _of_file(Path(path), bench, budget)
    if bench is not None:
        raise LbsError(f"bench={bench} goes with a packed file; the benchmark of a run lies in its folder, {path}")
    folder = RunFolder(path)
    if not folder.path.is_dir():
        raise CheckpointError(
            f"no run folder {folder.path}, nor a packed file; run_search and run_finetune make one, in a shell lbs "
            "search, finetune or quickstart"
        )
    parts: dict[str, Any] = {name: _optional(folder.file(f"{name}.json")) for name in ("environment", "network")}
    parts |= {name: read_sections(folder.file(f"{name}.json")) for name in ("config", "results")}
    rows = folder.metrics()
    plan = _optional(folder.file("plan.json"))
    if not rows and not plan and not parts["results"]:
        raise CheckpointError(f"{folder.path} holds no metrics, no plan and no results; there is nothing to report")
    metrics: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        metrics.setdefault(str(row.get("phase")), []).append(row)
    made = _optional(folder.file("record.json"))
    name = folder.path.resolve().name
    layers = layer_rows(Plan.from_json(json.dumps(plan))) if plan else ()
    return Record(name, metrics=metrics, layers=layers, made=made, path=str(path), **parts)


def _of_file(path: Path, bench: str | Path | None, budget: float | None) -> Record:
    """A packed file tells its layers; all that was measured is in the benchmark."""
    packed = load(path, budget=budget)
    network = {"model": packed.name or path.name, "input_shape": list(packed.input_shape)}
    results: dict[str, Any] = {"pack": {"bytes": path.stat().st_size}}
    if bench is not None:
        section = read_json(Path(bench))
        if not isinstance(section, dict) or not isinstance(section.get("rows"), list):
            raise CheckpointError(f"{bench} is no benchmark; lbs bench {path} --json > bench.json makes one")
        results["bench"] = section
    header = results.get("bench", {}).get("header")
    environment = header if isinstance(header, dict) else {}
    return Record(
        path.name.removesuffix(".safetensors").removesuffix(".lbs"), environment=environment, results=results,
        network=network, layers=layer_rows(packed.plan) if packed.plan else (), path=str(path), packed_alone=True,
    )  # fmt: skip


def layer_rows(plan: Plan) -> tuple[LayerRow, ...]:
    """Costs of every layer by the formulas of lbs.cost."""
    rows = []
    for layer in plan.layers:
        inputs = plan.kept_inputs(layer)
        now, before = layer.problem(inputs, layer.kept_filters), layer.problem()
        rows.append(
            LayerRow(
                layer,
                inputs,
                bops(full_precision(before)),
                bops(now),
                float_weight_bytes(before),
                float_weight_bytes(now) if layer.w_bits == FULL_PRECISION_BITS else weight_bytes(now),
            )
        )
    return tuple(rows)


def _optional(path: Path) -> dict[str, Any]:
    return read_sealed(path) if path.exists() else {}
