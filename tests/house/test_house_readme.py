"""README and docs/results.md: their tables and picture are those of the result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme_picture, readme_tables

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "version": 1,
    "level": "model",
    "device": "Some CPU",
    "threads": 2,
    "header": {"torch": "2.13.0"},
    "rows": [
        {
            "batch": 1,
            "contender": "packed",
            "median": 0.0012,
            "p20": 0.0011,
            "p80": 0.002,
            "ratios": {"torch float32": 6.5},
        },
        {"batch": 1, "contender": "torch float32", "median": 0.0078, "p20": 0.007, "p80": 0.01, "ratios": {}},
    ],
    "missing": {"torch bfloat16": "not asked for"},
    "notes": ["the float baselines are pruned"],
}
RECORD = {
    "schedule": "2 epochs",
    "epoch": "last",
    "fine_tuned_top1": 67.684,
    "packed_top1": 67.7,
    "equal_predictions": 9994,
    "images": 10000,
    "bops": 649478144,
    "full_precision_bops": 41798598656,
    "bits": [[4, 4], [8, 2]],
    "pruned_layers": {"layer1.0.conv1": "12/16"},
    "bytes": 251856,
}
OP = {
    "version": 1,
    "level": "op",
    "op": "bitconv2d",
    "header": {"device": "Some CPU", "batch": 1, "threads": 1, "torch": "2.13.0"},
    "rows": [{"problem": "a"}, {"problem": "a"}, {"problem": "b"}],
    "geomean": {"packed": {"torch float32": 12.345}},
}


def _root(tmp_path: Path, **files: dict[str, object]) -> Path:
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    for name, body in files.items():
        (folder / f"{name}.json").write_text(json.dumps(body))
    return tmp_path


def _text(root: Path) -> str:
    return "\n\n".join(readme_tables.measured(root).values())


@pytest.mark.parametrize("page", readme_tables.PAGES)
def test_pages_say_what_the_result_files_say(page: str) -> None:
    told = readme_tables.measured()
    text = (ROOT / page).read_text()
    sections = {name: told[name] for name in readme_tables.PAGES[page]}
    assert readme_tables.rewritten(text, sections) == text, "run benchmarks/readme_tables.py"


def test_the_picture_shows_what_the_result_files_say() -> None:
    found = readme_picture.points()
    picture = readme_picture.PICTURE.read_text()
    assert readme_picture.shows(picture, found), "run benchmarks/readme_picture.py"
    found["cifar100-resnet20"][readme_picture.OPERATIONS]["greedy"].append((9.0, 1.0, 1.0, 1.0))
    assert not readme_picture.shows(picture, found)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    found = readme_picture.points(tmp_path)  # no files: published points
    found["cifar100-resnet20"][readme_picture.OPERATIONS]["greedy"] = [(2.0, -1.0, -0.5, 0.0)]
    found["cifar100-resnet20"][readme_picture.TIME][readme_picture.SEARCHED] = [(80.0, -1.0, -0.5, 0.0)]
    readme_picture.draw(found, tmp_path / "picture.svg", metadata={"Description": readme_picture.told(found)})
    picture = (tmp_path / "picture.svg").read_text()
    assert readme_picture.shows(picture, found)
    for text in ("bit operations, % of float", "microseconds an image", "not measured", "published", "greedy"):
        assert text in picture


def test_tables_name_their_files_and_nothing_is_left_out(tmp_path: Path) -> None:
    text = _text(_root(tmp_path, model_net=MODEL, op_bitconv2d=OP, layers={"part": "layers"}))
    assert "| 1 | packed | 1.200 [1.100 2.000] | 6.50x torch float32 |" in text
    assert "| 1 | torch float32 | 7.800 [7.000 10.000] |  |" in text
    assert "Not timed: torch bfloat16 (not asked for)." in text
    assert "The float baselines are pruned." in text
    assert "over 2 layers" in text
    assert text.count(readme_tables.OP_LEGEND) == 1
    assert "| packed | 12.35x |" in text
    for name in ("model_net", "op_bitconv2d", "layers"):
        assert f"`benchmarks/results/cpu/{name}.json`" in text


def test_networks_under_milliseconds_are_a_row_for_all_seeds(tmp_path: Path) -> None:
    """Made-up numbers. Batch 1 alone is drawn."""
    row = {"contender": "searched 94.3 us", "bits": [[8, 8]], "pruned_layers": {"conv": "8/16"}, "bytes": 210_000}
    row |= {"asked": 94.3e-6, "float_top1": 68.83}
    rows = [
        {**row, "seed": seed, "batch": batch, "top1": top1, "median": batch * seconds}
        for seed, top1 in ((0, 68.0), (1, 67.0))
        for batch, seconds in ((1, 94e-6), (16, 83.2e-6))
    ]
    plain = {**rows[0], "contender": "8 bits, not trained", "asked": None, "pruned_layers": {}, "top1": 68.6}
    head = {
        "row": "cifar100-resnet20",
        "device": "Some CPU",
        "threads": 1,
        "torch": "2.13.0",
        "options": "--schedule 1",
    }
    body = {"level": "milliseconds", "header": head, "missing": ["searched 1.0 us, seed 0"], "rows": [*rows, plain]}
    root = _root(tmp_path, milliseconds=body)
    text = _text(root)
    spread = "67.50 [67.00 68.00] | 94.3 | 94.0 [94.0 94.0] | 83.2 [83.2 83.2] | 8/8 | 1 | 0.21 |"
    assert f"| searched 94.3 us | 0, 1 | {spread}" in text
    assert "| 8 bits, not trained | 0 | 68.60 |  | 94.0 |  | 8/8 | 0 | 0.21 |" in text
    assert "Refused or not trained: searched 1.0 us, seed 0." in text
    drawn = readme_picture.points(root)["cifar100-resnet20"][readme_picture.TIME]
    assert drawn[readme_picture.SEARCHED] == [(94.0, -1.83, -1.33, -0.83)]
    assert drawn[readme_picture.UNTRAINED] == [(94.0, -0.23, -0.23, -0.23)]


def test_the_end_of_the_quickstart_is_shown_as_it_was_printed(tmp_path: Path) -> None:
    lines = ["test images right: searched 98.00 %", "batch 1: 0.90x as fast as packed uniform 8-bit"]
    body = {"level": "quickstart", "summary": lines, "bench": {**MODEL, "notes": []}}
    text = _text(_root(tmp_path, quickstart=body, model_net=MODEL))
    assert "\n```\n" + "\n".join(lines) + "\n```\n" in text
    assert text.index("on Some CPU, 2 threads") < text.index("model_net")


GPU = {"device": "NVIDIA Example", "torch": "2.11", "triton": "3.6"}
LAYER = "bitconv2d_n128_64x56x56_to64_k3x3_s1_p1_w4a4_cuda"


def test_tables_of_a_gpu(tmp_path: Path) -> None:
    """Made-up numbers; nothing like them is shipped."""
    rows = [
        {"target": "fast", "needed": 2.0, "measured": 2.5, "met": True, "detail": "9 layers"},
        {"target": "faster", "needed": 94_620.0, "measured": 80_000.4, "met": False, "detail": ""},
        {"target": "fastest", "needed": None, "measured": None, "met": None, "detail": "no time"},
    ]
    layers = [
        {"problem": LAYER, "contender": "float16", "median_s": 6e-4},
        {"problem": LAYER, "contender": "triton:a", "median_s": 3e-4},
        {"problem": LAYER, "contender": "cuda:a", "error": "refused"},
        {"problem": LAYER.replace("64x56", "32x56"), "contender": "float16", "median_s": 8e-4},
        {"problem": LAYER.replace("64x56", "32x56"), "contender": "triton:a", "median_s": 1e-4},
    ]
    model = {"network": "net", "batch": 128, "median": 1e-3, "p20": 9e-4, "p80": 2e-3, "images_per_s": 128_000.0}
    models = [
        {**model, "contender": "w4a4", "ratios": {"torch float16": 1.5, "w8a8": 1.1}},
        {**model, "contender": "torch float16", "ratios": {"w4a4": 0.66}},
    ]
    roofs = {"copy": {"bytes_per_s": 4.3e12}, "int8": {"operations_per_s": 1.5e15}}
    files = {
        "targets": {"level": "gpu_targets", "rows": rows},
        "layers": {"level": "gpu_layers", "l2": "cold", "rows": layers},
        "models": {"level": "gpu_models", "rows": models, "missing": {"net 128": {"w2a2": "out of memory"}}},
        "roofs": {"level": "gpu_roofs", "rows": roofs, "b1_over_int8": None, "missing": {"b1": "no kernel"}},
        "tests": {"level": "gpu_tests", "passed": True},
    }
    text = _text(_root(tmp_path, **{name: {**body, "header": GPU} for name, body in files.items()}))
    for line in (
        "| fast | 2 | 2.5 | met | 9 layers |",
        "| faster | 94,620 | 80,000 | **missed** |  |",
        "| fastest |  |  | not measured | no time |",
        "| w4a4 | 128 | 2 | 4.00x |",  # geometric mean of 2 and 8
        "| net | 128 | w4a4 | 1.000 [0.900 2.000] | 128,000 | 1.50x torch float16 |",
        "| net | 128 | torch float16 | 1.000 [0.900 2.000] | 128,000 |  |",
        "Not timed: w2a2 (net 128) (out of memory).",
        "| copy | 4.30 TB/s |",
        "| int8 | 1500 TOP/s |",
        "Not timed: b1 (no kernel).",
        "Without a table here: `benchmarks/results/cpu/tests.json`.",
    ):
        assert line in text
    assert text.count("NVIDIA Example, torch 2.11, Triton 3.6") == 4


def test_networks_without_training(tmp_path: Path) -> None:
    """Made-up numbers."""
    row = {
        "bits": [4, 8],
        "rounding": "optimized",
        "zeros": 0.0,
        "bops_asked": None,
        "top1": 67.512,
        "float_top1": 68.8,
    }
    row |= {"bops": 25, "full_precision_bops": 1000, "bytes": 1_250_000, "seconds": 12.34, "peak_bytes": 3e8}
    rows = [row, {**row, "zeros": 0.3}, {**row, "bits": None, "bops_asked": 0.025, "rounding": "nearest"}]
    quick = {"faster_asked": 1.3, "latency": {"faster": 1.274}, "kept": {"a": "8/16", "b": "8/24"}, "distill": 20}
    rows.append({**row, "bits": None, "rounding": "nearest", **quick})
    head = {"model": "net", "calibration": 512, "test": 10_000, "threads": 1, "torch": "2.13"}
    text = _text(_root(tmp_path, net={"level": "quantization", "header": head, "rows": rows}))
    for line in (
        "**net without training**, calibrated on 512 images, tested on 10,000 others; 1 threads, torch 2.13",
        "| 4/8 | optimized | 67.51 of 68.80 | 2.50% | 1.25 | 12.3 | 300 |",
        "| 4/8, 30% of the weights 0 | optimized |",
        "| at most 2.5% of the BOPs | nearest |",
        "| 1.3x of 8/8 asked, 1.27x measured, 2 layers pruned, 20 epochs of distillation | nearest | 67.51 of 68.80 |",
    ):
        assert line in text


def test_networks_against_engines(tmp_path: Path) -> None:
    """Made-up numbers: the engine that is faster by its median is the one compared with."""
    one = {"network": "net", "threads": 1, "batch": 16, "p20": 1e-3, "p80": 9e-3, "ratios": {}, "algorithms": None}
    names = {"w8a8": (4e-3, 3e-3), "w4a4": (2e-3, 2e-3), "slow": (9e-3, 4e-3), "fast": (8e-3, 5e-3)}
    rows = [{**one, "contender": name, "median": m, "fastest": f} for name, (m, f) in names.items()]
    rows[0] |= {"algorithms": {"direct": 3, "winograd": 0}, "ratios": {"slow": 2.25, "fast": 2.0, "w4a4": 0.5}}
    rows[1] |= {"algorithms": {"direct": 1, "winograd": 2}, "ratios": {"slow": 4.5, "fast": 4.0, "w8a8": 1.9}}
    starts = [{"network": "net", "threads": 1, "contender": "fast", "seconds": 0.4321, "peak_bytes": 57.4e6}]
    body = {"level": "networks", "header": {"device": "Some CPU"}, "rows": rows, "starts": starts, "notes": ["busy"]}
    text = _text(_root(tmp_path, networks=body))
    for line in (
        "| net | 1 | 16 | w8a8 | 4.000 [1.000 9.000] | 2.00x fast | 1.33x |  | 3 direct |",
        "| net | 1 | 16 | w4a4 | 2.000 [1.000 9.000] | 4.00x fast | 2.00x | 1.90x | 1 direct, 2 winograd |",
        "| net | 1 | 16 | fast | 8.000 [1.000 9.000] |  |  |  |  |",
        "| net | 1 | fast | 432 | 57 |",
        "Busy.",
    ):
        assert line in text


def test_times_of_the_readme(tmp_path: Path) -> None:
    """Made-up numbers: below 1 is shown, the newest machine wins, and speeds are those over the faster engine."""
    one = {"network": "resnet18", "threads": 1, "p20": 0, "p80": 1, "ratios": {}, "algorithms": None, "fastest": 1e-3}
    times = {"w8a8": 4e-3, "w4a4": 3e-3, "w4a4 pruned": 2e-3, "OpenVINO int8": 2.5e-3, "ONNX Runtime int8": 5e-3}
    rows = [{**one, "batch": batch, "contender": name, "median": m} for name, m in times.items() for batch in (1, 16)]
    for row in rows:
        row["ratios"] = {"OpenVINO int8": 0.84, "ONNX Runtime int8": 1.66}
    head = {"device": "Some CPU", "date": "2026-01-02", "engines": {"openvino": "1.2"}, "commit": "0123456789"}
    body = {"level": "networks", "header": head, "rows": rows, "starts": [], "notes": []}
    older = {**body, "header": {**head, "date": "2026-01-01", "device": "Older CPU"}}
    told = readme_tables.measured(_root(tmp_path, new=body, old=older))["latency"]
    assert "| ResNet-18 | 4.000 | 3.000 | 2.000 | 2.500 | 5.000 | 0.84x | 0.84x |" in told
    assert "one thread of Some CPU, 2026-01-02, openvino 1.2" in told
    assert "Older" not in told


def test_accuracy_of_the_readme(tmp_path: Path) -> None:
    """Made-up numbers: seeds of one budget and one kind of ranges, weights that were not zeroed."""
    made = {**RECORD, "level": "search", "row": "cifar100-resnet56", "network": "net", "float_top1": 72.6}
    made |= {"target_bops": 1_918_800_000.0, "published": None, "best_epoch_top1": 0.0, "seeds": {"finetune": 0}}
    made |= {"schedule": "1+4 of 30+200 epochs, in full"}
    tuned = {"lr": 0.03, "distill": 0.7, "weight_decay": 1e-4}
    search = {"mode": "joint", "pruning": False, "ranges": "layer"}
    runs = {"a": {**made, "packed_top1": 72.0}, "b": {**made, "packed_top1": 71.0}, "c": made, "d": made}
    for name, run in runs.items():
        run_search = {**search, "ranges": "filter"} if name == "c" else search
        runs[name] = {**run, "config": {"finetune": tuned, "search": run_search}}
    runs["d"]["target_bops"] = 1e9
    row = {"bits": [4, 8], "rounding": "optimized", "zeros": 0.0, "bops_asked": None, "top1": 64.0, "float_top1": 80.0}
    row |= {"bops": 25, "full_precision_bops": 1000, "bytes": 1_250_000, "seconds": 1.0, "peak_bytes": 1}
    head = {"model": "mobilenet_v2", "calibration": 8, "test": 400, "threads": 1, "torch": "2.13"}
    net = {"level": "quantization", "header": head, "rows": [row, {**row, "zeros": 0.3, "top1": 1.0}]}
    told = readme_tables.measured(_root(tmp_path, **runs, net=net))["accuracy"]
    for line in (
        "| searched, fine-tuned: 1+4 epochs, 2 seeds | 72.60 | 71.50 [71.00 72.00] | 1.55% | 0.25 MB |",
        "| `lbs.quantize`, 4/8 bits, optimized rounding | 80.00 | 64.00 | 2.50% | 1.25 MB |",
        "MobileNetV2, ImageNet: 400 validation images, so ±2.0.",
    ):
        assert line in told


def test_record_of_a_searched_network(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results" / "search"
    folder.mkdir(parents=True)
    (folder / "net.json").write_text(json.dumps(RECORD))
    text = _text(tmp_path)
    for part in ("67.68 %", "67.70 %", "9,994 of 10,000", "649.5M of 41798.6M", "4/4, 8/2", "251,856 bytes"):
        assert part in text
    assert "`benchmarks/results/search/net.json`" in text


def test_reproduced_rows_share_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results" / "search"
    folder.mkdir(parents=True)
    made = {**RECORD, "row": "net", "network": "net", "float_top1": 68.8, "target_bops": 65e7, "best_epoch_top1": 68.0}
    made |= {"published": {"top1": 68.1, "bops": 630.6e6}, "seeds": {"finetune": 0}}
    tuned = {"lr": 0.03, "distill": 0.7, "weight_decay": 1e-4}
    search = {"mode": "joint", "pruning": True, "prune_lr": 0.16, "importance": "gamma", "max_pruning_ratio": 0.5}
    made["config"] = {"finetune": tuned, "search": search}
    better = {**made, "packed_top1": 68.1, "equal_predictions": 9990, "bops": 640e6, "seeds": {"finetune": 1}}
    better |= {"schedule": "3 epochs"}  # by the clock
    pruned = {**made, "row": "net-prune-only", "target_bops": None, "published": None, "packed_top1": None}
    pruned |= {"equal_predictions": None, "config": {"finetune": {**tuned, "ema": 0.9, "weight_decay": 5e-4}}}
    for name, body in {"a": better, "b": made, "c": pruned}.items():
        (folder / f"{name}.json").write_text(json.dumps(body))
    text = _text(tmp_path)
    assert text.count("**net**, float 68.80 %") == 1
    ranged = {**made, "config": {"finetune": tuned, "search": {**search, "ranges": "layer"}}}
    (folder / "a.json").write_text(json.dumps(ranged))
    apart = [line for line in _text(tmp_path).splitlines() if line.startswith("| net |")]
    assert ["ranges per layer" in line for line in apart] == [True, False]  # code from before ranges is another row
    rows = [line for line in text.splitlines() if line.startswith("| net")]
    assert rows == [
        "| net-prune-only | 2 epochs | 0.03, 0.7, decay 0.0005, average 0.9 | 0 | 67.68 | 68.00 | in float |  | "
        "649.5M | 4/4, 8/2 | 1 |  |",
        "| net | 3 epochs or 2 epochs | 0.03, 0.7; 0.16 by gamma, up to 50% | 0, 1 | 67.68 [67.68 67.68] | "
        "68.00 [68.00 68.00] | 67.90 [67.70 68.10] | 9,990 of 10,000 | "
        "640.0M to 649.5M of 650.0M | 4/4, 8/2 | 1 | 68.1 at 630.6M |",
    ]


def test_no_result_files(tmp_path: Path) -> None:
    assert set(readme_tables.measured(tmp_path).values()) == {"No result files.", "Every result file has its table."}


BEGIN, END = readme_tables.markers("networks")


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_page_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        readme_tables.rewritten(text, {"networks": ""})


def test_sections_are_written_between_their_markers() -> None:
    assert readme_tables.rewritten(f"a{BEGIN}old{END}b", {"networks": "new"}) == f"a{BEGIN}\nnew\n{END}b"
