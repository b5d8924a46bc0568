"""What a packed network is timed against: the same network in torch, at uniform 8 bits, and in other engines.

Baselines compute in the memory format that suits them best (channels last), on inputs already converted; where the
packed network takes bytes, they are given the normalised floats of the same bytes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization

from lbs.convolutions import plain_kind
from lbs.engines import ENGINES, EngineModels, why_not
from lbs.packing.model import PackedModel
from lbs.packing.packing import pack
from lbs.quant.calibrate import calibrate
from lbs.quant.deployed import undeploy
from lbs.quant.layers import QuantLayer
from lbs.search.prepare import uniform
from lbs.search.replace import carry, layer_arguments, layer_options, replace_layer
from lbs.search.streams import take_quantizers_off
from lbs_kernels.errors import BackendError, CheckpointError, first_line

PACKED = "packed"
UNIFORM8 = "packed uniform 8-bit"
FLOAT32 = "torch float32"
# Name of the option -> name of the row. float32_folded: norms merged into the convolutions, as deployment tools do.
BASELINES = {
    "float32": FLOAT32,
    "float32_folded": "torch float32, norms folded",
    "bfloat16": "torch bfloat16",
    "float16": "torch float16",
    "uniform8": UNIFORM8,
    **ENGINES,
}
DEFAULT_BASELINES = ("float32", "bfloat16", "onnxruntime8", "openvino8", "uniform8")
_CHECKED = 4  # images compared with the reference, which is slow
_ROWS = 64  # images a batch that sets ranges
Call = Callable[[], object]


class Contenders:
    """A packed network and its baselines, ready to be called, asked for classes, and weighed."""

    def __init__(
        self,
        packed: PackedModel,
        model: nn.Module | None,
        baselines: Sequence[str],
        uniform8: PackedModel | None,
        calibration: Tensor | None,
        progress: Callable[[str], None] = lambda step: None,
    ) -> None:
        """
        Args:
            model: the float network, or a quantized one, which is turned into floats again; None: all are missing.
            baselines: keys of BASELINES. uniform8: the network of that row; None: `model` is packed at 8 bits.
            calibration: normalised floats [N, C, H, W] that set the ranges of 8 bits; None: random numbers do.
            progress: is told what is made, as it begins.

        Raises:
            BackendError: a packed network differs from the reference.
        """
        self.packed = packed
        self.missing: dict[str, str] = {}
        self.notes: list[str] = []
        self._progress = progress
        self.model: nn.Module | None = None
        self._networks: dict[str, nn.Module] = {PACKED: packed}
        self._engines: EngineModels | None = None
        self._asked = [name for name in baselines if name in ENGINES]
        own = [name for name in baselines if name not in ENGINES]
        if model is None:
            self.missing.update((BASELINES[name], "no float network was given (model=)") for name in baselines)
        else:
            self.model = float_model(model, self.notes).to(packed.device).eval()
            for name in own:
                progress(f"make {BASELINES[name]}")
                even = name == "uniform8"
                made = (uniform8 or _uniform8(self.model, packed, calibration)) if even else baseline(name, self.model)
                self._networks[BASELINES[name]] = made
            self._engines = self._engines_of(self.model, calibration)
        for network in self._networks.values():
            if isinstance(network, PackedModel):
                _check(network)

    def _engines_of(self, model: nn.Module, calibration: Tensor | None) -> EngineModels | None:
        """The float network for the engines asked for; None where none of them can be timed."""
        for name in self._asked:
            reason = "timed on the CPU only" if self.packed.device.type != "cpu" else why_not(name)
            if reason is not None:
                self.missing[ENGINES[name]] = reason
        if all(ENGINES[name] in self.missing for name in self._asked):
            return None
        return EngineModels(model, self.packed.input_shape, calibration=calibration)

    def calls(self, images: Tensor, threads: int) -> dict[str, Call]:
        """Row name -> a call on `images`, as the packed network takes them. What cannot run them becomes missing."""
        floats = self._floats(images)
        calls = {name: _bound(network, images, floats) for name, network in self._networks.items()}
        for name in self._running():
            found = self._tried(name, len(images), partial(self._engine.call, name, floats, threads))
            if found is not None:
                calls[ENGINES[name]] = found
        return calls

    def classes(self, images: Tensor, batch: int, threads: int) -> dict[str, Tensor]:
        """Row name -> class of every image, int64 [N], in calls of at most `batch`; empty without logits."""
        found: dict[str, list[Tensor]] = {name: [] for name in self._networks}
        for part in images.split(batch):
            floats = self._floats(part)
            for name, network in self._networks.items():
                logits = _bound(network, part, floats)()
                if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
                    return {}
                found[name].append(logits.argmax(1).cpu())
        all_of_them = {name: torch.cat(parts) for name, parts in found.items()}
        floats = self._floats(images)
        for name in self._running():
            logits = self._tried(name, batch, partial(self._engine.outputs, name, floats, batch, threads))
            if logits is not None:
                all_of_them[ENGINES[name]] = logits.argmax(1)
        return all_of_them

    def sizes(self, batch: int) -> dict[str, int]:
        """Row name -> bytes: of the file that is loaded, or of the parameters and buffers of a module of torch."""
        sizes = {name: saved_bytes(network) for name, network in self._networks.items()}
        for name in self._running():
            sizes[ENGINES[name]] = self._engine.file(8 if name.endswith("8") else 32, batch).stat().st_size
        return {name: count for name, count in sizes.items() if count is not None}

    def network(self, name: str) -> nn.Module | None:
        """The network of a row that is one of torch's or packed."""
        return self._networks.get(name)

    @property
    def _engine(self) -> EngineModels:
        assert self._engines is not None
        return self._engines

    def _running(self) -> list[str]:
        return [name for name in self._asked if self._engines is not None and ENGINES[name] not in self.missing]

    def _floats(self, images: Tensor) -> Tensor:
        return self.packed.float_images(images).float()  # what baselines are given, at no cost to them

    def _tried(self, name: str, batch: int, make: Callable[[], Any]) -> Any:
        """What `make` gives; where an engine refuses, it is missing from here on, and None."""
        self._progress(f"{ENGINES[name]}, batch {batch}")
        try:
            with torch.inference_mode(False), torch.no_grad():
                return make()
        except Exception as error:  # noqa: BLE001  whatever a foreign engine raises, the others are still timed
            self.missing[ENGINES[name]] = f"batch {batch}: {type(error).__name__}: {first_line(error)}"
            return None


def float_model(model: nn.Module, notes: list[str]) -> nn.Module:
    """A copy in which quantized layers, and the norms and means around them, are torch's own again."""
    model = copy.deepcopy(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]
    for name, layer in layers:
        plain: Any = plain_kind(layer)(*layer_arguments(layer), **layer_options(layer))
        plain.weight = nn.Parameter(layer.quantized_weight().detach().clone())
        plain.bias = layer.bias
        carry(plain, layer)
        replace_layer(model, name, plain)
    take_quantizers_off(model)
    for module in model.modules():
        undeploy(module)
    if any(layer.kept is not None for _, layer in layers):
        notes.append("the float baselines have only the filters that were kept: the model given is already pruned")
    return model


def baseline(name: str, model: nn.Module) -> nn.Module:
    """A float network in the dtype of a row of torch's."""
    if name == "float32_folded":
        model = optimization.fuse(model)
    dtype = torch.float32 if name.startswith("float32") else getattr(torch, name)
    return copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def _uniform8(model: nn.Module, packed: PackedModel, calibration: Tensor | None) -> PackedModel:
    with torch.inference_mode(False), torch.no_grad():
        images = (
            packed.float_images(packed.random_images(8)).float()
            if calibration is None
            else calibration.to(packed.device).clone()
        )
        pixels = packed.normalize
        normalize = None if pixels is None else (pixels.mean, pixels.std)
        network = calibrate(uniform(model, images[:8], 8, 8), list(images.split(_ROWS))).eval()
        return pack(network, normalize=normalize, verify=False)


def saved_bytes(network: nn.Module) -> int | None:
    """Bytes of a packed network's file, or of a module's parameters and buffers; None for one that has no file."""
    if not isinstance(network, PackedModel):
        return sum(x.numel() * x.element_size() for x in (*network.parameters(), *network.buffers()))
    with tempfile.TemporaryDirectory(prefix="lbs-size-") as folder:
        path = Path(folder) / "packed.lbs.safetensors"
        try:
            network.save(path)
        except CheckpointError:  # a float part that has no form without pickle
            return None
        return path.stat().st_size


def _bound(model: nn.Module, images: Tensor, floats: Tensor) -> Call:
    if isinstance(model, PackedModel):
        return lambda: model(images)
    dtype = next(iter(model.parameters())).dtype
    pixels = floats.dim() == 4
    ready = floats.to(dtype=dtype, memory_format=torch.channels_last if pixels else torch.preserve_format)
    return lambda: model(ready)


def _check(packed: PackedModel) -> None:
    """The network on its back end equals the reference on the first images, bit for bit."""
    images = packed.random_images(_CHECKED)
    output = packed(images)
    expected, _ = packed.run_traced(images, backend="reference")
    for one, other in zip(_flat(output), _flat(expected), strict=True):
        if not torch.equal(one, other):
            raise BackendError(
                f"{packed.name or 'the packed network'} differs from the reference by "
                f"{float((one - other).abs().max())}; a wrong result is not timed, run lbs.verify"
            )


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = list(value.values()) if isinstance(value, dict) else list(value)
    return [tensor for item in items for tensor in _flat(item)]
