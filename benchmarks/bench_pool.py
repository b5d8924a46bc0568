"""pool on the poolings of real networks, against torch float32 and bfloat16 (float16 on a GPU), channels last.

python benchmarks/bench_pool.py --networks resnet18 --batch 8 --threads 1 --save
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from common import Case, Contender, arguments, bit_pairs, layer, recorded, require_backend, run, torch_dtypes
from torch import Tensor
from torch.nn import functional as F

from lbs_kernels.program.problem import Problem

STEM = (64, 112)  # channels, pixels a side: the maximum after the first convolution of ResNet-18 and -50
MEANS = ((64, 8), (512, 7), (1280, 7), (2048, 7))  # CIFAR ResNets, ResNet-18, MobileNetV2, ResNet-50


def torch_contenders(problem: Problem, kind: str) -> dict[str, Contender]:
    shape = (problem.batch, problem.in_channels, problem.height, problem.width)
    x = torch.randn(shape, device=problem.device).contiguous(memory_format=torch.channels_last)
    found: dict[str, Contender] = {}
    for name, dtype in torch_dtypes(problem.device).items():
        xd = x.to(dtype)

        def call(xd: Tensor = xd) -> Tensor:
            if kind == "mean":
                return F.adaptive_avg_pool2d(xd, 1)
            return F.max_pool2d(xd, problem.kernel, problem.stride, problem.padding)

        found[name] = recorded(call, problem.device)
    return found


def cases(args: argparse.Namespace) -> Iterator[Case]:
    channels, side = STEM
    for bits in dict.fromkeys(a_bits for _, a_bits in bit_pairs(args)):
        size = (args.batch, side, side, channels, channels)
        window = ((3, 3), (2, 2), (1, 1))
        yield _case(Problem("pool", *size, *window, w_bits=0, a_bits=bits, device=args.device), "max", args.threads)
    for channels, side in MEANS:
        size = (args.batch, side, side, channels, channels)
        yield _case(Problem("pool", *size, (side, side), w_bits=0, a_bits=0, device=args.device), "mean", args.threads)


def _case(problem: Problem, kind: str, threads: int) -> Case:
    """The maximum of codes, or the mean of a stream of floats."""
    ours, theirs = layer(problem, threads), torch_contenders(problem, kind)
    pixels = problem.height * problem.width + problem.out_height * problem.out_width
    elements = problem.batch * problem.in_channels * pixels
    moved = {name: elements * (4.0 if name == "torch float32" else 2.0) for name in theirs}
    return Case(problem, ours | theirs, moved | dict.fromkeys(ours, elements * (problem.a_bits or 32) / 8), 0.0)


def main() -> None:
    args = arguments("pool")
    require_backend(args.device)
    run("pool", cases(args), args, {})


if __name__ == "__main__":
    main()
