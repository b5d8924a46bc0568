"""bitconv2d on the convolutions of real networks, against torch float32, bfloat16 (float16 on a GPU) and oneDNN int8.

Codes in, codes out: the lowest code is 0, so the quantizer is the ReLU that the others have as well.

python benchmarks/bench_bitconv2d.py --networks resnet18 preresnet20 --batch 1 --threads 1 --save
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import torch
from common import Case, Contender, arguments, bit_pairs, layer, layers, recorded, require_backend, run, torch_dtypes
from torch import Tensor, nn
from torch.nn import functional as F

from lbs_kernels.program.problem import Problem


def problems(networks: list[str], batch: int, w_bits: int, a_bits: int, device: str) -> Iterator[Problem]:
    """Distinct convolutions; the network's first one keeps 8 bits and stands for the stem."""
    for conv, (_, channels, height, width) in layers(networks, nn.Conv2d):
        bits = (8, 8) if channels <= 3 else (w_bits, a_bits)
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        yield Problem("bitconv2d", batch, height, width, channels, conv.out_channels, *geometry, *bits, device=device)


def torch_contenders(problem: Problem) -> dict[str, Contender]:
    """The same layer with bias and ReLU in torch, channels last."""
    device = problem.device
    x = torch.randn(problem.batch, problem.in_channels, problem.height, problem.width, device=device)
    w_shape = (problem.out_channels, problem.in_channels // problem.groups, *problem.kernel)
    w, bias = torch.randn(w_shape, device=device), torch.randn(problem.out_channels, device=device)
    found: dict[str, Contender] = {}
    for name, dtype in torch_dtypes(device).items():
        xd, wd = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, w))
        bd = bias.to(dtype)

        def call(xd: Tensor = xd, wd: Tensor = wd, bd: Tensor = bd) -> Tensor:
            y = F.conv2d(xd, wd, bd, problem.stride, problem.padding, problem.dilation, problem.groups)
            return y.relu_()

        found[name] = recorded(call, device)
    return found


def onednn_contender(problem: Problem) -> dict[str, Contender]:
    """oneDNN's int8 convolution with bias and ReLU through torch."""
    x = torch.quantize_per_tensor(
        torch.rand(problem.batch, problem.in_channels, problem.height, problem.width), 1 / 255, 0, torch.quint8
    ).contiguous(memory_format=torch.channels_last)
    w_shape = (problem.out_channels, problem.in_channels // problem.groups, *problem.kernel)
    w = torch.quantize_per_tensor(torch.randn(w_shape), 0.02, 0, torch.qint8)
    geometry = (list(problem.stride), list(problem.padding), list(problem.dilation), problem.groups)
    weights = torch.ops.quantized.conv2d_prepack(w, torch.randn(problem.out_channels), *geometry)
    return {"oneDNN int8": lambda: torch.ops.quantized.conv2d_relu(x, weights, 0.05, 0)}


def bytes_moved(problem: Problem, w_bits: int, a_bits: int) -> float:
    """Input, weights and output, read or written once."""
    pixels = problem.batch * problem.height * problem.width * problem.in_channels
    outputs = problem.rows * problem.out_channels
    return ((pixels + outputs) * a_bits + problem.out_channels * problem.reduction * w_bits) / 8


def cases(args: argparse.Namespace) -> Iterator[Case]:
    widths = {"torch float32": 32, "torch bfloat16": 16, "torch float16": 16, "oneDNN int8": 8}
    found = (problems(args.networks, args.batch, *bits, args.device) for bits in bit_pairs(args))
    for problem in dict.fromkeys(itertools.chain.from_iterable(found)):  # the 8-bit stem comes once
        ours = layer(problem, args.threads)
        theirs = torch_contenders(problem)
        if args.device == "cpu":
            theirs |= onednn_contender(problem)
        moved = {name: bytes_moved(problem, widths[name], widths[name]) for name in theirs}
        moved |= {name: bytes_moved(problem, problem.w_bits, problem.a_bits) for name in ours}
        yield Case(problem, ours | theirs, moved, 2 * problem.macs)


def main() -> None:
    args = arguments("bitconv2d")
    require_backend(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.quantized.engine = "onednn"
    names = ("OpenVINO int8", "ONNX Runtime int8")
    if args.device != "cpu":
        names = ("torch TF32", "torch.compile max-autotune")
    run("bitconv2d", cases(args), args, dict.fromkeys(names, "not timed by this benchmark"))


if __name__ == "__main__":
    main()
