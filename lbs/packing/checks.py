"""What cannot be packed at all, refused before anything is built."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lbs.convolutions import TransposedConv2d
from lbs.quant.layers import QuantConv2d, QuantLayer, QuantLinear
from lbs.quant.quantizers import InputQuantizer, StreamQuantizer
from lbs_kernels.errors import GraphError


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Layers of fixed bits by name.

    Raises:
        GraphError: there are none, or the model is still being searched.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    searched = [name for name, layer in layers.items() if not isinstance(layer, QuantConv2d | QuantLinear)]
    if searched:
        raise GraphError(
            f"{searched[0]} and {len(searched) - 1} more layers are still searchable; fix bits and filters first: "
            "lbs.pack(lbs.freeze(model))"
        )
    if not layers:
        raise GraphError(
            f"{type(model).__name__} has no quantized layer, so there is nothing to pack; make it with lbs.prepare and "
            "lbs.freeze, or with lbs.uniform and lbs.calibrate"
        )
    return layers


def check_calibrated(layers: Mapping[str, QuantLayer]) -> None:
    """Refuse a model that was never calibrated nor trained: every range of it is the one it was made with.

    Raises:
        GraphError: names the layers.
    """
    if not all(_as_made(layer) for layer in layers.values()):
        return
    names = ", ".join(list(layers)[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
    raise GraphError(
        f"{names}: the range of weights and activations is 1 in every layer (a step of 1/32 for images), as they were "
        "made; set them from data first: lbs.calibrate(model, batches)"
    )


def _as_made(layer: QuantLayer) -> bool:
    quantizer = layer.quantizer
    made = type(quantizer)()
    untouched = all(
        torch.equal(value, made.state_dict()[key].to(value)) for key, value in quantizer.state_dict().items()
    )
    return untouched and bool((layer.w_range == 1).all())


def check_layer(name: str, layer: QuantLayer) -> None:
    """Refuse weights, ranges and steps that are not finite, and signed activations into zero padding.

    Raises:
        GraphError: names the layer, the value and the rule.
    """
    if not layer.quantize:
        raise GraphError(f"{name} computes in float at present (quantize is False); set it to True, or calibrate again")
    quantizer = layer.quantizer
    tensors: dict[str, Tensor] = {"weight": layer.weight, "w_range": layer.w_range, "output_scale": layer.output_scale}
    if isinstance(layer.bias, Tensor):
        tensors["bias"] = layer.bias
    for key, value in (("w_range", layer.w_range), ("output_scale", layer.output_scale)):
        for number in value.detach().abs().flatten().tolist():
            _check_positive(name, key, number)
    _check_positive(name, "the step of its quantizer", quantizer.step())
    for key, value in tensors.items():
        if not bool(value.detach().isfinite().all()):
            raise GraphError(f"{name}.{key} holds NaN or infinite values; load or train finite ones")
    if isinstance(quantizer, InputQuantizer) and not 0 <= quantizer.zero <= 255:
        raise GraphError(f"{name} has input zero {quantizer.zero}; it is a code, 0 to 255: calibrate again")
    if quantizer.signed and (any(getattr(layer, "padding", (0,))) or isinstance(layer, TransposedConv2d)):
        raise GraphError(
            f"{name} pads signed activations with zeros (padding {getattr(layer, 'padding', None)}), and signed codes "
            "have no zero; put a ReLU before it, or leave it in float (SearchConfig(exclude=...))"
        )


def check_stream(name: str, quantizer: StreamQuantizer) -> None:
    """Refuse a range of a residual stream that is not positive and finite. Raises GraphError."""
    if not quantizer.quantize:
        raise GraphError(f"{name} gives out floats at present (quantize is False); set it to True, or calibrate again")
    _check_positive(name, "the step of its codes", quantizer.value_step())


def _check_positive(name: str, what: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise GraphError(f"{name}: {what} is {value}; it must be positive and finite, calibrate or train it again")
