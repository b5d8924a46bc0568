"""Networks that make images larger are one region: transposed convolutions, pixels moved, products with a constant."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pack_nets
import pytest
import torch
from test_pack_exact import frozen
from test_pack_verify import damaged
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
from lbs.convolutions import TransposedConv2d, as_convolution, as_torch
from lbs.packing.transposed import NoWindow, parts_of
from lbs.quant.layers import QuantConvTranspose2d
from lbs.search.layers import SearchConvTranspose2d
from lbs.search.prepare import conversion_report
from lbs_kernels.program.steps import ConvStep, Program, QuantPackStep, SelectStep

SHAPE = (3, 7, 6)


def conv(inputs: int, filters: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, 3, padding=1)


def between(*parts: nn.Module, inputs: int, stem: int = 8) -> nn.Sequential:
    """Parts between a convolution and a ReLU, and a convolution of what they make."""
    return nn.Sequential(conv(3, stem), nn.ReLU(), *parts, conv(inputs, 5))


def one_region(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Any:
    packed = pack_nets.check_equal(model, shape)
    assert len(packed.regions) == 1
    assert packed.kept_float == ()
    return packed


# kernel, stride, padding, output padding, then options
WINDOWS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "as_many_taps_everywhere": ((2, 2), {}),
    "overlapping": ((4, 2, 1), {}),
    "unequal_taps": ((3, 2, 1, 1), {}),
    "unequal_and_cropped": ((5, 3, 2, 1), {}),
    "no_stride": ((3, 1, 1), {}),
    "pixels_of_the_bias_alone": ((1, 2), {}),
    "gaps_on_one_side": (((1, 3), (2, 2), (0, 1)), {}),
    "a_column_of_the_bias_alone": ((2, 2, 0, 1), {}),
    "sides_that_differ": (((4, 3), (2, 1), (1, 1)), {}),
    "more_padding_than_taps": ((4, 2, 3), {}),
    "groups": ((4, 2, 1), {"groups": 2}),
    "groups_of_unequal_taps": ((3, 2, 1), {"groups": 4}),
    "depthwise": ((4, 2, 1), {"groups": 8}),
    "dilated": ((3, 2, 1, 1), {"dilation": 2}),
    "dilated_apart": ((3, 2, 2), {"dilation": 3}),
    "no_bias": ((3, 2), {"bias": False}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str) -> None:
    window, options = WINDOWS[name]
    filters = 8 if name == "depthwise" else 12
    model = between(
        nn.ConvTranspose2d(8, filters, *window, **options), nn.BatchNorm2d(filters), nn.ReLU(), inputs=filters
    )
    packed = one_region(pack_nets.quantized(model, SHAPE))
    steps = [step for step in packed.programs[0].steps if step.name.startswith("2") and isinstance(step, ConvStep)]
    assert (len(steps) == 1) is (name not in UNEQUAL)


UNEQUAL = {
    *("unequal_taps", "unequal_and_cropped", "pixels_of_the_bias_alone", "gaps_on_one_side", "groups_of_unequal_taps"),
    *("dilated", "dilated_apart", "no_bias"),
}


@pytest.mark.parametrize("bits", [(2, 2), (4, 8), (8, 8)])
@pytest.mark.parametrize("window", [(2, 2), (3, 2, 1, 1)])
def test_grids_with_and_without_a_zero(bits: tuple[int, int], window: tuple[int, ...]) -> None:
    model = between(nn.ConvTranspose2d(8, 12, *window), nn.ReLU(), inputs=12)
    one_region(pack_nets.quantized(model, SHAPE, *bits))


BEHIND: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "slopes_of_channels": (lambda: [nn.PReLU(12)], 12),
    "activation": (lambda: [nn.BatchNorm2d(12), nn.SiLU()], 12),
    "maximum": (lambda: [nn.ReLU(), nn.MaxPool2d(2)], 12),
    "another": (lambda: [nn.ReLU(), nn.ConvTranspose2d(12, 6, 2, 2), nn.ReLU()], 6),
    "constant": (lambda: [pack_nets.Call(lambda x: 0.3 * x), nn.ReLU()], 12),
    "shuffle": (lambda: [nn.PixelShuffle(2), nn.ReLU()], 3),
    "crop": (lambda: [nn.ReLU(), pack_nets.Call(lambda x: x[:, :, 1:-2, 3:])], 12),
}


@pytest.mark.parametrize("window", [(2, 2), (3, 2)])
@pytest.mark.parametrize("name", BEHIND)
def test_what_follows(name: str, window: tuple[int, ...]) -> None:
    parts, inputs = BEHIND[name]
    model = between(nn.ConvTranspose2d(8, 12, *window), *parts(), inputs=inputs)
    one_region(pack_nets.quantized(model, SHAPE))


class Added(nn.Module):
    """A transposed convolution whose floats a sum, a gate and a norm of others' read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.norm = conv(3, 8), nn.ConvTranspose2d(8, 12, 4, 2, 1), nn.BatchNorm2d(12)
        self.inner, self.last = conv(12, 12), conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(torch.relu(self.stem(x)))
        y = self.inner(torch.relu(self.norm(y))) + y
        return self.last(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))


def test_floats_are_read() -> None:
    pack_nets.check_equal(pack_nets.quantized(Added(), SHAPE), SHAPE)


class UNet(nn.Module):
    """Two levels down and up, each joined with what had its size."""

    def __init__(self, *window: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(self._block(i, o) for i, o in ((3, 8), (8, 12), (12, 16)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, *window) for i, o in ((16, 12), (12, 8)))
        self.joined = nn.ModuleList(self._block(i, o) for i, o in ((24, 12), (16, 8)))
        self.last = nn.Conv2d(8, 4, 1)

    @staticmethod
    def _block(inputs: int, filters: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for place, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if place else x)
            kept.append(x)
        for up, block, other in zip(self.up, self.joined, (kept[1], kept[0]), strict=True):
            x = block(torch.cat([up(x), other], 1))
        return self.last(x)


@pytest.mark.parametrize("window", [(2, 2), (4, 2, 1), (3, 2, 1, 1)])
def test_u_net_is_one_region_and_comes_back(window: tuple[int, ...], tmp_path: Path) -> None:
    shape = (3, 12, 16)
    packed = one_region(frozen(UNet(*window), shape, 3), shape)
    packed.save(tmp_path / "network.lbs.safetensors")
    x = pack_nets.images(3, shape, 5)
    assert torch.equal(lbs.load(tmp_path / "network.lbs.safetensors")(x), packed(x))


class Residual(nn.Module):
    def __init__(self, filters: int, scale: float) -> None:
        super().__init__()
        self.body, self.scale = nn.Sequential(conv(filters, filters), nn.ReLU(), conv(filters, filters)), scale

    def forward(self, x: Tensor) -> Tensor:
        made = self.body(x).mul(self.scale)
        made += x
        return made


class SuperResolution(nn.Module):
    """Residual blocks whose bodies count a tenth, then pixels that are made of channels."""

    def __init__(self, scale: float = 0.1, factor: int = 2, filters: int = 8) -> None:
        super().__init__()
        self.head = conv(3, filters)
        self.body = nn.Sequential(Residual(filters, scale), Residual(filters, scale), conv(filters, filters))
        self.tail = nn.Sequential(conv(filters, filters * factor**2), nn.PixelShuffle(factor), conv(filters, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(self.body(x) + x)


@pytest.mark.parametrize(("scale", "factor"), [(0.1, 2), (-0.3, 3), (1, 4)])
def test_super_resolution_is_one_region_and_comes_back(scale: float, factor: int, tmp_path: Path) -> None:
    packed = one_region(frozen(SuperResolution(scale, factor), SHAPE, 4))
    # The image is encoded and, for the constant, stored; nothing else reads a stream to write another.
    copies = [step for step in packed.programs[0].steps if isinstance(step, QuantPackStep)]
    assert len(copies) == (1 if scale == 1 else 2)
    packed.save(tmp_path / "network.lbs.safetensors")
    x = pack_nets.images(3, SHAPE, 5)
    assert torch.equal(lbs.load(tmp_path / "network.lbs.safetensors")(x), packed(x))


def test_a_constant_in_bfloat16_is_rounded_once() -> None:
    model = pack_nets.quantized(SuperResolution(), SHAPE)
    packed = lbs.pack(model, stream_dtype="bfloat16")
    assert len(packed.regions) == 1
    assert lbs.verify(model, packed, pack_nets.images(3, SHAPE)).ok


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "behind": lambda x: x * 0.7,
    "in_front": lambda x: -0.7 * x,
    "clamped_before": lambda x: torch.relu(x) * 3,
    "twice": lambda x: (x * 0.7) * 0.3,
    "with_an_activation": lambda x: F.silu(x * 0.7) * 2,
    "one": lambda x: torch.mul(x, 1.0),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_products_with_constants(name: str) -> None:
    one_region(pack_nets.quantized(between(conv(8, 12), pack_nets.Call(CONSTANTS[name]), inputs=12), SHAPE))
    packed = pack_nets.quantized(
        nn.Sequential(pack_nets.Call(CONSTANTS[name]), conv(3, 6), nn.ReLU(), conv(6, 2)), SHAPE
    )
    pack_nets.check_equal(packed, SHAPE)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.scale = conv(3, 8), conv(8, 3), nn.Parameter(torch.tensor([0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) * self.scale))


def test_a_learned_number_is_a_constant() -> None:
    one_region(pack_nets.quantized(Learned(), SHAPE))


def test_a_constant_that_is_none_stays_in_float() -> None:
    model = pack_nets.quantized(
        between(conv(8, 12), pack_nets.Call(lambda x: x * float("inf")), nn.ReLU6(), inputs=12), SHAPE
    )
    assert [name for name, _ in lbs.pack(model).kept_float] == ["mul"]


def depth_to_space(x: Tensor) -> Tensor:
    """Blocks first among the channels, where torch has them last."""
    n, c, h, w = x.shape
    return x.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "shuffle": (lambda x: F.pixel_shuffle(x, 2), 3, 1),
    "unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 48, 1),
    "shuffle_by_hand": (depth_to_space, 3, 1),
    "focus": (focus, 48, 1),
    "crop": (lambda x: x[:, :, 1:-1, 2:], 12, 1),
    "channels_and_pixels": (lambda x: F.pixel_shuffle(x[:, 4:], 2), 2, 1),
    "channels_and_rows": (lambda x: x.view(-1, 6, 2, 8, 6).transpose(2, 3).reshape(-1, 12, 8, 6), 12, 1),
    "several": (lambda x: torch.cat([F.pixel_shuffle(x, 2), F.interpolate(x, scale_factor=2)], 1), 15, 3),
    "there_and_back": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)[:, ::2], 6, 3),
}


@pytest.mark.parametrize("name", MOVES)
def test_pixels_are_moved(name: str) -> None:
    function, inputs, count = MOVES[name]
    shape = (3, 8, 6)
    packed = one_region(
        pack_nets.quantized(between(conv(8, 12), nn.ReLU(), pack_nets.Call(function), inputs=inputs), shape), shape
    )
    assert sum(isinstance(step, SelectStep) for step in packed.programs[0].steps) == count


def test_what_no_block_says_stays_in_float() -> None:
    turned = between(conv(8, 12), pack_nets.Call(lambda x: x.transpose(2, 3)), inputs=12)
    packed = lbs.pack(pack_nets.quantized(turned, (3, 9, 9)))
    assert [name for name, _ in packed.kept_float] == ["transpose"]


def test_modules_of_torch_move_pixels() -> None:
    model = nn.Sequential(nn.PixelUnshuffle(2), conv(12, 16), nn.ReLU(), conv(16, 36), nn.PixelShuffle(3))
    one_region(pack_nets.quantized(model, (3, 8, 6)), (3, 8, 6))


def test_another_weight_is_found_in_every_part() -> None:
    for window in ((4, 2, 1), (3, 2, 1, 1)):
        model = pack_nets.quantized(between(nn.ConvTranspose2d(8, 12, *window), nn.ReLU(), inputs=12), SHAPE)
        packed = lbs.pack(model)
        keys = [key for key in packed.programs[0].arrays if key.startswith("2") and key.endswith("planes")]
        assert len(keys) == (1 if window[0] == 4 else 4)
        for key in keys:
            wrong = damaged(packed, functools.partial(flip, key))
            report = lbs.verify(model, wrong, pack_nets.images(2, SHAPE))
            assert "2: weight codes: 1 of" in str(report.first_difference)


def flip(key: str, program: Program, blob: Tensor) -> None:
    program.array(blob, key)[0, 2, 0, 0] ^= 1


def searched(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Any:
    return lbs.prepare(pack_nets.unsettle(model.eval()), pack_nets.images(4, shape))


def test_filters_of_a_transposed_convolution_are_pruned_with_their_readers() -> None:
    model = searched(between(nn.ConvTranspose2d(8, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8), inputs=8))
    up = model.get_submodule("2")
    assert isinstance(up, SearchConvTranspose2d)
    assert dict(conversion_report(model))["2"] == "bits (2, 4, 8); filters in 4 groups"
    plan = model.lbs_record.plan
    kept = tuple(range(4, 12))
    layers = tuple(replace(layer, kept=kept) if layer.name == "2" else layer for layer in plan.layers)
    small = lbs.freeze(model, replace(plan, layers=layers))
    fixed = small.get_submodule("2")
    assert isinstance(fixed, QuantConvTranspose2d)
    assert fixed.weight.shape == (8, 8, 2, 2)
    assert torch.equal(fixed.weight, up.weight[4:12])
    one_region(lbs.calibrate(small, [pack_nets.images(4, SHAPE)], bits=None).eval())


def test_every_filter_has_a_range() -> None:
    model = pack_nets.quantized(between(nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=2), inputs=12), SHAPE)
    assert model.get_submodule("2").w_range.shape == (12,)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_convolution_is_the_layer_and_back(groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups)
    made, x = as_convolution(layer), torch.randn(2, 4, 5, 3)
    assert made.weight.shape == (6, 4 // groups, 3, 2)
    with torch.no_grad():
        assert torch.equal(made(x), layer(x))
        assert torch.equal(made(x, [10, 10]), layer(x, [10, 10]))
        assert torch.equal(as_torch(made)(x), layer(x))
    with pytest.raises(RuntimeError, match="output padding"):
        made(x, [12, 10])


def test_one_whose_size_is_given_stays_in_float() -> None:
    up = nn.ConvTranspose2d(8, 12, 3, 2)
    model = between(Sized(up), inputs=12)
    quantized = pack_nets.quantized(model, SHAPE)
    ((name, reason),) = quantized.lbs_record.unconverted
    assert (name, reason.split(";")[0]) == ("2.up", "the forward pass gives it an output_size")
    assert type(quantized.get_submodule(name)) is nn.ConvTranspose2d


class Sized(nn.Module):
    def __init__(self, up: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=[16, 14])


class Tied(nn.Module):
    """An autoencoder that decodes with the weights it encodes with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = conv(3, 8), nn.ConvTranspose2d(8, 8, 3, padding=1, bias=False), conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.conv2d(torch.relu(self.first(x)), self.inner.weight, padding=1)
        return self.last(self.inner(hidden))


def test_a_weight_that_is_read_elsewhere_keeps_its_form() -> None:
    model = Tied().eval()
    quantized = lbs.uniform(model, pack_nets.images(2, SHAPE))
    assert quantized.lbs_record.unconverted == (("inner", "its weight is used beside it as well"),)
    assert torch.equal(quantized.inner.weight, model.inner.weight)


def test_layers_of_volumes_are_named() -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.volume, self.last = conv(3, 8), nn.Conv3d(1, 1, 3, padding=1), conv(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.volume(self.first(x).unsqueeze(1)).squeeze(1))

    model = Volume().eval()
    quantized = pack_nets.quantized(model, SHAPE)
    assert quantized.lbs_record.unconverted == (("volume", "Conv3d has no quantized form"),)
    assert ("volume", "left in float: Conv3d has no quantized form") in conversion_report(searched(Volume()))
    packed = lbs.pack(quantized)
    assert dict(packed.kept_float)["volume"] == "Conv3d has no quantized form"
    assert "in float: volume: Conv3d has no quantized form" in str(lbs.explain(packed))


def test_signed_codes_are_refused() -> None:
    model = pack_nets.quantized(between(nn.ConvTranspose2d(8, 12, 2, 2), inputs=12), SHAPE)
    model.get_submodule("2").quantizer.signed = True
    with pytest.raises(lbs.errors.GraphError, match="2 pads signed activations"):
        lbs.pack(model)


def test_outputs_far_beyond_what_taps_see_are_refused() -> None:
    layer = TransposedConv2d(1, 1, 2, stride=2, dilation=7, output_padding=(6, 6))
    with pytest.raises(NoWindow, match="pixels beyond an edge, and the taps they see"):
        parts_of(layer, (3, 3), (18, 18))
