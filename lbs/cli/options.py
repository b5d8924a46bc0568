"""Options that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lbs.cli.console import Console
from lbs.config import RunConfig
from lbs.run_folder import RunFolder
from lbs.runs.phases import Session, file_digest
from lbs.search.streams import WIDTHS
from lbs.train import distributed
from lbs_kernels.errors import BackendError, LbsError

_UNSET = argparse.SUPPRESS  # an option that was not named is not in the namespace: config.py decides


def numbers(text: str) -> tuple[int, ...]:
    """`2,4,8` -> (2, 4, 8)."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 2,4,8") from error


def decimals(text: str) -> tuple[float, ...]:
    """`.5,.4` -> (0.5, 0.4)."""
    return tuple(decimal(part) for part in text.split(",") if part.strip())


def decimal(text: str) -> float:
    """A finite number.

    >>> decimal("1e-3")
    0.001
    """
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite; give a number such as 0.01")
    return value


def bit_operations(text: str) -> float:
    """A share (`0.03`), a count (`650000000`), or a count with a unit (`650M`, `34.7G`).

    >>> bit_operations("650M")
    650000000.0
    """
    units = {"K": 1e3, "M": 1e6, "G": 1e9}
    unit = units.get(text[-1:].upper())
    value = decimal(text[:-1]) * unit if unit else decimal(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is no budget; give a share such as 0.03 or a count such as 650M")
    return value


def add_exclude(parser: argparse._ActionsContainer) -> None:
    """--exclude, of commands that choose which layers have bits."""
    parser.add_argument(
        "--exclude",
        action="append",
        default=_UNSET,
        metavar="PATTERN",
        help="leave layers in float whose name matches, such as 'layer1.*'; may be given several times",
    )


def add_streams(parser: argparse._ActionsContainer) -> None:
    """--streams, of commands that make a network quantized."""
    parser.add_argument(
        "--streams",
        type=int,
        choices=WIDTHS,
        default=_UNSET,
        help="bits of what residual sums store: 8, codes that layers of 8 bits read as well, or 32, floats (default)",
    )


def add_latency(parser: argparse._ActionsContainer) -> None:
    """--latency-ms and --latency-device, of commands that take a budget."""
    parser.add_argument(
        "--latency-ms", type=decimal, default=_UNSET, metavar="X", help="budget: one image, by what lbs tune measured"
    )
    parser.add_argument(
        "--latency-device",
        default=_UNSET,
        metavar="D",
        help="whose times --latency-ms counts: cpu (default), cuda, or those of a model of a GPU that is not here, "
        "such as modelled:nvidia-h200, with a batch behind it :128",
    )


def add_model(parser: argparse._ActionsContainer) -> None:
    """--model, of commands that build the network of a run again."""
    parser.add_argument(
        "--model", default=_UNSET, metavar="M:F", help="the run's module:function, which is called only if named here"
    )


def folder_of(args: argparse.Namespace, named: Collection[str] = ()) -> RunFolder:
    """The run folder of a command line, with the functions that may be called: those named here."""
    typed = (getattr(args, "model", ""), getattr(args, "teacher", ""), *named)
    return RunFolder(args.run, {name for name in typed if name})


def _budget(text: str) -> float | None:
    """A finite number, or `none`.

    >>> _budget("4"), _budget("none")
    (4.0, None)
    """
    return None if text == "none" else decimal(text)


def add_budget(parser: argparse._ActionsContainer) -> None:
    """--budget: what a packed file may cost, which may be a stranger's."""
    parser.add_argument(
        "--budget",
        type=_budget,
        default=1.0,
        metavar="X",
        help="times what one image may cost (default 1), or none: any, of a packed file that you trust",
    )


def add_machine(parser: argparse._ActionsContainer) -> None:
    """--threads and --device: may differ when a run goes on."""
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own number)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


# Group of options -> (name, kind, what it is) of those that have a default in the configuration.
_NUMBERS: dict[str, tuple[tuple[str, Callable[[str], Any], str], ...]] = {
    "images": (
        ("max-unreadable", decimal, "share of an image folder's files that may be left out, unreadable"),
        ("train-images", int, "train on that many images, drawn by the seed; 0: on all"),
        ("calibration", int, "training images that set the ranges"),
    ),
    "training": (
        ("epochs", int, "epochs"),
        ("batch-size", int, "images per step"),
        ("lr", decimal, "learning rate of weights"),
        ("warmup", decimal, "epochs of linear rise"),
        ("weight-decay", decimal, "weight decay of weights"),
        ("label-smoothing", decimal, "label smoothing"),
        ("distill", decimal, "share of the loss against the float network's outputs, 0..1"),
        ("temperature", decimal, "what those outputs are divided by"),
        ("minutes", decimal, "end the phase, and its learning-rate curve, after these minutes; 0: no limit"),
    ),
    "the run": (
        ("seed", int, "seed of order, augmentation and initialisation"),
        ("log-every", int, "steps between two rows of metrics"),
        ("eval-every", int, "epochs between two measurements on the test images"),
    ),
}


def add_training(parser: argparse.ArgumentParser, kind: type[RunConfig]) -> None:
    """Options of every training command, in groups. kind: its configuration, whose defaults the help shows."""
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder: configuration, checkpoints, results")
    parser.add_argument("--resume", action="store_true", help="go on with the run after a stop")
    network = parser.add_argument_group("network")
    add_name(network)
    network.add_argument("--weights", default=_UNSET, metavar="FILE", help="float weights: .safetensors or .pth")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data",
        default=_UNSET,
        help="digits, synthetic, a .npz file, an image folder, or imagenet:FOLDER to stream one",
    )
    images.add_argument("--mean", type=decimals, default=_UNSET, metavar="M,..", help="pixel mean per channel, of 0..1")
    images.add_argument("--std", type=decimals, default=_UNSET, metavar="S,..", help="pixel deviation per channel")
    images.add_argument(
        "--no-augment", dest="augment", action="store_false", default=_UNSET, help="no random crops and flips"
    )
    training = parser.add_argument_group("training")
    run = parser.add_argument_group("the run")
    for group, container in (("images", images), ("training", training), ("the run", run)):
        for name, number, text in _NUMBERS[group]:
            usual = getattr(kind, name.replace("-", "_"))
            container.add_argument(
                f"--{name}", type=number, default=_UNSET, metavar="N", help=f"{text} (default {usual:g})"
            )
    training.add_argument(
        "--schedule",
        choices=("cosine", "step", "constant"),
        default=_UNSET,
        help=f"curve of the learning rate (default {kind.schedule})",
    )
    training.add_argument(
        "--milestones",
        type=numbers,
        default=_UNSET,
        metavar="E,..",
        help="epochs at which `step` divides by 10",
    )
    training.add_argument("--amp", choices=("off", "bf16"), default=_UNSET, help="bfloat16 autocast while training")
    add_machine(run)


NAMES = "a name of lbs.models, timm:NAME, torchvision:NAME, or module:function"


def add_name(parser: argparse._ActionsContainer) -> None:
    """--model, of commands that build a network anew."""
    parser.add_argument("--model", default=_UNSET, metavar="NAME", help=NAMES)


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration fields the user named."""
    own = {"command", "json", "console", "run", "resume", "threads", "device"}
    found = {key: value for key, value in vars(args).items() if key not in own}
    if "milestones" in found:  # epochs of this run, not of the full schedule
        found["full_epochs"] = 0
    if "exclude" in found:
        found["exclude"] = tuple(found["exclude"])
    return found | digests(found)


def digests(options: dict[str, Any]) -> dict[str, str]:
    """The digest of every file among the options, by the field that keeps it. Raises CheckpointError."""
    named = [key for key in ("weights", "plan", "teacher_weights") if options.get(key)]
    return {f"{key}_digest": file_digest(options[key]) for key in named}


def set_threads(threads: int | None) -> None:
    """Use this many threads. Raises LbsError below 1."""
    if threads is None:
        return
    if threads < 1:
        raise LbsError(f"--threads {threads}; at least 1 is needed")
    torch.set_num_threads(threads)


def device_of(name: str | None) -> torch.device:
    """The device named, or cuda where there is one. Raises BackendError where it is missing."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendError(f"--device {name} is no device; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"--device {name}: networks are trained and run on cpu or cuda only")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"--device {name}: torch sees no GPU here; use --device cpu, or ask lbs doctor")
    return device


@contextmanager
def session(args: argparse.Namespace, out: Console, named: Collection[str] = ()) -> Iterator[Session]:
    """Folder, device and console of a training command, which joins the processes torchrun started.

    The folder is held meanwhile. named: functions that the user named otherwise than by --model and --teacher.
    """
    set_threads(args.threads)
    device = distributed.start(device_of(args.device))
    current = Session(folder_of(args, named), device, args.resume, out.progress(), out.say)
    with current.held():
        yield current
