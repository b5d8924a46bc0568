"""Evaluation in the arithmetic of the packed network: norms, means and activations round where its epilogue rounds.

    layer, norms behind it   y = fma(float32(acc), M[c], B[c])      M, B float32, rounded once from float64
    norm of floats           u = fma(x, G[c], H[c])
    mean, of a window too    float32 sums over pixels in row-major order
    bilinear interpolation   columns, then rows, by two float32 weights each
    activation               the float32 formula of the format

A module that stands alone cannot do that for a norm behind a layer: the layer's output is rounded before the norm sees
it. So the output of a layer carries what it was computed from (`Affine`), and a norm that nothing but follows goes back
to it. Training, float64, and networks that are still searched compute as torch does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lbs.quant import fold
from lbs.quant.activations import function_of
from lbs.quant.frozen_norm import FrozenNorm
from lbs_kernels.program.epilogue import fma_channels
from lbs_kernels.program.operations import average_pool, mean_pool, resize
from lbs_kernels.program.window import Window


@dataclass(frozen=True)
class Affine:
    """scale * source + shift, not rounded yet.

    source: [N, C, H, W] or [..., C], integers of at most the magnitude `bound`, or float32 numbers (None). scale,
    shift: float64, one number per channel, broadcastable.
    """

    source: Tensor
    bound: int | None
    scale: Tensor
    shift: Tensor

    def behind(self, gain: Tensor, offset: Tensor) -> Affine:
        """The same followed by a norm."""
        scale, shift = fold.behind(self.scale, self.shift, gain, offset)
        return replace(self, scale=scale, shift=shift)

    def value(self) -> Tensor:
        """Its float32 values, as the packed epilogue rounds them; norms find their way back through them."""
        y = fma_channels(self.source, self.scale.float(), self.shift.float(), self.bound)
        y.lbs_affine = self  # type: ignore[attr-defined]
        return y


class DeployedNorm(nn.BatchNorm2d):
    """A norm of a frozen network. `folds`: it follows a layer (or such a norm) directly, and alone."""

    folds: bool

    def forward(self, input: Tensor) -> Tensor:
        if not _deployed(self, input) or self.running_mean is None:
            return super().forward(input)
        self._check_input_dim(input)
        gain, offset = (part.view(-1, 1, 1) for part in fold.affine(self))
        before = getattr(input, "lbs_affine", None) if self.folds else None
        found = before.behind(gain, offset) if before is not None else Affine(input, None, gain, offset)
        return found.value()


class DeployedFrozenNorm(FrozenNorm, DeployedNorm):
    """The same of a norm that was frozen before."""


class DeployedMean(nn.AdaptiveAvgPool2d):
    """A mean of a frozen network; over all pixels it adds them in the order of the format."""

    def forward(self, input: Tensor) -> Tensor:
        if not _deployed(self, input) or input.dim() != 4 or self.output_size not in (1, (1, 1)):
            return super().forward(input)
        return _global_mean(input)


class DeployedWindow(nn.AvgPool2d):
    """The same of a mean over windows of equal numbers of taps."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride, padding = map(_pair, (self.kernel_size, self.stride, self.padding))
        spans = zip(input.shape[-2:], kernel, stride, padding, strict=True)
        partial = self.ceil_mode and any((size + 2 * pad - k) % step for size, k, step, pad in spans)
        counted = self.divisor_override is None and (self.count_include_pad or padding == (0, 0))
        if not _deployed(self, input) or input.dim() != 4 or partial or not counted:
            return super().forward(input)
        return average_pool(input.permute(0, 2, 3, 1), Window(kernel, stride, padding)).permute(0, 3, 1, 2)


class DeployedUpsample(nn.Upsample):
    """Upsampling of a frozen network; bilinear, it goes by the weights and in the order of the format."""

    def forward(self, input: Tensor) -> Tensor:
        if not _deployed(self, input) or input.dim() != 4 or self.mode != "bilinear":
            return super().forward(input)
        _, _, *size = super().forward(input[:1, :1]).shape
        follows = self.size is None and not self.recompute_scale_factor  # positions follow the factor
        factors = _factors(self.scale_factor if follows else None)
        sides = zip(input.shape[2:], size, factors, strict=True)
        (down, top), (across, left) = (positions(*side, bool(self.align_corners)) for side in sides)
        return resize(input.permute(0, 2, 3, 1), (size[0], size[1]), (down, across), (top, left)).permute(0, 3, 1, 2)


class DeployedUpsamplingBilinear2d(DeployedUpsample, nn.UpsamplingBilinear2d): ...


def positions(size: int, count: int, factor: float | None, align: bool) -> tuple[float, float]:
    """(scale, offset): `count` pixels made of `size` by bilinear interpolation lie at i * scale + offset among these.

    factor: as it was given, where positions follow it and not the sizes, which it need not divide.
    """
    if align:
        return ((size - 1) / (count - 1) if min(size, count) > 1 else 1.0), 0.0
    scale = size / count if factor is None else 1.0 / factor
    return scale, scale / 2 - 0.5


class _DeployedActivation(nn.Module):
    """An activation of a frozen network: the other base of a class that torch's own is the second base of."""

    def forward(self, input: Tensor) -> Tensor:
        if not _deployed(self, input):
            result: Tensor = super().forward(input)
            return result
        return function_of(self)(input)


class DeployedELU(_DeployedActivation, nn.ELU): ...


class DeployedGELU(_DeployedActivation, nn.GELU): ...


class DeployedHardsigmoid(_DeployedActivation, nn.Hardsigmoid): ...


class DeployedHardswish(_DeployedActivation, nn.Hardswish): ...


class DeployedLeakyReLU(_DeployedActivation, nn.LeakyReLU): ...


class DeployedMish(_DeployedActivation, nn.Mish): ...


class DeployedPReLU(_DeployedActivation, nn.PReLU): ...


class DeployedSigmoid(_DeployedActivation, nn.Sigmoid): ...


class DeployedSiLU(_DeployedActivation, nn.SiLU): ...


class DeployedTanh(_DeployedActivation, nn.Tanh): ...


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: DeployedNorm,
    FrozenNorm: DeployedFrozenNorm,
    nn.AdaptiveAvgPool2d: DeployedMean,
    nn.AvgPool2d: DeployedWindow,
    nn.Upsample: DeployedUpsample,
    nn.UpsamplingBilinear2d: DeployedUpsamplingBilinear2d,
    nn.ELU: DeployedELU,
    nn.GELU: DeployedGELU,
    nn.Hardsigmoid: DeployedHardsigmoid,
    nn.Hardswish: DeployedHardswish,
    nn.LeakyReLU: DeployedLeakyReLU,
    nn.Mish: DeployedMish,
    nn.PReLU: DeployedPReLU,
    nn.Sigmoid: DeployedSigmoid,
    nn.SiLU: DeployedSiLU,
    nn.Tanh: DeployedTanh,
}


def deploy(model: nn.Module, folding: Collection[str]) -> None:
    """Make norms, means, upsampling and activations of a quantized model, in place, compute as packed in evaluation.

    State, hooks and whatever refers to the modules stay. Classes derived from torch's keep a forward of their own.

    Arguments:
        folding: norms that follow a layer directly and alone (`ModelGraph.folding`).
    """
    for name, module in model.named_modules():
        if type(module) in _KINDS:
            module.__class__ = _KINDS[type(module)]
        if isinstance(module, DeployedNorm):
            module.folds = name in folding


def computes_as(module: object, kind: type[nn.Module]) -> bool:
    """Whether a module of a class derived from `kind` computes as that does, here or in torch."""
    return getattr(type(module), "forward", None) in (kind.forward, _KINDS.get(kind, kind).forward)


def undeploy(module: nn.Module) -> None:
    """Make one module, in place, torch's own again: what stays a float module beside packed ones."""
    plain = next((plain for plain, kind in _KINDS.items() if type(module) is kind), type(module))
    module.__class__ = nn.BatchNorm2d if plain is FrozenNorm else plain


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _factors(factor: Any) -> tuple[Any, Any]:
    return tuple(factor) if isinstance(factor, list | tuple) else (factor, factor)


def _global_mean(x: Tensor) -> Tensor:
    return mean_pool(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _deployed(module: nn.Module, x: Tensor) -> bool:
    return not module.training and not torch.is_grad_enabled() and x.dtype == torch.float32
