"""Mutated packed files and programs, for as long as one likes: nothing may crash, hang, or end in a foreign error.

    python tools/fuzz.py --seed 7 --files 20000 --programs 20000 --out fuzz.json

A file is refused, or loaded and run; both readers of programs, Python and C++, give one verdict on every program, and
compute the same bits where it is small. What ends otherwise is counted, kept under --folder, and the command ends
with 1. Another seed is another night's work.

It goes in pieces of 1000, each a process of its own: a crash ends none but that, which goes on behind the mutant that
made it. Piece k of seed s has the seed 1000 s + k. With --out the counts are written after every piece, and a command
that is given the same file and seed again goes on where the other ended.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/packing"), str(ROOT / "tests/kernels")]

from outcomes import Outcome  # noqa: E402  the paths above come first

PIECE = 1000
SECONDS = 60  # of the processor: native code that hangs hears no signal of Python's, so the system ends the process
NOTE, RESULT, PROGRAM = "note.json", "result.json", "program.json"


def main() -> int:
    """Run what was asked for; 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all mutants (default 0)")
    parser.add_argument("--files", type=int, default=20_000, metavar="N", help="mutated packed files")
    parser.add_argument("--programs", type=int, default=20_000, metavar="N", help="mutated programs")
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where it works (default: here)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the counts there, and go on from there")
    parser.add_argument("--piece", nargs=4, metavar=("KIND", "SEED", "COUNT", "FIRST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.piece:
        kind, *numbers = args.piece
        work(args.folder, kind, *map(int, numbers))
        return 0
    outcomes = run(args.seed, {"files": args.files, "programs": args.programs}, args.folder, args.out)
    for kind, outcome in outcomes.items():
        print(f"{outcome.done} {kind}: {outcome}")
        for words in outcome.failures:
            print(f"does not hold: {words}", file=sys.stderr)
    return 1 if any(outcome.failures for outcome in outcomes.values()) else 0


def run(seed: int, counts: dict[str, int], folder: Path, out: Path | None) -> dict[str, Outcome]:
    """Judge so many mutants of each kind, in pieces; what is in `out` already is not judged again."""
    saved: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    pieces = saved.get(str(seed), {})
    for kind, count in counts.items():
        for number, begin in enumerate(range(0, count, PIECE)):
            name = f"{kind} {number} {min(PIECE, count - begin)}"
            if name not in pieces:
                pieces[name] = piece(folder, kind, 1000 * seed + number, min(PIECE, count - begin)).to_json()
                if out is not None:
                    out.write_text(json.dumps({**saved, str(seed): pieces}, indent=1) + "\n")
                print(f"{kind}, piece {number}: {Outcome.of_json(pieces[name])}", flush=True)
    outcomes = {kind: Outcome() for kind in counts}
    for name, body in pieces.items():
        outcomes[name.split()[0]].add(Outcome.of_json(body))
    return outcomes


def piece(folder: Path, kind: str, seed: int, count: int) -> Outcome:
    """Judge `count` mutants in processes: one, and another behind each mutant that ends it."""
    total, first = Outcome(), 0
    place = Path(tempfile.mkdtemp(prefix=f"lbs-fuzz-{kind}-{seed}-", dir=folder))
    while first < count:
        command = [sys.executable, __file__, "--folder", str(place), "--piece", kind, str(seed), str(count), str(first)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode == 0:
            total.add(Outcome.of_json(json.loads((place / RESULT).read_text())))
            break
        if ended.returncode > 0 and ended.stderr.lstrip().startswith("Traceback"):  # of this tool
            raise RuntimeError(f"{' '.join(command)}: {ended.stderr}")
        noted = json.loads((place / NOTE).read_text())
        total.add(Outcome.of_json(noted["outcome"]))
        total.done += 1
        late = ended.returncode == -signal.SIGXCPU
        words = f"more than {SECONDS} s in native code" if late else f"ended with {ended.returncode}: {ended.stderr}"
        total.fail("hang" if late else "crash", f"seed {seed}, {kind} {noted['number']}: {words}")
        for left in [*place.glob("mutant.*"), *place.glob(PROGRAM)]:
            left.rename(place / f"seed{seed}-{noted['number']}-{left.name}")
        first = noted["number"] + 1
    if not total.failures:
        for left in place.iterdir():
            left.unlink()
        place.rmdir()
    return total


def work(folder: Path, kind: str, seed: int, count: int, first: int) -> None:
    """A process of a piece: the mutants `first` to `count`, with a note before each of what became of the others."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)

    def note(number: int, outcome: Outcome) -> None:
        (folder / NOTE).write_text(json.dumps({"number": number, "outcome": outcome.to_json()}))
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, hard))

    judged: dict[str, Callable[..., Outcome]] = {"files": attack_files, "programs": attack_programs}
    outcome = judged[kind](folder, seed, count, first, note)
    (folder / RESULT).write_text(json.dumps(outcome.to_json()))


def attack_files(folder: Path, *arguments: Any) -> Outcome:
    """See `file_mutants.attack`."""
    import file_mutants

    return file_mutants.attack(folder, *arguments)


def attack_programs(folder: Path, seed: int, count: int, first: int, note: Callable[[int, Outcome], None]) -> Outcome:
    """Mutated programs: judged by both readers, and run by both where they are accepted and small."""
    import test_program_rules as rules

    outcome = Outcome()

    def verdict(mutant: rules.Mutant) -> str:
        broken, program = rules.judge_one(mutant)
        if program is None:
            return broken
        return "valid, run by both" if rules.run_both(mutant, program) else "valid"

    for number, mutant in enumerate(rules.random_mutants(seed, count)):
        if number < first:
            continue
        (folder / PROGRAM).write_bytes(mutant.text)
        note(number, outcome)
        name = f"seed {seed}, program {number}, {mutant.what}"
        if not outcome.judge(name, len(mutant.text), lambda mutant=mutant: verdict(mutant)):  # type: ignore[misc]
            (folder / PROGRAM).rename(folder / f"seed{seed}-{number}-{PROGRAM}")
    return outcome


if __name__ == "__main__":
    sys.exit(main())
