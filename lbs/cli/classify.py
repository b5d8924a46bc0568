"""`lbs classify`: the classes of a folder of images in one CSV; `torchrun` shares them among processes."""

from __future__ import annotations

import argparse
from pathlib import Path

from lbs.cli.console import console
from lbs.cli.options import decimals, device_of
from lbs.cli.packed import add_source, source_of, statistics_of
from lbs.runs.classify import check_result, classify_folder, write_csv
from lbs.train import distributed
from lbs_kernels.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The network, the images, and where the rows go."""
    add_source(parser)
    parser.add_argument("--images", required=True, metavar="DIR", help="images in any folders of it")
    parser.add_argument(
        "--out", required=True, metavar="CSV", help="a row per image, by path: class, probability, error"
    )
    parser.add_argument("--names", metavar="FILE", help="names of the classes, a line each, from class 0 on")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images per call (default 64)")
    parser.add_argument("--mean", type=decimals, default=(), metavar="M,..", help="pixel mean per channel, of 0..1")
    parser.add_argument("--std", type=decimals, default=(), metavar="S,..", help="pixel deviation per channel")


def run(args: argparse.Namespace) -> int:
    """Classify, write the CSV, name what could not be read."""
    out = console(args)
    args.device = str(distributed.start(device_of(args.device)))
    packed = source_of(args).packed
    mean, std = statistics_of(args, packed)
    names = _names(args.names) if args.names else []
    check_result(packed, args.out, names)
    rows = classify_folder(packed, args.images, mean=mean, std=std, batch=args.batch, progress=out.progress())
    write_csv(args.out, rows, names)
    unread = {row.image: row.error for row in rows if row.place is None}
    for error in unread.values():
        out.say(f"left out: {error}")
    processes = distributed.world_size()
    by = f" by {processes} processes" if processes > 1 else ""
    out.say(f"{len(rows) - len(unread)} of {len(rows)} images classified{by}: {args.out}")
    out.finish({"file": args.out, "images": len(rows), "unreadable": unread, "processes": processes})
    return 0


def _names(file: str) -> list[str]:
    try:
        names = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}; give a text file with a name on each line") from error
    if not any(name.strip() for name in names):
        raise DataError(f"{file} holds no names; give a name on each line, or leave --names out")
    return names
