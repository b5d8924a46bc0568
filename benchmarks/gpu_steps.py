"""Every step of whole networks on a GPU, each alone in a CUDA graph: where a network's time goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lbs
import lbs.models
from benchmarks import gpu_device, gpu_nets
from lbs_kernels.gpu.forms import WEIGHTED
from lbs_kernels.gpu.modelled import Modelled
from lbs_kernels.program.problem import Problem

NETWORKS = (("resnet18", "w8a8"), ("resnet18", "w4a4"), ("resnet50", "w8a8"), ("resnet50", "w4a4"))
BATCHES = (128, 1)
ROUNDS = 7
TIMED = "one launch in a CUDA graph, replayed back to back: what it reads may lie in the second-level cache"


def measure(folder: Path, network: str, variant: str, batch: int) -> list[dict[str, Any]]:
    """One row per step: its kernel, seconds, and what the model gives for it, as told before it was measured.

    seconds is None where nothing can be recorded (Triton's interpreter).
    """
    packed = lbs.load(gpu_nets.build(str(folder), network, variant), device=gpu_device.DEVICE)
    (region,) = packed.regions
    runner: Any = region.compiled().runner
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, *lbs.models.entry(network).input_shape)
    images = [torch.randn(shape, generator=generator).to(gpu_device.DEVICE)]
    if gpu_device.device().type != "cuda":
        runner.run(images)
    seconds = runner.step_seconds(images, rounds=ROUNDS) or [None] * len(region.program.steps)
    problems, choices = runner.problems(batch), runner.kernels(batch)
    modelled = Modelled(batch=batch).of_steps(region.program)
    place = {"network": network, "variant": variant, "batch": batch}
    rows = [
        {
            **place,
            "step": step.name,
            "problem": asdict(problems[step.name]),
            "kernel": choice.name,
            "seconds": took,
            "modelled_seconds": told,
        }
        for step, choice, took, told in zip(region.program.steps, choices, seconds, modelled, strict=True)
        if step.name in problems  # else it is part of another step
    ]
    runner.release()
    return rows


def sweep(folder: Path, until: float, clock: Callable[[], float], save: Callable[[dict[str, Any]], object],
          attempt: Callable[[str], bool], ready: Callable[[str, str], object]) -> dict[str, Any]:  # fmt: skip
    """All networks at batch 128, then at 1, as far as the time goes; saved after each.

    ready: waits until a network is packed and its kernels are compiled.
    """
    body: dict[str, Any] = {"rows": [], "missing": {}, "timed": TIMED, "complete": False}
    for batch in BATCHES:
        for network, variant in NETWORKS:
            name = f"{network} {variant} {batch}"
            if clock() >= until or not attempt(name):
                body["missing"][name] = "the time was up" if clock() >= until else "it broke the device"
                continue
            try:
                ready(network, variant)
                body["rows"] += measure(folder, network, variant, batch)
            except Exception as error:  # noqa: BLE001  one network that fails must not cost the others
                body["missing"][name] = f"{type(error).__name__}: {str(error)[:300]}"
                gpu_device.survive()
            save(body)
    return {**body, "complete": not body["missing"]}


def costliest(rows: list[dict[str, Any]], count: int) -> list[Problem]:
    """The layers that take longest at the largest batch, by their seconds, or the model's where those are missing."""
    taken: dict[Problem, float] = {}
    largest = max((row["batch"] for row in rows), default=0)
    for row in rows:
        problem = Problem(**{key: tuple(v) if isinstance(v, list) else v for key, v in row["problem"].items()})
        if problem.op in WEIGHTED and row["batch"] == largest:
            taken[problem] = max(taken.get(problem, 0.0), row["seconds"] or row["modelled_seconds"])
    return sorted(taken, key=lambda problem: taken[problem], reverse=True)[:count]
