"""Run a program: checks, the cache of compiled runners, and the `torch.library` op that graphs see.

    torch.ops.lbs_kernels.run_program(Tensor[] inputs, Tensor blob, str program, str allow='') -> Tensor[]

A runner is built once per (program, blob, back end) and found again without hashing or parsing the text: by the
address of the blob, then one comparison of the text.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor

from lbs_kernels import library
from lbs_kernels.errors import BackendError, FormatError, ShapeError
from lbs_kernels.gpu import kernels
from lbs_kernels.program.checks import check_planes
from lbs_kernels.program.steps import IMAGE_DTYPES, STREAM_DTYPES, Program, TensorSpec, blob_digest
from lbs_kernels.program.text import read_program
from lbs_kernels.run import backends
from lbs_kernels.run.cpu import CpuRunner
from lbs_kernels.run.reference import ReferenceRunner

MAX_RUNNERS = 64


class Runner(Protocol):
    """What a back end gives: called with checked, dense images of a batch that is not empty."""

    def run(self, inputs: list[Tensor], trace: dict[int, Tensor] | None = None) -> list[Tensor]: ...


class CompiledProgram:
    """A program on one back end, ready to run. `fallback`: why "auto" did not take its first choice, or empty."""

    def __init__(self, text: str, blob: Tensor, backend: str = "auto", allow: str = "") -> None:
        """
        Args:
            text: JSON text of the program.
            blob: uint8 on the device that shall run it; kept, and not to be written to.
            backend: "auto", "reference", "cpu", "gpu" or "triton".
            allow: inexact kernels the gpu back end may take where they were measured faster ("fp16"); none if empty.

        Raises:
            FormatError: a damaged program, or the blob of another one.
            BackendError: the back end named cannot serve.
        """
        self.text = text
        self.blob = blob
        self.version = _version(blob)
        _check_blob(blob)
        self.program = read_program(text, blob.numel())
        _check_bytes(self.program, blob)
        self.fallback = ""
        self.backend = backends.resolve(backend, blob.device.type)
        try:
            self.runner = _build(self.backend, self.program, text, blob, allow)
        except BackendError as error:
            if backend != "auto":
                raise
            self.fallback = f"{self.backend}: {error}"
            self.backend = "reference"
            self.runner = ReferenceRunner(self.program, blob)
        self._inputs = [_Image(self.program.tensors[index]) for index in self.program.inputs]
        self._device = blob.device

    def run(
        self, inputs: list[Tensor], threads: int | None = None, trace: dict[int, Tensor] | None = None
    ) -> list[Tensor]:
        """Outputs of images; see `run_program`."""
        batch = self._check(inputs)
        ready = [dense(x) for x in inputs]
        if batch == 0:
            return _empty_outputs(self.program, ready, trace)
        if isinstance(self.runner, CpuRunner):
            return self.runner.run(ready, trace, threads)
        return self.runner.run(ready, trace)

    def _check(self, inputs: list[Tensor]) -> int:
        """The batch size. Raises ShapeError for images of another number, shape, dtype, device or batch."""
        if len(inputs) != len(self._inputs):
            raise ShapeError(f"{len(inputs)} inputs; the program was packed for {len(self._inputs)}")
        for x, image in zip(inputs, self._inputs, strict=True):
            image.check(x)
            if x.device != self._device:
                raise ShapeError(f"input lies on {x.device}, the packed weights on {self._device}; move one of them")
            if x.shape[0] != inputs[0].shape[0]:
                raise ShapeError(f"inputs have batches of {inputs[0].shape[0]} and {x.shape[0]}; they must be equal")
        return inputs[0].shape[0] if inputs else 0


class _Image:
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
    """Images whose memory is without gaps, channels first or last; copied only where it is neither."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def run_program(
    program: Program | str,
    blob: Tensor,
    inputs: list[Tensor],
    backend: str = "auto",
    threads: int | None = None,
    trace: dict[int, Tensor] | None = None,
) -> list[Tensor]:
    """Run a packed region.

    Args:
        program: the program, or its JSON text.
        blob: uint8, the program's arrays, on the device that shall run it.
        inputs: images [N, C, H, W] on the blob's device, float32 or uint8 as the program says; N may be 0. Channels may
            lie first or last in memory; other strides are copied.
        backend: "reference" (torch, anywhere), "cpu" (native), "gpu" (the best kernel for each step; or
            Triton's interpreter), "triton" (its kernels alone), or "auto".
        threads: of the native back end; torch's number unless given.
        trace: receives every tensor by index: images as given, codes uint8 [N, H, W, C], streams in the stream dtype.

    Returns:
        The program's outputs, float32 [N, C, H, W], or [N, C] where flat.

    Raises:
        ShapeError: inputs of another number, shape, dtype, device or batch.
        FormatError: a program that breaks the format, or a blob that is not its own.
        BackendError: the back end named is missing here.
    """
    text = program if isinstance(program, str) else program_text(program)
    if threads is not None and threads < 1:
        raise ShapeError(f"threads = {threads}; at least one is needed")
    return compiled(text, blob, backend).run(inputs, threads, trace)


_runners: dict[tuple[int, torch.device, str, int], CompiledProgram] = {}
_runners_lock = threading.Lock()


def compiled(text: str, blob: Tensor, backend: str = "auto", allow: str = "") -> CompiledProgram:
    """The cached `CompiledProgram`, built on first use."""
    # The cached runner keeps its blob alive, so an address cannot come to mean another blob while it is a key.
    key = (blob.data_ptr(), blob.device, f"{backend} {allow}", len(text))
    found = _cached(key, text, blob)
    if found is not None:
        return found
    with _runners_lock:
        found = _cached(key, text, blob)  # another thread may have built it meanwhile
        if found is not None:
            return found
        made = CompiledProgram(text, blob, backend, allow)
        _runners.pop(key, None)
        while len(_runners) >= MAX_RUNNERS:
            _runners.pop(next(iter(_runners)))
        _runners[key] = made
    return made


def _cached(key: tuple[int, torch.device, str, int], text: str, blob: Tensor) -> CompiledProgram | None:
    found = _runners.get(key)
    return found if found is not None and found.text == text and found.version == _version(blob) else None


def clear_runners() -> None:
    """Forget every compiled runner and the blobs they hold."""
    with _runners_lock:
        _runners.clear()


_texts: dict[int, tuple[weakref.ref[Program], str]] = {}


def program_text(program: Program) -> str:
    """`program.to_json()`, written once per program object."""
    key = id(program)
    found = _texts.get(key)
    if found is not None and found[0]() is program:
        return found[1]
    text = program.to_json()
    _texts[key] = (weakref.ref(program, lambda _: _texts.pop(key, None)), text)
    return text


def _version(blob: Tensor) -> int:
    """Counts in-place writes to the blob, so that a runner built before `load_state_dict` is not used after it."""
    return -1 if blob.is_inference() else blob._version


def _build(backend: str, program: Program, text: str, blob: Tensor, allow: str) -> Runner:
    if backend == "cpu":
        return CpuRunner(program, blob, text)
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
    if trace is not None:
        device = inputs[0].device
        trace.update(zip(program.inputs, inputs, strict=True))
        for index, spec in enumerate(program.tensors):
            if spec.form != "image":
                dtype = torch.uint8 if spec.form == "codes" else STREAM_DTYPES[program.stream_dtype]
                trace[index] = torch.empty((0, spec.height, spec.width, spec.channels), dtype=dtype, device=device)
    return _fake_outputs(program, inputs)


def _fake_outputs(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    batch = inputs[0].shape[0]
    outputs = []
    for index in program.outputs:
        spec = program.tensors[index]
        shape = (batch, spec.channels) if spec.flat else (batch, spec.channels, spec.height, spec.width)
        outputs.append(inputs[0].new_empty(shape, dtype=torch.float32))
    return outputs


@functools.lru_cache(maxsize=16)
def _parsed(text: str) -> Program:
    return read_program(text)


def _op(inputs: list[Tensor], blob: Tensor, program: str, allow: str = "") -> list[Tensor]:
    return compiled(program, blob, allow=allow).run(inputs)


def _op_fake(inputs: list[Tensor], blob: Tensor, program: str, allow: str = "") -> list[Tensor]:
    parsed = _parsed(program)
    if len(inputs) != len(parsed.inputs):
        raise ShapeError(f"{len(inputs)} inputs; the program was packed for {len(parsed.inputs)}")
    for x, index in zip(inputs, parsed.inputs, strict=True):
        _Image(parsed.tensors[index]).check(x)
    return _fake_outputs(parsed, inputs)


library.define("run_program(Tensor[] inputs, Tensor blob, str program, str allow='') -> Tensor[]", _op, _op_fake)
