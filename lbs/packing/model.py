"""PackedModel: a packed network as a module."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _global_forward_hooks as _all_forward_hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _all_forward_pre_hooks

from lbs.packing.captured import CapturedModel
from lbs.packing.pixels import Normalization
from lbs.packing.region import PackedRegion
from lbs.packing.serial import PackedParts, write
from lbs.plan import Plan
from lbs_kernels.errors import BackendError, GraphError, LbsError, ShapeError, first_line
from lbs_kernels.gpu.kernels import check_fallback
from lbs_kernels.library import unwatched
from lbs_kernels.program.steps import Program
from lbs_kernels.run.compiled import dtype_rule


class PackedModel(nn.Module):
    """A packed network: images [N, C, H, W], or lines [N, C, L], in, what the model returns out.

    Images are normalised float32, or bytes (uint8) where the network was packed with `normalize`. Channels may lie
    first or last in memory; both are read without a copy. A pixel that is NaN counts as the lowest value that a packed
    layer tells apart: no NaN comes out, and none is reported. No gradient passes a packed layer: an input that requires
    one is computed like any other and gets none, with a warning of torch's.

    `body` is a torch.fx GraphModule in which every region of packed layers is one call. `kept_float` lists what was
    not packed, each with its reason. `plan` holds the bits and kept filters it was made from, if there was a record.
    `report` is what `lbs.quantize` says of it; it is not saved.
    """

    report: Any = None

    def __init__(
        self,
        graph: fx.GraphModule,
        *,
        input_shape: tuple[int, ...],
        kept_float: tuple[tuple[str, str], ...] = (),
        plan: Plan | None = None,
        name: str = "",
        normalize: Normalization | None = None,
    ) -> None:
        """
        Args:
            graph: as `outer_graph` builds it.
            input_shape: of one image, [C, H, W], or line, [C, L].
            normalize: what the programs do to bytes; None: they take floats.
        """
        super().__init__()
        self.body = graph  # not "graph": an exported GraphModule has an attribute of that name
        self.input_shape = tuple(input_shape)
        self.kept_float = kept_float
        self.plan = plan
        self.name = name
        self.normalize = normalize
        # Regions take images: rows [N, C] come to them through `PackedRegion.forward`.
        self._whole = whole_region(graph) if len(input_shape) == 3 else None
        self.requires_grad_(False).eval()

    @property
    def regions(self) -> list[PackedRegion]:
        """The packed regions in execution order."""
        found = {name: m for name, m in self.body.named_children() if isinstance(m, PackedRegion)}
        return [found[f"region{index}"] for index in range(len(found))]

    @property
    def programs(self) -> list[Program]:
        """The regions' programs."""
        return [region.program for region in self.regions]

    @property
    def device(self) -> torch.device:
        """Where the packed weights lie."""
        blob: Tensor = self.body.region0.blob  # type: ignore[assignment,union-attr]
        return blob.device

    @property
    def fallback(self) -> str | None:
        """Inexact kernels the model may use on a GPU: None, or "fp16"; see `lbs.load`."""
        return self.regions[0].loaded.allow or None

    @fallback.setter
    def fallback(self, value: str | None) -> None:
        check_fallback(value)
        for region in self.regions:
            region.loaded.allow = value or ""

    def train(self, mode: bool = True) -> PackedModel:
        """Nothing is trained any more: float parts stay in evaluation mode too."""
        return super().train(False)

    @property
    def input_dtype(self) -> torch.dtype:
        """Of the images: torch.float32, or torch.uint8 where `normalize` is set."""
        return torch.float32 if self.normalize is None else torch.uint8

    def float_images(self, x: Tensor) -> Tensor:
        """What the network was trained on, for images `x` of this model: float32 as given, or float64 of bytes."""
        return x if self.normalize is None else self.normalize.values(x)

    def random_images(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Images of the model's shape and dtype on its device: any bytes, or normal floats."""
        shape = (batch, *self.input_shape)
        if self.normalize is not None:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu").to(self.device)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(self.device)

    @property
    def packed_bytes(self) -> int:
        """Bytes of planes, multipliers and biases of all regions."""
        return sum(region.blob.numel() for region in self.regions)

    def forward(self, x: Tensor) -> Any:
        """What the model computes, in evaluation mode. An empty batch gives empty outputs.

        Raises:
            ShapeError: another rank, channel count, size, dtype or device than the model was packed for.
            GraphError: what stays in float fails on these images, as an operation of a file may: by their values, or by
                an argument that only the processor's kernel refuses.
        """
        if self._whole is not None and unwatched(x):
            body, name, place = self._whole
            region: Any = body._modules[name]
            # Of a copy made by torch.nn.DataParallel it is still the body of the original; hooks are run by the body.
            if body is self._modules["body"] and not (hooked(body) or hooked(region)):
                try:
                    outputs: list[Tensor] = region.run([x])
                    return outputs[place]
                except ShapeError:
                    self.check_input(x)  # in words of the model
                    raise
        self.check_input(x)
        if torch.compiler.is_compiling():
            return self.body(x)
        with self._told():
            return self.body(x)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of torch as one of the family; what hooks of the user raise, and want of memory, stay as they are."""
        try:
            yield
        except (LbsError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if any(map(hooked, self.body.modules())):
                raise
            raise GraphError(
                f"{self.name or 'the packed network'} fails in its float parts ({type(error).__name__}: "
                f"{first_line(error)}); give it other images, or pack the network again"
            ) from error

    def check_input(self, x: Tensor) -> None:
        """Raises ShapeError where `x` is no batch the model was packed for."""
        if not isinstance(x, Tensor):
            raise ShapeError(
                f"input is a {type(x).__name__}; {dtype_rule(self.input_dtype)}, as a tensor: see torch.as_tensor"
            )
        if x.dim() != len(self.input_shape) + 1 or tuple(x.shape[1:]) != self.input_shape:
            wanted = ", ".join(str(size) for size in self.input_shape)
            raise ShapeError(
                f"input has shape {list(x.shape)}; the model was packed for [N, {wanted}]: give a batch of such "
                "images, or pack the model for this size (lbs.pack(model, example=...))"
            )
        if x.dtype != self.input_dtype:
            raise ShapeError(f"input is {x.dtype}; {dtype_rule(self.input_dtype)}")
        if x.device != self.device:
            raise ShapeError(f"input lies on {x.device}, the packed model on {self.device}; move one with .to(...)")

    def run_traced(self, x: Tensor, backend: str = "auto") -> tuple[Any, list[dict[int, Tensor]]]:
        """Output, and for each region all tensors of its program by number (see `PackedRegion.run_traced`)."""
        self.check_input(x)
        walk = _Tracing(self.body, backend)
        with torch.no_grad(), self._told():
            output = walk.run(x)
        return output, [walk.traces[f"region{index}"] for index in range(len(walk.traces))]

    def inexact_layers(self, batch: int, backend: str = "auto") -> frozenset[str]:
        """Layers that run in half precision at this batch size; none unless `fallback` allows it."""
        if not self.fallback or batch == 0:
            return frozenset()
        found: set[str] = set()
        for region in self.regions:
            pairs = zip(region.program.steps, region.compiled(backend).runner.kernels(batch), strict=True)
            found.update(step.name for step, kernel in pairs if not kernel.exact)
        return frozenset(found)

    def capture(self, *examples: Tensor, clone: bool = False) -> CapturedModel:
        """Record the model as CUDA graphs, one for the batch size of each example; see `CapturedModel`.

        Args:
            examples: images [N, C, H, W] on the model's GPU, of its dtype; their values do not matter.
            clone: return copies of the outputs instead of the graph's own memory, which the next call overwrites.

        Raises:
            BackendError: a model on the processor. ShapeError: no example, or no batch the model was packed for.

        Example:
            captured = packed.capture(images[:1], images[:32])
            logits = captured(images[:32])
        """
        return CapturedModel(self, examples, clone)

    def save(self, path: str | Path) -> None:
        """Write one file that `lbs.load` reads.

        Raises:
            CheckpointError: a float part that has no form without pickle, or a disk that is full; an old file stays.
        """
        parts = PackedParts(self.body, self.input_shape, self.kept_float, self.plan, self.name, self.normalize)
        write(Path(path), parts)

    def to_onnx(self, path: str | Path, exact: bool = True) -> tuple[str, ...]:
        """Write the network as an ONNX file that ONNX Runtime and OpenVINO read: opset 21, any number of images.

        Weights are integers of 4, 8 or 16 bits, whichever is the narrowest that holds them, activations uint8, pruned
        filters are absent; parts in float are ordinary nodes. Input `images`, as this model takes them (docs/onnx.md).

        Args:
            path: of the file; an old one is replaced when the new one is whole.
            exact: what follows an integer sum is computed in float64 and rounded once, so that an engine with float64
                finds the packed network's codes. Engines without it want False: codes on a rounding boundary may then
                come out one beside it, which some networks (MobileNetV2) spread over all that follows.

        Returns:
            What has no exact form: weights stored wider than they are, operations whose last bits are the engine's.

        Raises:
            GraphError: a part without a form in ONNX. CheckpointError: a network above 2 GB, or a place that cannot be
                written. BackendError: the package `onnx`, or for parts in float `onnxscript`, is not installed.

        Example:
            packed.to_onnx("network.onnx")
        """
        try:
            from lbs.onnx.export import Parts, write
        except ImportError as error:
            raise BackendError(f"to_onnx: {error}; install what writes ONNX: pip install onnx onnxscript") from error
        found = {f"region{index}": region for index, region in enumerate(self.regions)}
        parts = Parts(
            self.name,
            self.body,
            {name: region.program for name, region in found.items()},
            {name: region.blob for name, region in found.items()},
            self.kept_float,
            None if self._whole is None else self._whole[2],
        )
        return write(Path(path), parts, self.random_images(2), exact)

    def extra_repr(self) -> str:
        layers = sum(hasattr(step, "w_bits") for program in self.programs for step in program.steps)
        images = f"{str(self.input_dtype).removeprefix('torch.')} {self.input_shape}"
        return f"{self.name or 'network'}: {layers} packed layers, {self.packed_bytes} bytes, input {images}"


def need_packed(value: object, caller: str) -> None:
    """Raises GraphError where `value` is no packed network."""
    if not isinstance(value, PackedModel):
        raise GraphError(
            f"{caller} got a {type(value).__name__}; it looks at a packed network: lbs.pack(model) makes one, "
            "lbs.load(path) reads one"
        )


def hooked(module: nn.Module) -> bool:
    """Whether a hook wants to see the module called; those of all modules count too."""
    return bool(module._forward_hooks or module._forward_pre_hooks or _all_forward_hooks or _all_forward_pre_hooks)


def whole_region(graph: fx.GraphModule) -> tuple[fx.GraphModule, str, int] | None:
    """The name of the one region that the network consists of, and which of its outputs the network returns.

    The graph itself comes first; None for a network that consists of more.
    """
    match list(graph.graph.nodes):
        case [image, call, item, output] if (
            call.op == "call_module"
            and call.args == (image,)
            and item.target is operator.getitem
            and item.args[:1] == (call,)
            and type(item.args[1]) is int
            and output.args == (item,)
        ):
            whole = isinstance(graph.get_submodule(call.target), PackedRegion)
            return (graph, call.target, item.args[1]) if whole else None
    return None


class _Tracing(fx.Interpreter):
    """Runs the outer graph and keeps every tensor of every region."""

    def __init__(self, graph: fx.GraphModule, backend: str) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # torch.fx would add its own to the message
        self.backend = backend
        self.traces: dict[str, dict[int, Tensor]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        region = self.fetch_attr(target)
        if not isinstance(region, PackedRegion):
            return super().call_module(target, args, kwargs)
        outputs, self.traces[target] = region.run_traced(args, self.backend)
        return outputs
