"""What a GPU is measured for, in one command of limited time, the most telling parts first.

    python benchmarks/gpu_suite.py [--out DIR] [--only PART ...] [--minutes M] [--networks N] [--plan] [--dry]

In this order: the native module (of gpu_carry.py, else built), every step of ResNet-18 and -50 in its own
CUDA graph, whole networks against float16 in a graph and torch.compile, the roofs, the ten costliest layers tuned, the
GPU tests, steps of searches, compute-sanitizer; then the results beside the targets. `--only row --data DIR` is a call
of its own: a whole row of the results. Needed are torch, triton, numpy, safetensors and pytest; nothing is fetched.
What is missing beside them (nvcc, pytest-xdist, compute-sanitizer) costs its part, which says so.

Parts have boxes of time that add up to less than the default of `--minutes` (`--plan` prints them); what one leaves
goes to the next. Each writes DIR/<part>.json, after every problem where there are many, so that whatever ends the run
leaves what was measured. Kernels run in processes of their own: one that breaks the device costs its problem, and the
part goes on behind it. DIR/<device>.json is the measured table, for lbs_kernels/tuning/ or LBS_TUNING_DIR; the others
go to benchmarks/results/<device>/. `--dry` runs what a processor can: kernels in Triton's interpreter on tiny shapes.
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

from benchmarks.gpu_run import SLACK, Run, header, run_parts, warm  # noqa: E402  the path above comes first

# Part -> seconds of its box. While modules are built, networks are packed and torch.compile makes its own.
BOXES = {
    "build": 70.0,
    "steps": 65.0,
    "models": 110.0,
    "roofs": 15.0,
    "layers": 50.0,
    "tests": 80.0,
    "search": 45.0,
    "sanitizer": 30.0,
}
APART = {"row": 430.0}  # asked for by name alone
WHAT = {
    "build": "the CUDA module, if not carried; beside it networks are packed, and torch.compile makes float16 ones",
    "steps": "every step of ResNet-18 and -50, w8a8 and w4a4, batch 128 and 1, each alone in a graph",
    "models": "ResNet-18, -50, MobileNetV2, batch 128 and 1: packed, float16 channels_last, compiled; norms folded",
    "roofs": "copy, float16, int8 through torch, and bytes and single bits on tensor cores",
    "layers": "the ten costliest layers tuned, kernels in Triton and in CUDA",
    "tests": "tests marked gpu, what changed since they ran first",
    "search": "steps of float training and of searches",
    "sanitizer": "memcheck and racecheck over kernels in CUDA",
    "row": "one whole row: ResNet-20 on CIFAR-100, 30 + 200 epochs; a call of its own, --only row --data DIR",
}
MINUTES = 8.0
NO_GPU = (
    "gpu_suite: torch sees no CUDA device here; it measures GPU kernels and nothing else. Run it on a machine with an "
    "NVIDIA GPU (sm_80 or newer) and a CUDA build of torch; `lbs bench` measures the CPU."
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the result files; made if missing (default: $OUT)")
    parser.add_argument("--only", action="append", choices=list(BOXES | APART), help="run this part; may be repeated")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop after this long (default: %(default)s)")
    parser.add_argument("--networks", type=int, help="time the first so many (network, batch) alone: for a short run")
    parser.add_argument("--plan", action="store_true", help="print the parts and their seconds, and run nothing")
    parser.add_argument(
        "--dry", action="store_true", help="without a GPU: what runs in the interpreter, on tiny shapes"
    )
    parser.add_argument("--data", default="", help="CIFAR-100, for the part `row`, as lbs reproduce takes it")
    parser.add_argument("--child", choices=["steps", "roofs", "layers", "models", "warm"], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # time.time()
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plan:
        return args
    if args.out is None and not os.environ.get("OUT"):
        parser.error("there is no folder for the result files: give --out DIR, or set the environment variable OUT")
    args.out = args.out or Path(os.environ["OUT"])
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: the run needs some time, give a positive number")
    if args.networks is not None and args.networks < 1:
        parser.error(f"--networks {args.networks}: give a positive number, or leave models out by --only")
    return args


def selected(only: list[str] | None) -> list[str]:
    """Parts to run, always in the order of `BOXES`; those apart where they are named."""
    return [name for name in BOXES | APART if (only is None and name in BOXES) or name in (only or ())]


def plan(names: list[str]) -> str:
    """The parts with their seconds, and how many together."""
    boxes = BOXES | APART
    lines = [f"{boxes[name]:5.0f} s  {name:10} {WHAT[name]}" for name in names]
    total = sum(boxes[name] for name in names)
    return "\n".join([*lines, f"{total:5.0f} s  together, and {SLACK:.0f} s for the last files"])


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
    if args.plan:
        print(plan(selected(args.only)))
        return 0
    if args.dry:
        from benchmarks import gpu_dry

        return gpu_dry.main(args.out.resolve())
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    out = args.out.resolve()
    if args.child:
        child(args.child, Run(out, args.until, header(), args.scratch, networks=args.networks))
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="lbs-gpu-suite-"))
    run = Run(out, time.time() + 60 * args.minutes, header(), scratch, networks=args.networks, data=args.data)
    good = run_parts(run, {name: (BOXES | APART)[name] for name in selected(args.only)}, beside=warm)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
