"""bitlinear on the linear layers of real networks, against torch float32, bfloat16 (float16 on a GPU) and oneDNN int8.

python benchmarks/bench_bitlinear.py --networks resnet18 mobilenet_v2 --batch 64 --threads 1 --save
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from common import Case, Contender, arguments, bit_pairs, layer, layers, recorded, require_backend, run, torch_dtypes
from torch import Tensor, nn
from torch.nn import functional as F

from lbs_kernels.program.problem import Problem


def torch_contenders(problem: Problem) -> dict[str, Contender]:
    """The same layer with bias in torch."""
    x = torch.randn(problem.batch, problem.in_channels, device=problem.device)
    w = torch.randn(problem.out_channels, problem.in_channels, device=problem.device)
    found: dict[str, Contender] = {}
    for name, dtype in torch_dtypes(problem.device).items():
        operands = (x.to(dtype), w.to(dtype), torch.randn(problem.out_channels, device=problem.device, dtype=dtype))

        def call(operands: tuple[Tensor, ...] = operands) -> Tensor:
            return F.linear(*operands)

        found[name] = recorded(call, problem.device)
    return found


def onednn_contender(problem: Problem) -> dict[str, Contender]:
    """oneDNN's int8 matrix product with bias through torch."""
    x = torch.quantize_per_tensor(torch.rand(problem.batch, problem.in_channels), 1 / 255, 0, torch.quint8)
    w = torch.quantize_per_tensor(torch.randn(problem.out_channels, problem.in_channels), 0.02, 0, torch.qint8)
    weights = torch.ops.quantized.linear_prepack(w, torch.randn(problem.out_channels))
    return {"oneDNN int8": lambda: torch.ops.quantized.linear(x, weights, 0.05, 0)}


def bytes_moved(problem: Problem, w_bits: int, a_bits: int, out_bits: int) -> float:
    """Input, weights and output, read or written once."""
    rows, inputs, outputs = problem.batch, problem.in_channels, problem.out_channels
    return (rows * inputs * a_bits + inputs * outputs * w_bits + rows * outputs * out_bits) / 8


def cases(args: argparse.Namespace) -> Iterator[Case]:
    widths = {"torch float32": 32, "torch bfloat16": 16, "torch float16": 16, "oneDNN int8": 8}
    for w_bits, a_bits in bit_pairs(args):
        for linear, _ in layers(args.networks, nn.Linear):
            size = (args.batch, 1, 1, linear.in_features, linear.out_features)
            problem = Problem("bitlinear", *size, w_bits=w_bits, a_bits=a_bits, device=args.device)
            ours = layer(problem, args.threads)
            theirs = torch_contenders(problem)
            if args.device == "cpu":
                theirs |= onednn_contender(problem)
            moved = {name: bytes_moved(problem, widths[name], widths[name], widths[name]) for name in theirs}
            moved |= {name: bytes_moved(problem, w_bits, a_bits, 32) for name in ours}
            yield Case(problem, ours | theirs, moved, 2 * problem.macs)


def main() -> None:
    args = arguments("bitlinear")
    require_backend(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.quantized.engine = "onednn"
    names = ("OpenVINO int8", "ONNX Runtime int8") if args.device == "cpu" else ("torch TF32", "torchao", "gemlite")
    run("bitlinear", cases(args), args, dict.fromkeys(names, "not timed by this benchmark"))


if __name__ == "__main__":
    main()
