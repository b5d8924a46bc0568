"""Plan: bits and kept filters of every layer; the treaty between search and packing, as JSON a person can edit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lbs import cost
from lbs_kernels import files
from lbs_kernels.errors import PlanError, printable
from lbs_kernels.program.problem import TRANSPOSED, Problem
from lbs_kernels.program.steps import WeightGrid
from lbs_kernels.program.window import is_depthwise

PLAN_VERSION = 2  # 2: w_grid and ranges
RANGES = ("filter", "layer")
_OPS = {"conv2d": "bitconv2d", "conv_transpose2d": TRANSPOSED, "linear": "bitlinear"}


def grid_at(bits: int) -> WeightGrid:
    """The grid that weights of a width are put on where no data say otherwise: one with a zero at 8 bits.

    Grids with a zero do not nest, so that a search has the odd one at every width it chooses from.
    """
    return "zero" if bits == 8 else "odd"


@dataclass(frozen=True)
class LayerPlan:
    """One layer. Geometry is that of the unpruned layer for one image; `kept` lists the filters that live.

    w_grid and ranges say what its weights are rounded to: the codes (`lbs.quant.codec.Coding`), and whether every
    filter has a range of its own or the layer has one.
    """

    name: str
    kind: str  # conv2d | conv_transpose2d | linear
    w_bits: int
    a_bits: int
    in_channels: int
    filters: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    height: int = 1  # of the input
    width: int = 1
    positions: int = 1  # how often it is applied to one image: a linear layer's positions, a shared layer's calls
    kept: tuple[int, ...] | None = None  # None: all
    source: str | None = None  # the layer whose filters are this layer's input channels, if they can be pruned
    w_grid: WeightGrid = "odd"
    ranges: Literal["filter", "layer"] = "layer"

    @property
    def kept_filters(self) -> int:
        return self.filters if self.kept is None else len(self.kept)

    @property
    def depthwise(self) -> bool:
        """Whether every input channel has one filter of its own, which lives and dies with it."""
        return is_depthwise(self.groups, self.in_channels, self.filters)

    def problem(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        batch: int = 1,
        w_bits: int | None = None,
        a_bits: int | None = None,
    ) -> Problem:
        """The layer as a Problem, with other channel counts and bits where they are given."""
        return Problem(
            _OPS[self.kind],
            batch * self.positions,
            self.height,
            self.width,
            in_channels or self.in_channels,
            out_channels or self.filters,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            in_channels or self.groups if self.depthwise else self.groups,
            w_bits or self.w_bits,
            a_bits or self.a_bits,
        )


@dataclass(frozen=True)
class Plan:
    """Bits and kept filters, readable and editable as JSON.

    layers: in execution order. model: its name. version: of the text's form. modelled: the model whose times the plan
    was chosen by, "" where a budget counted or measured.

    >>> plan = Plan((LayerPlan("fc", "linear", 8, 8, 64, 10),))
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    layers: tuple[LayerPlan, ...]
    model: str = ""
    version: int = PLAN_VERSION
    modelled: str = ""

    def layer(self, name: str) -> LayerPlan:
        """The layer called `name`.

        Raises:
            PlanError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PlanError(f"plan has no layer {name!r}; it has {', '.join(entry.name for entry in self.layers)}")

    def kept_inputs(self, layer: LayerPlan) -> int:
        """Input channels of `layer` that live."""
        return layer.in_channels if layer.source is None else self.layer(layer.source).kept_filters

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of the first and the last layer, which stay at 8 / 8 bits and whole (`lbs.cost.edge_layers`)."""
        return cost.edge_layers(layer.name for layer in self.layers)

    def with_bits(self, w_bits: int, a_bits: int) -> Plan:
        """The same layers and filters at uniform bits, the edges at 8 / 8."""
        bits = cost.uniform_bits((layer.name for layer in self.layers), w_bits, a_bits)
        pairs = ((layer, *bits[layer.name]) for layer in self.layers)
        layers = (replace(layer, w_bits=w, a_bits=a, w_grid=grid_at(w)) for layer, w, a in pairs)
        return replace(self, layers=tuple(layers))

    def bops(self) -> int:
        """Bit operations of one image: sum of k_h k_w C_in C_out/groups H_out W_out b_w b_a over kept channels."""
        return sum(cost.bops(self._kept_problem(layer)) for layer in self.layers)

    def macs(self, layer: LayerPlan) -> int:
        """Multiply-accumulates of one layer and image, kept channels only."""
        return cost.macs(self._kept_problem(layer))

    def kept_problems(self) -> list[Problem]:
        """The layers as they run: channels that live, and the grids of weights that are not on the usual ones."""
        unusual = ((layer, layer.w_grid if layer.w_grid != grid_at(layer.w_bits) else None) for layer in self.layers)
        return [replace(self._kept_problem(layer), grid=grid) for layer, grid in unusual]

    def whole_problems(self) -> list[Problem]:
        """The layers with all their channels."""
        return [layer.problem() for layer in self.layers]

    @property
    def in_float(self) -> bool:
        """Whether every layer computes in float: only filters are gone."""
        return all(layer.w_bits == cost.FULL_PRECISION_BITS for layer in self.layers)

    def full_precision_bops(self) -> int:
        """The same network at 32 x 32 bits, nothing pruned."""
        return sum(cost.bops(cost.full_precision(layer.problem())) for layer in self.layers)

    def _kept_problem(self, layer: LayerPlan) -> Problem:
        return layer.problem(self.kept_inputs(layer), layer.kept_filters)

    def to_json(self) -> str:
        """Indented JSON, one layer after the other."""
        body = asdict(self)
        return json.dumps(body if self.modelled else {k: v for k, v in body.items() if k != "modelled"}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read `to_json`'s text.

        Raises:
            PlanError: not JSON, a field missing or of another kind, or a newer version.
        """
        try:
            body = json.loads(text)
            version = int(body.get("version", 0))
            if version > PLAN_VERSION:
                raise PlanError(
                    f"plan version {version} is newer than {PLAN_VERSION}, which this release reads; upgrade lbs"
                )
            layers = tuple(_read_layer(entry) for entry in body["layers"])
            _check_names(layers)
            return Plan(
                layers, printable(str(body.get("model", ""))), modelled=printable(str(body.get("modelled", "")))
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"not a plan: {type(error).__name__}: {error}; write plans with Plan.to_json") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON to a temporary name beside `path`, then rename.

        Raises:
            PlanError: there is no such folder.
        """
        if not Path(path).parent.is_dir():
            raise PlanError(f"plan {path} cannot be written: {Path(path).parent} is no folder; give one that exists")
        files.replace(Path(path), self.to_json().encode())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: a file that cannot be read, or is no plan.
        """
        try:
            text = files.read_regular(path).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan {path} cannot be read: {error}; give the path of a plan.json") from error
        return Plan.from_json(text)


def _read_layer(entry: dict[str, Any]) -> LayerPlan:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    layer = LayerPlan(**fields)
    check_layer(layer)
    return layer


_AT_LEAST = {"in_channels": 1, "filters": 1, "groups": 1, "height": 1, "width": 1, "positions": 1}
_PAIRS_AT_LEAST = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}


def check_layer(layer: LayerPlan) -> None:
    """Refuse a layer whose fields are of another kind, or outside what they may be.

    Raises:
        PlanError: the layer, the field, its value and the rule are named.
    """
    if not isinstance(layer.name, str) or not layer.name:
        raise PlanError(f"layer name {layer.name!r}; a layer is named by its path in the model, such as layer1.0.conv1")
    if layer.kind not in _OPS:
        raise PlanError(f"layer {layer.name}: kind={layer.kind!r}; a layer is one of {', '.join(_OPS)}")
    if layer.source is not None and not isinstance(layer.source, str):
        raise PlanError(f"layer {layer.name}: source={layer.source!r}; name a layer, or null")
    for label in ("w_bits", "a_bits"):
        bits = getattr(layer, label)
        if not _is_whole(bits) or not (1 <= bits <= 8 or bits == cost.FULL_PRECISION_BITS):
            raise PlanError(f"layer {layer.name}: {label}={bits!r}; a width is an integer from 1 to 8, or 32 for float")
    if layer.w_grid not in ("odd", "zero") or (layer.w_grid == "zero" and layer.w_bits == 1):
        raise PlanError(
            f"layer {layer.name}: w_grid={layer.w_grid!r} at {layer.w_bits} bits; odd, or zero from 2 bits on"
        )
    if layer.ranges not in RANGES:
        raise PlanError(f"layer {layer.name}: ranges={layer.ranges!r}; a range belongs to a filter or to the layer")
    for label, low in _AT_LEAST.items():
        value = getattr(layer, label)
        if not _is_whole(value) or value < low:
            raise PlanError(f"layer {layer.name}: {label}={value!r}; give an integer of at least {low}")
    for label, low in _PAIRS_AT_LEAST.items():
        value = getattr(layer, label)
        pair = isinstance(value, tuple) and len(value) == 2
        if not pair or not all(_is_whole(v) and v >= low for v in value):
            raise PlanError(f"layer {layer.name}: {label}={value!r}; give two integers of at least {low}")
    _check_kept(layer)


def _check_kept(layer: LayerPlan) -> None:
    if layer.kept is None:
        return
    whole = isinstance(layer.kept, tuple) and all(_is_whole(index) for index in layer.kept)
    if not whole or not layer.kept or list(layer.kept) != sorted(set(layer.kept)):
        raise PlanError(
            f"layer {layer.name}: kept={layer.kept!r}; list at least one filter by integer index, rising, none twice"
        )
    outside = [index for index in layer.kept if not 0 <= index < layer.filters]
    if outside:
        raise PlanError(f"layer {layer.name}: kept filter {outside[0]} is outside 0..{layer.filters - 1}")


def _check_names(layers: tuple[LayerPlan, ...]) -> None:
    """Names are unique and `source` names a layer whose filters are this one's input channels."""
    by_name = {layer.name: layer for layer in layers}
    if len(by_name) != len(layers):
        twice = sorted({layer.name for layer in layers if sum(o.name == layer.name for o in layers) > 1})
        raise PlanError(f"plan lists {', '.join(twice)} more than once; one entry per layer")
    for layer in layers:
        if layer.source is None:
            continue
        source = by_name.get(layer.source)
        if source is None:
            raise PlanError(f"layer {layer.name}: source={layer.source!r} is no layer of the plan")
        if source.filters != layer.in_channels:
            raise PlanError(
                f"layer {layer.name} reads {layer.in_channels} channels, but its source {source.name} has "
                f"{source.filters} filters"
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
