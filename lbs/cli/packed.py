"""The packed network a command looks at: a file, the one of a run folder, or one of the zoo."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import lbs
import lbs.models
import lbs.zoo
from lbs.cli.options import device_of, set_threads
from lbs.pack.model import PackedModel
from lbs.run_folder import RunFolder
from lbs.search import checkpoint, network
from lbs_kernels.errors import CheckpointError, LbsError

PACKED = "packed.lbs.safetensors"


@dataclass(frozen=True)
class Source:
    """A packed network and, where it is known, the float network it came from and its run folder."""

    packed: PackedModel
    path: Path
    float_model: nn.Module | None = None
    folder: RunFolder | None = None


def add_source(parser: argparse.ArgumentParser) -> None:
    """FILE, --run or --zoo: exactly one."""
    parser.add_argument("file", nargs="?", metavar="FILE", help="a .lbs.safetensors file")
    parser.add_argument("--run", metavar="DIR", help="the packed network of a run folder")
    parser.add_argument("--zoo", metavar="NAME", help=f"a shipped network: {', '.join(lbs.zoo.ENTRIES)}")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own number)")
    parser.add_argument("--device", default="cpu", help="where it runs: cpu (default) or cuda")


def source_of(args: argparse.Namespace) -> Source:
    """Load what was named.

    Raises:
        LbsError: none or several were named. CheckpointError: the file is missing or damaged.
    """
    named = [name for name in ("file", "run", "zoo") if getattr(args, name)]
    if len(named) != 1:
        raise LbsError(f"name one packed network: FILE, --run DIR or --zoo NAME (got {', '.join(named) or 'none'})")
    set_threads(args.threads)
    device = device_of(args.device)
    if args.zoo:
        entry = lbs.zoo.entry(args.zoo)
        return Source(
            lbs.load(entry.path, device), entry.path, lbs.models.create(entry.model, entry.num_classes).eval()
        )
    if args.run:
        return of_run(RunFolder(args.run), device)
    return Source(lbs.load(args.file, device), Path(args.file))


def of_run(folder: RunFolder, device: object = "cpu") -> Source:
    """The packed network of a run. Raises CheckpointError where it was not packed yet."""
    path = folder.file(PACKED)
    if not path.exists():
        raise CheckpointError(f"{folder.path} holds no packed network; run lbs pack --run {folder.path} first")
    if "pack" not in folder.results():
        raise CheckpointError(f"{path} is older than the network of the run; run lbs pack --run {folder.path} again")
    float_model = None
    if folder.file(network.FLOAT).exists():
        card = network.NetworkCard.read(folder)
        float_model = network.build(card.model, card.num_classes)
        checkpoint.apply_weights(float_model, checkpoint.load_weights(folder.file(network.FLOAT)), network.FLOAT)
        float_model.eval()
    return Source(lbs.load(path, str(device)), path, float_model, folder)
