"""A compiled module of another release: it is taken for missing, with the reason and the way out."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import lbs
import lbs_kernels
from lbs.cli import main
from lbs_kernels import extension
from lbs_kernels.errors import BackendError
from lbs_kernels.gpu import kernels
from lbs_kernels.program.problem import Problem
from lbs_kernels.run import backends

LAYER = Problem("bitconv2d", (3, 4, 4), 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 1, 1, "cuda")


def older(name: str, lacks: str) -> ModuleType:
    """A module with every name but one; `Program.run` is that method alone."""
    module: Any = ModuleType(f"lbs_kernels._{name}")
    for needed in extension.NEEDED[name]:
        head, _, method = needed.partition(".")
        if needed != lacks and head != lacks:
            owner = vars(module).setdefault(head, SimpleNamespace())
            setattr(owner, method or "__doc__", "here")
    return module


@pytest.mark.parametrize(
    ("name", "lacks", "told"),
    [
        ("cuda", "s8_launch", "s8_launch"),
        ("cpu", "Program.step_times", "Program.step_times"),
        ("cpu", "resolve_isa", "resolve_isa"),
    ],
)
def test_an_older_module_is_missing_and_says_why(
    name: str, lacks: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, f"lbs_kernels._{name}", older(name, lacks))
    module, reason = extension._load(name)
    assert module is None
    why = f"the one found was built by another release and lacks {told}"
    assert reason == f"{why}; build it again: pip install -e ."
    monkeypatch.setattr(extension, name, module)
    monkeypatch.setattr(extension, f"{name}_reason", reason)
    with pytest.raises(BackendError, match=re.escape(reason)):
        getattr(extension, f"require_{name}")()
    if name == "cpu":
        assert backends.BACKENDS["cpu"]("cpu") == reason
    else:
        row = next(kernel for kernel in kernels.KERNELS if kernel.family == "cuda")
        assert row.why_not(LAYER) == reason
    monkeypatch.setattr(extension, "build_report", lambda: {name: {"built": False, "reason": "no", "fix": "other"}})
    main.main(["doctor"])
    doctor = capsys.readouterr().out
    assert re.search(rf"native {name.upper()} module: {re.escape(why)}.*\n *fix: pip install -e \.\n", doctor)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_this_release_has_what_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = older(name, "")
    monkeypatch.setitem(sys.modules, f"lbs_kernels._{name}", whole)
    assert extension._load(name) == (whole, "")


@pytest.mark.skipif(extension.cpu is None, reason=f"CPU module missing: {extension.cpu_reason}")
def test_what_serves_tests_alone_is_not_shipped() -> None:
    assert [name for name in vars(extension.cpu) if name.startswith(("onebit", "s8"))] == []


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_every_name_that_is_used_is_needed(name: str) -> None:
    use = re.compile(rf"(?:require_{name}\(\)|extension\.{name})\.([A-Za-z_]\w*)")
    folders = [Path(package.__file__ or "").parent for package in (lbs, lbs_kernels)]
    used = {found for folder in folders for path in folder.rglob("*.py") for found in use.findall(path.read_text())}
    assert used == {needed.partition(".")[0] for needed in extension.NEEDED[name]}
