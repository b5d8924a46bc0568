"""Filters that go after training: which first, how their readers are fitted, and what that is measured to cost."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
from lbs.convolutions import TransposedConv2d
from lbs.graph import record_of
from lbs.models.mobilenet_v2 import InvertedResidual
from lbs.runs.searches import by_filters, close_by_losses
from lbs.search import readers, removal
from lbs.search.budget import Budget
from lbs.search.freeze import freeze, plan_of
from lbs.search.ledger import Ledger
from lbs.search.prepare import SearchConfig, prepare
from lbs.search.quantities import bit_operations
from lbs.search.readers import Moments, Reader, elimination
from lbs_kernels.errors import DataError


def images(count: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def net(seed: int = 0) -> nn.Sequential:
    """Two prunable convolutions: 1 -> norm -> relu -> 3 x 3 with a stride; 3 x 3 -> mean -> classifier."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(4):
            made.train()(images())
    return made.eval()


CONFIG = SearchConfig(bits=(32,), pruning=False)


def plain(model: nn.Module) -> tuple[nn.Module, Any]:
    made = freeze(prepare(model, images(2), CONFIG)).eval()
    return made, record_of(made).groups


def filled(layer: nn.Module, x: Tensor, channels: int) -> Reader:
    reader = Reader("", layer, channels)  # type: ignore[arg-type]
    with torch.no_grad():
        y = layer(x)
        for fold, moments in enumerate(reader.folds):
            moments.add(*reader.rows(x[fold::2], y[fold::2], torch.Generator().manual_seed(0)))
    return reader


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(6, 4, (3, 1), dilation=(2, 1), padding=(2, 0)),
        nn.Conv2d(6, 4, 1, stride=2),
        nn.Linear(6, 4),
        TransposedConv2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        TransposedConv2d(6, 4, (2, 3), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),  # more padding than its reach
    ],
    ids=str,
)
def test_rows_times_the_matrix_are_what_the_layer_computes(layer: Any) -> None:
    x = torch.randn(5, 6, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(5, 6)
    reader = Reader("", layer, 6)
    y = layer(x).detach()
    rows, wanted = reader.rows(x, y, torch.Generator().manual_seed(3))
    assert len(rows) == 5 * min(readers.PLACES, y[0, 0].numel())
    torch.testing.assert_close(
        rows.double() @ reader.matrix() + layer.bias.detach().double(), wanted.double(), atol=1e-5, rtol=1e-5
    )


def test_moments_say_what_the_rows_would() -> None:
    x, y = torch.randn(40, 6), torch.randn(40, 3)
    weight, bias = torch.randn(6, 3).double(), torch.randn(3).double()
    moments, first, rest = Moments(), Moments(), Moments()
    moments.add(x, y)
    first.add(x[:15], y[:15])
    rest.add(x[15:], y[15:])
    expected, every = (x.double() @ weight + bias - y).square().sum(1).mean(), torch.arange(6)
    cut = (x[:, [1, 4]].double() @ weight[[1, 4]] + bias - y).square().sum(1).mean()
    assert moments.error(torch.tensor([1, 4]), weight[[1, 4]], bias) == pytest.approx(float(cut), rel=1e-5)
    assert moments.error(every, weight, bias) == pytest.approx(float(expected), rel=1e-5)
    assert (first + rest).error(every, weight, bias) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("taps", [1, 9])
def test_the_channel_that_others_make_up_for_goes_first(taps: int) -> None:
    """Channel 2 is the sum of 0 and 4: large, and of no use. The rest goes by what no fit makes up for."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, 3 if taps == 9 else 1)
    x = torch.randn(64, 6, 8, 8) * torch.tensor([1, 0.3, 1, 3, 1, 0.8]).view(1, -1, 1, 1)
    x[:, 2] = x[:, 0] + x[:, 4]
    reader = filled(layer, x, 6)
    order = elimination([reader], 0)
    assert order[0] in (0, 2, 4)
    assert sorted(order) == list(range(6))
    assert order.index(1) < order.index(5) < order.index(3)  # by their size, where nothing else tells them apart
    with torch.no_grad():
        before, kept = layer(x), sorted(set(range(6)) - {order[0]})
    weight, bias = reader.settled(kept)
    reader.compute(reader.spread(kept, weight), bias)
    x[:, order[0]] = 1e6  # no longer read
    with torch.no_grad():
        assert F.mse_loss(layer(x), before) < 1e-3 * before.var()


def test_a_step_of_the_elimination_is_the_fit_without_the_channel() -> None:
    """error(c) of optimal brain surgeon, against least squares without c, for every c."""
    torch.manual_seed(1)
    layer = nn.Linear(5, 3)
    mixing = torch.randn(5, 5)
    reader = filled(layer, torch.randn(400, 5) @ mixing, 5)
    _, _, xx, _, _ = reader.folds[0].centred
    damped = xx + readers._DAMPING * xx.diagonal().mean() * torch.eye(5)
    lost = []
    for channel in range(5):
        kept = [c for c in range(5) if c != channel]
        w = reader.matrix()
        best = w[kept] + torch.linalg.solve(damped[kept][:, kept], damped[kept, channel][:, None] * w[channel])
        off = w.clone()
        off[kept] -= best
        lost.append(float((off * (damped @ off)).sum()))
    assert elimination([reader], 0)[0] == lost.index(min(lost))


def test_few_images_are_not_fitted_to_the_last_digit() -> None:
    """As many rows as columns: without a ridge they are met exactly, and other rows are missed."""
    torch.manual_seed(2)
    layer = nn.Linear(60, 4)
    x = torch.randn(100, 60)
    reader = filled(layer, x, 60)
    kept = sorted(elimination([reader], 0)[20:])
    weight, bias = reader.settled(kept)
    others = torch.randn(4000, 60)
    expected = layer(others).double()
    ours = (others[:, kept].double() @ weight + bias - expected).square().mean()
    exact, shift = reader._ridges(torch.tensor(kept), reader.folds[0] + reader.folds[1], (1e-9,))[0]
    assert ours < 0.8 * (others[:, kept].double() @ exact + shift - expected).square().mean()


def test_errors_are_losses_of_images_held_out_and_the_model_stays() -> None:
    model, groups = plain(net())
    before = copy.deepcopy(model.state_dict())
    searched = prepare(net(), images(2), SearchConfig(bits=(8,), group_size=1, filter_tile=4, max_pruning_ratio=0.75))
    ledger = Ledger(searched)
    seen: list[Tensor] = []

    def loss(found: Tensor, expected: Tensor) -> Tensor:
        seen.append(expected)
        return (found - expected).square().mean()

    batches = list(images(32).split(8))
    removal.measure(model, groups, ledger, batches, 16, loss)
    assert len(ledger.filters) == 2
    for choice in ledger.filters:
        assert len(choice.errors) == choice.top
        assert all(error >= 0 for error in choice.errors)
        assert sum(choice.errors) > 0
        assert sorted(choice.order) == list(range(16))
    odd = torch.cat(batches)[1::2]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(seen)[:8], model(odd[:8]))
    assert model.state_dict().keys() == before.keys()  # no bias stays
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (3, 1, 1, 1), (5, 1)])
def test_how_images_are_put_into_batches_does_not_matter(sizes: tuple[int, ...]) -> None:
    """Images are even and odd among all of them: a batch may hold one."""
    model, _ = plain(net())
    rows = []
    for batches in ([images(6)], images(6).split(sizes)):
        found = [Reader("5", model.get_submodule("5"), 16), Reader("10", model.get_submodule("10"), 16)]  # type: ignore[arg-type]
        readers.observe(model, model, found, batches)
        rows.append([reader.folds for reader in found])
    places = min(readers.PLACES, 25)
    assert [[fold.rows for fold in folds] for folds in rows[1]] == [[6 * places] * 2, [6] * 2]
    for one, other in zip(*(folds for _, folds in rows), strict=True):  # of the classifier all rows are taken
        for expected, found in zip(one.parts, other.parts, strict=True):
            torch.testing.assert_close(found, expected)


def test_filters_go_where_every_batch_holds_one_image() -> None:
    options: dict[str, Any] = {"bops": 0.017, "max_pruning_ratio": 0.5}
    report = lbs.quantize(net(), list(images(8).split(1)), **options).report
    assert report.outcome is not None
    with pytest.raises(DataError, match="there is a single one; give 2 images at least"):
        lbs.quantize(net(), images(1), **options)


def test_losses_between_those_measured_lie_between_and_never_fall() -> None:
    steps = removal._steps((4, 8, 12, 16, 20), (4, 12, 20), [3.0, 0.5, 0.6])  # noise: fewer filters seem better
    assert steps == pytest.approx((1.2, 1.2, 0.0, 0.0))


def test_readers_make_up_for_what_is_gone() -> None:
    model, groups = plain(net())
    kept = {"2": (0, 2, 4, 6, 8, 10, 12, 14), "5": tuple(range(12))}
    made = removal.compensated(model, groups, kept, list(images(64).split(16)))
    cut = copy.deepcopy(model)
    with torch.no_grad():
        for producer, reader in (("2", "5"), ("5", "10")):
            gone = sorted(set(range(16)) - set(kept[producer]))
            for one in (made, cut):
                layer: Any = one.get_submodule(reader)
                if one is cut:
                    layer.weight[:, gone] = 0.0
                assert not layer.weight[:, gone].any()
        x = images(64, seed=5)
        off, of_cut = ((one(x) - model(x)).square().mean() for one in (made, cut))
    assert off < 0.5 * of_cut
    plan = record_of(prepare(made, images(2), SearchConfig(bits=(8,), group_size=1))).plan.with_bits(8, 8)
    plan = replace(plan, layers=tuple(replace(one, kept=kept.get(one.name)) for one in plan.layers))
    small = removal.without_filters(made, images(2), SearchConfig(group_size=1), plan, 32)
    lbs.calibrate(small.eval(), [images(64)])
    assert small.get_submodule("5").weight.shape == (12, 8, 3, 3)
    with torch.no_grad():
        assert (small(x) - made(x)).square().mean() < 1e-3 * made(x).var()
    assert lbs.verify(small, lbs.pack(small), x[:8]).ok


def test_hidden_channels_of_an_inverted_residual_go_with_their_depthwise_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), InvertedResidual(8, 8, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    with torch.no_grad():
        model.train()(images())
    made, groups = plain(model.eval())
    kept = tuple(range(0, 16, 2))
    asked = {"2.conv.0.0": kept, "2.conv.1.0": kept}  # as a plan has them
    made = removal.compensated(made, groups, asked, list(images(64).split(16)))
    reader: Any = made.get_submodule("2.conv.2")
    assert not reader.weight[:, 1::2].any()
    with torch.no_grad():
        assert (made(images(8)) - model(images(8))).square().mean() < 0.2 * model(images(8)).var()


def test_a_search_by_losses_begins_with_readers_that_make_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the filters of both layers go, in fours; the network is then trained, norms and all."""
    model = net()
    with torch.no_grad():
        for _ in range(60):  # statistics of norms are those of the images, as after any training
            model.train()(images(64))
    model.eval()
    config = by_filters(SearchConfig(bits=(8,), group_size=4, max_pruning_ratio=0.5))
    assert (config.group_size, config.filter_tile) == (1, 4)
    off, x = [], images(64, seed=5)
    for made_up in (True, False):
        if not made_up:
            monkeypatch.setattr(removal, "make_up", lambda *args: None)
        searched = lbs.calibrate(prepare(model, images(2), config), [images(64)], norms="estimate")
        budget = Budget(searched, bops=1.01 * Budget(searched, bops=1.0).ledger.floor(bit_operations()))
        close_by_losses(budget, model, config, list(images(64).split(16)))
        assert [len(layer.kept or ()) for layer in plan_of(searched).layers[1:3]] == [8, 8]
        assert budget.frozen
        found = lbs.calibrate(freeze(searched), [images(64)], norms="estimate").eval()
        with torch.no_grad():
            off.append(float((found(x) - model(x)).square().mean()))
    assert off[0] < 0.5 * off[1]


def test_a_transposed_reader_makes_up_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()  # fmt: skip
    plain_model, groups = plain(model)
    made = removal.compensated(plain_model, groups, {"2": tuple(range(5))}, [images(64)])
    cut, x = copy.deepcopy(plain_model), images(64, seed=5)
    layer: Any = cut.get_submodule("4")
    with torch.no_grad():
        layer.weight[:, 5:] = 0.0
        off, of_cut = ((one(x) - model(x)).square().mean() for one in (made, cut))
    assert off < 0.5 * of_cut
