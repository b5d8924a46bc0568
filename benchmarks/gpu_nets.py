"""Packed networks for timing: random weights, ranges and norms from random images, bits by a rule; kept as files.

Speed depends on shapes, bits and kept filters, not on what was learned.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import lbs
import lbs.models
from lbs.cost import EDGE_BITS
from lbs.plan import LayerPlan, Plan, grid_at
from lbs_kernels.errors import LbsError
from lbs_kernels.program.problem import Problem

CALIBRATION = 4  # images
PRUNED = 0.3  # of the filters that can go


def _uniform(bits: int, layer: LayerPlan) -> LayerPlan:
    """As `lbs.uniform` makes them."""
    return replace(layer, w_bits=bits, a_bits=bits, w_grid=grid_at(bits), ranges="filter")


def _mixed(layer: LayerPlan) -> LayerPlan:
    """4 bits; 2 where the one-bit tensor cores pay: 3 x 3 windows over 128 channels or more."""
    return _uniform(2 if layer.kernel == (3, 3) and layer.in_channels >= 128 and layer.groups == 1 else 4, layer)


RULES = {
    "w8a8": lambda layer: _uniform(8, layer),
    "w4a4": lambda layer: _uniform(4, layer),
    "w2a2": lambda layer: _uniform(2, layer),
    "mixed": _mixed,
    "w4a4 pruned": lambda layer: _uniform(4, layer),
    "w8a8 pruned": lambda layer: _uniform(8, layer),
}
PRUNING = ("w4a4 pruned", "w8a8 pruned")


def float_model(network: str) -> nn.Module:
    """The float network, always with the same weights."""
    torch.manual_seed(0)
    return lbs.models.create(network).eval()


def file_of(folder: Path, network: str, variant: str) -> Path:
    """Where a packed network is kept."""
    return folder / f"{network}-{variant.replace(' ', '-')}.lbs.safetensors"


def build(folder: str, network: str, variant: str) -> str:
    """Pack one network into its file, unless it is there; returns the path."""
    path = file_of(Path(folder), network, variant)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        images = torch.randn(CALIBRATION, *lbs.models.entry(network).input_shape)
        model = lbs.prepare(float_model(network), images)
        model = lbs.freeze(model.eval(), plan(model, network, variant))
        model = lbs.calibrate(model, [images]).eval()
        lbs.pack(model, verify=False, stream_dtype="float16").save(path)  # as by default on a GPU
    return str(path)


def layers(network: str, variant: str) -> list[Problem]:
    """The layers of a variant for one image, without the filters that are gone; nothing is packed."""
    found = plan(lbs.prepare(float_model(network), lbs.models.example(network)), network, variant)
    return [layer.problem(found.kept_inputs(layer), layer.kept_filters) for layer in found.layers]


def plan(model: nn.Module, network: str, variant: str) -> Plan:
    """The plan of a variant: edges at 8/8 bits; the first filters of each prunable layer are kept."""
    record = model.lbs_record
    own: Plan = record.plan  # type: ignore[union-attr,assignment]
    prunable = {group.producer for group in record.groups if group.prunable}  # type: ignore[union-attr]
    step = lbs.models.entry(network).prune_group
    layers = []
    for layer in own.layers:
        edge = layer.name in own.edges
        layer = _uniform(EDGE_BITS, layer) if edge else RULES[variant](layer)
        if variant in PRUNING and layer.name in prunable and not edge:
            kept = max(step, round((1 - PRUNED) * layer.filters / step) * step)
            layer = replace(layer, kept=tuple(range(kept)) if kept < layer.filters else None)
        layers.append(layer)
    if variant in PRUNING and not any(layer.kept is not None for layer in layers):
        raise LbsError(f"{network} has no layer whose filters can go, so {variant!r} is what w4a4 is")
    return replace(own, layers=tuple(layers))
