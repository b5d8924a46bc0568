"""Records that were edited, or are a stranger's: values of any kind give a page or one sentence; names stay names."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pack_nets
import pytest
from test_report_page import EVERYTHING, PLAN, bench_section, fill

from lbs.cli import main
from lbs.cli.console import Console
from lbs.plan import Plan
from lbs.reporting import comparison, page, plots, records
from lbs.reporting.style import svg
from lbs.run_folder import RunFolder, write_sealed
from lbs_kernels.errors import CheckpointError, LbsError, printable

ODD: list[Any] = [None, True, -1, 1.5, 1e308, float("nan"), 10**400, "", "$x^{$", "\x1b[2J", "\ud800", [], [None], {}]
ODD += [{"a": []}, [[]], "../../escape"]
FILES = ("config.json", "results.json", "environment.json", "plan.json", "metrics.jsonl", "record.json", "network.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("odd") / "run")
    fill(folder, *EVERYTHING)
    card = {
        "model": "cifar_resnet20",
        "num_classes": 100,
        "input_shape": [1, 8, 8],
        "data": "digits",
        "fingerprint": "",
        "mean": [0.5],
        "std": [0.5],
    }
    folder.file("network.json").write_text(json.dumps(card))
    folder.file("record.json").write_text(json.dumps({"row": "r", "schedule": "8+30", "variant": "joint"}))
    return folder.path


@pytest.fixture
def sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "svg", lambda figure: b"<svg/>")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    if not path:
        return odd
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], odd)
    return copy


def mutate(path: Path, chance: random.Random) -> tuple[Any, Any]:
    """One value of a file becomes an odd one; a file of lines is changed in one of them. Most hashes are made right."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = chance.randrange(len(lines))
    body = json.loads(lines[number])
    place, odd = chance.choice(list(places(body))), chance.choice(ODD)
    body = changed(body, place, odd)
    if isinstance(body, dict) and "hash" in body and place != ("hash",) and chance.random() < 0.9:
        body = {key: value for key, value in body.items() if key != "hash"}
        body["hash"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    lines[number] = json.dumps(body)
    path.write_text("\n".join(lines))
    return place, odd


def check_mutants(whole: Path, tmp_path: Path, seed: int, count: int) -> tuple[int, int]:
    """Numbers of pages and of sentences."""
    chance, told = random.Random(seed), [0, 0]
    run = tmp_path / "run"
    makers = (lambda: page.report(run), lambda: comparison.compare([run, whole], tmp_path / "out"))
    for _ in range(count):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        what = [(name, mutate(run / name, chance)) for name in chance.sample(FILES, chance.choice((1, 1, 2)))]
        for make in makers:
            try:
                make()
                told[0] += 1
            except LbsError:
                told[1] += 1
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        assert {path.name for path in tmp_path.iterdir()} <= {"run", "out"}
    return told[0], told[1]


@pytest.mark.usefixtures("sketches")
def test_odd_values_give_a_page_or_a_sentence(whole: Path, tmp_path: Path) -> None:
    pages, sentences = check_mutants(whole, tmp_path, 0, 20)
    assert min(pages, sentences) > 2


@pytest.mark.usefixtures("sketches")
def test_an_odd_benchmark_of_a_packed_file_gives_a_page_or_a_sentence(tmp_path: Path) -> None:
    chance, told = random.Random(0), [0, 0]
    file, bench = tmp_path / "net.lbs.safetensors", tmp_path / "bench.json"
    pack_nets.packed_digits().save(file)
    shares = {"accuracy": {"packed": 0.5}, "agreement": {"packed": 0.9}, "bytes": {"packed": 9}}
    whole = {**bench_section(), "header": {"cpu": "x"}, "images": 9, **shares}
    for place in chance.sample(list(places(whole)), 12):
        odd = chance.choice(ODD)
        bench.write_text(json.dumps(changed(whole, place, odd)))
        try:
            page.report(file, bench=bench)
            told[0] += 1
        except LbsError:
            told[1] += 1
        except Exception as error:
            raise AssertionError(f"{place}: {odd!r}: {type(error).__name__}: {error}") from error
    assert min(told) > 2


@pytest.mark.slow
@pytest.mark.usefixtures("sketches")
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_odd_values_do_too(whole: Path, tmp_path: Path, seed: int) -> None:
    check_mutants(whole, tmp_path, seed, 300)


def test_a_command_says_so_in_one_line(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path / "run")
    results = RunFolder(whole).results()
    results["finetune"]["best_accuracy"] = "\x1b[2Jbest"
    write_sealed(tmp_path / "run/results.json", results)
    assert main.main(["report", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "holds a record of another form" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["a$b", "$x^{$", "\\$", "$", "$\\frac$", "\x1b[2J", "_^{}"])
def test_names_in_pictures_are_no_formulas(name: str) -> None:
    layers = tuple(replace(layer, name=f"{layer.name}{name}", source=None) for layer in PLAN.layers)
    row = {"phase": "search", "step": 1, "bops": 1e6, "gates": {layer.name: [8, 8, 4] for layer in layers}}
    record = records.Record("run", layers=records.layer_rows(Plan(layers)), metrics={"search": [row]})
    for stem, (_, figure) in plots.draw(record).items():
        if stem == "gates-cost":  # steps alone
            continue
        assert ElementTree.fromstring(svg(figure)) is not None
        shown = [text.get_text() for axis in figure.axes for text in (*axis.get_xticklabels(), *axis.get_yticklabels())]
        assert sum(printable(name) in text.replace(r"\$", "$") for text in shown) >= len(layers)


def test_what_a_picture_is_called_is_no_path(whole: Path, tmp_path: Path, sketches: None) -> None:
    for run in ("one", "two"):
        shutil.copytree(whole, tmp_path / run)
        card = {"model": f"../../../{tmp_path.name}", "num_classes": 7}
        (tmp_path / run / "network.json").write_text(json.dumps(card))
    comparison.compare([tmp_path / "one", tmp_path / "two"], tmp_path / "out/in")
    assert [path.name for path in (tmp_path / "out").rglob("pareto*")] == [f"pareto-.._.._.._{tmp_path.name}.svg"]


@pytest.mark.usefixtures("sketches")
def test_text_of_files_reaches_the_page_spelled_out(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    hostile = "\x1b]0;title\x07\x1b[2J\u202e$x^{$"
    card = json.loads((whole / "network.json").read_text())
    (tmp_path / "run/network.json").write_text(json.dumps({**card, "model": hostile}))
    results = RunFolder(whole).results()
    rows = [{**row, "contender": hostile} for row in results["bench"]["rows"]]
    write_sealed(tmp_path / "run/results.json", {**results, "bench": {**results["bench"], "rows": rows}})
    text = page.report(tmp_path / "run").read_text()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert text.count(r"\x1b]0;title\x07\x1b[2J\u202e") > 1


def test_text_of_files_reaches_the_terminal_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eabc\r"
    Console(as_json=False).say(f"model {hostile}\tname\n")
    told = capsys.readouterr().out
    assert re.search(r"\\x1b\]0;title\\x07\\x1b\[2J\\x9b31m\\u202eabc\\r\tname", told)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", told)
    assert "\x1b" not in str(CheckpointError(hostile))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("results.json", '{"float": []}', "section 'float' is a list, no object"),
        ("results.json", "[]", "holds a JSON list"),
        ("config.json", '{"search": 3}', "section 'search' is a int, no object"),
        ("metrics.jsonl", '{"step": "one"}\n{}', "line 1 is not JSON: its step is 'one'"),
    ],
)
def test_odd_sections_are_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    look: dict[str, Callable[[RunFolder], object]] = {
        "results.json": RunFolder.results,
        "metrics.jsonl": RunFolder.metrics,
        "config.json": lambda folder: records.read(folder.path),
    }
    with pytest.raises(CheckpointError, match=says):
        look[name](RunFolder(tmp_path))
