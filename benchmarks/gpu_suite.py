"""Everything this project wants to know from a GPU, in one command that may be the only one a machine ever runs.

    python benchmarks/gpu_suite.py [--out DIR] [--only PART ...] [--minutes M] [--networks N]

It builds the native modules, measures the roofs, runs the GPU tests, times training steps, tunes and times layers,
times whole networks, runs compute-sanitizer, and compares the results with the targets. Needed are torch, triton,
numpy, safetensors and pytest; nothing is fetched. What is missing beside them (nvcc, pytest-xdist, compute-sanitizer)
costs its part, which says so.

Parts have boxes of time that add up to nine minutes; what one leaves goes to the next. Each writes DIR/<part>.json,
after every problem where there are many, so that whatever ends the run leaves what was measured. Kernels run in
processes of their own: one that breaks the device costs its problem, and the part goes on behind it. DIR/<device>.json
is the measured table, for lbs_kernels/tuning/ or LBS_TUNING_DIR; the others go to benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script from anywhere
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu_run import Run, header, run_parts, warm  # noqa: E402  the path above comes first

# Part -> seconds of its box. The first three judge and build, the others spend what is left.
BOXES = {
    "build": 80.0,
    "roofs": 25.0,
    "tests": 125.0,
    "search": 50.0,
    "layers": 95.0,
    "models": 125.0,
    "sanitizer": 35.0,
}
MINUTES = 9.0
NO_GPU = (
    "gpu_suite: torch sees no CUDA device here; it measures GPU kernels and nothing else. Run it on a machine with an "
    "NVIDIA GPU (sm_80 or newer) and a CUDA build of torch; `lbs bench` measures the CPU."
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the result files; made if missing (default: $OUT)")
    parser.add_argument("--only", action="append", choices=list(BOXES), help="run this part; may be repeated")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop after this long (default: %(default)s)")
    parser.add_argument("--networks", type=int, help="time the first so many (network, batch) alone: for a short run")
    parser.add_argument("--child", choices=["roofs", "layers", "models", "warm"], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # time.time()
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out is None and not os.environ.get("OUT"):
        parser.error("there is no folder for the result files: give --out DIR, or set the environment variable OUT")
    args.out = args.out or Path(os.environ["OUT"])
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: the run needs some time, give a positive number")
    if args.networks is not None and args.networks < 1:
        parser.error(f"--networks {args.networks}: give a positive number, or leave models out by --only")
    return args


def selected(only: list[str] | None) -> list[str]:
    """Parts to run, always in the order of `BOXES`."""
    return [name for name in BOXES if only is None or name in only]


def child(part: str, run: Run) -> NoReturn:
    """Run one part and leave at once: compiling processes are not waited for, the parent ends them."""
    from benchmarks import gpu_children

    code = 1
    try:
        gpu_children.run(part, run)
        code = 0
    except BaseException:  # noqa: BLE001  told in the log, and by the exit code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 where every part went well, 1 where one failed, 2 without a GPU."""
    args = arguments(argv)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    out = args.out.resolve()
    if args.child:
        child(args.child, Run(out, args.until, header(), args.scratch, networks=args.networks))
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="lbs-gpu-suite-"))
    run = Run(out, time.time() + 60 * args.minutes, header(), scratch, networks=args.networks)
    good = run_parts(run, {name: BOXES[name] for name in selected(args.only)}, beside=warm)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
