"""quantpack on the inputs of real networks, against torch's own quantizer and the same arithmetic in torch calls.

python benchmarks/bench_quantpack.py --networks resnet18 preresnet20 --batch 8 --threads 1 --save
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from common import Case, Contender, arguments, bit_pairs, packed, recorded, require_backend, run
from torch import Tensor

import lbs.models
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Consumer, Emit, Program, QuantPackStep, TensorSpec, build_blob

SCALE, ZERO = 48.0, 117


def packed_contenders(problem: Problem, image: Tensor, zero: int, threads: int) -> dict[str, Contender]:
    """Image in, codes out: of floats, and of bytes that are normalised on the way."""
    pictures = torch.randint(0, 256, image.shape, dtype=torch.uint8, device=image.device)
    affine = {
        "multiplier": torch.full((problem.in_channels,), 1 / 64),
        "bias": torch.full((problem.in_channels,), -2.0),
    }
    return {
        "packed": _packed(problem, image, zero, threads, "float32", {}),
        "packed bytes": _packed(problem, pictures, zero, threads, "uint8", affine),
    }


def _packed(
    problem: Problem, image: Tensor, zero: int, threads: int, dtype: str, affine: dict[str, Tensor]
) -> Contender:
    size = (problem.in_channels, problem.height, problem.width)
    source = TensorSpec("image", "image", *size, dtype=dtype)  # type: ignore[arg-type]
    codes = TensorSpec("codes", "codes", *size, problem.a_bits, zero)
    emit = Emit(consumers=(Consumer(1, problem.a_bits, SCALE, zero),))
    keys = {name: name for name in affine}
    specs, blob, digest = build_blob(affine)
    program = Program((source, codes), (QuantPackStep("quantpack", 0, emit, **keys),), (0,), (), specs, digest=digest)
    return packed(program, blob, image, 0, threads)["packed"]


def torch_contenders(image: Tensor, bits: int, zero: int) -> dict[str, Contender]:
    """Codes as uint8, channels last."""
    x = image.contiguous(memory_format=torch.channels_last)
    n = (1 << bits) - 1

    def calls() -> Tensor:
        return (x * SCALE).round_().add_(zero).clamp_(0, n).to(torch.uint8)

    found = {"torch calls": recorded(calls, str(image.device))}
    if bits == 8 and image.device.type == "cpu":
        found["torch quantizer"] = lambda: torch.quantize_per_tensor(x, 1 / SCALE, zero, torch.quint8)
    return found


def cases(args: argparse.Namespace) -> Iterator[Case]:
    shapes = dict.fromkeys(lbs.models.entry(name).input_shape for name in args.networks)
    for bits in dict.fromkeys(a_bits for _, a_bits in bit_pairs(args)):
        zero = ZERO if bits == 8 else 0
        for channels, height, width in shapes:
            size = (args.batch, height, width, channels, channels)
            problem = Problem("quantpack", *size, a_bits=bits, device=args.device)
            image = torch.randn(args.batch, channels, height, width, device=args.device)
            contenders = packed_contenders(problem, image, zero, args.threads) | torch_contenders(image, bits, zero)
            read, written = {"packed bytes": 1}, {"packed": bits / 8, "packed bytes": bits / 8}
            moved = {name: image.numel() * (read.get(name, 4) + written.get(name, 1)) for name in contenders}
            yield Case(problem, contenders, moved, 0.0)


def main() -> None:
    args = arguments("quantpack")
    require_backend(args.device)
    run("quantpack", cases(args), args, {})


if __name__ == "__main__":
    main()
