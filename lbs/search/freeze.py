"""Searchable model -> quantized model: bits fixed, pruned filters physically gone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lbs.convolutions import plain_kind
from lbs.graph import ModelRecord, record_of
from lbs.plan import LayerPlan, Plan, check_layer, grid_at
from lbs.quant.deployed import deploy
from lbs.quant.layers import QuantLayer, fixed_kind
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer, StreamQuantizer
from lbs.search.gates import BitGate, refresh
from lbs.search.layers import FULL_BITS, SearchLayer
from lbs.search.multi_path import settled_range, settled_weight
from lbs.search.replace import carry, kept_like, layer_arguments, layer_options, like, replace_layer
from lbs.search.streams import share_quantizers
from lbs.wrappers import copied, unwrapped
from lbs_kernels.errors import PlanError


def plan_of(model: nn.Module) -> Plan:
    """The plan a searchable, uniform or frozen model follows right now.

    Raises:
        GraphError: a model that lbs did not make.
    """
    model = unwrapped(model)
    plan = record_of(model).plan
    layers = []
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SearchLayer):
                module.observe_filters()
    refresh([module for module in model.modules() if isinstance(module, BitGate)])
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        kept = layer.kept
        if isinstance(module, SearchLayer):
            gate = module.own_gate()
            kept = gate.kept() if gate is not None else None
            kept = None if kept is None or len(kept) == layer.filters else kept
        w_bits, a_bits = (int(getattr(module, label, FULL_BITS)) for label in ("w_bits", "a_bits"))
        layers.append(_rounded_as(replace(layer, w_bits=w_bits, a_bits=a_bits, kept=kept), module))
    return replace(plan, layers=tuple(layers))


def _rounded_as(entry: LayerPlan, module: nn.Module) -> LayerPlan:
    """The entry with what the layer's weights are rounded to; those of a searched one, to what it will be frozen to."""
    if not isinstance(module, QuantLayer) or entry.w_bits == FULL_BITS:
        return entry
    grid = grid_at(entry.w_bits) if module.searched else module.w_grid
    return replace(entry, w_grid=grid, ranges="filter" if module.w_range.dim() else "layer")


def freeze(model: nn.Module, plan: Plan | None = None) -> nn.Module:
    """A copy of a searchable (or uniform) model with fixed bits and without its pruned filters.

    Layers whose activations are fixed at 8 bits take the quantizer of the stream of 8 bits that they read.

    Arguments:
        model: searchable or uniform; it stays as it is.
        plan: bits and kept filters to apply, in any order of layers; None takes what the gates say.

    Raises:
        PlanError: the plan names other layers or sizes, or prunes filters that cannot go.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(
            f"plan is a {type(plan).__name__}; read one with lbs.Plan.load(path) or lbs.Plan.from_json(text)"
        )
    model = unwrapped(model)
    plan = plan or plan_of(model)
    model = copied(model)
    record = record_of(model)
    plan = _with_through(plan, record)
    check_fit(plan, record)
    layers = tuple(_fitted(plan.layer(own.name), own) for own in record.plan.layers)
    plan = replace(record.plan, layers=layers, modelled=plan.modelled)
    kept = {entry.name: entry.kept for entry in plan.layers if entry.kept is not None}
    present = {entry.name: _rows(model.get_submodule(entry.name), entry) for entry in plan.layers}
    sources = {c: g.producer for g in record.groups if g.producer in kept for c in g.consumers}
    twins: dict[tuple[object, ...], nn.Parameter] = {}  # weights that were one parameter stay one
    for entry in plan.layers:
        old = model.get_submodule(entry.name)
        rows, columns = present[entry.name], present.get(sources.get(entry.name, ""))
        replace_layer(model, entry.name, _fixed(old, entry, rows, columns, twins))
    for group in record.groups:
        rows = present.get(group.producer)
        if rows is not None and group.prunable:
            for norm in group.norms:
                _cut_norm(model.get_submodule(norm), rows)  # type: ignore[arg-type]
    share_quantizers(model, record)
    model.lbs_record = replace(record, plan=plan)  # type: ignore[assignment]
    if not plan.in_float:
        deploy(model, record.folding)
    return model


def _fitted(entry: LayerPlan, own: LayerPlan) -> LayerPlan:
    """Bits and kept filters of a plan's entry, the geometry of the model."""
    kept = entry.kept if entry.kept_filters < entry.filters else None
    own = replace(own, w_bits=entry.w_bits, a_bits=entry.a_bits, kept=kept)
    return replace(own, w_grid=entry.w_grid, ranges=entry.ranges)


def _with_through(plan: Plan, record: ModelRecord) -> Plan:
    """The plan in which depthwise layers lose the filters of the layer before them, where it does not say so."""
    kept = {entry.name: entry.kept for entry in plan.layers}
    follows = {name: group.producer for group in record.groups if group.prunable for name in group.through}
    layers = []
    for entry in plan.layers:
        leader = kept.get(follows.get(entry.name, ""))
        layers.append(replace(entry, kept=leader) if entry.kept is None and leader is not None else entry)
    return replace(plan, layers=tuple(layers))


def _rows(layer: nn.Module, entry: LayerPlan) -> tuple[int, ...] | None:
    """Rows of the layer's weights that the plan keeps; None for all. A frozen layer may have lost filters already."""
    there = getattr(layer, "kept", None)
    if there is None:
        return entry.kept
    gone = sorted(set(entry.kept or range(entry.filters)) - set(there))
    if gone:
        raise PlanError(
            f"plan keeps filters {gone} of {entry.name}, which were cut before; start from the searchable model"
        )
    return tuple(there.index(index) for index in entry.kept or ())


def check_fit(plan: Plan, record: ModelRecord) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        PlanError: names, sizes or prunability differ; the first difference is named.
    """
    names = [entry.name for entry in plan.layers]
    expected = [entry.name for entry in record.plan.layers]
    if sorted(names) != sorted(expected):
        odd = sorted(set(names) ^ set(expected))
        raise PlanError(
            f"plan does not fit the model: layers {', '.join(odd) or 'are listed twice'}; use the plan of this model"
        )
    groups = {group.producer: group for group in record.groups}
    leaders = {name: group.producer for group in record.groups if group.prunable for name in group.through}
    for entry in plan.layers:
        own = record.plan.layer(entry.name)
        check_layer(entry)
        for label in ("kind", "in_channels", "filters", "kernel", "stride", "padding", "dilation", "groups"):
            if getattr(entry, label) != getattr(own, label):
                raise PlanError(
                    f"plan does not fit the model: {entry.name} has {label} {getattr(own, label)}, the plan says "
                    f"{getattr(entry, label)}; use the plan of this model"
                )
        if entry.name in leaders:
            leader = plan.layer(leaders[entry.name])
            if entry.kept != leader.kept:
                raise PlanError(
                    f"plan keeps filters {entry.kept} of the depthwise layer {entry.name} and {leader.kept} of "
                    f"{leader.name} before it; they live and die together, give both the same"
                )
        elif entry.kept_filters < entry.filters:
            group = groups.get(entry.name)
            if group is None or not group.prunable:
                reason = group.reason if group is not None else "it is no convolution"
                raise PlanError(f"plan prunes {entry.name}, whose filters cannot go: {reason}; keep all of them")


def _fixed(
    old: nn.Module,
    entry: LayerPlan,
    rows: tuple[int, ...] | None,
    columns: tuple[int, ...] | None,
    twins: dict[tuple[object, ...], nn.Parameter],
) -> nn.Module:
    """A layer of fixed bits that keeps `rows` (filters) and `columns` (input channels) of `old`."""
    new = _float_layer(old, entry) if entry.w_bits == FULL_BITS else _quantized_layer(old, entry)
    weight = settled_weight(old, entry.w_bits)
    bias: Tensor | None = old.bias  # type: ignore[assignment]
    key = (id(weight), rows, columns)
    if rows is not None:
        weight = weight[torch.tensor(rows)]
        bias = bias[torch.tensor(rows)] if bias is not None else None
    if columns is not None:
        weight = weight[:, torch.tensor(columns)]
    if rows is not None and isinstance(new, QuantLayer) and new.w_range.dim():
        new.w_range = nn.Parameter(new.w_range.detach()[torch.tensor(rows)].clone())
    if key not in twins:
        twins[key] = kept_like(weight, old.weight)
    new.weight = twins[key]
    new.bias = kept_like(bias, old.bias) if bias is not None else None  # type: ignore[assignment]
    if isinstance(new, nn.Conv2d):
        new.groups = len(rows) if entry.depthwise and rows is not None else new.groups
        new.out_channels, new.in_channels = int(weight.shape[0]), int(weight.shape[1]) * new.groups
    elif isinstance(new, nn.Linear):
        new.out_features, new.in_features = int(weight.shape[0]), int(weight.shape[1])
    carry(new, old)
    new.kept = entry.kept  # type: ignore[assignment]
    return new


def _quantized_layer(old: nn.Module, entry: LayerPlan) -> QuantLayer:
    """A layer of fixed bits with the bits of the plan and the ranges of `old`, its weights not yet cut."""
    if not isinstance(old, QuantLayer) or old.w_bits == FULL_BITS:
        raise PlanError(
            f"plan gives {entry.name} {entry.w_bits} bits, but it was searched in float; give it 32, or None"
        )
    quantizer: ActivationQuantizer | InputQuantizer
    if isinstance(old.quantizer, InputQuantizer):
        quantizer = old.quantizer
        if entry.a_bits != 8:
            raise PlanError(
                f"plan gives the first layer {entry.name} {entry.a_bits}-bit inputs; the network input has 8"
            )
    else:
        quantizer = ActivationQuantizer(entry.a_bits, old.quantizer.signed)
        quantizer.zero_point.fill_(old.quantizer.coding.zero_at(entry.a_bits))
        quantizer.range = settled_range(old.quantizer.range, getattr(old.quantizer, "gate", None))
        if isinstance(old.quantizer, StreamQuantizer):  # the stream keeps its own
            quantizer.range = kept_like(quantizer.range, quantizer.range)
    kind, options = fixed_kind(old), layer_options(old)
    new = kind(*layer_arguments(old), w_bits=entry.w_bits, quantizer=quantizer, standardize=old.standardize, **options)
    like(new, old)
    new.w_range = settled_range(old.w_range, getattr(old, "w_gate", None))
    if entry.ranges == "layer" and new.w_range.dim():
        new.w_range = nn.Parameter(new.w_range.detach().abs().amax())
    elif entry.ranges == "filter" and not new.w_range.dim():
        new.range_by_filter()
    new.w_grid = entry.w_grid
    new.output_scale.copy_(old.output_scale)
    new.total_filters = entry.filters
    return new


def _float_layer(old: nn.Module, entry: LayerPlan) -> nn.Module:
    """A plain layer of the kind of `old`, which computed in float."""
    if isinstance(old, QuantLayer) and old.w_bits != FULL_BITS:
        raise PlanError(
            f"plan gives {entry.name} 32 bits, but it was searched quantized; give it 1 to 8, or search with "
            "SearchConfig(bits=(32,))"
        )
    new = plain_kind(old)(*layer_arguments(old), **layer_options(old))
    like(new, old)
    return new


def _cut_norm(norm: nn.BatchNorm2d, kept: tuple[int, ...]) -> None:
    index = torch.tensor(kept)
    norm.num_features = len(kept)
    for name in ("weight", "bias"):
        value = getattr(norm, name)
        if value is not None:
            setattr(norm, name, kept_like(value.detach()[index], value))
    for name in ("running_mean", "running_var"):
        value = getattr(norm, name)
        if value is not None:
            setattr(norm, name, value[index].clone())
