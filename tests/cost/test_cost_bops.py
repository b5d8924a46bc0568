"""BOPs against the published totals, to the printed digit, and against a count by hand on odd shapes."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

import lbs
import lbs.models
from lbs.cost import (
    activation_bytes,
    bops,
    float_weight_bytes,
    macs,
    network_layers,
    pair_macs,
    physical,
    physical_bops,
    weight_bytes,
)
from lbs_kernels.errors import GraphError, LbsError
from lbs_kernels.program.problem import Problem

# (network, bits or None for full precision, printed total, divisor, digits): tables of arXiv 2101.04935.
REFERENCE = [
    ("preresnet20", None, "41798.6", 1e6, 1),
    ("preresnet20", 8, "2612.4", 1e6, 1),
    ("preresnet20", 4, "674.6", 1e6, 1),
    ("preresnet20", 2, "190.2", 1e6, 1),
    ("preresnet56", None, "128771.7", 1e6, 1),
    ("preresnet56", 8, "8048.2", 1e6, 1),
    ("preresnet56", 4, "2033.6", 1e6, 1),
    ("preresnet56", 2, "529.9", 1e6, 1),
    ("resnet18", None, "1857.6", 1e9, 1),
    ("resnet18", 4, "34.7", 1e9, 1),
    ("resnet50", None, "4187.3", 1e9, 1),
    ("resnet50", 4, "71.2", 1e9, 1),
    ("mobilenet_v2", None, "308.0", 1e9, 1),
    ("mobilenet_v2", 6, "11.17", 1e9, 2),
    ("mobilenet_v2", 4, "5.39", 1e9, 2),
]


@pytest.mark.parametrize(("name", "bits", "printed", "unit", "digits"), REFERENCE)
def test_totals_equal_the_published_ones(name: str, bits: int | None, printed: str, unit: float, digits: int) -> None:
    with torch.device("meta"):
        layers = network_layers(lbs.models.create(name), lbs.models.example(name))
    total = layers.full_precision_bops() if bits is None else layers.with_bits(bits, bits).bops()
    assert f"{total / unit:.{digits}f}" == printed
    assert layers.uncounted == ()


def test_preresnet20_multiply_accumulates() -> None:
    with torch.device("meta"):
        layers = network_layers(lbs.models.create("preresnet20"), lbs.models.example("preresnet20"))
    assert sum(macs(layer.problem) for layer in layers.layers) == 40_818_944
    assert layers.layers[0].name == "conv1"
    assert layers.layers[-1].name == "fc"


def _count(problem: Problem) -> int:
    """Multiply-accumulates by walking over every product."""
    per_group_in = problem.in_channels // problem.groups
    products = itertools.product(
        range(problem.batch),
        range(problem.out_height),
        range(problem.out_width),
        range(problem.out_channels),
        range(problem.kernel[0]),
        range(problem.kernel[1]),
        range(per_group_in),
    )
    return sum(1 for _ in products)


@pytest.mark.parametrize(
    "problem",
    [
        Problem("bitconv2d", 1, 5, 4, 3, 2, (3, 3), padding=(1, 1), w_bits=2, a_bits=4),
        Problem("bitconv2d", 2, 5, 7, 6, 4, (3, 1), stride=(2, 1), padding=(1, 0), groups=2, w_bits=4, a_bits=8),
        Problem("bitconv2d", 1, 6, 6, 4, 4, (3, 3), dilation=(2, 2), groups=4),
        Problem("bitlinear", 3, 1, 1, 7, 5, w_bits=8, a_bits=2),
    ],
    ids=str,
)
def test_formula_equals_a_count(problem: Problem) -> None:
    assert macs(problem) == _count(problem) == problem.macs
    assert bops(problem) == _count(problem) * problem.w_bits * problem.a_bits
    assert pair_macs(problem) * problem.in_channels * problem.out_channels == macs(problem) * problem.groups


@pytest.mark.parametrize(("channels", "words"), [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2)])
def test_physical_fills_words(channels: int, words: int) -> None:
    problem = Problem("bitconv2d", 1, 4, 4, channels, 5, (3, 3), padding=(1, 1), w_bits=2, a_bits=4)
    assert physical(problem).in_channels == 32 * words
    assert physical_bops(problem) * channels == bops(problem) * 32 * words
    assert weight_bytes(problem) == 4 * 2 * 5 * 9 * words + 8 * 5
    assert activation_bytes(problem) == 4 * 4 * 4 * 4 * words
    assert float_weight_bytes(problem) == 4 * 5 * 9 * channels


def test_physical_fills_every_group_on_its_own() -> None:
    depthwise = Problem("bitconv2d", 1, 4, 4, 48, 48, (3, 3), padding=(1, 1), groups=48)
    assert physical_bops(depthwise) == 32 * bops(depthwise)


def test_uniform_bits_leave_the_edges_alone() -> None:
    with torch.device("meta"):
        layers = network_layers(lbs.models.create("cifar_resnet20"), lbs.models.example("cifar_resnet20"))
    bits = {layer.name: (layer.problem.w_bits, layer.problem.a_bits) for layer in layers.with_bits(2, 4).layers}
    assert bits.pop("conv1") == bits.pop("fc") == (8, 8)
    assert set(bits.values()) == {(2, 4)}
    assert layers.physical_bops() > layers.bops()


class _Sequence(nn.Module):
    """A linear layer used twice at several positions, and a module no formula covers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(self.embed(x)))


def test_linear_layers_count_positions_and_uses() -> None:
    layers = network_layers(_Sequence(), torch.zeros(2, 5, dtype=torch.long))
    assert [layer.name for layer in layers.layers] == ["fc", "fc"]
    assert sum(macs(layer.problem) for layer in layers.layers) == 2 * 5 * 36
    assert layers.uncounted == ("embed",)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = lbs.models.create("cifar_resnet20").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    network_layers(model, lbs.models.example("cifar_resnet20", batch=3))
    assert model.training
    assert not model.conv1._forward_hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_same_padding() -> None:
    example = torch.zeros(1, 3, 9, 8)
    padded = network_layers(nn.Conv2d(3, 4, (5, 3), padding="same", dilation=(2, 1)), example).layers[0].problem
    assert padded.padding == (4, 1)
    assert (padded.out_height, padded.out_width) == (9, 8)
    assert network_layers(nn.Conv2d(3, 4, 3, padding="valid"), example).layers[0].problem.padding == (0, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")  # torch's own, once in a process
        with pytest.raises(GraphError, match=r"kernel \(2, 2\).*'same'"):
            network_layers(nn.Conv2d(3, 4, 2, padding="same"), example)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(GraphError, match="runs no layer whose cost is known"):
        network_layers(nn.ReLU(), torch.zeros(1, 3))
    with pytest.raises(GraphError, match=r"shape \(1, 4, 32, 32\)"):
        network_layers(lbs.models.create("cifar_resnet20"), torch.zeros(1, 4, 32, 32))
    with pytest.raises(LbsError, match="no cost formula for 'fft'"):
        bops(Problem("fft", 1, 1, 1, 1, 1))


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"dilation": 3, "output_padding": 1}])
@pytest.mark.parametrize("window", [(2, 2), (4, 2, 1), (3, 2), (2, 3)])
def test_a_transposed_convolution_multiplies_every_input_pixel_by_every_tap(
    window: tuple[int, ...], options: dict[str, int]
) -> None:
    layer = nn.ConvTranspose2d(4, 6, *window, **options)
    ((counted),) = network_layers(layer, torch.zeros(1, 4, 5, 7)).layers
    by_hand = sum(
        int(torch.count_nonzero(layer.weight[:, :, k_y, k_x])) * 5 * 7
        for k_y, k_x in itertools.product(range(window[0]), repeat=2)
    )
    assert macs(counted.problem) == by_hand
    assert bops(counted.problem) == by_hand * 64


@pytest.mark.parametrize("window", [(2, 2), (4, 2, 1), (3, 2), (2, 3)])
def test_bytes_of_a_transposed_convolution_are_those_of_its_steps(window: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), nn.ConvTranspose2d(40, 6, *window), nn.Conv2d(6, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    packed = lbs.pack(lbs.calibrate(lbs.uniform(net, x), [x]).eval())
    arrays = packed.programs[0].arrays
    held = sum(spec.nbytes for key, spec in arrays.items() if key.startswith("2"))
    assert packed.plan is not None
    assert weight_bytes(packed.plan.layer("2").problem()) == held
