"""`lbs pack`: the network of a run as one .lbs.safetensors file."""

from __future__ import annotations

import argparse

from lbs.cli.console import console
from lbs.cli.options import add_model, folder_of, set_threads
from lbs.packing.explain import told_estimate
from lbs.reporting.units import seconds, size
from lbs.runs.stages import pack_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run folder, the type of residual streams, and what images are given as."""
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder with a searched network")
    parser.add_argument(
        "--stream-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="what residual streams of floats are stored in",
    )
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="the packed network is given bytes and normalises them itself, as the data of the run was normalised",
    )
    add_model(parser)
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own number)")


def run(args: argparse.Namespace) -> int:
    """Pack, and say how large the file is."""
    out = console(args)
    set_threads(args.threads)
    section = pack_run(folder_of(args), args.stream_dtype, args.uint8)
    for name, reason in section["kept_float"]:
        out.say(f"{name} stays in float: {reason}")
    if section["coded_streams"]:
        out.say(f"residual streams of 8 bits: {', '.join(section['coded_streams'])}")
    out.say(
        f"packed: {section['file']}, {size(section['bytes'])}, for {section['input_dtype']} images; "
        "codes of every layer checked"
    )
    if "latency" in section:
        took = section["latency"]
        estimate = told_estimate(took["estimated"], took["measured"])
        out.say(
            f"a call of one image takes {seconds(took['measured'])} of {seconds(took['target'])} asked for, "
            f"{took['threads']} threads; {estimate}"
        )
    out.say(f"next: lbs verify --run {args.run}; lbs bench --run {args.run}")
    out.finish(section)
    return 0
