"""A packed network with what it came from, and the one of a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lbs
from lbs.packing.model import PackedModel
from lbs.run_folder import RunFolder
from lbs.runs import network
from lbs.train import checkpoint
from lbs_kernels.errors import CheckpointError, LbsError

PACKED = "packed.lbs.safetensors"


@dataclass(frozen=True)
class Source:
    """A packed network and, where it is known, the float network it came from and its run folder."""

    packed: PackedModel
    path: Path
    float_model: nn.Module | None = None
    folder: RunFolder | None = None


def of_run(folder: RunFolder, device: object = "cpu", with_float: bool = True, budget: float | None = 1.0) -> Source:
    """The packed network of a run, loaded within `budget`, and the float one where it is asked for.

    Raises CheckpointError where it was not packed yet.
    """
    path = folder.file(PACKED)
    if not path.exists():
        raise CheckpointError(f"{folder.path} holds no packed network; run lbs pack --run {folder.path} first")
    if "pack" not in folder.results():
        raise CheckpointError(f"{path} is older than the network of the run; run lbs pack --run {folder.path} again")
    float_model = None
    if with_float and folder.file(network.FLOAT).exists():
        card = network.NetworkCard.read(folder)
        float_model = network.build_of(folder, card.model, card.num_classes)
        checkpoint.apply_weights(float_model, checkpoint.load_weights(folder.file(network.FLOAT)), network.FLOAT)
        float_model.eval()
    return Source(lbs.load(path, str(device), budget=budget), path, float_model, folder)


def float_of(packed: PackedModel, name: str, weights: str = "") -> nn.Module:
    """The float network a packed file came from: `name` as in `network.build`, with its weights where they are named.

    Raises:
        LbsError: an unknown name. CheckpointError: weights of another network.
    """
    with torch.inference_mode():
        logits = packed(packed.random_images(1))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise LbsError(
            f"{packed.name or 'the packed network'} returns no logits; the float networks named are classifiers"
        )
    model = network.build(name, logits.shape[1])
    if weights:
        checkpoint.apply_weights(model, checkpoint.load_weights(Path(weights)), weights)
    return model.eval()
