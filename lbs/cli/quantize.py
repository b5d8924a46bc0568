"""`lbs quantize`: a trained network and a folder of images become a packed file, without training."""

from __future__ import annotations

import argparse

from lbs.cli.console import console
from lbs.cli.options import (
    NAMES,
    add_exclude,
    add_latency,
    add_streams,
    bit_operations,
    decimal,
    decimals,
    numbers,
    set_threads,
)
from lbs.reporting.units import size
from lbs.runs.quantized import quantize_files
from lbs_kernels.errors import LbsError

_OWN = ("command", "json", "threads", "named", "console")
_UNSET = argparse.SUPPRESS  # an option that was not named is not in the namespace: `quantize_files` decides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The network, its images, the file, and how narrow it shall be."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help=NAMES)
    parser.add_argument("--model", dest="named", metavar="MODEL", help="the same as an option")
    parser.add_argument("--images", required=True, metavar="DIR", help="images in any folders of it; no classes needed")
    parser.add_argument(
        "--weights", metavar="FILE", help="float weights: .safetensors or .pth (a module:function may have its own)"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the packed network (default: MODEL.lbs.safetensors, without what is left of :)"
    )
    widths = parser.add_argument_group("widths", "8 bits, or one of")
    widths.add_argument(
        "--bits",
        type=numbers,
        default=_UNSET,
        metavar="W,A",
        help="of weights and activations, such as 4,8, or one for both",
    )
    widths.add_argument("--bops", type=bit_operations, default=_UNSET, help="budget: 0.03 (share), 650M, 34.7G")
    widths.add_argument(
        "--size-mb", type=decimal, default=_UNSET, metavar="X", help="budget: packed weights, 10^6 bytes"
    )
    add_latency(widths)
    widths.add_argument(
        "--prune",
        dest="max_pruning_ratio",
        type=decimal,
        default=_UNSET,
        metavar="X",
        help="share of a layer's filters that may go for the budget (default 0)",
    )
    widths.add_argument(
        "--distill",
        type=int,
        default=_UNSET,
        metavar="N",
        help="train for N epochs to return on the images what the float network returns (default 0)",
    )
    widths.add_argument(
        "--rounding",
        choices=("nearest", "optimized"),
        default=_UNSET,
        help="of weights below 8 bits: to the nearest code (default), or so that layers compute the same (minutes)",
    )
    add_exclude(widths)
    add_streams(widths)
    pictures = parser.add_argument_group("images")
    pictures.add_argument("--count", type=int, default=_UNSET, metavar="N", help="how many are used (default 256)")
    pictures.add_argument("--size", type=int, default=_UNSET, metavar="N", help="sides after scaling and cropping")
    pictures.add_argument(
        "--mean", type=decimals, default=_UNSET, metavar="M,..", help="pixel mean per channel, of 0..1 (ImageNet's)"
    )
    pictures.add_argument(
        "--std", type=decimals, default=_UNSET, metavar="S,..", help="pixel deviation per channel (ImageNet's)"
    )
    pictures.add_argument(
        "--uint8", action="store_true", help="the packed network is given bytes and normalises them itself"
    )
    parser.add_argument("--classes", type=int, default=_UNSET, metavar="N", help="classes (default: as the weights)")
    parser.add_argument("--measure", action="store_true", help="time one image beside torch float and uniform 8 bits")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own number)")


def run(args: argparse.Namespace) -> int:
    """Quantize, print the report, name the file."""
    out = console(args)
    set_threads(args.threads)
    if (args.name is None) == (args.named is None):
        raise LbsError(f"name one network: MODEL or --model MODEL (got {args.name} and {args.named})")
    args.name = args.name or args.named
    options = {key: value for key, value in vars(args).items() if key not in _OWN}
    if "exclude" in options:
        options["exclude"] = tuple(options["exclude"])
    packed, section = quantize_files(**options, say=out.step)
    out.say(str(packed.report))
    out.say(f"{section['file']}: {size(section['bytes'])}; next: lbs explain or lbs bench {section['file']}")
    out.finish(section)
    return 0
