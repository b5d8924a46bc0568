"""What a run was asked to do: one frozen dataclass per training command, kept in config.json with a hash.

A resumed run takes what is not named again from the file, and refuses what is named otherwise: training goes on as it
began, or not at all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from lbs.run_folder import RunFolder, read_json, write_json
from lbs_kernels.errors import TrainingError

CONFIG_VERSION = 1
_INHERITED = ("data", "model", "mean", "std", "augment")
C = TypeVar("C", bound="RunConfig")


@dataclass(frozen=True)
class RunConfig:
    """What every training command has. Accuracies and metrics depend on nothing else but machine and versions."""

    command: ClassVar[str] = ""
    phases: ClassVar[tuple[str, ...]] = ()  # whose checkpoints are this command's

    data: str = ""
    model: str = ""
    weights: str = ""  # file of float weights; "" where the run folder has them, or they are trained first
    weights_digest: str = ""  # sha256 of that file
    mean: tuple[float, ...] = ()  # pixel statistics; (): those of the data set
    std: tuple[float, ...] = ()
    augment: bool = True
    seed: int = 0
    epochs: int = 30
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    warmup: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.0
    amp: str = "off"
    log_every: int = 50
    eval_every: int = 1
    calibration: int = 512  # training images that set the ranges

    def digest(self) -> str:
        """sha256 over the canonical JSON, first 16 hex digits."""
        text = json.dumps({"command": self.command, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """For config.json: the fields and their hash."""
        return {**asdict(self), "hash": self.digest()}


@dataclass(frozen=True)
class SearchRun(RunConfig):
    """`lbs search`."""

    command: ClassVar[str] = "search"
    phases: ClassVar[tuple[str, ...]] = ("float", "search")

    bops: float = 0.0  # at most 1: a share of full precision; above: bit operations of one image
    bits: tuple[int, ...] = (2, 4, 8)
    pruning: bool = True
    group_size: int = 0  # filters pruned together; 0: the model's own
    max_pruning_ratio: float = 0.5
    importance: str = "gamma"
    gate_lr: float = 0.006
    prune_lr: float = 0.05
    strength: float = 1.0  # of the budget term, at the start
    gain: float = 0.01
    stop_when_met: bool = True  # the gates stand still from there on, and fine-tuning follows
    float_epochs: int = 0  # train the float network first, where there are no weights
    float_lr: float = 0.1


@dataclass(frozen=True)
class FinetuneRun(RunConfig):
    """`lbs finetune`."""

    command: ClassVar[str] = "finetune"
    phases: ClassVar[tuple[str, ...]] = ("finetune",)

    lr: float = 0.01
    plan: str = ""  # file of a plan; "": the run folder's own
    plan_digest: str = ""
    uniform: tuple[int, ...] = ()  # (weight bits, activation bits) of a uniform baseline instead of a plan


def from_dict(kind: type[C], body: dict[str, Any], origin: str) -> C:
    """Read `as_dict`'s content.

    Raises:
        TrainingError: a key this release does not know, one that is missing, or a hash that does not fit.
    """
    known = {field.name for field in fields(kind)}
    if not isinstance(body, dict):
        raise TrainingError(f"{origin} is a {type(body).__name__}, no object; restore it, or start in a new run folder")
    odd = sorted(body.keys() - known - {"hash"}) + [f"no {key}" for key in sorted(known - body.keys())]
    if odd:
        raise TrainingError(f"{origin} was written by another release ({', '.join(odd)}); finish the run with that one")
    config = kind(**{key: _tuples(value) for key, value in body.items() if key != "hash"})
    if body.get("hash") != config.digest():
        raise TrainingError(
            f"{origin} was edited by hand (hash {body.get('hash')}, its fields give {config.digest()}); "
            "restore it, or start in a new run folder"
        )
    return config


def refuse_changes(saved: RunConfig, asked: dict[str, Any], origin: str) -> None:
    """Refuse options that differ from the run that is to go on.

    Raises:
        TrainingError: names every option with both values.
    """
    known = asdict(saved)
    unknown = sorted(asked.keys() - known.keys())
    if unknown:
        raise TrainingError(f"--resume: unknown options {', '.join(unknown)}; leave them out")
    differing = (key for key in sorted(asked) if known[key] != asked[key])
    changed = [f"{key} {known[key]!r}, asked is {asked[key]!r}" for key in differing]
    if changed:
        raise TrainingError(
            f"--resume with another configuration; {origin} has {'; '.join(changed)}. "
            "Leave these options out to go on, or start in a new run folder"
        )


def open_run(kind: type[C], folder: RunFolder, asked: dict[str, Any], resume: bool, inherit: str = "") -> C:
    """The configuration of a command in its run folder, written to config.json when the command starts anew.

    Arguments:
        asked: the options the user named. inherit: a command in whose section data, model and pixel statistics are
            looked up where they are not named.

    Raises:
        TrainingError: nothing to resume; another configuration; or the folder holds such a run and `resume` is off.
    """
    path = folder.file("config.json")
    sections: dict[str, Any] = dict(read_json(path)) if path.exists() else {}
    section = sections.get(kind.command)
    if resume:
        if section is None:
            raise TrainingError(f"{folder.path} holds no {kind.command} to resume; start it without --resume")
        saved = from_dict(kind, section, f"{path}, section {kind.command}")
        refuse_changes(saved, asked, str(path))
        return saved
    if any(folder.checkpoint(phase).exists() for phase in kind.phases):
        raise TrainingError(
            f"{folder.path} already holds a {kind.command}; go on with --resume, or name a new folder with --run"
        )
    inherited = {key: _tuples(value) for key, value in sections.get(inherit, {}).items() if key in _INHERITED}
    config = kind(**{**inherited, **asked})
    for name in ("data", "model"):
        if not getattr(config, name):
            raise TrainingError(f"--{name} is missing and {folder.path} holds no run to take it from; name it")
    write_json(path, {**sections, "version": CONFIG_VERSION, kind.command: config.as_dict()})
    return config


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
