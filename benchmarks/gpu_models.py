"""Whole networks on a GPU: packed ones against torch in float32, TF32, float16 and compiled float16, in CUDA graphs."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import lbs
import lbs.models
from benchmarks import gpu_device, gpu_nets
from lbs.packing.model import PackedModel
from lbs_kernels.errors import BackendError
from lbs_kernels.times import stopwatch
from lbs_kernels.times.stopwatch import Times
from lbs_kernels.tune import tuner

FP32, TF32, FP16, COMPILED = "torch float32", "torch TF32", "torch float16", "torch float16 compiled"
# Most telling first: the budget may end the list anywhere. All but the last, which one target speaks of, are compiled.
COMPILED_AT = (
    ("resnet18", 128), ("resnet50", 128), ("resnet18", 1), ("resnet50", 1), ("mobilenet_v2", 128), ("mobilenet_v2", 1),
)  # fmt: skip
ORDER = (*COMPILED_AT, ("resnet50", 256), ("resnet18", 256))
# Ways of torch.compile, best first. Both are made while tests run, the default one first: max-autotune takes minutes,
# one after the other; where it did not come so far, what the default way made counts, and the result says which it was.
AUTOTUNED, PLAIN = "max-autotune-no-cudagraphs", "default"
TIMED = "mean of back-to-back replays of a CUDA graph, images on the GPU; one request alone waits for its launch, too"
SWITCHES = ("LBS_PDL", "LBS_FORK")  # kernels that overlap, and branches of a network beside one another
CHECKED = 2  # images compared with the reference, which is slow
Call = Callable[[], object]


def variants(network: str) -> list[str]:
    """Packed contenders of a network: those that targets speak of."""
    own = {"resnet18": ["w4a4 pruned"], "resnet50": ["w4a4 pruned", "mixed"]}
    return ["w8a8", "w4a4", *own.get(network, [])]


def contenders(network: str, batch: int) -> list[str]:
    """The packed ones; at batch 1, where launches are most of the time, also one with each switch of theirs off."""
    names = variants(network)
    return [*names, *(f"{names[0]}, {name}=0" for name in SWITCHES)] if batch == 1 else names


@contextmanager
def switches_of(contender: str) -> Iterator[str]:
    """What is bound inside goes by the switches that the contender names; gives its variant."""
    variant, _, off = contender.partition(", ")
    before = {name: os.environ.get(name) for name in SWITCHES}
    os.environ.update({name: "0" if off == f"{name}=0" else "1" for name in SWITCHES})
    try:
        yield variant
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 on or off for matrix products and convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def folded(network: str) -> nn.Module:
    """The float network with its norms folded into the convolutions before them, as packed ones have them."""
    fused: nn.Module = fuse(gpu_nets.float_model(network))
    return fused


def compiled_half(model: nn.Module, mode: str) -> Callable[..., Any]:
    """torch.compile for one batch size; its kernels go into the caller's CUDA graph, so it records none of its own.

    Without the reset and dynamic=False, a second size of the same code is compiled for every size: slower, and not what
    was made before.
    """
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(model, mode=mode, dynamic=False)
    return compiled


def warm(network: str, batch: int, mode: str) -> None:
    """Let torch.compile choose its kernels, which inductor remembers on disk, while nothing is timed.

    Everything is as in `baselines`, or it would not be found again.
    """
    torch.backends.cudnn.benchmark = True
    with torch.no_grad(), tf32(False):
        model = _channels_last(folded(network).to(gpu_device.DEVICE).half())
        compiled_half(model, mode)(_images(network, batch).contiguous(memory_format=torch.channels_last).half())
    gpu_device.survive()


def mark_of(folder: Path, network: str, batch: int, mode: str) -> Path:
    """The file that says that `warm` is done."""
    return folder / f".warmed-{network}-{batch}-{mode}"


def compiled_at(count: int | None) -> list[tuple[str, int]]:
    """`COMPILED_AT` within the first `count` of `ORDER`."""
    return [place for place in COMPILED_AT if place in ORDER[:count]]


def plain_done(folder: Path, count: int | None = None) -> bool:
    """Whether nothing remains to be compiled in the default way within the first `count` of `ORDER`."""
    return all(mark_of(folder, network, batch, PLAIN).exists() for network, batch in compiled_at(count))


def warmed(folder: Path, network: str, batch: int) -> str:
    """The best way of torch.compile that is warm; empty where none is, or none is wanted."""
    wanted = (AUTOTUNED, PLAIN) if (network, batch) in COMPILED_AT else ()
    return next((mode for mode in wanted if mark_of(folder, network, batch, mode).exists()), "")


def baselines(
    network: str, batch: int, mode: str, attempt: Callable[[str], bool]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Recorded calls by name, and the baselines that could not be made with their reasons.

    Args:
        mode: of torch.compile; empty leaves it out.
    """
    images = _images(network, batch)
    model = _channels_last(folded(network).to(gpu_device.DEVICE))
    half = copy.deepcopy(model).half()
    last = images.contiguous(memory_format=torch.channels_last)
    half_images = last.half()
    makers: dict[str, tuple[bool, Callable[[], Call]]] = {
        FP32: (False, lambda: lambda: model(last)),
        TF32: (True, lambda: lambda: model(last)),
        FP16: (False, lambda: lambda: half(half_images)),
    }
    missing = {}
    if mode:
        makers[COMPILED] = (False, lambda: functools.partial(compiled_half(half, mode), half_images))
    else:
        places = ", ".join(f"{name} {size}" for name, size in COMPILED_AT)
        missing[COMPILED] = f"it is compiled before the timing, for {places}, as far as the time goes"
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
    for name in contenders(network, batch):
        if not attempt(f"{network} {batch} {name}"):
            missing[name] = tuner.BROKE
            continue
        try:
            with switches_of(name) as variant:
                packed = lbs.load(gpu_nets.build(str(folder), network, variant), device=gpu_device.DEVICE)
                check(packed, images)
                found[name] = gpu_device.recorded(functools.partial(packed, images))
            for region in packed.regions:  # the graph has buffers of its own
                region.compiled().runner.release()  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001  one variant that fails must not cost the others
            missing[name] = f"{type(error).__name__}: {str(error)[:300]}"
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
    times: dict[str, Times] = stopwatch.interleave(
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
