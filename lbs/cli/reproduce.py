"""`lbs reproduce`: one command for one row of the results: float network, search, fine-tune, pack, verify, record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from lbs.cli.console import Console, console
from lbs.cli.options import add_machine, bit_operations, decimal, digests, session
from lbs.config import FinetuneRun, RunConfig, SearchRun
from lbs.reporting.units import bops, quantity, seconds
from lbs.run_folder import write_json
from lbs.runs import rows
from lbs.runs.reproduction import Options, open_row, reproduce, row_of
from lbs.runs.rows import Row, row_named
from lbs.train import distributed
from lbs_kernels.errors import LbsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which row, from what, how long."""
    parser.add_argument("row", nargs="?", metavar="ROW", help="a name of --list; --resume --out DIR needs none")
    parser.add_argument("--list", action="store_true", help="list the rows and what was published")
    parser.add_argument("--out", dest="run", metavar="DIR", help="run folder (default: runs/ROW-seedN)")
    parser.add_argument("--resume", action="store_true", help="go on after a stop, in whatever phase it was")
    parser.add_argument(
        "--data", help="CIFAR-100: a .npz file or the folder cifar-100-python; ImageNet: imagenet:FOLDER"
    )
    parser.add_argument("--weights", metavar="FILE", help="float weights; without them the float network is trained")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the record here too")
    add_machine(parser)
    other = parser.add_argument_group("other than the row has them")
    other.add_argument("--schedule", metavar="S+F", help="epochs of search and fine-tuning, such as 8+30")
    other.add_argument("--float-epochs", type=int, metavar="N", help="epochs of the float network, without --weights")
    other.add_argument("--seed", type=int, metavar="N", help="seed of all phases (default 0)")
    other.add_argument("--amp", choices=("off", "bf16"), help="bfloat16 autocast while training")
    other.add_argument("--minutes", type=decimal, metavar="N", help="end fine-tuning, and its curve, after N minutes")
    other.add_argument("--curve", choices=("cosine", "step", "constant"), help="learning rate of fine-tuning")
    other.add_argument("--lr", type=decimal, metavar="X", help="learning rate of fine-tuning")
    other.add_argument("--distill", type=decimal, metavar="X", help="share of the float network in fine-tuning's loss")
    other.add_argument("--bops", type=bit_operations, help="another budget: 0.03 (share), 650M, 34.7G")
    other.add_argument("--train-images", type=int, metavar="N", help="train on that many images only")
    other.add_argument(
        "--max-unreadable", type=decimal, metavar="X", help="share of a folder's files that may be left out"
    )
    for phase in ("search", "finetune"):
        other.add_argument(
            f"--{phase}",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"another option of the {phase} phase",
        )


def run(args: argparse.Namespace) -> int:
    """Make the row and print it beside the published one; 1 where a packed network is not the trained one."""
    out = console(args)
    if args.list or (args.row is None and args.run is None and not args.resume):
        list_rows(out)
        return 0
    if args.row is not None:
        args.run = args.run or f"runs/{row_named(args.row).name}-seed{args.seed or 0}"
    elif not (args.resume and args.run):
        raise LbsError("name a ROW of --list; only --resume --out DIR takes it from the run in DIR")
    typed = [text.removeprefix("teacher=") for text in args.finetune if text.startswith("teacher=")]
    with session(args, out, [*typed, *(row.network.model for row in rows.ROWS.values())]) as current:
        folder, processes = current.folder, distributed.world_size()
        row = row_named(args.row or distributed.first(lambda: row_of(folder)).name)
        configs = distributed.first(lambda: open_row(row, named_options(args, row), folder, args.resume, processes))
        folder.note_environment()
        record = reproduce(row, configs, current)
    if args.record is not None:
        write_json(args.record, record)
    show(out, record)
    out.say(f"next: lbs report {args.run}")
    out.finish(record)
    return 0 if record["verified"] or record["in_float"] else 1


def named_options(args: argparse.Namespace, row: Row) -> Options:
    """What the user named, by phase; `common` is for all."""
    common = {key: getattr(args, key) for key in ("data", "seed", "amp", "train_images", "max_unreadable")}
    finetune = {"minutes": args.minutes, "schedule": args.curve, "lr": args.lr, "distill": args.distill}
    search = {"bops": args.bops}
    if row.search is None and (args.bops or args.search):
        raise LbsError(f"{row.name} has no search: its bits are given; leave out --bops and --search")
    search["epochs"], finetune["epochs"] = epochs_of(args.schedule, row)
    float_network = {"weights": args.weights, "epochs": args.float_epochs}
    named = {"common": common, "float": float_network, "search": search, "finetune": finetune}
    found = {phase: {k: v for k, v in options.items() if v is not None} for phase, options in named.items()}
    found["search"] |= dict(setting(SearchRun, text) for text in args.search)
    found["finetune"] |= dict(setting(FinetuneRun, text) for text in args.finetune)
    return {phase: options | digests(options) for phase, options in found.items()}


def epochs_of(text: str | None, row: Row) -> tuple[int | None, int | None]:
    """Epochs of search and fine-tuning from `8+30`, or `30` where the row has no search."""
    if text is None:
        return None, None
    parts = [part.strip() for part in text.split("+")]
    if not all(part.isdecimal() for part in parts) or len(parts) > 2 or (row.search is not None and len(parts) != 2):
        wanted = "epochs of fine-tuning, such as 30" if row.search is None else "two numbers, such as 8+30"
        raise LbsError(f"--schedule {text}: {row.name} takes {wanted}")
    return (int(parts[0]) if len(parts) == 2 else None), int(parts[-1])


def setting(kind: type[RunConfig], text: str) -> tuple[str, Any]:
    """`bits=2,4` -> ("bits", (2, 4)): numbers as Python spells them, true or false, words, lists with commas.

    >>> setting(SearchRun, "importance=taylor"), setting(SearchRun, "gain=.16"), setting(SearchRun, "bits=[2,4]")
    (('importance', 'taylor'), ('gain', 0.16), ('bits', (2, 4)))
    >>> setting(SearchRun, "exclude=layer1.*,fc"), setting(SearchRun, "pruning=false")
    (('exclude', ('layer1.*', 'fc')), ('pruning', False))
    """
    key, sign, word = text.partition("=")
    types = {field.name: str(field.type) for field in fields(kind)}
    if not sign or key not in types:
        raise LbsError(f"--{kind.command} {text}: give KEY=VALUE; keys are {', '.join(sorted(types))}")
    read, wanted = _SPELLINGS[types[key]]
    try:
        value = tuple(map(read, _parts(word))) if types[key].startswith("tuple") else read(word)
    except (ValueError, KeyError, argparse.ArgumentTypeError) as error:
        raise LbsError(f"--{kind.command} {text}: {key} takes {wanted}") from error
    return key, value


def _truth(word: str) -> bool:
    return {"true": True, "false": False}[word.lower()]


def _text(word: str) -> str:
    return str(json.loads(word)) if word.startswith('"') else word


# Type of an option -> (how a text is read, what it takes).
_SPELLINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number such as 4"),
    "float": (decimal, "a finite number such as 0.03 or 3e-2"),
    "bool": (_truth, "true or false"),
    "str": (_text, "a word"),
    "tuple[int, ...]": (int, "whole numbers with commas between them, such as 2,4,8"),
    "tuple[float, ...]": (decimal, "numbers with commas between them, such as .5,.4"),
    "tuple[str, ...]": (_text, "patterns with commas between them, such as layer1.*,fc"),
}


def _parts(word: str) -> list[str]:
    """`[2,4]` or `2,4` -> the texts between the commas. A pattern such as `[ab]*` keeps its brackets: it is no JSON."""
    try:
        found = json.loads(word)
    except ValueError:
        found = None
    if isinstance(found, list):
        return [part if isinstance(part, str) else json.dumps(part) for part in found]
    return [part.strip() for part in word.split(",") if part.strip()]


def list_rows(out: Console) -> None:
    """All rows, with their budget and what was published."""
    body = []
    for row in rows.ROWS.values():
        budget = "-" if row.target is None else f"{row.target:.0%} of float" if row.target <= 1 else bops(row.target)
        mark = row.published
        published = f"published {mark.top1:.1f} % at {bops(mark.bops)}" if mark else ""
        out.say(f"{row.name:34s} {row.variant:16s} budget {budget:14s} {published}")
        body.append({"row": row.name, "variant": row.variant, "target_bops": row.target})
    out.finish({"rows": body})


def show(out: Console, record: dict[str, Any]) -> None:
    """The row in a few lines, the published one beside it."""
    tuned = f"fine-tuned {record['fine_tuned_top1']:.2f} % (last epoch)" if record["best_epoch"] else "not fine-tuned"
    best = f", best {record['best_epoch_top1']:.2f} % in epoch {record['best_epoch']}" if record["best_epoch"] else ""
    out.say(f"{record['row']}, seed {record['seeds']['finetune']}, schedule: {record['schedule']}")
    out.say(f"  float {record['float_top1']:.2f} %, {tuned}{best}")
    if record["in_float"]:
        out.say("  a float network with fewer filters: there are no codes to pack")
    else:
        equal = f"{record['equal_predictions']} of {record['images']} predictions equal"
        out.say(f"  packed {record['packed_top1']:.2f} %, {equal}: {'passed' if record['verified'] else 'FAILED'}")
    target = record["target_bops"]
    allowed = f" of {bops(target)} allowed" if target else ""
    out.say(f"  {bops(record['bops'])} BOPs{allowed}, {bops(record['full_precision_bops'])} in full precision")
    before = {name: row.get("thresholds") for name, row in (record["targets"] or {}).items()}
    if any(before.values()):
        out.say(f"  thresholds had reached {', '.join(map(quantity, before, before.values()))} before the projection")
    if record["published"]:
        mark = record["published"]
        out.say(f"  published: {mark['top1']:.1f} % at {bops(mark['bops'])} ({mark['method']})")
    spent = ", ".join(f"{name} {seconds(value)}" for name, value in record["seconds"].items() if value is not None)
    out.say(f"  time: {spent}")
