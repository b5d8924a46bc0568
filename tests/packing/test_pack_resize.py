"""Bilinear interpolation lies inside regions: a segmentation network of each family is one region."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pack_nets
import pytest
import torch
from test_pack_exact import frozen
from test_pack_select import block
from test_pack_verify import damaged
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
from lbs.graph import trace
from lbs_kernels.program.steps import Program, ResizeStep

SHAPE = (3, 20, 12)


def resized(x: Tensor, like: Tensor, align: bool = False) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=align)


class Residual(nn.Module):
    """Widened, a depthwise kernel with holes, gated, narrowed; hard activations, as MobileNetV3 has them."""

    def __init__(self, inputs: int, filters: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        wide, self.adds = 2 * inputs, stride == 1 and inputs == filters
        depthwise = nn.Conv2d(wide, wide, 3, stride, dilation, dilation, groups=wide, bias=False)
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
            depthwise, nn.BatchNorm2d(wide), nn.Hardswish(),
        )  # fmt: skip
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.ReLU(), nn.Conv2d(4, wide, 1), nn.Hardsigmoid()
        )
        self.last = nn.Sequential(nn.Conv2d(wide, filters, 1, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y = self.last(y * self.excite(y))
        return x + y if self.adds else y


class Pyramid(nn.Module):
    """Branches of several dilations and one of the mean, which is spread over the pixels again."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.one = block(inputs, filters)
        self.wide = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, filters, 3, padding=d, dilation=d, bias=False), nn.BatchNorm2d(filters), nn.ReLU()
            )
            for d in (2, 3)
        )
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), block(inputs, filters))
        self.project = nn.Sequential(block(4 * filters, filters), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        found = [self.one(x), *(branch(x) for branch in self.wide), resized(self.mean(x), x)]
        return self.project(torch.cat(found, dim=1))


class DeepLab(nn.Module):
    """Dilated inverted residuals, a pyramid, and maps of classes as large as the image, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.early = Residual(8, 12, stride=2)
        self.late = nn.Sequential(Residual(12, 12), Residual(12, 16, dilation=2))
        self.pyramid = Pyramid(16, 10)
        self.head = nn.Sequential(block(10, 10, 3), nn.Conv2d(10, 5, 1))
        self.auxiliary = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early = self.early(self.stem(x))
        result = OrderedDict()
        result["out"] = resized(self.head(self.pyramid(self.late(early))), x)
        result["aux"] = resized(self.auxiliary(early), x)
        return result


class UNet(nn.Module):
    """Down by maxima, up by bilinear interpolation, padded to what was there before, joined with it."""

    def __init__(self, up: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.one, self.two, self.three = block(3, 9, 3), block(9, 13, 3), block(13, 16, 3)
        self.up, self.again = up(), up()
        self.join, self.last = block(29, 12, 3), block(21, 8, 3)
        self.classes = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        y = self.join(torch.cat([self.up(self.three(F.max_pool2d(two, 2))), two], 1))
        return self.classes(self.last(torch.cat([self.again(y), one], 1)))


class FeaturePyramid(nn.Module):
    """Maps of several sizes, each the sum of its own and of the next smaller one enlarged; three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([block(3, 8, 3), block(8, 12, 3, 2), block(12, 16, 3, 2)])
        self.across = nn.ModuleList(nn.Conv2d(count, 10, 1) for count in (8, 12, 16))
        self.smooth = nn.ModuleList(nn.Conv2d(10, 6, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        results: list[Tensor] = []
        top = self.across[2](maps[2])
        results.append(self.smooth[2](top))
        for place in (1, 0):
            height, width = maps[place].shape[2], maps[place].size(3)
            top = self.across[place](maps[place]) + F.interpolate(top, (height, width), None, "bilinear", True)
            results.append(self.smooth[place](top))
        return results


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "deeplab": DeepLab,
    "unet": lambda: UNet(lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "unet, corners aligned": lambda: UNet(lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    "pyramid": FeaturePyramid,
}


def quantized(name: str, bits: int = 4) -> nn.Module:
    torch.manual_seed(3)
    return pack_nets.quantized(NETWORKS[name](), SHAPE, bits, bits)


def resizes(packed: nn.Module) -> list[ResizeStep]:
    return [step for program in packed.programs for step in program.steps if isinstance(step, ResizeStep)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_segmentation_network_is_one_region(name: str, tmp_path: Path) -> None:
    packed = pack_nets.check_equal(quantized(name), SHAPE)
    assert packed.kept_float == ()
    assert len(packed.programs) == 1
    assert len(resizes(packed)) == 2
    x = pack_nets.images(5, SHAPE, 9)
    packed.save(tmp_path / "network.lbs.safetensors")
    pack_nets.assert_same(lbs.load(tmp_path / "network.lbs.safetensors")(x), packed(x))


@pytest.mark.parametrize("align", [False, True])
def test_modules_are_evaluated_as_they_are_packed(align: bool) -> None:
    upsample = nn.Upsample(scale_factor=2.6, mode="bilinear", align_corners=align)
    model = pack_nets.quantized(nn.Sequential(nn.Conv2d(3, 6, 3), upsample), SHAPE)
    packed, x = lbs.pack(model), pack_nets.images(5, SHAPE, 9)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
        torchs_own = F.interpolate(model[0](x), scale_factor=2.6, mode="bilinear", align_corners=align)
    assert torch.allclose(packed(x), torchs_own, atol=1e-5)
    assert not torch.equal(packed(x), torchs_own)


@pytest.mark.parametrize("name", ["unet", "deeplab"])
def test_any_widths_and_filters_that_are_cut(name: str) -> None:
    torch.manual_seed(3)
    model = frozen(NETWORKS[name](), SHAPE, 3)
    packed = pack_nets.check_equal(model, SHAPE)
    assert len(packed.programs) == 1


def test_filters_in_front_of_interpolation_can_go() -> None:
    graph = trace(NETWORKS["unet"]().eval(), pack_nets.images(2, SHAPE))
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 4, 1))
    assert trace(chain.eval(), pack_nets.images(2, SHAPE)).groups["0"].prunable
    assert not graph.groups["three.0"].prunable  # joined with others behind it


class Resized(nn.Module):
    """A layer, interpolation, a layer."""

    def __init__(self, resize: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.resize(self.first(x))))


FORMS: dict[str, Callable[[Tensor], Tensor] | nn.Module] = {
    "a size": lambda x: F.interpolate(x, (31, 7), mode="bilinear"),
    "one size": lambda x: F.interpolate(x, 9, mode="bilinear", align_corners=True),
    "a factor that divides nothing": lambda x: F.interpolate(x, scale_factor=1.37, mode="bilinear"),
    "the same, computed again": lambda x: F.interpolate(
        x, scale_factor=1.37, mode="bilinear", recompute_scale_factor=True
    ),
    "two factors": lambda x: F.interpolate(x, None, (0.5, 3.3), "bilinear", False),
    "corners and a factor": lambda x: F.interpolate(x, scale_factor=(2, 1.5), mode="bilinear", align_corners=True),
    "one row": lambda x: F.interpolate(x, (1, 24), mode="bilinear", align_corners=True),
    "an older name": lambda x: F.upsample(x, size=(9, 9), mode="bilinear", align_corners=False),
    "another older name": lambda x: F.upsample_bilinear(x, (9, 9)),
    "a size of sizes": lambda x: F.interpolate(x, (x.shape[2] * 2, x.size(3) // 2), mode="bilinear"),
    "a module": nn.Upsample((13, 40), mode="bilinear"),
    "a module of two factors": nn.Upsample(scale_factor=(1.5, 0.7), mode="bilinear", align_corners=False),
    "a module that computes again": nn.Upsample(scale_factor=1.3, mode="bilinear", recompute_scale_factor=True),
    "a module with corners": nn.Upsample(scale_factor=3, mode="bilinear", align_corners=True),
    "the module of its own": nn.UpsamplingBilinear2d(size=(33, 5)),
}


@pytest.mark.filterwarnings("ignore:.*upsample:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_say_it(form: str) -> None:
    torch.manual_seed(1)
    model = pack_nets.quantized(Resized(FORMS[form]), SHAPE)
    packed = pack_nets.check_equal(model, SHAPE)
    assert packed.kept_float == ()
    assert len(resizes(packed)) == 1
    if form.startswith(("a module", "the module")):
        x = pack_nets.images(4, SHAPE, 8)
        with torch.no_grad():
            assert torch.equal(packed(x), model(x))


class Doubled(nn.Upsample):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


OTHERS: dict[str, tuple[Callable[[Tensor], Tensor] | nn.Module, str]] = {
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "interpolate has no packed form"),
    "antialiased": (
        lambda x: F.interpolate(x, (5, 5), mode="bilinear", antialias=True),
        "interpolate has no packed form",
    ),
    "nearest to a size that divides nothing": (lambda x: F.interpolate(x, (23, 17)), "interpolate has no packed form"),
    "a forward of its own": (Doubled(scale_factor=2, mode="bilinear"), "Doubled has no packed form"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_interpolation_stays_in_float(name: str) -> None:
    torch.manual_seed(1)
    resize, reason = OTHERS[name]
    packed = lbs.pack(pack_nets.quantized(Resized(resize), SHAPE))
    assert [why for _, why in packed.kept_float] == [reason]


@pytest.mark.parametrize("name", ["unet", "deeplab"])
def test_streams_in_half_precision(name: str) -> None:
    pack_nets.check_equal(quantized(name), SHAPE, stream_dtype="float16")


class First(nn.Module):
    """The images themselves are interpolated."""

    def __init__(self) -> None:
        super().__init__()
        self.resize = nn.Upsample((15, 9), mode="bilinear")
        self.conv, self.last = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(self.resize(x))))


def test_bytes_of_an_image_are_normalised_before_they_are_interpolated() -> None:
    torch.manual_seed(0)
    model = pack_nets.quantized(First(), SHAPE)
    packed = lbs.pack(model, normalize=((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    assert packed.kept_float == ()
    images = torch.randint(0, 256, (3, *SHAPE), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    assert lbs.verify(model, packed, images).ok


def test_positions_that_are_moved_are_found() -> None:
    def change(program: Program, blob: Tensor) -> Program:
        steps = [
            replace(step, offset=(step.offset[0] + 1e-3, step.offset[1])) if isinstance(step, ResizeStep) else step
            for step in program.steps
        ]
        return replace(program, steps=tuple(steps))

    model = quantized("unet")
    report = lbs.verify(model, damaged(lbs.pack(model), change), pack_nets.images(4, SHAPE))
    assert report.first_layer == "cat@join.0.input"  # whose parts it is


def test_explain_names_the_size() -> None:
    rows = {row.name: row for row in lbs.explain(lbs.pack(quantized("unet")), rounds=1).rows}
    assert (rows["again"].operation, rows["again"].output) == ("interpolate to 20x12", (20, 12, 12))
