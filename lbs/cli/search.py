"""`lbs search`: float network -> plan.json and the searched network."""

from __future__ import annotations

import argparse

from lbs.cli.console import console
from lbs.cli.options import (
    add_exclude,
    add_latency,
    add_streams,
    add_training,
    asked,
    bit_operations,
    decimal,
    numbers,
    session,
)
from lbs.config import SearchRun, open_run
from lbs.reporting.units import bops
from lbs.runs.limits import NO_TARGET, TARGETS
from lbs.runs.modes import MODES
from lbs.runs.phases import run_search
from lbs.search.importance import IMPORTANCE
from lbs.train import distributed
from lbs_kernels.errors import PlanError

_UNSET = argparse.SUPPRESS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the search, in groups."""
    add_training(parser, SearchRun)
    _add_budgets(parser.add_argument_group("budget", "one at least"))
    _add_choices(parser.add_argument_group("what is searched"))
    _add_gates(parser.add_argument_group("thresholds"))
    _add_stages(parser.add_argument_group("before and between"))


def _add_budgets(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--bops", type=bit_operations, default=_UNSET, help="budget: 0.03 (share), 650M, 34.7G")
    group.add_argument(
        "--size-mb", type=decimal, default=_UNSET, metavar="X", help="budget: packed weights, 10^6 bytes"
    )
    add_latency(group)


def _add_choices(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mode", choices=tuple(MODES), default=_UNSET, help=f"what is searched (default {SearchRun.mode})"
    )
    group.add_argument("--bits", type=numbers, default=_UNSET, metavar="B,..", help="chain of widths (default 2,4,8)")
    add_streams(group)
    add_exclude(group)
    group.add_argument("--no-pruning", dest="pruning", action="store_false", default=_UNSET, help="bits only")
    group.add_argument(
        "--group-size", type=int, default=_UNSET, metavar="N", help="filters pruned together (default: the model's)"
    )
    group.add_argument(
        "--filter-tile",
        type=int,
        default=_UNSET,
        metavar="N",
        help="kept filters of a layer are a multiple (default 1)",
    )
    group.add_argument(
        "--max-pruning-ratio",
        type=decimal,
        default=_UNSET,
        metavar="R",
        help=f"largest share per layer (default {SearchRun.max_pruning_ratio:g})",
    )
    group.add_argument(
        "--importance",
        choices=tuple(IMPORTANCE),
        default=_UNSET,
        help=f"what ranks filters (default {SearchRun.importance})",
    )


def _add_gates(group: argparse._ArgumentGroup) -> None:
    for name, text in (
        ("gate-lr", "learning rate of bit thresholds"),
        ("prune-lr", "learning rate of pruning thresholds"),
        ("strength", "weight of the budget term at the start"),
        ("gain", "growth of that weight per step above the target"),
    ):
        _add_rate(group, name, text)
    group.add_argument(
        "--all-epochs",
        dest="stop_when_met",
        action="store_false",
        default=_UNSET,
        help="train on with held gates when the budget is met",
    )


def _add_stages(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--float-epochs", type=int, default=_UNSET, metavar="N", help="train the float network first, without --weights"
    )
    _add_rate(group, "float-lr", "learning rate of --float-epochs")
    group.add_argument(
        "--prune-bops",
        type=bit_operations,
        default=_UNSET,
        metavar="B",
        help=f"two-stage: budget of the first stage, at 32 x 32 bits (default {SearchRun.prune_bops:g})",
    )
    group.add_argument(
        "--pruned-epochs",
        type=int,
        default=_UNSET,
        metavar="N",
        help="two-stage: epochs of fine-tuning in float between the stages (default: as many as --epochs)",
    )
    _add_rate(group, "pruned-lr", "two-stage: learning rate of fine-tuning in float between the stages")


def _add_rate(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    usual = getattr(SearchRun, name.replace("-", "_"))
    group.add_argument(f"--{name}", type=decimal, default=_UNSET, metavar="X", help=f"{text} (default {usual:g})")


def run(args: argparse.Namespace) -> int:
    """Search, and print target and result."""
    out = console(args)
    options = asked(args)
    if not args.resume and not any(name in options for name in TARGETS):
        raise PlanError(NO_TARGET)
    with session(args, out) as current:
        folder, processes = current.folder, distributed.world_size()
        config = distributed.first(lambda: open_run(SearchRun, folder, options, args.resume, processes=processes))
        folder.note_environment()
        section = run_search(config, current)
    out.say(
        f"searched: {section['frozen_accuracy']:.2%} before fine-tuning, {bops(section['bops'])} BOPs "
        f"({bops(section['full_precision_bops'])} in full precision)"
        + (f"; layers in float: {bops(section['float_bops'])} more" if section["float_bops"] else "")
    )
    out.say(f"next: lbs finetune --run {args.run}")
    out.finish(section)
    return 0
