"""Accuracy against measured milliseconds: networks searched under `latency_ms` beside those one would take without.

    python benchmarks/bench_milliseconds.py --row cifar100-resnet20 --data cifar100.npz --weights FILE --runs DIR \\
        --options="--schedule 1+3 --curve cosine --lr 0.03 --distill 0.7 --amp bf16" --save

`lbs tune` first measures what is not known yet. Then `lbs reproduce` trains every row in a folder of its own below
--runs. What is finished is left, what was stopped goes on: after any stop, the same command does the rest. In the end
all packed networks are timed in one process, interleaved, at every batch. The file is written again after every row,
with those that are there.

--trained trains nothing more: it times what is there.

Points are shares of what a call of uniform 8 bits takes, and become milliseconds once, in DIR/points.json. Searched is
by thresholds that learn, and by measured losses (greedy). Beside them are uniform 8 and 4 bits, both without an even
share of the filters of every layer that can lose some, too, and 8 bits as `lbs.quantize` makes them without training.
Fine-tuning is the same for all that are trained, and so are residual streams (--streams), of 8 bits by default.

    {"version": 1, "level": "milliseconds", "header": {..., "row", "options", "streams", "points"},
     "missing": [what lbs reproduce refused, a point out of reach say, and what was not trained],
     "rows": [{"contender", "seed", "batch", "median", "p20", "p80", "fastest"  (seconds),
               "asked", "estimated"  (seconds at batch 1, null without a target), "top1"  (percent, packed),
               "float_top1", "bops", "bytes", "bits", "pruned_layers"}]}
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, header

import lbs
import lbs.cost
import lbs.data
import lbs.models
from lbs.cost.latency import call_seconds, fastest, surroundings
from lbs.run_folder import RunFolder, read_json, write_json
from lbs.runs import network
from lbs.runs.packed import PACKED
from lbs.runs.rows import row_named
from lbs.runs.stages import UNIFORM8, uniform8_run
from lbs_kernels.errors import BackendError
from lbs_kernels.times.stopwatch import Times, interleave
from lbs_kernels.times.table import device_slug

POINTS = (0.9, 0.75, 0.6)  # of a call of uniform 8 bits
UNIFORM = (8, 4)  # bits
PRUNED = (0.25, 0.5)  # even shares of filters
SEARCHED = {"searched": "", "greedy": "-greedy"}  # name -> variant of the row
UNTRAINED = "8 bits, not trained"
CALIBRATION = 512  # training images, for those
REFUSED = 2  # what lbs ends with, having said why
PART = 128  # of them at once


@dataclass(frozen=True)
class Contender:
    """A row of `lbs reproduce` with the options that are its own. asked: milliseconds."""

    name: str
    row: str
    options: tuple[str, ...] = ()
    asked: float | None = None

    def folder(self, runs: Path, seed: int) -> Path:
        """Where it is trained."""
        return runs / f"{self.name.replace(' ', '-')}-seed{seed}"


def contenders(row: str, points: list[float], streams: int, search: tuple[str, ...] = ()) -> list[Contender]:
    """All that are trained, those searched under milliseconds last; `search` are options of these."""
    alike = ("ranges=filter", f"streams={streams}")
    found = [Contender(f"uniform {bits}", f"{row}-uniform-{bits}") for bits in UNIFORM]
    for bits, share in product(UNIFORM, PRUNED):
        own = ("--finetune", f"uniform_pruned={share}")
        found.append(Contender(f"uniform {bits} without {share:.0%}", f"{row}-uniform-{bits}-pruned", own))
    found = [replace(one, options=(*one.options, *each("--finetune", alike))) for one in found]
    for asked in points:
        own = each("--search", [f"latency_ms={asked:g}", "bops=0", "max_pruning_ratio=0.5", *alike, *search])
        for how, variant in SEARCHED.items():
            found.append(Contender(f"{how} {asked * 1e3:.1f} us", row + variant, own, asked))
    return found


def each(option: str, values: Iterable[str]) -> tuple[str, ...]:
    """An option with one value after the other, as words of a command line."""
    return tuple(word for value in values for word in (option, value))


def command(*words: str) -> None:
    """`lbs ...` in a process of its own, of the lbs that runs here. Raises CalledProcessError."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-m", "lbs", *words], check=True, env=environment)


def points_of(args: argparse.Namespace) -> list[float]:
    """Milliseconds that are asked for: of the calls that were measured, kept beside the runs, so that they stay."""
    path = args.runs / "points.json"
    if not path.exists():
        model = lbs.models.create(row_named(args.row).network.model).eval()
        layers = lbs.cost.network_layers(model, lbs.models.example(row_named(args.row).network.model))
        problems = [layer.problem for layer in layers.with_bits(8, 8).layers]
        around = surroundings(problems, streams=args.streams)
        threads = fastest(around)
        call = call_seconds(problems, problems, batch=1, threads=threads, streams=args.streams)
        points = [1e3 * call * share for share in args.points]
        write_json(path, {"call": call, "threads": threads, "streams": args.streams, "points": points})
    found = read_json(path)
    if found["streams"] != args.streams:
        raise SystemExit(f"{args.runs} holds runs with --streams {found['streams']}; give that, or another folder")
    return [float(point) for point in found["points"]]


def trained(one: Contender, seed: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """The record of a contender, which is trained as far as it is not yet; None where that is refused, as a point out
    of reach is, or where nothing more is to be trained. Raises CalledProcessError where it ends otherwise: asked to
    stop, say.
    """
    folder = one.folder(args.runs, seed)
    record = folder / "record.json"
    if not record.exists() and args.trained:
        return None
    if not record.exists():
        begun = (folder / "config.json").exists()
        options = () if begun else (*one.options, *shlex.split(args.options), "--seed", str(seed))
        files = ("--data", str(args.data), *(("--weights", str(args.weights)) if args.weights else ()))
        named = ("--resume",) if begun else (one.row, *files, *options)
        try:
            command("reproduce", *named, "--out", str(folder), "--threads", str(args.threads))
        except subprocess.CalledProcessError as error:
            if error.returncode != REFUSED:
                raise
            return None
    return read_json(record)


def untrained(folder: RunFolder, streams: int) -> dict[str, Any]:
    """8 bits without training, of the float network and the data of a run that is finished."""
    if "uniform8" not in folder.results():
        data = network.images_of(network.NetworkCard.read(folder))
        chosen = data.subset(min(CALIBRATION, data.train_count), seed=0)
        images = [lbs.data.normalize(part, data.mean, data.std) for part in chosen.train_x.split(PART)]
        uniform8_run(folder, images, streams=streams)
    return dict(folder.results()["uniform8"])


def measured(files: dict[str, Path], batches: list[int], rounds: int, threads: int) -> dict[int, dict[str, Times]]:
    """Times of all packed networks by batch, interleaved, on the last processors."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-threads:])
    packed = {name: lbs.load(path) for name, path in files.items()}
    shape = next(iter(packed.values())).random_images(1).shape[1:]
    found = {}
    with torch.inference_mode():
        for batch in batches:
            images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
            found[batch] = interleave({name: partial(one, images) for name, one in packed.items()}, rounds=rounds)
    os.sched_setaffinity(0, allowed)
    return found


def rows_of(done: dict[str, dict[str, Any]], times: dict[int, dict[str, Times]]) -> list[dict[str, Any]]:
    """The rows of the file: what is known of a contender, with its times at a batch."""
    rows = []
    for batch, of_batch in times.items():
        for name, one in of_batch.items():
            span = {"median": one.median, "p20": one.p20, "p80": one.p80, "fastest": min(one.seconds)}
            rows.append({**done[name], "batch": batch, **span})
    return rows


def known(one: Contender, seed: int, record: dict[str, Any]) -> dict[str, Any]:
    """What the record of a row says of it."""
    latency = record.get("latency") or {}
    return {
        "contender": one.name,
        "seed": seed,
        "asked": None if one.asked is None else one.asked / 1e3,
        "estimated": latency.get("estimated"),
        "top1": record["packed_top1"],
        **{key: record[key] for key in ("float_top1", "bops", "bytes", "bits", "pruned_layers")},
    }


def run(args: argparse.Namespace, path: Path | None) -> None:
    """Train what is missing, time everything that is there, keep the file at `path`, print the rows."""
    args.runs.mkdir(parents=True, exist_ok=True)
    model = row_named(args.row).network.model
    if not args.trained:
        command("tune", "--shapes", model, "--threads", str(args.threads), "--streams", str(args.streams))
    points = points_of(args)
    head = {**header(args), "row": args.row, "options": args.options, "streams": args.streams, "points": points}
    missing: list[str] = []
    done: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    for seed in args.seeds:
        for one in contenders(args.row, points, args.streams, tuple(args.search)):
            record, folder = trained(one, seed, args), one.folder(args.runs, seed)
            if record is None:
                missing.append(f"{one.name}, seed {seed}")
                continue
            if not record["verified"]:
                raise BackendError(f"{folder} holds a packed network that is not the trained one; it is not timed")
            name = f"{one.name}, seed {seed}"
            done[name], files[name] = known(one, seed, record), folder / PACKED
            if UNTRAINED not in done:
                section = untrained(RunFolder(folder), args.streams)
                done[UNTRAINED] = {**known(one, seed, record), "contender": UNTRAINED, "bops": None, "bits": [[8, 8]]}
                done[UNTRAINED] |= {"top1": 100 * section["accuracy"], "bytes": section["bytes"], "pruned_layers": {}}
                files[UNTRAINED] = folder / UNIFORM8
            if not args.trained:
                written(path, head, missing, done, measured(files, args.batches, args.rounds, args.threads))
    times = measured(files, args.batches, 2 * args.rounds, args.threads)
    written(path, head, missing, done, times)
    for row in rows_of(done, times):
        asked = "" if row["asked"] is None else f" of {row['asked'] * 1e6:.1f} asked"
        span = f"{row['median'] * 1e6:8.1f} us [{row['p20'] * 1e6:.1f} {row['p80'] * 1e6:.1f}]"
        name = f"{row['contender']:24s} seed {row['seed']}"
        print(f"batch {row['batch']:3d}  {name}  {row['top1']:6.2f} %  {span}{asked}")
    for name in missing:
        print(f"{name}: " + ("not trained" if args.trained else "refused by lbs reproduce, which says why above"))


def written(
    path: Path | None,
    head: dict[str, Any],
    missing: list[str],
    done: dict[str, dict[str, Any]],
    times: dict[int, dict[str, Times]],
) -> None:
    """The file, whole or not at all."""
    if path is not None:
        told = {"version": 1, "level": "milliseconds", "header": head, "missing": missing}
        write_json(path, {**told, "rows": rows_of(done, times)})


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--row", default="cifar100-resnet20", help="of lbs reproduce; its network is what is searched")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", help="of the float network; without, every row trains its own, alike")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs; the same one goes on with them")
    parser.add_argument("--options", default="", help="schedule and recipe of all rows, as lbs reproduce takes them")
    parser.add_argument("--streams", type=int, choices=(8, 32), default=8, help="bits of residual streams, of all")
    parser.add_argument("--search", action="append", default=[], metavar="KEY=VALUE", help="of the searches alone")
    parser.add_argument("--points", nargs="+", type=float, default=list(POINTS), help="shares of uniform 8 bits' time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--trained", action="store_true", help="train nothing more, time what is there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/<device>/milliseconds_<row>.json")
    parser.add_argument("--output", type=Path, help="write the JSON here instead")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.device, args.batch = "cpu", args.batches  # of the header that all benchmarks share
    default = RESULTS / device_slug("cpu") / f"milliseconds_{args.row}.json" if args.save else None
    path = args.output or default
    run(args, path)
    if path is not None:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
