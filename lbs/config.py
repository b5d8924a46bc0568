"""What a run was asked to do: one frozen dataclass per training command, kept in config.json with a hash.

A configuration is a Recipe and more, so the trainer takes it as it is.

A resumed run takes what is not named again from the file, and refuses what is named otherwise: training goes on as it
began, or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from lbs.recipe import Recipe
from lbs.run_folder import RunFolder, read_sections, write_json
from lbs_kernels.errors import TrainingError

CONFIG_VERSION = 2
_INHERITED = ("data", "model", "mean", "std", "augment", "train_images", "max_unreadable", "row", "exclude", "streams")
C = TypeVar("C", bound="RunConfig")


@dataclass(frozen=True)
class RunConfig(Recipe):
    """What every training command has: a recipe, and what it is applied to.

    Accuracies and metrics depend on nothing else but machine, versions and number of processes.
    """

    command: ClassVar[str] = ""
    phases: ClassVar[tuple[str, ...]] = ()  # whose checkpoints are this command's

    epochs: int = 30
    lr: float = 1e-3
    row: str = ""  # the row of a table of results this run makes
    data: str = ""
    model: str = ""
    weights: str = ""  # file of float weights; "" where the run folder has them, or they are trained first
    weights_digest: str = ""  # sha256 of that file
    mean: tuple[float, ...] = ()  # pixel statistics; (): those of the data set
    std: tuple[float, ...] = ()
    augment: bool = True
    seed: int = 0
    batch_size: int = 128  # of all processes together
    max_unreadable: float = 0.0  # share of an image folder's files that may be left out
    train_images: int = 0  # train on that many, drawn by the seed; 0: on all
    calibration: int = 512  # training images that set the ranges

    def digest(self) -> str:
        """sha256 over the canonical JSON, first 16 hex digits."""
        text = json.dumps({"command": self.command, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """For config.json: the fields and their hash."""
        return {**asdict(self), "hash": self.digest()}


@dataclass(frozen=True)
class FloatRun(RunConfig):
    """The float network: `weights` as they are, or else training, 200 epochs unless it is told otherwise."""

    command: ClassVar[str] = "float"
    phases: ClassVar[tuple[str, ...]] = ("float",)

    epochs: int = 200
    lr: float = 0.1
    weight_decay: float = 5e-4
    warmup: float = 1.0


# A float network trained within a search keeps the curve and the decay of FloatRun.
_OWN_CURVE = ("schedule", "milestones", "full_epochs", "minutes", "weight_decay", "warmup")


@dataclass(frozen=True)
class SearchRun(RunConfig):
    """`lbs search`. 30 epochs at 1e-3 are the paper's; the rate is constant, so that thresholds move to the end.

    Thresholds move at (their rate x lambda) against the task's pull (their rate alone): a fast threshold under a small
    lambda closes what the task misses least, a slow one under a large lambda whatever is dearest. strength 0.3 with
    gate_lr .03 closes as fast as 1.4 with .006, and left a better network before fine-tuning on every seed of a short
    trial. It needs some hundred steps; what is left when the epochs end is closed by projection. prune_lr .16 takes
    part of a budget from filters; .032 took almost all of it from 2-bit activations, which cost more. `gain` 0 is the
    paper's constant lambda, `importance` magnitude its ranking of filters.
    """

    command: ClassVar[str] = "search"
    phases: ClassVar[tuple[str, ...]] = ("float", "prune", "pruned", "search")

    schedule: str = "constant"
    full_epochs: int = 30
    mode: str = "joint"  # what is searched, and how: see lbs.runs.modes
    bops: float = 0.0  # at most 1: a share of full precision; above: bit operations of one image; 0: no target
    size_mb: float = 0.0  # of packed weights, in 10^6 bytes; 0: no target
    latency_ms: float = 0.0  # of one image, by the times `lbs tune` measured or a model tells; 0: no target
    latency_device: str = "cpu"  # whose times: cpu, cuda, or a modelled GPU (lbs_kernels.gpu.modelled)
    bits: tuple[int, ...] = (2, 4, 8)
    ranges: str = "layer"  # of the weights; the committed rows have one for every layer, as the paper's
    pruning: bool = True
    exclude: tuple[str, ...] = ()  # name patterns of layers that stay in float
    streams: int = 32  # bits of residual streams: 8, or 32 for floats
    group_size: int = 0  # filters pruned together; 0: the model's own
    filter_tile: int = 1  # kept filters of a layer are a multiple of it
    max_pruning_ratio: float = 0.5
    importance: str = "gamma"
    gate_lr: float = 0.03
    prune_lr: float = 0.16
    strength: float = 0.3  # of the budget term, at the start
    gain: float = 0.004
    stop_when_met: bool = True  # the gates stand still from there on, and fine-tuning follows
    prune_bops: float = 0.7  # two-stage: target of the first stage at 32 x 32 bits, counted as bops is
    pruned_epochs: int = 0  # two-stage: of fine-tuning in float between the stages; 0: as many as `epochs`
    pruned_lr: float = 0.01
    float_epochs: int = 0  # train the float network first, where there are no weights
    float_lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema:
            raise TrainingError(f"ema={self.ema}: a search goes by the weights as they are; average in fine-tuning")

    def float_run(self) -> FloatRun:
        """How the float network comes to be: the weights that were named, or float_epochs of training.

        Raises TrainingError for numbers that make no recipe.
        """
        shared = {field.name: getattr(self, field.name) for field in fields(RunConfig)}
        own = {field.name: field.default for field in fields(FloatRun) if field.name in _OWN_CURVE}
        try:
            return FloatRun(**{**shared, **own, "epochs": self.float_epochs, "lr": self.float_lr, "distill": 0.0})
        except TrainingError as error:
            raise TrainingError(f"float_{error}") from error  # of epochs or lr: the rest is as it was


@dataclass(frozen=True)
class FinetuneRun(RunConfig):
    """`lbs finetune`: the paper's CIFAR-100 recipe, .1 divided by 10 at 80 and 120 of 200 epochs."""

    command: ClassVar[str] = "finetune"
    phases: ClassVar[tuple[str, ...]] = ("finetune",)

    epochs: int = 200
    full_epochs: int = 200
    lr: float = 0.1
    schedule: str = "step"
    milestones: tuple[int, ...] = (80, 120)
    plan: str = ""  # file of a plan; "": the run folder's own
    plan_digest: str = ""
    teacher: str = ""  # network that `distill` follows, by name; "": the float network itself
    teacher_weights: str = ""
    teacher_weights_digest: str = ""
    exclude: tuple[str, ...] = ()  # name patterns of layers that stay in float, with plan or uniform
    streams: int = 32  # bits of residual streams, likewise: 8, or 32 for floats
    uniform: tuple[int, ...] = ()  # (weight bits, activation bits) of a uniform baseline instead of a plan
    uniform_pruned: float = 0.0  # share of its filters that every layer that can lose some loses, with uniform
    ranges: str = "layer"  # of the weights, with uniform; as in a search

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.uniform_pruned < 1 or (self.uniform_pruned and not self.uniform):
            raise TrainingError(
                f"uniform_pruned={self.uniform_pruned:g}; it is a share of filters in [0, 1), beside uniform bits"
            )
        if bool(self.teacher) != bool(self.teacher_weights):
            raise TrainingError(
                f"teacher {self.teacher!r} with weights {self.teacher_weights!r}: give the name of a network and the "
                "file of its weights, or neither"
            )
        if self.teacher and not self.distill:
            raise TrainingError(f"teacher {self.teacher!r} is not used at distill=0; give a distill above 0")


def from_dict(kind: type[C], body: dict[str, Any], origin: str) -> C:
    """Read `as_dict`'s content.

    Raises:
        TrainingError: a key this release does not know, one that is missing, or a hash that does not fit.
    """
    known = {field.name for field in fields(kind)}
    odd = sorted(body.keys() - known - {"hash"}) + [f"no {key}" for key in sorted(known - body.keys())]
    if odd:
        raise TrainingError(f"{origin} was written by another release ({', '.join(odd)}); finish the run with that one")
    try:
        config = kind(**{key: _tuples(value) for key, value in body.items() if key != "hash"})
        digest = config.digest()
    except (ArithmeticError, TypeError, ValueError) as error:
        raise TrainingError(f"{origin} has odd fields: {error}; restore it, or start in a new run folder") from error
    if body.get("hash") != digest:
        raise TrainingError(
            f"{origin} was edited by hand (hash {body.get('hash')}, its fields give {digest}); "
            "restore it, or start in a new run folder"
        )
    return config


def refuse_changes(saved: Sequence[tuple[RunConfig, dict[str, Any]]], origin: str) -> None:
    """Refuse options that differ from the run that is to go on: pairs of what was saved and what is asked.

    Raises:
        TrainingError: names every option of every command with both values.
    """
    changed = []
    for config, asked in saved:
        known = asdict(config)
        unknown = sorted(asked.keys() - known.keys())
        if unknown:
            raise TrainingError(f"resume=True: unknown options {', '.join(unknown)}; leave them out")
        differing = [key for key in sorted(asked) if known[key] != asked[key]]
        if differing:
            texts = (f"{key} {known[key]!r}, asked is {asked[key]!r}" for key in differing)
            changed.append(f"{config.command} has {'; '.join(texts)}")
    if changed:
        raise TrainingError(
            f"resume=True with another configuration; in {origin} {'; '.join(changed)}. "
            "Leave these options out to go on, or start in a new run folder"
        )


def open_run(
    kind: type[C], folder: RunFolder, asked: dict[str, Any], resume: bool, inherit: str = "", processes: int = 1
) -> C:
    """The configuration of a command in its run folder, written to config.json when the command starts anew.

    Arguments:
        asked: the options the user named. inherit: a command in whose section data, model and pixel statistics are
            looked up where they are not named. processes: how many train together.

    Raises:
        TrainingError: nothing to resume; another configuration or number of processes; or the folder holds such a run
            and `resume` is off.
    """
    found: C = open_runs(((kind, asked),), folder, resume, inherit, processes)[0]  # type: ignore[assignment]
    return found


def open_runs(
    wanted: Sequence[tuple[type[RunConfig], dict[str, Any]]],
    folder: RunFolder,
    resume: bool,
    inherit: str = "",
    processes: int = 1,
) -> list[RunConfig]:
    """As `open_run` for several commands, whose sections are written at once: all of them are there, or none.

    Raises:
        TrainingError: as `open_run`; what differs is listed for all commands together.
    """
    with folder.held():
        return _open_runs(wanted, folder, resume, inherit, processes)


def _open_runs(
    wanted: Sequence[tuple[type[RunConfig], dict[str, Any]]],
    folder: RunFolder,
    resume: bool,
    inherit: str,
    processes: int,
) -> list[RunConfig]:
    path = folder.file("config.json")
    sections = read_sections(path)
    found = sections.get("processes")
    begun = dict(found) if isinstance(found, dict) else {}
    if resume:
        saved = [_saved(kind, sections, folder) for kind, _ in wanted]
        refuse_changes([(config, asked) for config, (_, asked) in zip(saved, wanted, strict=True)], str(path))
        for config in saved:
            if begun.get(config.command, processes) != processes:
                raise TrainingError(
                    f"resume=True with {processes} processes; the {config.command} in {path} was begun with "
                    f"{begun[config.command]}, and another number trains otherwise. Start as many to go on"
                )
        return saved
    configs: list[RunConfig] = []
    for kind, asked in wanted:
        if any(folder.checkpoint(phase).exists() for phase in kind.phases):
            raise TrainingError(
                f"{folder.path} already holds a {kind.command}; go on with resume=True, or name a new folder"
            )
        inherited = {key: _tuples(value) for key, value in sections.get(inherit, {}).items() if key in _INHERITED}
        config = kind(**{**inherited, **asked})
        for name in ("data", "model"):
            if not getattr(config, name):
                raise TrainingError(f"no {name}= is given, and {folder.path} holds no run to take it from; name it")
        configs.append(config)
    new = {config.command: config.as_dict() for config in configs}
    begun |= dict.fromkeys(new, processes)
    write_json(path, {**sections, "version": CONFIG_VERSION, "processes": begun, **new})
    return configs


def _saved(kind: type[C], sections: dict[str, Any], folder: RunFolder) -> C:
    section, path = sections.get(kind.command), folder.file("config.json")
    if section is None:
        raise TrainingError(f"{folder.path} holds no {kind.command} to resume; start it without resume=True")
    return from_dict(kind, section, f"{path}, section {kind.command}")


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
