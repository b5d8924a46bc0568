"""pool on the poolings of real networks, against torch float32 and bfloat16 (float16 on a GPU), channels last.

python benchmarks/bench_pool.py --networks resnet18 --batch 8 --threads 1 --save
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from common import Case, Contender, arguments, bit_pairs, packed, recorded, require_backend, run, torch_dtypes
from torch import Tensor
from torch.nn import functional as F

from lbs_kernels.one_step import OneStep, code_image
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Consumer, Emit, PoolStep, QuantPackStep

STEM = (64, 112)  # channels, pixels a side: the maximum after the first convolution of ResNet-18 and -50
MEANS = ((64, 8), (512, 7), (1280, 7), (2048, 7))  # CIFAR ResNets, ResNet-18, MobileNetV2, ResNet-50


def max_of_codes(problem: Problem, threads: int) -> dict[str, Contender]:
    region = OneStep()
    size = (problem.height, problem.width, problem.in_channels)
    codes = region.code_input(size, problem.a_bits, 0, False, output=True)
    out = (problem.out_height, problem.out_width, problem.in_channels)
    target = Consumer(region.codes("pooled", out, problem.a_bits, 0, False), problem.a_bits, 1.0)
    window = (problem.kernel, problem.stride, problem.padding)
    region.steps.append(PoolStep("pool", codes, Emit(consumers=(target,)), "max", *window))
    x = torch.randint(0, 1 << problem.a_bits, (problem.batch, *size), dtype=torch.uint8)
    return packed(*region.build({}), code_image(x, problem.a_bits, 0, False).to(problem.device), 1, threads)


def mean_of_stream(problem: Problem, threads: int) -> dict[str, Contender]:
    region = OneStep()
    size = (problem.height, problem.width, problem.in_channels)
    image = region.image(size)
    values = region.stream("values", size, output=False)
    region.steps.append(QuantPackStep("input", image, Emit(stream=values)))
    emit = Emit(stream=region.stream("y", (1, 1, problem.in_channels)))
    region.steps.append(PoolStep("pool", values, emit, "mean"))
    shape = (problem.batch, problem.in_channels, problem.height, problem.width)
    return packed(*region.build({}), torch.randn(shape, device=problem.device), 1, threads)


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
        problem = Problem("pool", *size, (3, 3), (2, 2), (1, 1), a_bits=bits, device=args.device)
        yield _case(problem, max_of_codes(problem, args.threads), "max", bits)
    for channels, side in MEANS:
        problem = Problem("pool", args.batch, side, side, channels, channels, (side, side), device=args.device)
        yield _case(problem, mean_of_stream(problem, args.threads), "mean", 32)


def _case(problem: Problem, ours: dict[str, Contender], kind: str, bits: int) -> Case:
    theirs = torch_contenders(problem, kind)
    pixels = problem.height * problem.width + problem.out_height * problem.out_width
    elements = problem.batch * problem.in_channels * pixels
    moved = {name: elements * (4.0 if name == "torch float32" else 2.0) for name in theirs}
    return Case(problem, ours | theirs, moved | dict.fromkeys(ours, elements * bits / 8), 0.0)


def main() -> None:
    args = arguments("pool")
    require_backend(args.device)
    run("pool", cases(args), args, {})


if __name__ == "__main__":
    main()
