"""Layers whose bits and filters are still open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbs.quant import codec, fake
from lbs.quant.layers import ConvProduct, LinearProduct, QuantLayer
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer
from lbs.search.bit_sharing import gated
from lbs.search.gates import BitGate, PruneGate


class SearchQuantizer(ActivationQuantizer):
    """An activation quantizer whose width is searched."""

    def __init__(self, chain: tuple[int, ...], signed: bool = False) -> None:
        super().__init__(chain[-1], signed)
        self.gate = BitGate(chain)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.gate.active:
            y = gated(x, self.range.abs(), self.gate, "signed" if self.signed else "unsigned")
            self.bits = self.gate.bits
            return y
        return super().forward(x)


class SearchLayer(QuantLayer):
    """What searchable convolutions and linear layers share.

    `w_gate` searches the weight width; `prune` closes groups of this layer's own filters; `input_gate` is the prune
    gate of the layer that feeds this one. A closed filter is cut where it is read: the consumer's weights are
    multiplied by the mask, which equals masking the activation behind norm and ReLU and costs no pass over it.
    """

    w_gate: BitGate | None
    prune: PruneGate | None

    def __init__(
        self,
        *args: Any,
        chain: tuple[int, ...],
        quantizer: ActivationQuantizer | InputQuantizer,
        standardize: str,
        importance: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_quant(chain[-1], quantizer, standardize)
        self.w_gate = BitGate(chain) if len(chain) > 1 else None
        self.prune = None
        self.importance = importance
        self._input_gate: list[PruneGate] = []  # in a list: owned, saved and trained by the producer
        self._norm: list[nn.Module] = []  # the norm whose gamma ranks this layer's filters

    def float_weight(self) -> Tensor:
        return codec.standardize(self.weight, self.standardize, self._alive())

    def _alive(self) -> Tensor | None:
        """1 for weights between living channels, broadcastable to `weight`; None if all live."""
        if self.prune is None and not self._input_gate:
            return None
        window = [1] * (self.weight.dim() - 2)
        alive = self.weight.new_ones(1, 1, *window)
        with torch.no_grad():
            if self.prune is not None:
                alive = alive * self.prune.mask().view(-1, 1, *window)
            if self._input_gate:
                alive = alive * self._input_gate[0].mask().view(1, -1, *window)
        return alive

    @property
    def computes_integers(self) -> bool:
        """Never: gates may still move, and their masks are no part of the integer arithmetic."""
        return False

    def observe_filters(self) -> None:
        """Give the prune gate this iteration's importance of each filter."""
        if self.prune is None:
            return
        if self.importance == "gamma" and self._norm:
            size = self._norm[0].weight.abs()  # type: ignore[operator]
            largest = size.detach().max()
        else:
            size = self.weight.abs().flatten(1).mean(1)
            largest = self.weight.detach().abs().max()
        self.prune.observe(size / largest.clamp(min=torch.finfo(size.dtype).tiny))  # all zero: no group ranks higher

    def quantized_weight(self) -> Tensor:
        v, w = self.w_range.abs(), self.float_weight()
        gate = self.w_gate
        if self.training and gate is not None and gate.active:
            quantized = gated(w, v, gate, "weight")
            self.w_bits = gate.bits
        else:
            quantized = fake.fake_weight(w, v, self.w_bits)
        return self._cut_inputs(quantized * self.output_scale)

    def unrounded_weight(self) -> Tensor:
        return self._cut_inputs(super().unrounded_weight())

    def _cut_inputs(self, weight: Tensor) -> Tensor:
        """Zero where the feeding layer's filters are closed."""
        if not self._input_gate:
            return weight
        return weight * self._input_gate[0].mask().view(1, -1, *([1] * (weight.dim() - 2)))


class SearchConv2d(SearchLayer, ConvProduct):
    """A convolution under search; tensors as in torch.nn.Conv2d."""


class SearchLinear(SearchLayer, LinearProduct):
    """A linear layer under search; tensors as in torch.nn.Linear."""
