"""Published accuracies and bit operations, drawn and printed beside what a run reached.

Table 1 and 2 of arXiv 2101.04935. The networks are pre-activation ResNets on CIFAR-100, which cost exactly what the
post-activation ones here do; the published accuracies are probably those of the best epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT, OURS = "full precision", "LBS"
# (network of lbs.models, classes) -> name the points are listed under.
NETWORKS = {
    ("cifar_resnet20", 100): "cifar100-resnet20",
    ("preresnet20", 100): "cifar100-resnet20",
    ("cifar_resnet56", 100): "cifar100-resnet56",
    ("preresnet56", 100): "cifar100-resnet56",
    ("resnet18", 1000): "imagenet-resnet18",
    ("mobilenet_v2", 1000): "imagenet-mobilenet_v2",
}


@dataclass(frozen=True)
class Mark:
    """One published point: top-1 in percent, bit operations of one image."""

    network: str
    method: str
    top1: float
    bops: float


def _marks(network: str, unit: float, points: dict[str, tuple[float, float]]) -> list[Mark]:
    return [Mark(network, method, top1, unit * bops) for method, (top1, bops) in points.items()]


MARKS: tuple[Mark, ...] = (
    *_marks(
        "cifar100-resnet20",
        1e6,
        {
            FLOAT: (67.5, 41798.6),
            "uniform 4-bit": (67.8, 674.6),
            "DNAS": (67.8, 664.2),
            "HAQ": (67.7, 653.4),
            "LBS quantization only": (68.1, 649.5),
            "LBS pruning only": (67.9, 28586.5),
            OURS: (68.1, 630.6),
        },
    ),
    *_marks(
        "cifar100-resnet56",
        1e6,
        {
            FLOAT: (71.7, 128771.7),
            "uniform 4-bit": (70.9, 2033.6),
            "DNAS": (71.2, 1996.9),
            "HAQ": (71.2, 2014.9),
            "LBS quantization only": (71.5, 1970.7),
            "LBS pruning only": (71.5, 87021.6),
            OURS: (71.6, 1918.8),
            "LBS, more compressed": (70.8, 1042.5),
            "prune, then quantize": (70.4, 1077.7),
        },
    ),
    *_marks(
        "imagenet-resnet18",
        1e9,
        {
            FLOAT: (70.7, 1857.6),
            "uniform 4-bit": (71.0, 34.7),
            "HAQ": (70.2, 34.7),
            "DJPQ": (69.1, 35.5),
            "DQ": (68.5, 40.7),
            OURS: (70.8, 32.3),
        },
    ),
    *_marks(
        "imagenet-mobilenet_v2",
        1e9,
        {
            FLOAT: (71.9, 308.0),
            "uniform 6-bit": (71.8, 11.2),
            "HAQ": (71.2, 10.8),
            "DQ": (70.4, 158.5),
            OURS: (71.7, 10.8),
        },
    ),
)


def marks_of(network: str) -> list[Mark]:
    """All marks of a network, such as `cifar100-resnet20`; empty where nothing was published."""
    return [mark for mark in MARKS if mark.network == network]


def mark_of(network: str, method: str) -> Mark | None:
    """One mark, or None."""
    return next((mark for mark in marks_of(network) if mark.method == method), None)
