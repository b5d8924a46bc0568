"""The public face: light to import, complete, and usable where Triton, the native module and a GPU are missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import lbs
import lbs.models
from lbs_kernels import errors


def _run(code: str) -> str:
    """Output of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_in_no_torch() -> None:
    assert _run("import sys, lbs; print('torch' in sys.modules, lbs.__version__)") == f"False {lbs.__version__}"


@pytest.mark.parametrize("name", lbs.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(lbs, name) is not None
    assert name in dir(lbs)


def test_unknown_name_is_an_attribute_error_that_lists_the_others() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'prune'; it offers .*prepare"):
        _ = lbs.prune


@pytest.mark.parametrize(
    "first",
    ["import lbs.packing.model", "import lbs.benchmark", "import lbs.reporting.page", "import lbs.runs.quantized"],
)
def test_functions_stay_functions_whatever_is_imported_first(first: str) -> None:
    functions = "lbs.bench, lbs.fidelity, lbs.pack, lbs.quantize, lbs.report"
    code = f"{first}\nimport lbs\nprint({{type(function).__name__ for function in ({functions})}})"
    assert _run(code) == "{'function'}"


def test_errors_are_one_family() -> None:
    family = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(family) > 5
    assert all(issubclass(kind, lbs.errors.LbsError) for kind in family)
    assert {kind.__name__ for kind in family} == set(lbs.errors.__all__)


def test_errors_are_imported_by_their_public_name() -> None:
    assert _run("from lbs.errors import GraphError, LbsError; print(issubclass(GraphError, LbsError))") == "True"


def test_packed_network_runs_without_triton_and_native_module() -> None:
    """The reference serves where nothing else is there, and `backends` says why."""
    output = _run(
        """
        import sys

        for name in ("triton", "lbs_kernels._cpu", "lbs_kernels._cuda"):
            sys.modules[name] = None  # importing it fails as if it were not installed
        import torch
        import lbs, lbs.models
        from lbs_kernels.run import backends

        torch.manual_seed(0)
        model = lbs.uniform(lbs.models.create("digits_resnet8"), lbs.models.example("digits_resnet8"), 4, 4)
        images = torch.rand(4, 1, 8, 8)
        lbs.calibrate(model, [images])
        packed = lbs.pack(model.eval())
        able = [name for name in backends.BACKENDS if backends.why_not(name, "cpu") is None]
        print(tuple(packed(images).shape), able)
        """
    )
    assert output.splitlines()[-1] == "(4, 10) ['reference']"
