"""`lbs quickstart`: the whole road on scikit-learn's real digits, from training to the report, in about a minute."""

from __future__ import annotations

import argparse
import itertools
import signal
import time
from pathlib import Path
from typing import Any

import torch

from lbs.cli.console import Console, console
from lbs.cli.options import set_threads
from lbs.cli.verify import show
from lbs.config import FinetuneRun, SearchRun, open_run
from lbs.extras import asked_for
from lbs.reporting import records
from lbs.reporting.tables import bits_pay, kept_filters, speeds
from lbs.reporting.units import bops, percent, size
from lbs.run_folder import RunFolder, read_sections
from lbs.runs.phases import Session, run_finetune, run_search
from lbs.runs.session import calibration_batches
from lbs.runs.stages import bench_run, pack_run, uniform8_run, verify_run
from lbs.train.stopping import Stopped
from lbs_kernels.device import processors
from lbs_kernels.errors import LbsError

# 8x8 images: threads cost more than they bring (2 threads on 2 busy cores were 15 times slower than one).
TRAINING_THREADS = 1
LEAST_ACCURACY = 0.97
# Four bits in every layer take 1.6 % of full precision: half of that takes filters as well. Two bits would save bit
# operations alone, where processors multiply bytes.
SEARCH: dict[str, Any] = {
    "data": "digits",
    "model": "digits_vgg5",
    "augment": False,  # mirrored digits are other digits
    "batch_size": 64,
    "float_epochs": 6,
    "epochs": 12,  # ends where the thresholds meet the budget
    "prune_lr": 0.3,
    "lr": 0.005,
    "schedule": "cosine",
    "bops": 0.008,
    "bits": (4, 8),
    "log_every": 5,
}
FINETUNE: dict[str, Any] = {"epochs": 8, "batch_size": 64, "lr": 0.02, "schedule": "cosine", "distill": 0.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run goes, and the threads of the benchmark."""
    parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/quickstart, or the next free number)")
    parser.add_argument("--threads", type=int, default=min(2, processors()), help="threads of the benchmark")


def run(args: argparse.Namespace) -> int:
    """All stages; 1 where the packed network is not the trained one, or learned too little."""
    out = console(args)
    set_threads(args.threads)  # refused now, not after the training
    folder = RunFolder(args.run or free_folder(Path("runs")))
    with folder.held():
        try:
            return _stages(args, out, folder)
        except KeyboardInterrupt as stop:
            raise Stopped(_rest(folder, stop), getattr(stop, "number", 0) or signal.SIGINT) from stop


def _rest(folder: RunFolder, stop: KeyboardInterrupt) -> str:
    """What is left to do in a run that was interrupted, command by command; a quickstart itself starts anew."""
    done = folder.results()
    left = [name for name in ("search", "finetune", "pack", "verify", "bench") if name not in done]
    begun = read_sections(folder.file("config.json"))
    commands = [f"lbs {name} --run {folder.path}" + (" --resume" if name in begun else "") for name in left]
    told = str(stop).partition("; go on")[0] or "interrupted"
    return (
        f"{told}; go on with {'; '.join([*commands, f'lbs report {folder.path}'])}, or start anew with lbs quickstart"
    )


def _stages(args: argparse.Namespace, out: Console, folder: RunFolder) -> int:
    started = time.monotonic()
    folder.note_environment()
    torch.set_num_threads(TRAINING_THREADS)
    session = Session(folder, torch.device("cpu"), progress=out.progress(), say=out.say)

    _title(out, 1, f"train a float network on real digits, then search its bits and filters ({folder.path})")
    config = open_run(SearchRun, folder, SEARCH, resume=False)
    searched = run_search(config, session)
    _title(out, 2, "fine-tune at the bits that were found")
    tuned = run_finetune(open_run(FinetuneRun, folder, FINETUNE, resume=False, inherit="search"), session)
    _title(out, 3, "pack into bit-planes; beside it the float network at uniform 8 bits, as lbs.quantize makes it")
    packed = pack_run(folder)
    even = uniform8_run(folder, calibration_batches(config, session.data(config), session.device))
    for section in (packed, even):
        out.say(f"{section['file']}: {size(section['bytes'])}")
    _title(out, 4, "verify: codes of every layer, predictions on every test image")
    verified = verify_run(folder, strict=True)
    show(out, verified)
    _title(out, 5, f"time it against torch, uniform 8 bits and engines in the same process, {args.threads} threads")
    timed = bench_run(folder, out.say, threads=args.threads)
    _title(out, 6, "write the report")
    page, record = _page(out, folder), records.read(folder.path)
    passed = verified["passed"] and verified["packed_accuracy"] >= LEAST_ACCURACY
    seconds = time.monotonic() - started
    summary = [*_results(record, tuned, searched), f"{seconds:.0f} s" + (f"; open {page}" if page else "")]
    for line in summary:
        out.say(line)
    if not passed:
        out.say(
            f"FAILED: every prediction must be equal and at least {percent(LEAST_ACCURACY)} right; "
            f"{verified['first_difference'] or 'see the lines above'}"
        )
    body = {"level": "quickstart", "passed": passed, "seconds": seconds, "page": page, "summary": summary}
    out.finish({**body, **folder.results(), "bench": timed})
    return 0 if passed else 1


def _page(out: Console, folder: RunFolder) -> str:
    """Writes the report; its path, or nothing where what draws it is not installed."""
    try:
        with asked_for("the report"):
            from lbs.reporting.page import report
    except LbsError as error:
        out.say(str(error))
        return ""
    return str(report(folder.path))


def free_folder(parent: Path) -> Path:
    """runs/quickstart, or runs/quickstart-2 and so on: an old run is never touched."""
    names = itertools.chain(["quickstart"], (f"quickstart-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())


def _results(record: records.Record, tuned: dict[str, Any], searched: dict[str, Any]) -> list[str]:
    """What the search brought, beside the float network, uniform 8 bits, and whatever else is the fastest."""
    right = {name: percent(record.accuracy(name)) for name in ("packed", "torch float32", "packed uniform 8-bit")}
    sizes = {name: size(record.value(name, "bytes")) for name in ("pack", "uniform8", "float")}
    lines = [
        f"test images right: searched {right['packed']}, float {right['torch float32']}, uniform 8 bits "
        f"{right['packed uniform 8-bit']}",
        f"bit operations: {bops(tuned['bops'])} of {bops(searched['target_bops'])} allowed; file: {sizes['pack']}, "
        f"uniform 8 bits {sizes['uniform8']}, float {sizes['float']}",
        kept_filters(record),
        *speeds(record),
        bits_pay(record),
    ]
    return [line for line in lines if line]


def _title(out: Console, number: int, text: str) -> None:
    out.say()
    out.say(f"[{number}/6] {text}")
