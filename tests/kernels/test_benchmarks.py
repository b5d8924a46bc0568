"""The benchmarks of single operations run, check their results, and write the schema they promise."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lbs_kernels import extension

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPS = ("bitconv2d", "bitlinear", "quantpack", "pool")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A benchmark sets torch's number of threads; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(extension.cpu is None, reason=f"native module: {extension.cpu_reason}")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_benchmark_writes_its_schema(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module(f"bench_{op}")
    path = tmp_path / "result.json"
    settings = ["--networks", "digits_resnet8", "--bits", "4/2", "--rounds", "2", "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [f"bench_{op}", *settings, "--output", str(path)])
    monkeypatch.setattr(module, "run", _quick(module.run))
    module.main()
    report = json.loads(path.read_text())
    assert (report["version"], report["level"], report["op"]) == (1, "op", op)
    assert {"device", "threads", "batch", "torch", "commit"} <= set(report["header"])
    assert {row["contender"] for row in report["rows"]} >= {"packed"}
    for row in report["rows"]:
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert bool(row["faster_than"]) == row["contender"].startswith("packed")
    assert report["geomean"]["packed"]


def _quick(run: object) -> object:
    """The same run with hardly any warm-up."""
    common = importlib.import_module("common")

    def quick(*arguments: object) -> object:
        with pytest.MonkeyPatch.context() as patch:
            interleave = common.interleave
            patch.setattr(
                common, "interleave", lambda calls, **options: interleave(calls, **{**options, "warmup": 0.001})
            )
            patch.setattr(common, "roofs", lambda device: {"operations_per_s": 1e12, "bytes_per_s": 1e10})
            return run(*arguments)  # type: ignore[operator]

    return quick


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    common = importlib.import_module("common")
    programs = importlib.import_module("programs")
    program, blob = programs.one_conv(0, channels=3, filters=5, size=(4, 4), w_bits=4, a_bits=4)
    honest = common.CpuRunner

    class Wrong(honest):  # type: ignore[misc, valid-type]
        def run(self, *arguments: object, trace: dict[int, torch.Tensor] | None = None, **options: object) -> object:
            outputs = super().run(*arguments, trace=trace, **options)
            if trace is not None:
                trace[1] = trace[1] ^ 1
            return outputs

    if extension.cpu is None:
        pytest.skip(f"native module: {extension.cpu_reason}")
    monkeypatch.setattr(common, "CpuRunner", Wrong)
    with pytest.raises(AssertionError, match="differs from the reference; nothing is timed"):
        common.packed(program, blob, programs.random_inputs(program, 1, 0)[0], 1, 1)
