"""`lbs`: finds the sub-command, runs it, and turns errors into one clear line and an exit code.

Exit codes: 0 done, 1 a check failed, 2 bad usage or an error of the LbsError family, 130 interrupted, 143 terminated,
141 whoever read the output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence

from lbs.extras import asked_for
from lbs_kernels.errors import LbsError, printable

COMMANDS = {
    "quickstart": "search, pack, verify and time a small network on real digits, in about a minute",
    "search": "find bits and filters of every layer within a budget",
    "finetune": "train the searched network at its fixed bits",
    "reproduce": "make one row of the published results: float network, search, fine-tune, pack, verify, record",
    "quantize": "pack a trained network without training it: a folder of images, no labels",
    "pack": "write the network of a run as bit-planes, and check the file",
    "verify": "compare a packed network with the trained one: codes of every layer, predictions on every test image",
    "export": "write a packed network as an ONNX file, for ONNX Runtime, OpenVINO and others",
    "explain": "show every layer of a packed network: shape, bits, filters, kernel, time",
    "bench": "accuracy, time and size of a packed network beside torch, uniform 8 bits and other engines",
    "classify": "write the classes of a folder of images into one CSV, by one process or several",
    "tune": "measure kernels on this machine, so that the fastest are chosen and latencies are known",
    "report": "write a page of one network, before and after, or of several runs side by side",
    "doctor": "say what this machine lacks, why, and the command that mends it",
}

# What a command does when it has not spoken for two seconds.
WAITS = {
    "search": "reading images, setting ranges or measuring",
    "finetune": "reading images, setting ranges or measuring",
    "reproduce": "reading images, setting ranges or measuring",
    "quickstart": "setting ranges or measuring",
    "quantize": "reading weights and images",
    "classify": "reading images",
    "pack": "packing, and checking the codes of every layer",
    "verify": "comparing the packed network with the trained one",
    "export": "writing the graph",
    "explain": "timing every layer",
    "bench": "timing",
    "tune": "looking up what is to be measured",
    "report": "drawing",
    "doctor": "looking",
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen command's file is imported, so that help is quick."""
    parser = argparse.ArgumentParser(
        prog="lbs", description="Search the bits and filters of a network, pack it, run it."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            with asked_for(f"lbs {name}"):
                importlib.import_module(f"lbs.cli.{name}").add_arguments(sub)
            sub.add_argument("--json", action="store_true", help="print one JSON document; all else goes to stderr")
            sub.usage = _usage(sub)
    return parser


def _usage(parser: argparse.ArgumentParser) -> str:
    """What must be given; the groups below list the rest."""
    words = [parser.prog]
    for action in parser._actions:
        name = str(action.metavar or action.dest.upper())
        if not action.option_strings:
            words.append(name if action.required else f"[{name}]" if action.nargs != "+" else f"{name} ...")
        elif action.required:
            words.append(f"{action.option_strings[0]} {name}")
    return " ".join([*words, "[options]"])


def _by_argument(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The option that is meant by an argument: the one of its name, else the one that fills it in (`--prune`)."""
    named = {option[2:].replace("-", "_"): option for option in options_of(parser)}
    filled = {
        action.dest: action.option_strings[-1]
        for action in parser._actions
        if action.option_strings and action.const is not False  # --no-augment says the opposite of augment=True
    }
    return filled | named


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options a parser has, by their long names."""
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


NEXT = """\
lbs finds the bits and filters of a network, packs it, and runs it. What next?

  lbs quickstart                              the whole road on real digits, in about a minute
  lbs quantize MODEL --images DIR             a trained network becomes a packed file, without training
  lbs search --run DIR --data SET --model M   find bits and filters within a budget, with data and labels
  lbs bench --zoo cifar100-resnet20           time the network that ships with lbs
  lbs doctor                                  what this machine lacks

lbs --help lists all commands, lbs COMMAND --help the options of one."""


def as_options(message: str, command: str, typed: Sequence[str] = ()) -> str:
    """An error as a shell says it: what is an argument in Python (`name=value`) is an option where the command has it.

    typed: what the user wrote stays as it is, such as a folder called lr=0.1. A command that takes KEY=VALUE for
    several phases speaks so: `lr=0` is then any of them.

    >>> as_options("float_epochs=-1, bits=(2, 4), nothing=1; go on with resume=True", "search")
    '--float-epochs -1, --bits 2,4, nothing=1; go on with --resume'
    """
    parser = argparse.ArgumentParser()
    importlib.import_module(f"lbs.cli.{command}").add_arguments(parser)
    options = _by_argument(parser)
    by_key = any(action.metavar == "KEY=VALUE" for action in parser._actions)

    def spelled(found: re.Match[str]) -> str:
        option = options.get(found["name"])
        value = found["value"] or ""
        if option is None or found[0] in typed or "/" in value or (by_key and value != "True"):
            return found[0]
        if value == "None":
            value = "none"
        if found["items"] is not None:
            value = ",".join(re.findall(r"[^, ]+", found["items"]))
        return option if value in ("", "True") else f"{option} {value}"

    named = r"(?<![\w/.-])(?P<name>[a-z]\w*)=(?:\((?P<items>[^()]*)\)|(?P<value>[^\s,;:()]+))?"
    return re.sub(named, spelled, message)


def interrupted(args: argparse.Namespace) -> str:
    """How a command that was interrupted, and did not say so itself, goes on."""
    if args.command == "tune":
        return "what was measured is kept: call it again to go on"
    if args.command not in ("search", "finetune", "reproduce"):
        return "nothing was written: call it again"
    if not args.run or not os.path.exists(os.path.join(args.run, "config.json")):
        return "nothing was saved: call it again"
    where = "--out" if args.command == "reproduce" else "--run"
    return f"go on with lbs {args.command} {where} {shlex.quote(str(args.run))} --resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    try:
        args = build_parser(chosen).parse_args(arguments)
    except SystemExit as stop:  # argparse has printed what was wrong, or the help
        return int(stop.code or 0)
    except LbsError as error:  # the command needs a package that is not installed
        print(f"lbs {chosen}: {error}", file=sys.stderr)
        return 2
    if args.command is None:
        print(NEXT)
        return 0
    from lbs.cli.console import console
    from lbs.train import distributed

    try:
        with console(args).watched(WAITS[args.command]):
            code = int(importlib.import_module(f"lbs.cli.{args.command}").run(args))
        distributed.stop()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        with contextlib.suppress(OSError, ValueError):  # or Python would complain when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (LbsError, OSError) as error:
        message = printable(as_options(" ".join(str(error).split("\n")), args.command, arguments))
        print(f"lbs {args.command}: {message}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": message, "kind": type(error).__name__}))
        return 2
    except KeyboardInterrupt as stop:
        told = as_options(str(stop), args.command, arguments) or f"interrupted; {interrupted(args)}"
        print(f"lbs {args.command}: {printable(told)}", file=sys.stderr)
        return 128 + (getattr(stop, "number", 0) or signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
