"""The rows `lbs reproduce` can make: a network, a way to compress it, and the published number beside it.

A new row is one line here. Schedules are those of the paper; every number can be changed on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lbs.data.cifar100 import MEAN, STD
from lbs.reporting.published import OURS, Mark, mark_of
from lbs_kernels.errors import LbsError

UNIFORM_BITS = (2, 3, 4, 8)
MIXED_PAIRS = ((4, 2), (2, 4))  # of weights and activations: what low budgets are compared with


@dataclass(frozen=True)
class Network:
    """A network on its data set. `common`: options of all three phases; the others are of one phase."""

    name: str
    model: str
    common: dict[str, Any] = field(default_factory=dict)
    float: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of a table of results. `search` None: no search, bits are given."""

    name: str
    network: Network
    variant: str
    search: dict[str, Any] | None
    finetune: dict[str, Any] = field(default_factory=dict)
    published: Mark | None = None

    @property
    def target(self) -> float | None:
        """Bit operations allowed; None where they follow from the bits."""
        return None if self.search is None else self.search["bops"]


def _cifar100(name: str, model: str) -> Network:
    # At most a quarter of a layer's filters: a half left a far worse network before fine-tuning (one seed each).
    return Network(name, model, common={"mean": MEAN, "std": STD}, search={"max_pruning_ratio": 0.25})


def _imagenet(name: str, model: str, batch: int) -> Network:
    curve = {"lr": 0.01, "schedule": "cosine", "milestones": ()}
    return Network(
        name,
        model,
        common={"batch_size": batch},
        search={"epochs": 10, "full_epochs": 10},
        finetune={"epochs": 90, "full_epochs": 90, **curve},
    )


CIFAR_RESNET20 = _cifar100("cifar100-resnet20", "cifar_resnet20")
CIFAR_RESNET56 = _cifar100("cifar100-resnet56", "cifar_resnet56")
IMAGENET_RESNET18 = _imagenet("imagenet-resnet18", "resnet18", batch=256)
IMAGENET_MOBILENET = _imagenet("imagenet-mobilenet_v2", "mobilenet_v2", batch=150)
# Real images that need no file: what the command does can be seen in a minute.
DIGITS = Network(
    "digits-resnet8",
    "digits_resnet8",
    common={"data": "digits", "augment": False, "batch_size": 64},
    float={"epochs": 12},
    search={"epochs": 20, "full_epochs": 20, "lr": 0.005, "schedule": "cosine"},
    finetune={"epochs": 12, "full_epochs": 12, "lr": 0.02, "schedule": "cosine", "milestones": ()},
)


def _row(network: Network, variant: str, search: dict[str, Any], method: str) -> Row:
    name = network.name if variant == "joint" else f"{network.name}-{variant}"
    return Row(name, network, variant, search, published=mark_of(network.name, method))


# Filters alone must save a third: a quarter of each prunable layer is not enough. What is compared with two stages,
# whose first does that, may cut as many.
HALF = {"max_pruning_ratio": 0.5}


def _uniform(network: Network, w_bits: int, a_bits: int) -> Row:
    variant, mark = f"uniform-{w_bits}-{a_bits}", None
    if w_bits == a_bits:
        variant, mark = f"uniform-{w_bits}", mark_of(network.name, f"uniform {w_bits}-bit")
    return Row(f"{network.name}-{variant}", network, variant, None, {"uniform": (w_bits, a_bits)}, published=mark)


def _evenly_pruned(network: Network, bits: int, share: float) -> Row:
    """Uniform bits without a share of the filters of every layer that can lose some; `uniform_pruned` is another."""
    variant = f"uniform-{bits}-pruned"
    named = {"uniform": (bits, bits), "uniform_pruned": share}
    return Row(f"{network.name}-{variant}", network, variant, None, named)


def _cifar_rows(network: Network, joint: float, quantized: float, pruned: float) -> list[Row]:
    return [
        _row(network, "joint", {"bops": joint}, OURS),
        _row(network, "quant-only", {"bops": quantized, "mode": "quantization-only"}, "LBS quantization only"),
        _row(network, "prune-only", {"bops": pruned, "mode": "pruning-only", **HALF}, "LBS pruning only"),
        _row(network, "two-stage", {"bops": joint, "mode": "two-stage", **HALF}, ""),
        _row(network, "multi-path", {"bops": joint, "mode": "multi-path"}, ""),
        _row(network, "greedy", {"bops": joint, "mode": "greedy"}, ""),
        *[_uniform(network, bits, bits) for bits in UNIFORM_BITS],
        *[_uniform(network, *pair) for pair in MIXED_PAIRS],
        *[_evenly_pruned(network, bits, 0.25) for bits in (8, 4)],
    ]


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        *_cifar_rows(CIFAR_RESNET20, joint=630.6e6, quantized=649.5e6, pruned=28586.5e6),
        *_cifar_rows(CIFAR_RESNET56, joint=1918.8e6, quantized=1970.7e6, pruned=87021.6e6),
        _row(CIFAR_RESNET56, "joint-1042M", {"bops": 1042.5e6, **HALF}, "LBS, more compressed"),
        _row(
            CIFAR_RESNET56, "two-stage-1042M", {"bops": 1042.5e6, "mode": "two-stage", **HALF}, "prune, then quantize"
        ),
        _row(IMAGENET_RESNET18, "joint", {"bops": 32.3e9}, OURS),
        _uniform(IMAGENET_RESNET18, 4, 4),
        _row(IMAGENET_MOBILENET, "joint", {"bops": 10.8e9}, OURS),
        _uniform(IMAGENET_MOBILENET, 6, 6),
        _row(DIGITS, "joint", {"bops": 0.02}, ""),
        _row(DIGITS, "prune-only", {"bops": 0.7, "mode": "pruning-only", **HALF}, ""),
        _row(DIGITS, "two-stage", {"bops": 0.02, "mode": "two-stage", **HALF}, ""),
        _row(DIGITS, "multi-path", {"bops": 0.02, "mode": "multi-path"}, ""),
        _row(DIGITS, "greedy", {"bops": 0.02, "mode": "greedy"}, ""),
        _row(DIGITS, "quant-only", {"bops": 0.03, "mode": "quantization-only"}, ""),
        *[_uniform(DIGITS, bits, bits) for bits in UNIFORM_BITS],
        *[_evenly_pruned(DIGITS, bits, 0.25) for bits in (8, 4)],
    )
}


def row_named(name: str) -> Row:
    """A row. Raises LbsError that lists all of them."""
    if name not in ROWS:
        raise LbsError(f"no row is called {name!r}; the rows are {', '.join(ROWS)}")
    return ROWS[name]
