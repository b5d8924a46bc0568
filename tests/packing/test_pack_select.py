"""Concatenations, slices, shuffles and repeated pixels lie inside regions: one region for each family of networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pack_nets
import pytest
import torch
from test_pack_exact import frozen
from test_pack_verify import damaged
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
from lbs_kernels.program.steps import Program, SelectStep

SHAPE = (3, 12, 8)


def block(inputs: int, filters: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters), nn.ReLU())


class Family(nn.Module):
    """A stem of 9 channels, what makes the family, a mean and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 9, 3)
        self.fc = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(self.stem(x)).mean((2, 3)))

    def inner(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Dense(Family):
    """Every layer reads all that was made before it, through a norm of its own; a transition halves the image."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(9 + 5 * place) for place in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(9 + 5 * place, 5, 3, padding=1, bias=False) for place in range(3))
        self.transition = nn.Conv2d(24, 12, 1)
        self.last = block(12, 10, 3)

    def inner(self, x: Tensor) -> Tensor:
        made = [x]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            made.append(conv(torch.relu(norm(torch.cat(made, 1)))))
        x = F.avg_pool2d(self.transition(torch.relu(self.norms[3](torch.cat(made, 1)))), 2)
        return self.last(x)


class GrowingDense(Dense):
    """The same, joining what is new to one tensor; its sum is read besides."""

    def inner(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(torch.relu(norm(x)))], dim=1)
        return torch.relu(self.norms[3](x)) + x


class Fire(Family):
    """Squeezed, then widened by two kernels side by side; a maximum between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.ModuleList([block(9, 4), block(18, 6)])
        self.one = nn.ModuleList([block(4, 10), block(6, 7)])
        self.three = nn.ModuleList([block(4, 8, 3), block(6, 9, 3)])
        self.last = nn.Conv2d(16, 7, 1)

    def inner(self, x: Tensor) -> Tensor:
        for place in range(2):
            x = self.squeeze[place](x)
            x = torch.cat((self.one[place](x), self.three[place](x)), 1)
            if place == 0:
                x = F.max_pool2d(x, 3, 2, 1)
        return torch.relu(self.last(x))


class Inception(Family):
    """Four branches of one value, a maximum in front of one, read by two layers and by a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = block(9, 8), nn.Sequential(block(9, 3), block(3, 9, 3))
        self.five, self.behind = nn.Sequential(block(9, 3), block(3, 5, 5)), block(9, 4)
        self.next, self.other = block(26, 8), block(26, 4, 3, 2)

    def inner(self, x: Tensor) -> Tensor:
        pooled = self.behind(F.max_pool2d(x, 3, 1, 1))
        x = torch.concat([self.one(x), self.three(x), self.five(x), pooled], dim=-3)
        return torch.cat([F.max_pool2d(x, 2), self.other(x), F.avg_pool2d(self.next(x), 2)], 1)


def shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class Shuffle(Family):
    """Half of the channels pass by a depthwise branch; both are shuffled together."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = block(9, 12)
        self.branches = nn.ModuleList(
            nn.Sequential(block(6, 6), block(6, 6, 3, groups=6)[:2], block(6, 6)) for _ in range(3)
        )
        self.last = block(12, 11)

    def inner(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for branch in self.branches:
            left, right = x.chunk(2, dim=1)
            x = shuffled(torch.cat((left, branch(right)), dim=1), 2)
        return self.last(x)


class ShuffleModule(Shuffle):
    """The same by torch's own module, slices, and a grouped convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(3)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)

    def inner(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        half = x.shape[1] // 2
        x = torch.cat((self.branches[0](x[:, half:]), x[:, :half]), 1)
        x = torch.relu(self.grouped(self.shuffle(x)))
        return self.last(torch.cat([self.branches[1](x[:, ::2]), x[:, 1::2]], 1))


class Ghost(Family):
    """Half of the filters are cheap ones of the other half; more are made than are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = block(9, 7), block(7, 7, 3, groups=7)
        self.last = nn.Conv2d(13, 9, 3, padding=1)

    def inner(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        y = torch.cat([y, self.cheap(y)], dim=1)[:, :13, :, :]
        return self.last(y) + x


class UNet(Family):
    """Down, up by repeated pixels, and joined with what was there before, image included."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = block(9, 12, 3, 2), block(12, 16, 3, 2)
        self.up, self.joined, self.last = nn.Upsample(scale_factor=2), block(28, 8, 3), block(20, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        top = self.stem(x)
        down = self.down(top)
        y = self.joined(torch.cat([self.up(self.deep(down)), down], 1))
        y = torch.cat([top, F.interpolate(y, size=top.shape[2:]), x], 1)
        return self.fc(self.last(y).mean((2, 3)))


FAMILIES: list[type[Family]] = [Dense, GrowingDense, Fire, Inception, Shuffle, ShuffleModule, Ghost, UNet]


def quantized(make: type[Family], bits: int = 4) -> nn.Module:
    torch.manual_seed(4)
    model = make()
    model(torch.zeros(1, *SHAPE))
    return pack_nets.quantized(model, SHAPE, bits, bits)


@pytest.mark.parametrize("make", FAMILIES)
def test_a_family_is_one_region(make: type[Family], tmp_path: Path) -> None:
    model = quantized(make)
    packed = pack_nets.check_equal(model, SHAPE)
    assert packed.kept_float == ()
    assert len(packed.programs) == 1
    x = pack_nets.images(5, SHAPE, 9)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
    packed.save(tmp_path / "family.lbs.safetensors")
    assert torch.equal(lbs.load(tmp_path / "family.lbs.safetensors")(x), packed(x))


def forms(make: type[Family]) -> list[set[str]]:
    """Of every selection, the forms of what it reads."""
    (program,) = lbs.pack(quantized(make), verify=False).programs
    steps = [step for step in program.steps if isinstance(step, SelectStep)]
    return [{program.tensors[index].form for index in step.inputs} for step in steps]


@pytest.mark.parametrize("make", [Fire, UNet])
def test_codes_pass_where_layers_alone_read_them(make: type[Family]) -> None:
    assert forms(make) == [{"codes"}] * 2


def test_streams_are_read_where_norms_or_parts_of_them_are() -> None:
    assert forms(Dense) == [{"stream"}] * 3
    assert forms(Shuffle) == [{"stream"}] * 4  # one for each branch's half, and the last


@pytest.mark.parametrize("make", FAMILIES)
def test_any_widths_and_filters_that_are_cut(make: type[Family]) -> None:
    torch.manual_seed(4)
    model = make()
    model(torch.zeros(1, *SHAPE))
    model = frozen(model, SHAPE, 3)
    packed = pack_nets.check_equal(model, SHAPE)
    assert len(packed.programs) == 1
    x = pack_nets.images(5, SHAPE, 9)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


@pytest.mark.parametrize("make", [Dense, Shuffle, UNet])
def test_streams_in_half_precision(make: type[Family]) -> None:
    pack_nets.check_equal(quantized(make), SHAPE, stream_dtype="bfloat16")


@pytest.mark.parametrize(("make", "name"), [(Shuffle, "getitem_7"), (UNet, "cat_1@last.0.input")])
def test_a_channel_that_is_taken_for_another_is_found(make: type[Family], name: str) -> None:
    def change(program: Program, blob: Tensor) -> Program:
        steps = list(program.steps)
        place = next(index for index, step in enumerate(steps) if step.name == name)
        step = steps[place]
        assert isinstance(step, SelectStep)
        channels = list(step.channels or range(sum(program.tensors[index].channels for index in step.inputs)))
        channels[1], channels[2] = channels[2], channels[1]
        steps[place] = replace(step, channels=tuple(channels))
        return replace(program, steps=tuple(steps))

    model = quantized(make)
    report = lbs.verify(model, damaged(lbs.pack(model), change), pack_nets.images(4, SHAPE))
    assert report.first_layer == name


def test_bytes_of_an_image_are_normalised_among_other_channels() -> None:
    model = quantized(UNet)
    packed = lbs.pack(model, normalize=((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    assert packed.kept_float == ()
    images = torch.randint(0, 256, (3, *SHAPE), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    assert lbs.verify(model, packed, images).ok
