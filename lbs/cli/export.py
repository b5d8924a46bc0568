"""`lbs export`: a packed network as a file that other engines run."""

from __future__ import annotations

import argparse
from pathlib import Path

from lbs.cli.console import console
from lbs.cli.packed import add_source, source_of
from lbs.reporting.units import size

_SUFFIX = ".onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which network, and the file."""
    add_source(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the ONNX file, for ONNX Runtime, OpenVINO and others"
    )
    parser.add_argument(
        "--float32", dest="exact", action="store_false", help="no float64 in the file; codes on a boundary may differ"
    )


def run(args: argparse.Namespace) -> int:
    """Write the file, and say what in it is not exactly the packed network."""
    out = console(args)
    target = Path(args.out if args.out.endswith(_SUFFIX) else args.out + _SUFFIX)
    notes = source_of(args).packed.to_onnx(target, args.exact)
    written = target.stat().st_size
    for note in notes:
        out.say(note)
    out.say(f"wrote {target}, {size(written)}: opset 21, input `images`, any number of them")
    out.finish({"file": str(target), "bytes": written, "notes": notes})
    return 0
