"""A program on one back end, ready to run: what images must be, and who runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from lbs_kernels.device import named_isa
from lbs_kernels.errors import BackendError, FormatError, ShapeError
from lbs_kernels.gpu import kernels
from lbs_kernels.program.checks import check_planes, check_program
from lbs_kernels.program.runner import Runner, empty_outputs, empty_tensors
from lbs_kernels.program.steps import IMAGE_DTYPES, Program, TensorSpec, blob_digest
from lbs_kernels.run import backends
from lbs_kernels.run.cpu import CpuRunner
from lbs_kernels.run.reference import ReferenceRunner


class CompiledProgram:
    """A program on one back end, ready to run. `fallback`: why "auto" did not take its first choice, or empty."""

    def __init__(self, program: Program, blob: Tensor, backend: str = "auto", allow: str = "") -> None:
        """
        Args:
            blob: uint8 on the device that shall run it; kept, and not to be written to.
            backend: "auto", "reference", "cpu", "gpu" or "triton".
            allow: inexact kernels the gpu back end may take where they were measured faster ("fp16"); none if empty.

        Raises:
            FormatError: a damaged program, or the blob of another one.
            BackendError: the back end named cannot serve.
        """
        _check_blob(blob)
        check_program(program, blob.numel())
        _check_bytes(program, blob)
        self.program = program
        self.blob = blob
        self.version = version_of(blob)
        self.backend = backends.resolve(backend, blob.device.type)
        first = backends.first_choice(backend, blob.device.type)
        self.fallback = "" if first == self.backend else f"{first}: {backends.why_not(first, blob.device.type)}"
        try:
            self.runner = _build(self.backend, program, blob, allow)
        except BackendError as error:
            if backend != "auto" or named_isa():  # which names the native back end
                raise
            self.fallback = f"{self.backend}: {error}"
            self.backend = "reference"
            self.runner = ReferenceRunner(program, blob)
        self._images = [Image(program.tensors[index]) for index in program.inputs]
        self._device = blob.device

    def run(
        self, inputs: list[Tensor], trace: dict[int, Tensor] | None = None, *, threads: int | None = None
    ) -> list[Tensor]:
        """Outputs of images; see `run_program`."""
        batch = self._check(inputs)
        ready = inputs
        if len(inputs) > 1 or not inputs[0].is_contiguous() or _lazy(inputs[0]):
            ready = [dense(x) for x in inputs]
        if batch == 0:
            return _empty_outputs(self.program, ready, trace)
        return self.runner.run(ready, trace, threads=threads)

    def serves(self, blob: Tensor) -> bool:
        """Whether it was built for this blob as it is now: the same memory, not written to since."""
        return (blob is self.blob or blob.data_ptr() == self.blob.data_ptr()) and version_of(blob) == self.version

    def _check(self, inputs: list[Tensor]) -> int:
        """The batch size. Raises ShapeError for images of another number, shape, dtype, device or batch."""
        if len(inputs) != len(self._images):
            check_inputs(inputs, self._images)
        batch = inputs[0].shape[0] if inputs else 0
        for x, image in zip(inputs, self._images):  # noqa: B905  as many
            if x.dtype is not image.dtype or x.shape != (batch, *image.shape):
                image.check(x)
                raise ShapeError(f"inputs have batches of {batch} and {x.shape[0]}; they must be equal")
            if x.device != self._device:
                raise ShapeError(f"input lies on {x.device}, the packed weights on {self._device}; move one of them")
        return batch


class Image:
    """What one input of a program must be."""

    def __init__(self, spec: TensorSpec) -> None:
        self.dtype = IMAGE_DTYPES[spec.dtype]
        self.shape = torch.Size((spec.channels, spec.height, spec.width))

    def check(self, x: Tensor) -> None:
        """Raises ShapeError; `x` may be a fake of symbolic batch."""
        if x.dtype is not self.dtype:
            raise ShapeError(f"input is {x.dtype}; {dtype_rule(self.dtype)}")
        if x.dim() != 4 or x.shape[1:] != self.shape:
            raise ShapeError(
                f"input has shape {list(x.shape)}; the program was packed for [N, {', '.join(map(str, self.shape))}], "
                "resize the images or pack for this size"
            )


def check_inputs(inputs: list[Tensor], images: list[Image]) -> None:
    """Raises ShapeError for inputs of another number, shape or dtype; they may be fakes."""
    if len(inputs) != len(images):
        raise ShapeError(f"{len(inputs)} inputs; the program was packed for {len(images)}")
    for x, image in zip(inputs, images, strict=True):
        image.check(x)


def dtype_rule(wanted: torch.dtype) -> str:
    """What images a program of this input dtype takes, and the way out for who has others."""
    if wanted is torch.uint8:
        return (
            "the program takes the bytes of images (uint8, 0 to 255) and normalises them itself: give the bytes as "
            "they are, or pack without normalize= for float32"
        )
    return (
        "the program takes normalised float32 images: convert and normalise them as in training, or pack with "
        "normalize=(mean, std) to give bytes"
    )


def dense(x: Tensor) -> Tensor:
    """Images whose memory holds them without gaps, channels first or last; copied only where it does not."""
    if _lazy(x):
        x = x.resolve_neg().clone()
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _lazy(x: Tensor) -> bool:
    """Whether memory does not hold the values as they are: a view that stands for its negative, zeros of no memory."""
    return x.is_neg() or x._is_zerotensor()


def version_of(blob: Tensor) -> int:
    """Counts in-place writes to the blob, so that a runner built before `load_state_dict` is not used after it."""
    return -1 if blob.is_inference() else blob._version


def _build(backend: str, program: Program, blob: Tensor, allow: str) -> Runner:
    if backend == "cpu":
        return CpuRunner(program, blob)
    if backend in ("gpu", "triton"):
        from lbs_kernels.gpu.runner import GpuRunner  # lazily: importing Triton takes a second

        families = ("triton",) if backend == "triton" else (*kernels.exact_families(), *filter(None, [allow]))
        runner: Runner = GpuRunner(program, blob, blob.device, families=families)
        return runner
    return ReferenceRunner(program, blob)


def _check_blob(blob: Tensor) -> None:
    if blob.dtype is not torch.uint8 or blob.dim() != 1 or not blob.is_contiguous():
        raise FormatError(f"blob is {blob.dtype} of shape {list(blob.shape)}; expected contiguous uint8 [bytes]")


def _check_bytes(program: Program, blob: Tensor) -> None:
    host = blob.cpu()
    check_planes(program, host)
    if program.digest:
        actual = blob_digest(host)
        if actual != program.digest:
            raise FormatError(
                f"blob has sha256 {actual[:12]}..., the program was packed with {program.digest[:12]}...; "
                "the weights are damaged or belong to another network"
            )


def _empty_outputs(program: Program, inputs: list[Tensor], trace: dict[int, Tensor] | None) -> list[Tensor]:
    device = inputs[0].device
    if trace is not None:
        trace.update(zip(program.inputs, inputs, strict=True))
        trace.update(empty_tensors(program, 0, device))
    return empty_outputs(program, 0, device)
