"""What every layer of a network takes within a call: of a packed network by its steps, of one of torch's by hooks."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbs.packing.model import PackedModel

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_WARM = 2  # calls that are not timed


@dataclass(frozen=True)
class LayerTimes:
    """One layer by its name: bits of its packed weights, 0 where it stays in float, and seconds by contender."""

    name: str
    w_bits: int
    seconds: dict[str, float]


def layer_times(
    networks: Mapping[str, nn.Module], packed: PackedModel, images: Tensor, threads: int, rounds: int
) -> tuple[LayerTimes, ...]:
    """Medians over `rounds` calls on `images`, as `packed` takes them, by layer in the order of the first network.

    Args:
        networks: packed ones and modules of torch by row name. Norms and activations that torch computes by themselves
            are no part of a layer, while a packed layer has them in its epilogue.
    """
    found: dict[str, dict[str, float]] = {}
    floats = packed.float_images(images).float()
    for name, network in networks.items():
        if isinstance(network, PackedModel):
            seconds = _of_steps(network, images, threads, rounds)
        else:
            kind = next(iter(network.parameters())).dtype
            seconds = _of_modules(network, floats.to(dtype=kind, memory_format=_format(floats)), rounds)
        for layer, took in seconds.items():
            found.setdefault(layer, {})[name] = took
    bits = {step.name: getattr(step, "w_bits", 0) for program in packed.programs for step in program.steps}
    return tuple(LayerTimes(layer, bits.get(layer, 0), seconds) for layer, seconds in found.items())


def _format(floats: Tensor) -> torch.memory_format:
    return torch.channels_last if floats.dim() == 4 else torch.preserve_format


def _of_steps(packed: PackedModel, images: Tensor, threads: int, rounds: int) -> dict[str, float]:
    """Of the layers with weights; none where the back end does not tell."""
    _, traces = packed.run_traced(images)
    seconds: dict[str, float] = {}
    for region, trace in zip(packed.regions, traces, strict=True):
        inputs = [trace[place].contiguous() for place in region.program.inputs]
        took = region.compiled().runner.step_seconds(inputs, threads=threads, rounds=rounds) or []
        for step, one in zip(region.program.steps, took, strict=False):
            if getattr(step, "w_bits", 0):
                seconds[step.name] = one
    return seconds


def _of_modules(model: nn.Module, images: Tensor, rounds: int) -> dict[str, float]:
    """On the processor only: no clock between two layers sees a GPU."""
    if images.device.type != "cpu":
        return {}
    started: dict[str, float] = {}
    took: dict[str, list[float]] = defaultdict(list)

    def before(name: str) -> Any:
        return lambda module, args: started.__setitem__(name, time.perf_counter())

    def after(name: str) -> Any:
        return lambda module, args, output: took[name].append(time.perf_counter() - started[name])

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            hooks += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        for _ in range(_WARM + rounds):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    calls = {name: len(times) // (_WARM + rounds) for name, times in took.items()}  # in one call of the network
    return {name: statistics.median(times[calls[name] * _WARM :]) * calls[name] for name, times in took.items()}
