"""Whole networks on a GPU: packed ones against torch in float32, TF32, float16 and compiled float16, in CUDA graphs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lbs
import lbs.models
from benchmarks import gpu_device, gpu_nets
from lbs.pack.model import PackedModel
from lbs_kernels import timing, tuner
from lbs_kernels.errors import BackendError
from lbs_kernels.timing import Times

FP32, TF32, FP16, COMPILED = "torch float32", "torch TF32", "torch float16", "torch float16 compiled"
# Most valuable first: the budget may end the list anywhere.
ORDER = (
    ("resnet50", 128), ("resnet18", 128), ("resnet50", 256), ("resnet18", 1), ("resnet50", 1), ("mobilenet_v2", 128),
    ("cifar_resnet20", 128), ("cifar_resnet20", 1), ("resnet18", 256), ("cifar_resnet56", 128), ("mobilenet_v2", 1),
    ("cifar_resnet56", 1), ("mobilenet_v2", 256), ("cifar_resnet20", 256), ("cifar_resnet56", 256),
)  # fmt: skip
AUTOTUNED = {("resnet50", 128), ("resnet18", 128)}  # max-autotune takes minutes for each; warmed while tests run
CHECKED = 2  # images compared with the reference, which is slow
Call = Callable[[], object]


def variants(network: str) -> list[str]:
    """Packed contenders of a network."""
    return [name for name in gpu_nets.RULES if name != "mixed" or network == "resnet50"]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 on or off for matrix products and convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def compiled_half(model: nn.Module) -> Callable[..., Any]:
    """torch.compile at its best; its kernels go into the caller's CUDA graph, so it records none of its own."""
    compiled: Callable[..., Any] = torch.compile(model, mode="max-autotune-no-cudagraphs")
    return compiled


def warm(network: str, batch: int) -> None:
    """Let max-autotune choose its kernels, which inductor remembers on disk, while nothing is timed."""
    torch.backends.cudnn.benchmark = True
    model = _channels_last(gpu_nets.float_model(network).to(gpu_device.DEVICE).half())
    compiled_half(model)(_images(network, batch).half().contiguous(memory_format=torch.channels_last))
    gpu_device.survive()


def baselines(
    network: str, batch: int, compiled: bool, attempt: Callable[[str], bool]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Recorded calls by name, and the baselines that could not be made with their reasons."""
    images = _images(network, batch)
    model = _channels_last(gpu_nets.float_model(network).to(gpu_device.DEVICE))
    half = copy.deepcopy(model).half()
    last = images.contiguous(memory_format=torch.channels_last)
    half_images = last.half()
    makers: dict[str, tuple[bool, Callable[[], Call]]] = {
        FP32: (False, lambda: lambda: model(last)),
        TF32: (True, lambda: lambda: model(last)),
        FP16: (False, lambda: lambda: half(half_images)),
    }
    missing = {COMPILED: f"max-autotune takes minutes; it is timed for {sorted(AUTOTUNED)} where the time allows"}
    if compiled:
        missing = {}
        function = compiled_half(half)
        makers[COMPILED] = (False, lambda: lambda: function(half_images))
    found: dict[str, Call] = {}
    for name, (allowed, make) in makers.items():
        if not attempt(f"{network} {batch} {name}"):
            missing[name] = tuner.BROKE
            continue
        try:
            with tf32(allowed):  # the graph keeps the kernels that were chosen while it was recorded
                found[name] = gpu_device.recorded(make())
        except Exception as error:  # noqa: BLE001  a baseline that cannot run is listed as missing
            missing[name] = f"{type(error).__name__}: {str(error)[:200]}"
            gpu_device.survive()
    return found, missing


def packed_calls(
    folder: Path, network: str, batch: int, attempt: Callable[[str], bool]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Recorded calls of the packed variants, each found equal to the reference first."""
    images = _images(network, batch)
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for variant in variants(network):
        if not attempt(f"{network} {batch} {variant}"):
            missing[variant] = tuner.BROKE
            continue
        try:
            packed = lbs.load(gpu_nets.build(str(folder), network, variant), device=gpu_device.DEVICE)
            check(packed, images)
            found[variant] = gpu_device.recorded(functools.partial(packed, images))
            for region in packed.regions:  # the graph has buffers of its own
                region.compiled().runner.release()  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001  one variant that fails must not cost the others
            missing[variant] = f"{type(error).__name__}: {str(error)[:300]}"
            gpu_device.survive()
    return found, missing


def check(packed: PackedModel, images: Tensor) -> None:
    """First and last image of the batch against the reference, bit for bit. Raises BackendError."""
    places = sorted({0, len(images) - 1})[:CHECKED]
    output = packed(images)[places]
    expected, _ = packed.run_traced(images[places], backend="reference")
    if not torch.equal(output, expected):
        share = float((output != expected).float().mean())
        raise BackendError(f"{packed.name}: {share:.2%} of the outputs differ from the reference; it is not timed")


def measure(
    network: str, batch: int, calls: dict[str, Call], attempt: Callable[[str], bool], rounds: int = 15
) -> list[dict[str, Any]]:
    """One row per contender, all interleaved; ratios: how many times faster than each other contender."""
    times: dict[str, Times] = timing.interleave(
        calls,
        device=gpu_device.DEVICE,
        rounds=rounds,
        warmup=0.05,
        before=lambda name: attempt(f"{network} {batch} {name}"),
    )
    return [
        {
            "network": network,
            "batch": batch,
            "contender": name,
            "median": one.median,
            "p20": one.p20,
            "p80": one.p80,
            "images_per_s": batch / one.median,
            "ratios": {other: one.ratio(times[other]) for other in times if other != name},
        }
        for name, one in times.items()
    ]


def _channels_last(model: nn.Module) -> nn.Module:
    moved: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def _images(network: str, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *lbs.models.entry(network).input_shape, generator=generator).to(gpu_device.DEVICE)
