"""Residual streams of 8 bits: which values they are, trained and packed alike, one tensor with what layers read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pack_nets
import pytest
import torch
from torch import Tensor, nn

import lbs
import lbs.models
from lbs.packing.explain import streams_of_codes
from lbs.quant import codec
from lbs.quant.quantizers import ActivationQuantizer, StreamQuantizer
from lbs.search.prepare import conversion_report
from lbs.search.streams import NAME
from lbs_kernels.errors import GraphError, PlanError
from lbs_kernels.program.steps import PoolStep, Program

SHAPE = (3, 20, 18)


def conv(channels: int, filters: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(filters))


class Block(nn.Module):
    """Basic block, with or without a shortcut convolution and the ReLU behind the sum."""

    def __init__(self, channels: int, filters: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.first, self.second = conv(channels, filters, 3, stride), conv(filters, filters)
        self.short = conv(channels, filters, 1, stride) if stride > 1 or channels != filters else nn.Identity()
        self.act = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        return self.act(y + self.short(x))


class Bottleneck(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList([conv(channels, inner, 1), conv(inner, inner, 3), conv(inner, channels, 1)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for step in self.steps[:2]:
            y = torch.relu(step(y))
        return torch.relu(x + self.steps[2](y))


class Inverted(nn.Module):
    """Expanded, by depth, projected, without a ReLU behind: codes with a zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.body = nn.Sequential(
            conv(channels, wide, 1), nn.ReLU6(), conv(wide, wide, 3, groups=wide), nn.ReLU6(), conv(wide, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module, channels: int = 12, pooled: bool = False, classes: int = 7) -> None:
        super().__init__()
        self.stem = conv(3, channels, 3, 2 if pooled else 1)
        self.pool = nn.MaxPool2d(3, 2, 1) if pooled else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        last = [m for m in self.blocks.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
        self.fc = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(torch.relu(self.stem(x))))
        return self.fc(x.mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: Net(Block(12, 12), Block(12, 21, 2), Block(21, 21), channels=12),
    "stem": lambda: Net(Block(12, 12), Block(12, 12), pooled=True),
    "bottleneck": lambda: Net(Bottleneck(13, 6), Bottleneck(13, 6), pooled=True, channels=13),
    "inverted": lambda: Net(conv(12, 10), Inverted(10), Inverted(10), conv(10, 16, 1), nn.ReLU()),
    "linear sums": lambda: Net(Block(12, 12, relu=False), Block(12, 18, 2, relu=False), Block(18, 18)),
}


def made(name: str, w_bits: int, a_bits: int, streams: int = 8) -> nn.Module:
    torch.manual_seed(5)
    model = pack_nets.unsettle(NETS[name]().eval())
    calibration = pack_nets.images(8, SHAPE, 100)
    network = lbs.uniform(model, calibration, w_bits, a_bits, streams=streams)
    return lbs.calibrate(network, [calibration], norms="keep").eval()


def coded(program: Program) -> int:
    """Sums of codes."""
    return sum(step.emit.residual_step is not None for step in program.steps)


def between(program: Program) -> list[str]:
    """Streams that are not returned."""
    return [spec.name for i, spec in enumerate(program.tensors) if spec.form == "stream" and i not in program.outputs]


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize("name", NETS)
def test_packed_equals_the_model(name: str, bits: tuple[int, int]) -> None:
    network = made(name, *bits)
    packed = pack_nets.check_equal(network, SHAPE)
    (program,) = packed.programs
    sums = sum(isinstance(m, Block | Bottleneck | Inverted) for m in network.modules())
    assert coded(program) == sums
    assert len(between(program)) == 1  # what the mean reads
    with torch.no_grad():
        x = pack_nets.images(5, SHAPE, 6)
        assert torch.equal(network(x), packed(x))
    standing = [c.step for step in program.steps for c in step.emit.consumers if c.step is not None]
    assert bool(standing) == (bits[1] < 8)
    assert any(spec.zero for spec in program.tensors if spec.name in streams_of_codes(program)) == (
        name in ("basic", "inverted", "linear sums")
    )


def test_layers_of_8_bits_read_what_sums_read() -> None:
    program = made_program("stem", 8, 8)
    pool = next(step for step in program.steps if isinstance(step, PoolStep) and step.kind == "max")
    tensor = pool.emit.consumers[0].tensor
    assert program.tensors[pool.input].form == "codes"  # the stem writes bytes
    readers = [step.name for step in program.steps if tensor in (step.input, step.emit.residual)]
    assert readers == ["blocks.0.first.0", "blocks.0.second.0"]
    assert sum(spec.form == "codes" for spec in program.tensors) == 7  # image, stem, pool, inside blocks, between, mean


def made_program(name: str, w_bits: int, a_bits: int) -> Program:
    (program,) = lbs.pack(made(name, w_bits, a_bits)).programs
    return program


def test_all_codes_are_encoded_to_themselves() -> None:
    q = torch.arange(256, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    ranges = torch.cat(
        [torch.rand(400, generator=generator) * 10, 10 ** (torch.rand(400, generator=generator) * 60 - 30)]
    )
    for v in ranges:
        for zero in (0, 1, 128, 255):
            coding = codec.Coding("unsigned", zero, 255) if zero else codec.UNSIGNED
            assert torch.equal(codec.activation_codes(codec.activation_values(q, v, 8, coding), v, 8, coding), q)


def test_filters_of_inner_layers_are_cut() -> None:
    torch.manual_seed(5)
    calibration = pack_nets.images(8, SHAPE, 100)
    model = lbs.prepare(pack_nets.unsettle(NETS["basic"]().eval()), calibration, streams=8)
    lbs.calibrate(model, [calibration])
    plan = model.lbs_record.plan
    layers = []
    for index, layer in enumerate(plan.layers):
        bits = {} if layer.name in plan.edges else {"w_bits": 4, "a_bits": (4, 8)[index % 2]}
        kept = {"kept": (0, 1, 2, 3, 8, 9, 10, 11)} if layer.name in ("blocks.0.first.0", "blocks.1.first.0") else {}
        layers.append(replace(layer, **bits, **kept))
    network = lbs.calibrate(lbs.freeze(model, replace(plan, layers=tuple(layers))), [calibration]).eval()
    shared = [m.quantizer for m in pack_nets.layers_of(network).values() if isinstance(m.quantizer, StreamQuantizer)]
    assert {quantizer.bits for quantizer in shared} == {8}
    own = [m.quantizer for m in pack_nets.layers_of(network).values() if type(m.quantizer) is ActivationQuantizer]
    assert {4, 8} == {quantizer.bits for quantizer in own}
    packed = pack_nets.check_equal(network, SHAPE)
    assert coded(packed.programs[0]) == 3


def test_streams_learn_and_survive_copies_and_state() -> None:
    network = made("stem", 8, 8)
    quantizers = [m for m in network.modules() if isinstance(m, StreamQuantizer)]
    assert len(quantizers) == 2
    before = [float(q.range.detach()) for q in quantizers]
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    network.train()(pack_nets.images(8, SHAPE, 3)).square().sum().backward()
    optimizer.step()
    assert all(float(q.range.detach()) != v for q, v in zip(quantizers, before, strict=True))
    network.eval()
    other = copy.deepcopy(network)
    held = [m for m in other.modules() if isinstance(m, StreamQuantizer)]
    layers = pack_nets.layers_of(other)
    assert layers["blocks.0.first.0"].quantizer is other.pool.stream_quantizer  # type: ignore[union-attr]
    assert not {id(q) for q in held} & {id(q) for q in quantizers}
    fresh = made("stem", 8, 8)
    fresh.load_state_dict(network.state_dict())
    x = pack_nets.images(3, SHAPE, 9)
    with torch.no_grad():
        assert torch.equal(fresh(x), network(x))
        assert torch.equal(lbs.freeze(network)(x), network(x))
        assert torch.equal(lbs.pack(fresh)(x), network(x))
    pack_nets.check_equal(network, SHAPE)


def test_what_stays_in_floats_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (conv(3 if i == 0 else 8, 8) for i in range(4))
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = x + self.b(torch.relu(x))  # its floats are read by the ReLU
            y = torch.relu(x)
            y = y + self.c(y)  # no module returns it
            z = y.relu().clone()
            return self.fc((self.d(y) + z).mean((2, 3)))

    example = pack_nets.images(4, SHAPE)
    network = lbs.uniform(Odd().eval(), example, 8, 8, streams=8)
    told = dict(row for row in conversion_report(network) if "residual" in row[1])
    assert told["a.1"] == "residual stream: floats, as relu reads its floats"
    assert "no module returns it that is called once" in told["relu_1"]
    assert not any(isinstance(m, StreamQuantizer) for m in network.modules())
    pack_nets.check_equal(lbs.calibrate(network, [example]).eval(), SHAPE)


def test_a_stream_that_somebody_reads_floats_of_is_kept_outside(tmp_path: Path) -> None:
    network = made("stem", 8, 8)
    network.pool.register_forward_hook(lambda module, args, output: torch.nn.functional.softplus(output))  # type: ignore[union-attr]
    packed = pack_nets.check_equal(network, SHAPE)
    assert len(packed.programs) == 2
    assert "reads its floats" in dict(packed.kept_float)[f"pool.{NAME}"]
    packed.save(tmp_path / "net.lbs.safetensors")
    x = pack_nets.images(2, SHAPE, 4)
    assert torch.equal(lbs.load(tmp_path / "net.lbs.safetensors")(x), packed(x))


def test_a_network_of_lines() -> None:
    class Line(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv1d(channels, channels, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.b(torch.relu(self.a(x))))

    class Lines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act = nn.Conv1d(3, 9, 5, padding=2), nn.ReLU()
            self.blocks = nn.Sequential(Line(9), Line(9))
            self.fc = nn.Linear(9, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.blocks(self.act(self.stem(x))).mean(2))

    torch.manual_seed(3)
    example = torch.randn(6, 3, 40)
    network = lbs.calibrate(lbs.uniform(Lines().eval(), example, 8, 8, streams=8), [example]).eval()
    packed = lbs.pack(network, example=example)
    assert coded(packed.programs[0]) == 2
    with torch.no_grad():
        assert torch.equal(packed(example), network(example))


def test_a_file_holds_them(tmp_path: Path) -> None:
    packed = lbs.pack(made("inverted", 8, 8))
    packed.save(tmp_path / "net.lbs.safetensors")
    x = pack_nets.images(2, SHAPE, 4)
    assert torch.equal(lbs.load(tmp_path / "net.lbs.safetensors")(x), packed(x))
    assert "residual streams of 8 bits: blocks_0_1" in str(lbs.explain(packed, rounds=1))


def test_quantize_says_how_many_streams_are_codes() -> None:
    torch.manual_seed(5)
    packed = lbs.quantize(NETS["stem"]().eval(), pack_nets.images(16, SHAPE), streams=8)
    assert dict(packed.report.rows())["streams"] == "2 of 2 residual ones are codes of 8 bits"
    assert coded(packed.programs[0]) == 2


def test_refusals() -> None:
    model, example = NETS["stem"]().eval(), pack_nets.images(2, SHAPE)
    with pytest.raises(PlanError, match="streams=4; residual streams have 8 bits"):
        lbs.uniform(model, example, streams=4)
    with pytest.raises(PlanError, match="never packed; leave streams= out"):
        lbs.prepare(model, example, lbs.SearchConfig(bits=(32,)), streams=8)
    with pytest.raises(PlanError, match="never packed; leave streams= out"):
        lbs.prepare(model, example, lbs.SearchConfig(pruning=False, trace=False), streams=8)
    network = made("stem", 8, 8)
    next(m for m in network.modules() if isinstance(m, StreamQuantizer)).range.data.fill_(float("nan"))
    with pytest.raises(GraphError, match="the step of its"):
        lbs.pack(network)
