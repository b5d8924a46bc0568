"""Float model -> searchable model (`prepare`), and the uniform baseline (`uniform`)."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from lbs.channels import ChannelGroup, groups_in_training
from lbs.convolutions import TransposedConv2d, plain_kind
from lbs.cost import EDGE_BITS
from lbs.graph import ModelGraph, ModelRecord, observe_layers, record_of, template_plan, trace
from lbs.plan import RANGES, LayerPlan, Plan, grid_at
from lbs.quant.codec import check_chain
from lbs.quant.deployed import deploy
from lbs.quant.frozen_norm import adopt_frozen_norms
from lbs.quant.layers import QuantLayer, fixed_kind
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer
from lbs.search.gates import PruneGate
from lbs.search.importance import IMPORTANCE
from lbs.search.layers import FULL_BITS, FloatInput, SearchLayer, SearchQuantizer, searched_kind
from lbs.search.lines import as_images
from lbs.search.lookalikes import as_torch_has_them
from lbs.search.plain import as_convolutions, has_own_forward, in_torchs_form, plain_copy
from lbs.search.replace import adopt, layer_arguments, layer_options, like, replace_layer
from lbs.search.streams import FLOAT, check_streams, hang_quantizers, residual_streams, share_quantizers
from lbs.wrappers import unwrapped
from lbs_kernels.errors import FormatError, GraphError, LbsError, PlanError, raise_together
from lbs_kernels.program.planes import accumulator_fits, check_accumulator

CONVOLUTIONS = "convolutions"  # of multi_path


@dataclass(frozen=True)
class SearchConfig:
    """What is searched.

    pruning: filters too. trace: the network, by torch.fx. standardize: what weights are divided by before they are
    rounded: their deviation (`scale`; `full` takes off their mean as well), or nothing (`none`).

    bits: chain of widths; (32,) searches the filters of a network that stays in float. group_size: filters per prune
    group (B). max_pruning_ratio: share of a layer's groups that may close. importance: a rule of
    lbs/search/importance.py, such as `gamma` or the paper's `magnitude`. filter_tile: kept filters of a layer are a
    multiple of it. ranges: of weights, one for every filter, or one for the layer (as in LBS). multi_path: a branch of
    its own for every width instead of bit sharing, the baseline of lbs/search/multi_path.py; "convolutions" gives every
    branch weights and a convolution of its own. exclude: name patterns
    left in float, each matching a layer. trace=False (with pruning=False) serves models torch.fx cannot trace; they can
    be searched and fine-tuned, not packed. The first and the last layer stay at 8 / 8 bits and keep their filters
    (`lbs.cost.edge_layers`).
    """

    bits: tuple[int, ...] = (2, 4, 8)
    pruning: bool = True
    group_size: int = 4
    max_pruning_ratio: float = 0.5
    importance: str = "gamma"
    filter_tile: int = 1
    standardize: str = "scale"
    ranges: Literal["filter", "layer"] = "filter"
    multi_path: bool | Literal["convolutions"] = False
    exclude: tuple[str, ...] = ()
    trace: bool = True

    def __post_init__(self) -> None:
        in_float = self.bits in ((FULL_BITS,), [FULL_BITS])
        object.__setattr__(self, "bits", (FULL_BITS,) if in_float else check_chain(self.bits))
        if self.pruning and not self.trace:
            raise PlanError("pruning=True needs trace=True: filters are cut along the traced graph; set pruning=False")
        for label in ("group_size", "filter_tile"):
            count = getattr(self, label)
            if not isinstance(count, int) or count < 1:
                raise PlanError(f"{label}={count}; it counts filters, a whole number from 1 on")
        if isinstance(self.exclude, str):
            raise PlanError(f"exclude={self.exclude!r} is one text; give a tuple of patterns: ({self.exclude!r},)")
        if not 0 <= self.max_pruning_ratio < 1:
            raise PlanError(
                f"max_pruning_ratio={self.max_pruning_ratio}; it lies in [0, 1): a layer keeps one group at least"
            )
        if self.multi_path not in (False, True, CONVOLUTIONS):
            raise PlanError(f"multi_path={self.multi_path!r} is unknown; use False, True or {CONVOLUTIONS!r}")
        if self.ranges not in RANGES:
            raise PlanError(f"ranges={self.ranges!r} is unknown; use {' or '.join(RANGES)}")
        if self.importance not in IMPORTANCE:
            raise PlanError(f"importance={self.importance!r} is unknown; use {', '.join(IMPORTANCE)}")


def prepare(model: nn.Module, example: Tensor, config: SearchConfig | None = None, streams: int = FLOAT) -> nn.Module:
    """A copy of `model` whose convolution and linear layers have searchable bits and filters.

    The copy carries `lbs_record`; `conversion_report(copy)` lists every layer. Follow with `lbs.calibrate`.

    Arguments:
        model: a float network, in wrappers or not; it stays as it is. config: what is searched, by default 2, 4 and 8
            bits and filters.
        example: one input batch [N, C, H, W], or [N, C, L]. streams: bits of what residual sums store until they add
            it: 8, or 32 for floats (`conversion_report` lists them).

    Raises:
        GraphError: nothing can be converted, the model cannot be traced, weights are not finite, or a layer's sum at
            the widest bits of the chain could overflow once it is packed. PlanError: streams of other bits, or of 8
            where nothing is traced or all computes in float.

    Source:
        arXiv 2101.04935 (Loss-aware Bit Sharing), eq. 8-15.
    """
    config = config or SearchConfig()
    model, record = _copy_and_trace(model, example, config, streams)
    edges = record.plan.edges
    if config.trace and config.bits != (FULL_BITS,):  # others are never packed
        chains = [(EDGE_BITS,) if layer.name in edges else config.bits for layer in record.plan.layers]
        check_sums(
            [(layer, chain[-1], chain[-1], chain) for layer, chain in zip(record.plan.layers, chains, strict=True)]
        )
    for layer in record.plan.layers:
        edge = layer.name in edges
        chain = (EDGE_BITS,) if edge and config.bits != (FULL_BITS,) else config.bits
        quantizer: ActivationQuantizer | InputQuantizer | FloatInput
        if chain == (FULL_BITS,):
            quantizer = FloatInput()
        elif layer.name == edges[0]:
            quantizer = InputQuantizer()
        elif edge or len(chain) == 1:
            quantizer = ActivationQuantizer(chain[-1])
        else:
            quantizer = SearchQuantizer(chain, multi_path=config.multi_path)
        old = model.get_submodule(layer.name)
        new = _searchable(old, chain, quantizer, config)
        if config.ranges == "filter" and chain != (FULL_BITS,):
            new.range_by_filter()
        replace_layer(model, layer.name, new)
    hang_quantizers(model, record)
    share_quantizers(model, record)
    if config.pruning:
        _add_prune_gates(model, record, config)
    model.lbs_record = record  # type: ignore[assignment]
    return model


def uniform(
    model: nn.Module,
    example: Tensor,
    weight_bits: int = 8,
    activation_bits: int = 8,
    exclude: tuple[str, ...] = (),
    ranges: Literal["filter", "layer"] = "filter",
    streams: int = FLOAT,
) -> nn.Module:
    """A copy of `model` at one width throughout (first and last layer at 8 / 8): the baseline. Then calibrate.

    Arguments:
        model, example: as in `prepare`. weight_bits, activation_bits: 1 to 8. ranges: of the weights, one for every
            filter, or one for the layer (as in LBS). exclude: name patterns left in float, as in `SearchConfig`.
            streams: as in `prepare`.

    Raises:
        GraphError, PlanError: as `prepare`.
    """
    for width in (weight_bits, activation_bits):
        check_chain((width,))
    model, record = _copy_and_trace(model, example, SearchConfig(exclude=exclude), streams)
    return _at_widths(model, record, record.plan.with_bits(weight_bits, activation_bits), ranges)


def at_widths(
    model: nn.Module, example: Tensor, plan: Plan, exclude: tuple[str, ...] = (), streams: int = FLOAT
) -> nn.Module:
    """A copy of a float `model` at the widths of a plan that `prepare` and `plan_of` made for it; then calibrate.

    Unlike a frozen copy of the searched model it knows nothing of the search: no range and no statistics. All filters
    stay. Raises GraphError as `prepare`, PlanError for a plan of other layers.
    """
    model, record = _copy_and_trace(model, example, SearchConfig(exclude=exclude), streams)
    asked = ((entry, plan.layer(entry.name)) for entry in record.plan.layers)
    layers = (replace(own, w_bits=one.w_bits, a_bits=one.a_bits, w_grid=grid_at(one.w_bits)) for own, one in asked)
    return _at_widths(model, record, replace(record.plan, layers=tuple(layers), modelled=plan.modelled), "filter")


def _at_widths(model: nn.Module, record: ModelRecord, plan: Plan, ranges: str) -> nn.Module:
    """The plain copy `model` itself, its layers at the widths of the plan."""
    check_sums([(layer, layer.w_bits, layer.a_bits, ()) for layer in plan.layers])
    for layer in plan.layers:
        quantizer = InputQuantizer() if layer.name == plan.edges[0] else ActivationQuantizer(layer.a_bits)
        old = model.get_submodule(layer.name)
        fixed = fixed_layer(old, layer.w_bits, quantizer, "scale")
        fixed.w_grid = layer.w_grid
        if ranges == "filter":
            fixed.range_by_filter()
        replace_layer(model, layer.name, fixed)
    hang_quantizers(model, record)
    share_quantizers(model, record)
    model.lbs_record = replace(record, plan=plan)  # type: ignore[assignment]
    deploy(model, record.folding)
    return model


def conversion_report(model: nn.Module) -> list[tuple[str, str]]:
    """(layer, what became of it) for every layer of a prepared model, also those left in float and why; and where
    streams of 8 bits were asked for, (module that returns it, what became of it) for every residual stream.
    """
    record = record_of(model)
    reasons = {g.producer: g.reason for g in record.groups}
    rows = []
    for layer in record.plan.layers:
        module: Any = model.get_submodule(layer.name)
        gate = getattr(module, "prune", None)
        pruning = (
            f"filters in {gate.groups} groups"
            if gate is not None
            else "filters kept: " + (reasons.get(layer.name) or "first or last layer, or pruning is off")
        )
        through = getattr(module, "through_gate", None)
        if through:
            pruning = "filters go with those before it"
        searched = getattr(module, "w_gate", None)
        bits = searched.chain if searched is not None else f"fixed at {module.w_bits}/{module.a_bits}"
        rows.append((layer.name, f"bits {bits}; {pruning}"))
    streams = [
        (one.name, f"residual stream: {f'floats, as {one.reason}' if one.reason else 'codes of 8 bits'}")
        for one in record.streams
    ]
    return [*rows, *streams, *((name, f"left in float: {reason}") for name, reason in record.unconverted)]


def _copy_and_trace(
    model: nn.Module, example: Tensor, config: SearchConfig, streams: int
) -> tuple[nn.Module, ModelRecord]:
    check_streams(streams)
    if streams != FLOAT and (not config.trace or config.bits == (FULL_BITS,)):
        raise PlanError(
            f"streams={streams} of a network that is not traced, or whose layers compute in float: it is never packed; "
            "leave streams= out"
        )
    if any(isinstance(m, QuantLayer) for m in unwrapped(model).modules()):
        raise GraphError(f"{type(model).__name__} already holds quantized layers; give the float model")
    model = plain_copy(model)
    adopt_frozen_norms(model)
    model = as_torch_has_them(model)
    reasons = {}
    if config.trace:
        reasons = as_images(model, example)
        as_convolutions(model)
    _check_finite(model)
    graph, layers, found, uneven = _layers_and_groups(model, example, config)
    unconverted = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            reason = _unconvertible(name, module, layers, config.exclude, uneven)
            if reason:
                unconverted.append((name, reason))
        elif _is_other_layer(module) and ".parametrizations." not in f".{name}.":
            unconverted.append((name, reasons.get(name) or _without_form(module, config)))
    _check_patterns(model, config.exclude)
    skipped = {name for name, _ in unconverted}
    for name in skipped:
        left = model.get_submodule(name)
        if isinstance(left, TransposedConv2d):
            replace_layer(model, name, in_torchs_form(left))
    groups = {
        name: _fitting_tile(_without_tied(_without(group, skipped), model), model, config)
        for name, group in found.items()
    }
    kept = {name: layer for name, layer in layers.items() if name not in skipped}
    in_float = tuple(layer for name, layer in layers.items() if name in skipped - uneven)
    plan = template_plan(kept, groups, type(model).__name__)
    if not plan.layers:
        listed = "; ".join(f"{n}: {r}" for n, r in unconverted) or "it has no Conv2d and no Linear"
        raise GraphError(f"{type(model).__name__} has no layer that can be converted ({listed}); nothing to search")
    record = ModelRecord(tuple(example.shape[1:]), plan, tuple(groups.values()), tuple(unconverted), in_float=in_float)
    if graph is None:
        return model, record
    residuals = () if streams == FLOAT else residual_streams(graph, kept)
    return model, replace(record, folding=graph.folding, streams=residuals)


def _without_form(module: nn.Module, config: SearchConfig) -> str:
    """Why a layer of another kind stays in float."""
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.ConvTranspose2d) and not config.trace:
        return f"{type(module).__name__} is converted along the traced graph only; set trace=True"
    tied = type(module) is nn.ConvTranspose2d
    return "its weight is used beside it as well" if tied else f"{type(module).__name__} has no quantized form"


def _is_other_layer(module: nn.Module) -> bool:
    """Whether a module multiplies by weights of its own, as layers of torch's do, and those without parts."""
    layer = type(module).__module__.startswith("torch.nn") or next(module.children(), None) is None
    return layer and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _layers_and_groups(
    model: nn.Module, example: Tensor, config: SearchConfig
) -> tuple[ModelGraph | None, dict[str, LayerPlan], dict[str, ChannelGroup], frozenset[str]]:
    if not config.trace:
        layers, uneven = observe_layers(model, example)
        return None, layers, {}, uneven
    graph = trace(model, example)
    groups = groups_in_training(graph.groups, graph.module, model, example)
    return graph, graph.layers, groups, graph.uneven


def _check_finite(model: nn.Module) -> None:
    """Parameters, and the statistics of norms; other buffers may hold what they like, such as a mask of -inf."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            tensors |= {f"{name}.{key}": value for key, value in module.named_buffers(recurse=False)}
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        verb = "holds" if len(bad) == 1 else "hold"
        raise GraphError(
            f"{', '.join(bad)} {verb} NaN or infinite values; quantization needs finite weights, load others"
        )


def _check_patterns(model: nn.Module, patterns: tuple[str, ...]) -> None:
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    lost = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if lost:
        what = " and ".join(f"exclude={pattern!r} matches no layer" for pattern in lost)
        raise PlanError(f"{what}; the layers are {', '.join(names)}")


def _without(group: ChannelGroup, skipped: set[str]) -> ChannelGroup:
    if skipped & {group.producer, *group.through, *group.consumers}:
        return replace(group, prunable=False, reason="it touches a layer left in float")
    return group


def _without_tied(group: ChannelGroup, model: nn.Module) -> ChannelGroup:
    """Filters whose weights serve another layer as well stay: cutting them would untie the two."""
    members = {group.producer, *group.through, *group.consumers}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Conv2d | nn.Linear) or weight is None:
            continue
        other = owners.setdefault(id(weight), name)
        if other != name and {name, other} & members:
            return replace(group, prunable=False, reason=f"{other} and {name} share their weights")
    return group


def _fitting_tile(group: ChannelGroup, model: nn.Module, config: SearchConfig) -> ChannelGroup:
    """Filters stay where no number of whole groups but all of them is a multiple of the tile."""
    unit = math.lcm(config.group_size, config.filter_tile)
    if config.filter_tile == 1 or not group.prunable:
        return group
    filters = int(model.get_submodule(group.producer).weight.shape[0])  # type: ignore[index]
    if filters % unit == 0:
        return group
    reason = f"{filters} are no multiple of {unit}, the smallest one of filter_tile={config.filter_tile} in groups"
    return replace(group, prunable=False, reason=f"{reason} of {config.group_size}")


def _unconvertible(
    name: str,
    module: nn.Conv2d | nn.Linear,
    layers: dict[str, LayerPlan],
    exclude: tuple[str, ...],
    uneven: frozenset[str],
) -> str:
    """Why a layer stays in float; "" if it need not."""
    if any(fnmatch.fnmatch(name, pattern) for pattern in exclude):
        return "excluded by name"
    own = has_own_forward(module)
    if own is not None:
        return own
    if getattr(module, "sized", False):
        return "the forward pass gives it an output_size; output_padding= of the layer says the same once and for all"
    if name not in layers:
        return "the forward pass does not call it"
    if name in uneven:
        return "the forward pass calls it on inputs of different sizes, and one entry of costs cannot stand for both"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return (
            "its weight is computed by a parametrization; torch.nn.utils.parametrize.remove_parametrizations(layer, "
            "'weight') makes it a parameter"
        )
    methods = _own_methods(module)
    if methods:
        return f"{type(module).__name__} has methods that a quantized layer has not: {', '.join(methods)}"
    return ""


def _own_methods(layer: nn.Conv2d | nn.Linear) -> list[str]:
    plain = plain_kind(layer)
    added = {name for kind in type(layer).__mro__ if not issubclass(plain, kind) for name in vars(kind)}
    return sorted(name for name in added if not name.startswith("_") and not hasattr(plain, name))


def check_sums(rows: Iterable[tuple[LayerPlan, int, int, tuple[int, ...]]]) -> None:
    """`check_sum` of (layer, w_bits, a_bits, chain) for every row; all that fail are told at once."""
    told: list[LbsError] = []
    for row in rows:
        try:
            check_sum(*row)
        except GraphError as error:
            told.append(error)
    raise_together(told)


def check_sum(layer: LayerPlan, w_bits: int, a_bits: int, chain: tuple[int, ...] = ()) -> None:
    """Refuse what `lbs.pack` would refuse after training, if these bits were chosen.

    chain: widths to choose from. In a search nothing is pruned in this count: no search promises that it will be.
    """
    reduction = layer.problem().reduction
    try:
        check_accumulator(reduction, w_bits, a_bits, layer.name)
    except FormatError as error:
        way = f"leave it in float, exclude=({layer.name!r},)"
        fitting = tuple(bits for bits in chain if accumulator_fits(reduction, bits, bits))
        if fitting:
            way = f"search bits={fitting}, which fit, or {way}"
        bits = f"{w_bits} bits" if w_bits == a_bits else f"{w_bits}/{a_bits} bits"
        raise GraphError(f"{error}. It could be trained but not packed at {bits}: {way}") from error


def _add_prune_gates(model: nn.Module, record: ModelRecord, config: SearchConfig) -> None:
    rule, edges = IMPORTANCE[config.importance], record.plan.edges
    for group in record.groups:
        if not group.prunable or group.producer in edges:
            continue
        producer: Any = model.get_submodule(group.producer)
        filters = int(producer.weight.shape[0])
        gate = PruneGate(filters, config.group_size, config.max_pruning_ratio, config.filter_tile, bool(rule.watches))
        producer.prune = gate
        like(gate, producer)
        norms = [model.get_submodule(name) for name in group.norms]
        producer.norm_behind = [norm for norm in norms if norm.weight is not None][:1]
        for name in group.consumers:
            consumer: Any = model.get_submodule(name)
            consumer.input_gate = [gate]
            consumer.watches_input = rule.watches == "activation" and name == group.consumers[0]
        for name in group.through:
            passed: Any = model.get_submodule(name)
            passed.through_gate = [gate]
        producer.observe_filters()


def _searchable(
    old: nn.Module,
    chain: tuple[int, ...],
    quantizer: ActivationQuantizer | InputQuantizer | FloatInput,
    config: SearchConfig,
) -> SearchLayer:
    extra: dict[str, Any] = {"chain": chain, "quantizer": quantizer, "standardize": config.standardize}
    extra |= {"importance": config.importance, "multi_path": config.multi_path}
    new = searched_kind(old)(*layer_arguments(old), **extra, **layer_options(old))
    adopt(new, old)
    if config.multi_path == CONVOLUTIONS:
        new.split_paths()
    return new


def fixed_layer(
    old: nn.Module, w_bits: int, quantizer: ActivationQuantizer | InputQuantizer, standardize: str
) -> QuantLayer:
    """A layer of fixed bits with the shape and weights of `old`."""
    kind = fixed_kind(old)
    new = kind(*layer_arguments(old), w_bits=w_bits, quantizer=quantizer, standardize=standardize, **layer_options(old))
    return adopt(new, old)
