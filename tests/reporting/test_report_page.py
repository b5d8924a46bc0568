"""The report: complete, partial and damaged run folders; one file that needs no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pack_nets
import pytest

from lbs.plan import LayerPlan, Plan
from lbs.reporting import page, plots, records, style, tables, units
from lbs.run_folder import RunFolder, write_json
from lbs_kernels.errors import CheckpointError, LbsError, PlanError

PLAN = Plan(
    (
        LayerPlan("conv1", "conv2d", 8, 8, 3, 16, (3, 3), (1, 1), (1, 1), height=8, width=8),
        LayerPlan("a", "conv2d", 4, 2, 16, 16, (3, 3), (1, 1), (1, 1), height=8, width=8, kept=tuple(range(12))),
        LayerPlan("b", "conv2d", 2, 4, 16, 16, (3, 3), (1, 1), (1, 1), height=8, width=8, source="a"),
        LayerPlan("fc", "linear", 8, 8, 16, 10),
    ),
    "Small",
)


@pytest.fixture
def sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed but not rendered, which takes seconds."""
    monkeypatch.setattr(page, "svg", lambda figure: b"<svg/>")


def bench_rows() -> list[dict[str, Any]]:
    rows = []
    for batch, base in ((1, 2e-3), (64, 4e-2)):
        for name, share in (("packed", 0.1), ("torch float32", 1.0), ("torch bfloat16", 0.7)):
            median = base * share
            rows.append(
                {
                    "contender": name,
                    "batch": batch,
                    "median": median,
                    "p20": 0.9 * median,
                    "p80": 1.2 * median,
                    "ratios": {"torch float32": base / median, "torch bfloat16": 0.7 * base / median},
                }
            )
    return rows


def bench_section() -> dict[str, Any]:
    layers = [{"name": x.name, "seconds": {"packed": 1e-5, "torch float32": 8e-5}} for x in PLAN.layers]
    told = {"missing": {"x": "not installed"}, "bits": ["bits did not pay: packed is x0.90"], "layers": layers}
    return {"version": 1, "device": "cpu", "threads": 2, "rows": bench_rows(), **told}


def fill(folder: RunFolder, *parts: str) -> None:
    """Write the named parts of a run."""
    folder.path.mkdir()
    if "plan" in parts:
        PLAN.save(folder.file("plan.json"))
    if "metrics" in parts:
        for phase in ("float", "search", "finetune"):
            for step in range(1, 5):
                row: dict[str, Any] = {
                    "phase": phase,
                    "kind": "step" if step % 2 else "epoch",
                    "step": step,
                    "epoch": step,
                }
                row |= {"loss": 2.0 / step, "task_loss": 1.0 / step, "train_accuracy": 0.2 * step, "lr": 0.1}
                row["test_accuracy"] = None if step % 2 else 0.19 * step
                if phase == "search":
                    row |= {"bops": PLAN.bops() * (6 - step), "lambda": 1.0}
                    row["gates"] = {
                        r.name: [8 if step < 3 else r.w_bits, r.a_bits, r.kept_filters] for r in PLAN.layers
                    }
                folder.append_metrics(row)
    if "results" in parts:
        phase = {"epochs": 4, "steps": 8, "seconds": 75.0, "accuracy": 0.7, "best_accuracy": 0.71, "best_epoch": 3}
        folder.add_result("float", {**phase, "accuracy": 0.72, "bytes": 100_000})
        allowed = {"target": 2 * PLAN.bops(), "value": PLAN.bops(), "thresholds": 3 * PLAN.bops()}
        small = {"target": 5500, "value": 5400, "thresholds": 5300}
        targets = {"bops": allowed, "size_mb": small}
        folder.add_result(
            "search", {**phase, "targets": targets, "target_bops": allowed["target"], "bops": PLAN.bops()}
        )
        folder.add_result("finetune", phase)
        folder.add_result("pack", {"bytes": 20_000})
        folder.add_result("verify", {"images": 50, "equal_predictions": 50, "packed_accuracy": 0.7, "passed": True})
    if "bench" in parts:
        folder.add_result("bench", bench_section())
    if "environment" in parts:
        folder.note_environment()
        write_json(folder.file("config.json"), {"version": 1, "search": {"hash": "abc123", "seed": 7}})


EVERYTHING = ("plan", "metrics", "results", "bench", "environment")
LAYERS, TIMES = ("bits", "filters", "operations", "bytes"), ("milliseconds", "latency-1", "latency-64")
TRAINING = ("accuracy", "loss", "gates-cost", "gates-weights", "gates-activations", "gates-filters")
PICTURES = ("top1", *LAYERS, *TIMES, *TRAINING)


def test_a_complete_run_makes_one_page_that_needs_no_other_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    fill(folder, *EVERYTHING)
    path = page.report(folder.path)
    text = path.read_text()
    for stem in PICTURES:
        assert f'id="{stem}"' in text
        ElementTree.parse(folder.file(f"{stem}.svg"))
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "Not here yet" not in text
    for expected in (
        "70.00 %",
        "12 / 16",
        "abc123",
        "50 of 50",
        "batch 1: 7.0x as fast as torch bfloat16",
        "20.0 kB",
        ">met<",
    ):
        assert expected in text, expected
    record = records.read(folder.path)
    found = {table.title: table.rows for table in tables.tables(record)}
    cost, full = (units.bops(n * PLAN.bops()) for n in (1, 3))
    assert found["Budget"] == (
        ("bit operations", units.bops(2 * PLAN.bops()), full, cost, "closed by projection"),
        ("packed weights", "5.5 kB", "5.3 kB", "5.4 kB", "opened by projection"),
    )
    assert [row[:2] for row in found["Training"]] == [("float", "7"), ("search", "7"), ("finetune", "-")]
    detail = next(tile.detail for tile in tables.tiles(record) if tile.label == "Budget")
    assert detail == f"{cost} of {units.bops(2 * PLAN.bops())}, 5.4 kB of 5.5 kB allowed"


FAST = {"torch float32": 9.2, "packed uniform 8-bit": 1.5}


@pytest.mark.parametrize(
    ("ratios", "right", "value", "state", "told"),
    [
        ((FAST, FAST), 0.98, "1.50x", "good", "batch 64: 1.50x as fast as packed uniform 8-bit (98.50 % right)"),
        # The fastest other is another one at each batch, and the tile shows the least that is gained.
        ((FAST, {**FAST, "OpenVINO int8": 1.2}), 0.98, "1.20x", "good", "batch 64: 1.20x as fast as OpenVINO int8"),
        (
            ({**FAST, "packed uniform 8-bit": 0.96}, FAST),
            0.98,
            "0.96x",
            "bad",
            "batch 1: 0.96x as fast as packed uniform 8-bit (98.50 % right); batch 64: 1.50x",
        ),
        (
            (FAST, {"torch float32": 0.5}),
            0.98,
            "0.50x",
            "bad",
            "batch 64: 0.50x as fast as torch float32 (99.00 % right)",
        ),
        ((FAST, FAST), 0.97, "1.50x", "bad", "(98.50 % right)"),  # faster, and not the same accuracy
        (
            ({**FAST, "OpenVINO int8": 1.2},) * 2,
            0.976,
            "1.20x",
            "bad",
            "as fast as OpenVINO int8",
        ),  # that is like float
    ],
)
def test_speed_is_told_against_the_fastest_other(
    ratios: tuple[dict[str, float], ...], right: float, value: str, state: str, told: str
) -> None:
    rows = [
        {"contender": "packed", "batch": batch, "median": 1e-3, "p20": 1e-3, "p80": 1e-3, "ratios": found}
        for batch, found in zip((1, 64), ratios, strict=True)
    ]
    results = {
        "float": {"accuracy": 0.99},
        "uniform8": {"accuracy": 0.985},
        "verify": {"packed_accuracy": right},
        "bench": {"rows": rows},
    }
    found = {tile.label: tile for tile in tables.tiles(records.Record("run", results=results))}
    tile = found["Against the fastest other"]
    assert (tile.value, tile.state) == (value, state)
    assert told in tile.detail
    accuracy = found["Accuracy, packed"].detail
    assert (
        accuracy
        == f"float 99.00 %, {100 * right - 99:+.2f} points; uniform 8 bits 98.50 %, {100 * right - 98.5:+.2f} points"
    )


@pytest.mark.parametrize(
    ("of_bits", "told"),
    [
        ({"1": 1.0, "64": 1.02}, "1.00x at batch 1, 1.02x at batch 64; fewer bits save memory here and no time"),
        ({"1": 0.9, "64": 1.3}, "0.90x at batch 1, 1.30x at batch 64; fewer bits pay at batch 64"),
        ({}, ""),
    ],
)
def test_what_bits_alone_bring_is_told(of_bits: dict[str, float], told: str) -> None:
    record = records.Record("run", results={"bench": {"rows": bench_rows(), "of_bits": of_bits}})
    line = tables.bits_pay(record)
    assert line == (f"against the same filters at 8 bits: {told}" if told else "")
    assert line in tables.latency_table(record).note


def test_filters_that_are_left_are_told() -> None:
    record = records.Record("run", layers=records.layer_rows(PLAN))
    assert tables.kept_filters(record) == "filters kept: 54 of 58; a 12 of 16"


@pytest.mark.parametrize("section", [{"target_bops": 3e6}, {"targets": {"bops": {"target": 3e6, "value": 2e6}}}])
def test_a_search_of_an_older_release_did_not_note_its_thresholds(tmp_path: Path, section: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.add_result("search", {"bops": 2e6, **section})
    rows = tables.budget_table(records.read(folder.path)).rows
    assert rows == (("bit operations", "3.0M", "-", "2.0M", "-"),)


@pytest.mark.parametrize("part", EVERYTHING)
@pytest.mark.usefixtures("sketches")
def test_every_part_may_be_missing(tmp_path: Path, part: str) -> None:
    folder = RunFolder(tmp_path / "run")
    fill(folder, *(other for other in EVERYTHING if other != part))
    text = page.report(folder.path).read_text()
    lost = {"plan": LAYERS, "metrics": TRAINING, "bench": TIMES, "results": ("top1",)}.get(part, ())
    for stem in PICTURES:
        assert (f'id="{stem}"' not in text) == (stem in lost)
        assert folder.file(f"{stem}.svg").exists() == (stem not in lost)
    if part == "bench":
        assert f"benchmark: <code>lbs bench --run {folder.path}</code>" in text


@pytest.mark.parametrize("part", ["plan", "metrics", "results"])
def test_every_part_stands_alone(tmp_path: Path, part: str) -> None:
    folder = RunFolder(tmp_path / "run")
    fill(folder, part)
    assert "Not here yet" in page.report(folder.path).read_text()


def test_totals_are_those_of_the_plan() -> None:
    rows = records.layer_rows(PLAN)
    assert sum(row.bops for row in rows) == PLAN.bops()
    assert sum(row.full_bops for row in rows) == PLAN.full_precision_bops()
    assert rows[1].bops == 9 * 16 * 12 * 64 * 4 * 2
    assert rows[2].inputs == 12
    table = tables.layer_table(records.Record("x", layers=rows))
    assert table.rows[-1][0] == "total"
    assert all(len(row) == len(table.header) for row in table.rows)


@pytest.mark.usefixtures("sketches")
def test_names_are_escaped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    fill(folder, "results")
    folder.add_result("bench", {"rows": [{**bench_rows()[0], "contender": "<script>alert(1)</script>"}]})
    assert "<script>" not in page.report(folder.path).read_text()


@pytest.mark.usefixtures("sketches")
def test_a_missed_budget_and_a_failed_check_are_shown_as_such(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    fill(folder, *EVERYTHING)
    folder.add_result("search", {"target_bops": PLAN.bops() / 2})
    folder.add_result("verify", {"images": 50, "equal_predictions": 49, "packed_accuracy": 0.6, "passed": False})
    found = {tile.label: tile for tile in tables.tiles(records.read(folder.path))}
    assert (found["Budget"].value, found["Budget"].state) == ("missed", "bad")
    assert (found["Packed = trained"].value, found["Packed = trained"].state) == ("no", "bad")


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run folder"):
        page.report(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="nothing to report"):
        page.report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"results.json is not JSON"):
        page.report(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "plan.json").write_text('{"layers": [{"name": 1}]}')
    with pytest.raises(PlanError, match="not a plan"):
        page.report(tmp_path)


def test_before_stands_beside_after() -> None:
    results = {
        "float": {"accuracy": 0.72, "bytes": 100_000},
        "verify": {"packed_accuracy": 0.7},
        "pack": {"bytes": 20_000},
        "bench": {**bench_section(), "images": 50, "accuracy": {"packed": 0.71, "torch float32": 0.74}},
    }
    table = tables.before_after_table(records.Record("run", results=results, layers=records.layer_rows(PLAN)))
    found = {row[0]: row[1:] for row in table.rows}
    assert found["top-1 accuracy"] == ("74.00 %", "-", "71.00 %", "-3.00 pts")  # all of the same images
    assert "Classes of 50 images" in table.note
    assert found["filters"] == ("58", "58", "54", "7% gone")
    assert found["file or weights"] == ("100.0 kB", "-", "20.0 kB", "5.0x")
    assert found["call, batch 1"] == ("2.00 ms", "-", "200.0 us", "10.0x")
    full = PLAN.full_precision_bops()
    assert found["bit operations"][:3] == (units.bops(full), units.bops(full // 16), units.bops(PLAN.bops()))


def test_layers_have_their_times_and_a_line_where_bits_did_not_pay(tmp_path: Path) -> None:
    record = records.Record("run", results={"bench": bench_section()}, layers=records.layer_rows(PLAN))
    table = tables.layer_table(record)
    assert table.header[-3:] == ("#Time", "#at 8 bits", "#in float32")
    assert {row[-3:] for row in table.rows[:-1]} == {("10.0 us", "-", "80.0 us")}
    assert table.rows[-1][-3:] == ("40.0 us", "-", "320.0 us")
    assert "Bits did not pay: packed is x0.90." in tables.latency_table(record).note


def test_a_packed_file_and_its_benchmark_make_a_page(tmp_path: Path, sketches: None) -> None:
    file, bench = tmp_path / "net.lbs.safetensors", tmp_path / "bench.json"
    pack_nets.packed_digits().save(file)
    path = page.report(file)
    text = path.read_text()
    assert path == tmp_path / "net-report" / "report.html"
    assert 'id="bits"' in text
    assert 'id="latency-1"' not in text
    assert f"lbs bench {file} --model NAME --json &gt; bench.json" in text
    layers = [{"name": "<img src=x>", "seconds": {"packed": 1e-5}}]
    bench.write_text(json.dumps({**bench_section(), "accuracy": {"packed": 0.9}, "layers": layers}))
    text = page.report(file, bench=bench, out=tmp_path / "out").read_text()
    assert "Not here yet" not in text
    assert "90.00 %" in text
    assert "<img src=x>" not in text
    assert (tmp_path / "out" / "latency-64.svg").exists()
    bench.write_text("{}")
    with pytest.raises(CheckpointError, match="is no benchmark; lbs bench"):
        page.report(file, bench=bench)
    folder = RunFolder(tmp_path / "run")
    fill(folder, "results")
    with pytest.raises(LbsError, match="goes with a packed file"):
        page.report(folder.path, bench=bench)


def test_pictures_are_narrow_labelled_and_have_dark_colours() -> None:
    results = {"bench": {**bench_section(), "accuracy": {"packed": 0.9, "torch float32": 0.91}}}
    row = {"phase": "search", "kind": "epoch", "step": 1, "bops": 1e6, "task_loss": 1.0, "test_accuracy": 0.5}
    row["gates"] = {layer.name: [8, 8, 4] for layer in PLAN.layers}
    record = records.Record("run", results=results, layers=records.layer_rows(PLAN), metrics={"search": [row]})
    pictures = plots.draw(record)
    assert set(pictures) == set(PICTURES)
    for stem, (_, figure) in pictures.items():
        axis = figure.axes[0]
        assert axis.get_xlabel(), stem
        assert axis.get_ylabel(), stem
        assert figure.get_figwidth() == style.WIDTH
        image = style.svg(figure).decode()
        root = ElementTree.fromstring(image)
        assert float(root.attrib["width"].removesuffix("pt")) == 72 * style.WIDTH
        assert "@media (prefers-color-scheme: dark)" in image
        drawn = {
            color
            for kind in ("fill", "stroke")
            for color in re.findall(rf'style="[^"]*{kind}: (#[0-9a-f]{{6}})', image)
        }
        assert drawn & {style.INK, style.QUIET}
        assert not drawn & {"#000000", "#808080"}, stem  # matplotlib's own, which no rule swaps


def test_what_a_dark_page_swaps_is_readable() -> None:
    """Contrast of text against cards, as WCAG counts it: 4.5 and more."""

    def light(color: str) -> float:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((light(one), light(other)))
        return (high + 0.05) / (low + 0.05)

    for back, ink in ((style.BACK, style.INK), (style.DARK[style.BACK], style.DARK[style.INK])):
        assert contrast(back, ink) > 4.5
    for color in (style.WEIGHTS, style.ACTIVATIONS, style.KEPT, *style.SERIES):
        assert contrast(style.DARK[style.BACK], style.DARK.get(color, color)) > 3.0
