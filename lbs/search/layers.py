"""Layers whose bits and filters are still open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbs.convolutions import TransposedConv2d, plain_kind
from lbs.plan import grid_at
from lbs.quant import codec, fake
from lbs.quant.layers import ConvProduct, LinearProduct, QuantLayer, TransposedProduct
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer
from lbs.search.bit_sharing import gated
from lbs.search.gates import BitGate, PruneGate
from lbs.search.importance import IMPORTANCE, rule_of
from lbs.search.multi_path import BranchGate

# What a layer under search has and a layer of fixed bits has not.
SEARCH_STATE = ("w_gate", "prune", "importance", "input_gate", "through_gate", "norm_behind", "watches_input", "paths")
FULL_BITS = 32  # a layer of these bits computes in float: only its filters are searched


class FloatInput(nn.Module):
    """What stands where a quantizer would, in a layer that computes in float."""

    bits, signed = FULL_BITS, False

    def forward(self, x: Tensor) -> Tensor:
        return x


class SearchQuantizer(ActivationQuantizer):
    """An activation quantizer whose width is searched."""

    def __init__(self, chain: tuple[int, ...], signed: bool = False, multi_path: bool | str = False) -> None:
        super().__init__(chain[-1], signed, zero_bits=chain[0])
        self.gate = BranchGate(chain) if multi_path else BitGate(chain)

    @property
    def bits(self) -> int:
        """The width that is open now."""
        return self.gate.bits

    def forward(self, x: Tensor) -> Tensor:
        gate, coding = self.gate, self.coding
        if isinstance(gate, BranchGate):
            v = self.range.abs()
            return gate.mix(x, v, coding) if self.training else gate.branch(x, v, coding, gate.level)
        if self.training and gate.active:
            return gated(x, self.range.abs(), gate, coding)
        if self.training and x.is_cuda:  # decided on the device, and not read back yet
            return fake.fake_activation(x, self.range, gate.open_width(), coding)  # type: ignore[arg-type]
        return super().forward(x)


def searched_gate(quantizer: nn.Module) -> BitGate | None:
    """The gate of a quantizer whose width is searched, else None."""
    gate = getattr(quantizer, "gate", None)
    return gate if isinstance(gate, BitGate) else None


class SearchLayer(QuantLayer):
    """What searchable convolutions and linear layers share.

    `w_gate` searches the weight width; `prune` closes groups of this layer's own filters; `input_gate` is the prune
    gate of the layer that feeds this one. A closed filter is cut where it is read: the consumer's weights are
    multiplied by the mask, which equals masking the activation behind norm and ReLU and costs no pass over it.
    """

    w_gate: BitGate | None
    prune: PruneGate | None
    paths: nn.ParameterList | None

    def __init__(
        self,
        *args: Any,
        chain: tuple[int, ...],
        quantizer: ActivationQuantizer | InputQuantizer | FloatInput,
        standardize: str,
        importance: str,
        multi_path: bool | str = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_quant(chain[-1], quantizer, standardize if chain[-1] < FULL_BITS else "none")
        gate_type = BranchGate if multi_path else BitGate
        self.w_gate = gate_type(chain) if len(chain) > 1 else None
        self.w_grid = "odd" if self.w_gate is not None else grid_at(chain[-1])
        self.paths = None  # weights of every branch but the widest, which has `weight`
        self.prune = None
        self.importance = importance
        # In lists: owned, saved and trained elsewhere.
        self.input_gate: list[PruneGate] = []  # of the layer whose filters this one reads
        self.through_gate: list[PruneGate] = []  # of the layer before this depthwise one, whose filters go along
        self.norm_behind: list[nn.Module] = []  # whose gamma ranks this layer's filters
        self.watches_input = False  # the feeding layer's filters are ranked by what arrives here

    @property
    def w_bits(self) -> int:
        """The width of the weights that is open now, or the fixed one."""
        return self._w_bits if self.w_gate is None else self.w_gate.bits

    @property
    def searched(self) -> bool:
        return self.w_gate is not None

    @property
    def range_widths(self) -> tuple[int, int]:
        """The middle of what is still searched, of two widths the narrower: wider codes lose less by its range than
        narrower ones by theirs.
        """
        open_gates = (self.w_gate, self.w_bits), (searched_gate(self.quantizer), self.a_bits)
        w_bits, a_bits = (
            width if gate is None else gate.chain[(len(gate.chain) - 1) // 2] for gate, width in open_gates
        )
        return w_bits, a_bits

    def own_gate(self) -> PruneGate | None:
        """The gate that closes this layer's own filters."""
        return self.prune if self.prune is not None else next(iter(self.through_gate), None)

    def forward(self, input: Tensor) -> Tensor:
        learning = self.training and torch.is_grad_enabled()
        if self.prune is not None:
            if learning:  # ranked in this iteration's graph, so that the task's gradient reaches what ranks the filters
                self.observe_filters()
                self.prune.share(IMPORTANCE[self.importance].watches == "gradient")
            else:
                with torch.inference_mode(False), torch.no_grad():  # what stays behind serves the next training step
                    self.observe_filters()
        if learning and self.watches_input:
            seen = input.detach()
            self.input_gate[0].note(seen.flatten(2).mean((0, 2)) if seen.dim() > 2 else seen.mean(0))
        if self.paths is not None and self.training and self.quantize:
            return self._through_paths(input)
        return super().forward(input)

    def split_paths(self) -> None:
        """Give every branch weights of its own, all as the layer's are now, and so a convolution."""
        gate = self.w_gate
        if isinstance(gate, BranchGate):
            own = (nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad) for _ in gate.chain[1:])
            self.paths = nn.ParameterList(own)

    def path_weight(self, level: int) -> Tensor:
        """The weights of one branch."""
        return self.weight if self.paths is None or level == len(self.paths) else self.paths[level]

    def _through_paths(self, input: Tensor) -> Tensor:
        """The sum over the branches' convolutions, each times what it counts."""
        gate: Any = self.w_gate
        source, v, shares = self.quantizer(input), self.weight_range().abs(), gate.weights()
        total: Any = None
        for level in range(len(gate.chain)):
            w = codec.standardize(self.path_weight(level), self.standardize, self._alive())
            weight = self._cut_inputs(gate.branch(w, v, codec.WEIGHTS["odd"], level) * self.output_scale)
            part = self.product(source, weight, None)
            part = shares[level].to(part.dtype) * part
            total = part if total is None else total + part
        if self.bias is None:
            return total
        return total + (self.bias.view(-1, 1, 1) if isinstance(self, nn.Conv2d) else self.bias)

    def float_weight(self) -> Tensor:
        weight = self.weight if self.w_gate is None else self.path_weight(self.w_gate.level)
        return codec.standardize(weight, self.standardize, self._alive())

    def _alive(self) -> Tensor | None:
        """1 for weights between living channels, broadcastable to `weight`; None if all live."""
        own = self.own_gate()
        if own is None and not self.input_gate:
            return None
        window = [1] * (self.weight.dim() - 2)
        alive = self.weight.new_ones(1, 1, *window)
        with torch.no_grad():
            if own is not None:
                alive = alive * own.shared_mask().view(-1, 1, *window)
            if self.input_gate:
                alive = alive * self.input_gate[0].shared_mask().view(1, -1, *window)
        return alive

    @property
    def computes_integers(self) -> bool:
        """Never: gates may still move, and their masks are no part of the integer arithmetic."""
        return False

    def observe_filters(self) -> None:
        """Give the prune gate this iteration's importance of each filter."""
        if self.prune is not None:
            rule = rule_of(self)
            self.prune.observe(rule.score(rule.look(self)))

    def quantized_weight(self) -> Tensor:
        if self.w_bits == FULL_BITS:
            return self._cut_inputs(self.weight)
        v, w = self.weight_range().abs(), self.float_weight()
        gate, coding = self.w_gate, codec.WEIGHTS["odd"]  # grids with a zero do not nest
        if isinstance(gate, BranchGate):
            quantized = gate.mix(w, v, coding) if self.training else gate.branch(w, v, coding, gate.level)
        elif self.training and gate is not None and gate.active:
            quantized = gated(w, v, gate, coding)
        elif self.training and gate is not None and w.is_cuda:
            quantized = fake.fake_weight(w, v, gate.open_width())  # type: ignore[arg-type]
        else:
            quantized = fake.fake_weight(w, v, self.w_bits, self.w_grid)
        return self._cut_inputs(quantized * self.output_scale)

    def unrounded_weight(self) -> Tensor:
        return self._cut_inputs(super().unrounded_weight())

    def _cut_inputs(self, weight: Tensor) -> Tensor:
        """Zero where the feeding layer's filters are closed."""
        if not self.input_gate:
            return weight
        return weight * self.input_gate[0].shared_mask().view(1, -1, *([1] * (weight.dim() - 2)))


class SearchConv2d(SearchLayer, ConvProduct):
    """A convolution under search; tensors as in torch.nn.Conv2d."""


class SearchConvTranspose2d(SearchLayer, TransposedProduct):  # type: ignore[misc]
    """A transposed convolution under search; its weight as in TransposedConv2d."""


class SearchLinear(SearchLayer, LinearProduct):
    """A linear layer under search; tensors as in torch.nn.Linear."""


_SEARCHED: dict[type[nn.Module], Any] = {
    TransposedConv2d: SearchConvTranspose2d,
    nn.Conv2d: SearchConv2d,
    nn.Linear: SearchLinear,
}


def searched_kind(layer: nn.Module) -> Any:
    """The class of searchable layers that a convolution or linear layer becomes."""
    return _SEARCHED[plain_kind(layer)]
