"""The back ends a test compares with the reference: those that can run here; others are skipped with their reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from programs import random_inputs
from torch import Tensor

from lbs_kernels.device import isa_reasons
from lbs_kernels.program.steps import Program
from lbs_kernels.run.backends import why_not
from lbs_kernels.run.reference import ReferenceRunner


def _contender(backend: str, device: str) -> object:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    reason = why_not(backend, device)
    if reason is not None:
        marks.append(pytest.mark.skip(reason=f"{backend}: {reason}"))
    return pytest.param(backend, device, id=f"{backend}-{device}", marks=marks)


# (back end, device of the tensors); Triton on the CPU is its interpreter.
CONTENDERS = [_contender("cpu", "cpu"), _contender("triton", "cpu"), _contender("triton", "cuda")]
# The native kernels by every instruction set of this machine, for `OneStep.run`.
ISA_CONTENDERS = [
    pytest.param(f"cpu/{isa}", "cpu", id=f"cpu-{isa}") for isa, reason in isa_reasons().items() if reason == ""
]


@contextmanager
def filled_memory() -> Iterator[None]:
    """Every torch.empty is filled with NaN or the largest integer, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal in every element, dtype and shape; the message names the first difference."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    wrong = actual.cpu() != expected.cpu()
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        found, wanted = actual.cpu()[place].item(), expected.cpu()[place].item()
        share = float(wrong.float().mean())
        pytest.fail(f"{what} differs in {share:.2%} of its elements, first at {place}: {found}, expected {wanted}")


def assert_traced(runner: Any, program: Program, blob: Tensor) -> None:
    """Outputs and every tensor on the way are those of the reference, of two images."""
    images = random_inputs(program, 2, 4)
    expected: dict[int, Tensor] = {}
    actual: dict[int, Tensor] = {}
    outputs = ReferenceRunner(program, blob).run(images, expected)
    for result, output in zip(runner.run(images, actual), outputs, strict=True):
        assert_same(result, output, "output")
    assert set(actual) == set(expected)
    for index in expected:
        assert_same(actual[index], expected[index], f"tensor {index}")
