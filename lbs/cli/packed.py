"""The packed network a command looks at: a file, the one of a run folder, or one of the zoo."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

import lbs
import lbs.models
import lbs.zoo
from lbs.cli.console import console
from lbs.cli.options import add_budget, device_of, folder_of, set_threads
from lbs.packing.floats import float_network
from lbs.packing.model import PackedModel
from lbs.runs.network import NetworkCard
from lbs.runs.packed import Source, of_run
from lbs.runs.quantized import IMAGENET
from lbs_kernels.errors import GraphError, LbsError


def add_source(parser: argparse.ArgumentParser, plans: bool = False) -> None:
    """FILE, --run or --zoo: exactly one. plans: of commands that do with what is not packed yet."""
    file, run = (" or a plan.json", ", or its plan where it is not packed") if plans else ("", "")
    parser.add_argument("file", nargs="?", metavar="FILE", help=f"a .lbs.safetensors file{file}")
    parser.add_argument("--run", metavar="DIR", help=f"the packed network of a run folder{run}")
    parser.add_argument("--zoo", metavar="NAME", help=f"a shipped network: {', '.join(lbs.zoo.ENTRIES)}")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--threads", type=int, help="processor threads (default: torch's own number)")
    add_budget(where)
    where.add_argument("--device", default="cpu", help="where it runs: cpu (default) or cuda")


def source_of(args: argparse.Namespace, with_float: bool = False) -> Source:
    """Load what was named; `with_float`: and the float network, where it is known.

    Raises:
        LbsError: none or several were named. CheckpointError: the file is missing or damaged.
    """
    named = [name for name in ("file", "run", "zoo") if getattr(args, name)]
    if len(named) != 1:
        raise LbsError(f"name one packed network: FILE, --run DIR or --zoo NAME (got {', '.join(named) or 'none'})")
    set_threads(args.threads)
    device = device_of(args.device)
    if args.zoo:
        entry = lbs.zoo.entry(args.zoo)
        return Source(
            lbs.load(entry.path, device), entry.path, lbs.models.create(entry.model, entry.num_classes).eval()
        )
    if args.run:
        return of_run(folder_of(args), device, with_float, args.budget)
    packed = lbs.load(args.file, device, budget=args.budget)
    rebuilt = _rebuilt(args, packed) if with_float and not getattr(args, "model", "") else None
    return Source(packed, Path(args.file), rebuilt)


def known_statistics(args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and deviation that a run, or a shipped network, was trained with; of a file none are known."""
    if args.zoo:
        entry = lbs.zoo.entry(args.zoo)
        return entry.mean, entry.std
    if args.run:
        card = NetworkCard.read(folder_of(args))
        return card.mean, card.std
    return (), ()


def statistics_of(args: argparse.Namespace, packed: PackedModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """--mean and --std, else those that are known, else of three channels ImageNet's. Raises LbsError as below."""
    check_statistics(args, packed)
    mean, std = (args.mean, args.std) if args.mean or args.std else known_statistics(args)
    return IMAGENET if not mean and not std and packed.input_shape[0] == len(IMAGENET[0]) else (mean, std)


def check_statistics(args: argparse.Namespace, packed: PackedModel) -> None:
    """Raises LbsError where one of --mean and --std is given without the other, or both to a network of bytes."""
    if bool(args.mean) != bool(args.std):
        raise LbsError("--mean and --std belong together; give both, one value of each per channel, or none")
    if args.mean and packed.normalize is not None:
        raise LbsError("--mean and --std: the network takes bytes and normalises them itself; leave them out")


def _rebuilt(args: argparse.Namespace, packed: PackedModel) -> nn.Module | None:
    """The float network of a file's own graph, where nothing else is at hand."""
    try:
        network = float_network(packed)
    except GraphError as error:
        console(args).say(f"no float baselines: {error}")
        return None
    console(args).say("float baselines: the packed network's own graph in float, without the filters it has lost")
    return network
