"""Programs that are loaded, and the `torch.library` operations that run them.

    torch.ops.lbs_kernels.run(Tensor[] inputs, Tensor blob, int handle) -> Tensor[]
    torch.ops.lbs_kernels.run_program(Tensor[] inputs, Tensor blob, str program, str allow='') -> Tensor[]

A handle names a `LoadedProgram` of this process: nothing is copied or compared in a call. The text means the same
program everywhere, so that is what a graph holds that leaves the process (`torch.export`); its programs are kept in a
cache and found without hashing or parsing the text: by the address of the blob, then one comparison of the text. Such a
graph owns nothing but its blob: when another text is read, programs go whose blob nobody but the cache holds any more.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from lbs_kernels import library
from lbs_kernels.errors import FormatError, ShapeError
from lbs_kernels.program.runner import empty_outputs
from lbs_kernels.program.steps import Program
from lbs_kernels.program.text import read_program
from lbs_kernels.run.compiled import CompiledProgram, Image, check_inputs

MAX_TEXTS = 256  # programs of living graphs that hold their text; networks of more than a hundred regions exist
MAX_BUILT = 4  # back ends times devices that one loaded program stays built for

_handles = itertools.count(1)  # never used twice: a graph may outlive its program
_loaded: weakref.WeakValueDictionary[int, LoadedProgram] = weakref.WeakValueDictionary()
_building = threading.Lock()


def _after_fork() -> None:
    """In a child: a thread of the parent may have held the lock."""
    global _building
    _building = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class LoadedProgram:
    """A valid program and what it was built into. It frees both with itself; whoever runs it keeps it.

    handle: names it in graphs of this process. allow: see `CompiledProgram`.
    """

    def __init__(self, program: Program, allow: str = "") -> None:
        self.program = program
        self._allow = allow
        self.images = [Image(program.tensors[index]) for index in program.inputs]
        self.handle = next(_handles)
        self._built: dict[tuple[str, str, torch.device], CompiledProgram] = {}
        self._latest: CompiledProgram | None = None  # of the back end "auto"
        _loaded[self.handle] = self

    @property
    def allow(self) -> str:
        """Inexact kernels it may run."""
        return self._allow

    @allow.setter
    def allow(self, value: str) -> None:
        self._allow, self._latest = value, None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the program; a copy has a handle of its own."""
        return LoadedProgram, (self.program, self._allow)

    @functools.cached_property
    def text(self) -> str:
        """The program's JSON text."""
        return self.program.to_json()

    def run(self, inputs: list[Tensor], blob: Tensor) -> list[Tensor]:
        """Outputs of images on the blob's device, by the back end "auto"."""
        found = self._latest
        if found is None or not found.serves(blob):
            found = self._latest = self.compiled(blob)
        return found.run(inputs)

    def compiled(self, blob: Tensor, backend: str = "auto") -> CompiledProgram:
        """The program on a back end, built on first use and again where the blob has changed.

        Raises:
            FormatError: the blob of another program. BackendError: the back end named cannot serve.
        """
        key = (backend, self._allow, blob.device)
        found = self._built.get(key)
        if found is not None and found.serves(blob):
            return found
        with _building:
            found = self._built.get(key)  # another thread may have built it meanwhile
            if found is None or not found.serves(blob):
                found = CompiledProgram(self.program, blob, backend, self._allow)
                self._built.pop(key, None)
                _keep(self._built, key, found, MAX_BUILT)
        return found

    def forget(self) -> None:
        """Free what was built; the next call builds it again."""
        self._latest = None
        self._built.clear()


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
    loaded, kept = loaded_text(text, blob)
    return loaded.compiled(kept, backend).run(inputs, trace, threads=threads)


_texts: dict[tuple[int, torch.device, int, str], tuple[LoadedProgram, Tensor]] = {}


def loaded_text(text: str, blob: Tensor, allow: str = "") -> tuple[LoadedProgram, Tensor]:
    """The program of a text, read on first use and kept while its blob lives; and the blob as the cache holds it.

    That is a tensor of its own on the same memory, so that what else holds the memory can be counted.
    """
    key = (blob.data_ptr(), blob.device, len(text), allow)
    found = _texts.get(key)
    if found is not None and found[0].text == text:
        return found
    program = read_program(text, blob.numel() if blob.dtype is torch.uint8 else None)
    with _building:
        found = _texts.get(key)  # another thread may have read it meanwhile
        if found is not None and found[0].text == text:
            return found
        _drop_ownerless()
        made = LoadedProgram(program, allow)
        made.__dict__["text"] = text  # as given: it may leave out what has a default
        _texts.pop(key, None)
        kept = made, blob.detach()
        _keep(_texts, key, kept, MAX_TEXTS)
    return kept


def _drop_ownerless() -> None:
    """Forget programs whose blob lies in memory that only the cache holds: their graphs are gone."""
    holders = torch._C._storage_Use_Count
    lonely = torch.empty(1, dtype=torch.uint8, device="cpu")  # who asks for a storage holds it too, in some releases
    asking = holders(_storage(lonely)) - 1
    ours = Counter(_storage(blob) for _, blob in _texts.values())
    for key, (_, blob) in list(_texts.items()):
        if holders(_storage(blob)) - asking <= ours[_storage(blob)]:
            del _texts[key]


def _storage(blob: Tensor) -> int:
    """Names the memory a tensor lies in, while it lives."""
    return blob.untyped_storage()._cdata


def clear_runners() -> None:
    """Free what every program was built into; the next call chooses kernels anew."""
    with _building:
        _texts.clear()
        for reference in _loaded.valuerefs():  # a list: other threads may load programs meanwhile
            if (loaded := reference()) is not None:
                loaded.forget()


def _keep(cache: dict[Any, Any], key: Any, value: Any, limit: int) -> None:
    while len(cache) >= limit:
        cache.pop(next(iter(cache)))
    cache[key] = value


_written: dict[int, tuple[weakref.ref[Program], str]] = {}


def program_text(program: Program) -> str:
    """`program.to_json()`, written once per program object."""
    key = id(program)
    found = _written.get(key)
    if found is not None and found[0]() is program:
        return found[1]
    text = program.to_json()
    _written[key] = (weakref.ref(program, lambda _: _written.pop(key, None)), text)
    return text


def _of_handle(handle: int) -> LoadedProgram:
    found = _loaded.get(handle)
    if found is None:
        raise FormatError(
            f"handle {handle} names no program that is loaded in this process; keep the packed network that the graph "
            "was made of, or take torch.export, whose graphs hold their programs"
        )
    return found


def _run(inputs: list[Tensor], blob: Tensor, handle: int) -> list[Tensor]:
    return _of_handle(handle).run(inputs, blob)


def _run_fake(inputs: list[Tensor], blob: Tensor, handle: int) -> list[Tensor]:
    return _fake_outputs(_of_handle(handle), inputs)


def _run_text(inputs: list[Tensor], blob: Tensor, program: str, allow: str = "") -> list[Tensor]:
    loaded, kept = loaded_text(program, blob, allow)
    return loaded.run(inputs, kept)


def _run_text_fake(inputs: list[Tensor], blob: Tensor, program: str, allow: str = "") -> list[Tensor]:
    return _fake_outputs(_parsed(program), inputs)


@functools.lru_cache(maxsize=16)
def _parsed(text: str) -> LoadedProgram:
    return LoadedProgram(read_program(text))


def _fake_outputs(loaded: LoadedProgram, inputs: list[Tensor]) -> list[Tensor]:
    check_inputs(inputs, loaded.images)
    return empty_outputs(loaded.program, inputs[0].shape[0], inputs[0].device)


library.define("run(Tensor[] inputs, Tensor blob, int handle) -> Tensor[]", _run, _run_fake)
library.define(
    "run_program(Tensor[] inputs, Tensor blob, str program, str allow='') -> Tensor[]", _run_text, _run_text_fake
)
