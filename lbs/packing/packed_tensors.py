"""What a packed model computed, by the names of the layers and nodes it came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lbs.packing.transposed import PART, Part
from lbs_kernels.errors import GraphError
from lbs_kernels.program.planes import unpack_weights
from lbs_kernels.program.steps import ConvStep, LinearStep, Program


class PackedTensors:
    """Tensors of one traced run of all regions, in the shapes of the float model.

    steps: of the packed layers by their names, of a transposed convolution its parts. streams: node -> where its floats
    are stored. codes: layer (`.input`) or node of a stream -> where its codes are. images: node -> what float modules
    gave to a region.
    """

    def __init__(
        self, programs: Sequence[Program], blobs: Sequence[Tensor], traces: Sequence[dict[int, Tensor]]
    ) -> None:
        self._programs, self._blobs, self._traces = programs, blobs, traces
        self.steps: dict[str, list[tuple[int, ConvStep | LinearStep]]] = {}
        self.inexact: frozenset[str] = frozenset()  # layers that ran in half precision
        self.streams: dict[str, list[tuple[int, int]]] = {}
        self.codes: dict[str, tuple[int, int]] = {}
        self.images: dict[str, Tensor] = {}
        self._writers: list[dict[int, str]] = []
        for region, program in enumerate(programs):
            writers: dict[int, str] = {}
            for step in program.steps:
                if isinstance(step, ConvStep | LinearStep):
                    self.steps.setdefault(step.name.partition(PART)[0], []).append((region, step))
                writers.update((consumer.tensor, step.name) for consumer in step.emit.consumers)
                if step.emit.stream is not None:
                    writers[step.emit.stream] = step.name
            self._writers.append(writers)
            for index, spec in enumerate(program.tensors):
                if spec.form == "stream":
                    self.streams.setdefault(spec.name, []).append((region, index))
                elif spec.form == "codes":
                    self.codes[spec.name] = (region, index)
                elif spec.form == "image" and spec.name not in self.streams:  # else an earlier region's result
                    self.images[spec.name] = traces[region][index]

    def input_codes(self, name: str, shape: torch.Size) -> Tensor:
        """float64 codes that the layer `name` read, as `shape` [N, C, H, W], [N, C] or flattened."""
        region, step = self.steps[name][0]
        return _logical(self._traces[region][step.input], shape, name).double()

    def coded(self, name: str, shape: torch.Size) -> tuple[Tensor, str]:
        """float64 codes of the stream `name`, as `shape`, and the step that wrote them."""
        region, index = self.codes[name]
        return _logical(self._traces[region][index], shape, name).double(), self._writers[region][index]

    def writer_of_input(self, name: str) -> str:
        """Name of the step that wrote the codes the layer `name` read."""
        region, step = self.steps[name][0]
        return self._writers[region][step.input]

    def weight_codes(self, name: str, shape: torch.Size) -> Tensor:
        """uint8 codes in the planes of the layer `name`, as `shape` [O, C, kh, kw] or [O, C]."""
        return _logical(self._codes(*self.steps[name][0]), shape, name)

    def transposed_codes(self, name: str, codes: Tensor, parts: Sequence[Part]) -> Tensor:
        """The same of a transposed convolution, whose weights its parts hold between them; `codes` where none does, as
        no output sees that tap.
        """
        found = codes.cpu().clone()
        for part, (region, step) in zip(parts, self.steps[name], strict=True):
            part.put(self._codes(region, step).permute(0, 3, 1, 2).cpu(), found)
        return found

    def _codes(self, region: int, step: ConvStep | LinearStep) -> Tensor:
        """uint8 [F, kh, kw, C]."""
        source = self._programs[region].tensors[step.input]
        groups = step.groups if isinstance(step, ConvStep) else 1
        planes = self._programs[region].array(self._blobs[region], step.planes)
        codes = unpack_weights(planes, source.channels // groups)
        kernel = step.kernel if isinstance(step, ConvStep) else (1, 1)
        return codes.reshape(codes.shape[0], *kernel, codes.shape[2])

    def stored(self, name: str, shape: torch.Size) -> list[tuple[Tensor, str, str]]:
        """Every stream of the node `name`: float64 as `shape`, the step that wrote it, and its dtype's name."""
        return [
            (
                _logical(self._traces[region][index], shape, name).double(),
                self._writers[region][index],
                self._programs[region].stream_dtype,
            )
            for region, index in self.streams[name]
        ]


def _logical(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    """[N, H, W, C] as [N, C, H, W], or flattened from it."""
    moved = tensor.permute(0, 3, 1, 2)
    if moved.numel() != shape.numel() or (len(shape) == 4 and moved.shape != shape):
        raise GraphError(
            f"{name}: the packed model holds {list(moved.shape)}, the model {list(shape)}; verify a packed model "
            "against the model it was made from"
        )
    return moved.reshape(shape)
