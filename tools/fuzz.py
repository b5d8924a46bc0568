"""Mutated packed files and programs, for as long as one likes: nothing may crash, hang, or end in a foreign error.

    python tools/fuzz.py --seed 7 --files 20000 --programs 20000

A file is refused, or loaded and run; both readers of programs, Python and C++, give one verdict on every program.
The first that ends otherwise is kept, in a new folder under --folder, and named, and the command ends with 1. Counts,
the worst time and the peak memory are printed. Another seed is another night's work.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/packing"), str(ROOT / "tests/kernels")]


def main() -> int:
    """Run what was asked for; 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all mutants (default 0)")
    parser.add_argument("--files", type=int, default=20_000, metavar="N", help="mutated packed files")
    parser.add_argument("--programs", type=int, default=20_000, metavar="N", help="mutated programs")
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where it works (default: here)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import file_mutants
    import test_program_rules as rules
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="lbs-fuzz-", dir=args.folder))
    try:
        started = time.monotonic()
        outcome = file_mutants.attack(folder, args.seed, args.files)
        print(f"{args.files} files in {time.monotonic() - started:.0f} s: {outcome}", flush=True)
        started = time.monotonic()
        verdicts, accepted = rules.judge(rules.random_mutants(args.seed, args.programs))
        ran = rules.run_all(accepted, args.programs // 30)
        print(
            f"{args.programs} programs in {time.monotonic() - started:.0f} s: Python and C++ agree on all, "
            f"{verdicts['']} valid, {ran} of them run by both to the same bits"
        )
    except AssertionError as error:
        print(f"does not hold: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
