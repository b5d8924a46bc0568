"""Kernels between pages that cannot be touched (guarded.py): none reads or writes outside its buffers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from guarded import SIDES
from programs import CASES
from test_native_runner import native

from lbs_kernels import device, extension
from lbs_kernels.errors import BackendError

if extension.cpu is None:
    pytest.skip(f"native module missing: {extension.cpu_reason}", allow_module_level=True)
if not sys.platform.startswith("linux"):
    pytest.skip("pages are guarded as Linux does it", allow_module_level=True)

HERE = Path(__file__).parent
OTHERS = [isa for isa, why in device.isa_reasons().items() if not why and isa != device.default_isa()]
ISAS = [str(device.default_isa()), *(pytest.param(isa, marks=pytest.mark.slow) for isa in OTHERS)]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: a kernel that leaves its buffers ends it."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_stay_within_their_buffers(isa: str, side: str) -> None:
    done = python(str(HERE / "guarded.py"), isa, side)
    assert done.returncode == 0, f"ended with {done.returncode} in the last of these:\n{done.stderr[-2000:]}"
    assert int(done.stdout) > 200


@pytest.mark.parametrize("side", ["reads", "start"])
def test_four_bytes_too_far_are_seen(side: str) -> None:
    """As a kernel that writes them: its output is one number shorter than it was told."""
    code = f"""
import sys, torch
from guarded import guarded
from programs import CASES, random_inputs
from test_native_runner import native
program, blob = CASES["chain"](0)
(image,), (index,) = random_inputs(program, 1, 0), program.outputs
in_front = {side == "start"}
spec = program.tensors[index]
y = guarded(torch.zeros(spec.channels * spec.height * spec.width - 1), {side!r})
runner = native(program, blob)
print("ready", flush=True)
runner.run([image.data_ptr()], [y.data_ptr() - 4 * in_front], 1, 1)
"""
    done = python("-c", code)
    assert done.stdout == "ready\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_a_guard_of_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBS_GUARD", "all")
    with pytest.raises(BackendError, match="LBS_GUARD is 'all'; it is one of reads, writes, start, or unset"):
        native(*CASES["one_pixel"](0))
