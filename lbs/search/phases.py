"""The phases of a run, from configuration to files: float training, search, fine-tuning."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lbs.data
from lbs.config import FinetuneRun, FloatRun, RunConfig, SearchRun
from lbs.plan import Plan
from lbs.quant import calibrate
from lbs.run_folder import RunFolder, write_bytes
from lbs.search import checkpoint, distributed, network
from lbs.search.budget import Budget, parameter_groups
from lbs.search.evaluation import evaluate
from lbs.search.freeze import freeze, plan_of
from lbs.search.modes import mode_settings
from lbs.search.network import FINAL, FLOAT, SEARCHED, NetworkCard
from lbs.search.prepare import SearchConfig, conversion_report, prepare, uniform
from lbs.search.protocols import Progress
from lbs.search.trainer import Trainer
from lbs_kernels.errors import CheckpointError, PlanError, TrainingError


@dataclass
class Session:
    """What a phase needs besides its configuration: where to write, what to train on, whom to tell."""

    folder: RunFolder
    device: torch.device
    resume: bool = False
    progress: Progress | None = None
    say: Callable[[str], None] = lambda line: None


def file_digest(path: str) -> str:
    """sha256 of a file, first 16 hex digits; "" for no path. Raises CheckpointError where it cannot be read."""
    if not path:
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; give the path of a file") from error


def run_float(config: FloatRun, session: Session) -> dict[str, Any]:
    """Weights from a file, or trained here -> float.safetensors. Returns the section `float`; at once where it is done.

    Raises:
        LbsError: any of the family; nothing that was saved before is lost.
    """
    folder, kept = session.folder, session.folder.file(FLOAT)
    before = distributed.first(lambda: folder.results().get("float", {}) if session.resume else {})
    if before.get("config_hash") == config.digest():
        return dict(before)
    data, card = _data_and_card(config, session)
    card.write(folder)
    torch.manual_seed(config.seed)
    model = network.build(config.model, card.num_classes).to(session.device)
    network.check_images(model, card, session.device)
    if config.weights:
        network.load_float(model, Path(config.weights), card)
        section: dict[str, Any] = {"origin": config.weights}
        section["accuracy"] = evaluate(model, _test_loader(data, session.device))
    else:
        trainer = Trainer(
            model,
            _train_loader(config, data, session.device),
            config,
            phase="float",
            test=_test_loader(data, session.device),
            folder=folder,
            progress=session.progress,
        )
        section = {"origin": "trained in this run", **trainer.fit(_goes_on(session, "float")).as_dict()}
    session.say(f"float network: {section['accuracy']:.2%} of the test images")
    checkpoint.save_weights(kept, model)
    distributed.wait()
    section |= {"bytes": kept.stat().st_size, "config_hash": config.digest()}
    folder.add_result("float", section)
    return section


def run_search(config: SearchRun, session: Session) -> dict[str, Any]:
    """Float network -> plan.json and searched.safetensors. Returns results.json's section `search`.

    Raises:
        LbsError: any of the family; nothing that was saved before is lost.
    """
    data, card = _data_and_card(config, session)
    _check_rates(config)
    settings = _settings(config)  # a mistake in the options shows before the training does
    card.write(session.folder)
    model = _float_network(config, card, session)
    torch.manual_seed(config.seed)
    searched = prepare(model, card.example().to(session.device), settings)
    report = conversion_report(searched)
    for name, fate in report:
        session.say(f"{name}: {fate}")
    calibrate(searched, _calibration_batches(config, data, session.device))
    groups = parameter_groups(searched, config.lr, config.weight_decay, config.gate_lr, config.prune_lr)
    budget = Budget(searched, bops=config.bops, strength=config.strength, gain=config.gain)
    trainer = Trainer(
        searched,
        _train_loader(config, data, session.device),
        config,
        phase="search",
        test=_test_loader(data, session.device),
        groups=groups,
        budget=budget,
        teacher=model,
        folder=session.folder,
        progress=session.progress,
        observe=lambda: _gate_row(searched, budget),
        stop=(lambda: budget.frozen) if config.stop_when_met else None,
    )
    result = trainer.fit(_goes_on(session, "search"))
    outcome = budget.finish()
    session.say(str(outcome))
    frozen = freeze(searched)
    calibrate(frozen, _calibration_batches(config, data, session.device), bits=None)
    accuracy = evaluate(frozen, _test_loader(data, session.device))
    plan = plan_of(frozen)
    network.with_signs(card, frozen).write(session.folder)
    checkpoint.save_weights(session.folder.file(SEARCHED), frozen)
    write_bytes(session.folder.file("plan.json"), plan.to_json().encode())
    section = {
        **result.as_dict(),
        "target_bops": outcome.target,
        "bops": outcome.value,
        "full_precision_bops": outcome.full_precision,
        "frozen_accuracy": accuracy,
        "conversion": [list(row) for row in report],
        **_left_out(trainer.train),
        "config_hash": config.digest(),
    }
    session.folder.add_result("search", section)
    distributed.wait()
    if outcome.value > outcome.target:
        raise PlanError(f"{outcome}; search longer (--epochs), or with a larger --strength")
    return section


def run_finetune(config: FinetuneRun, session: Session) -> dict[str, Any]:
    """Searched (or hand-planned, or uniform) network -> model.safetensors. Returns the section `finetune`."""
    folder = session.folder
    data, card = _data_and_card(config, session)
    torch.manual_seed(config.seed)  # dropout, say, must not depend on which phases this process ran before
    quantized, card = _start_of_finetuning(config, data, card, session)
    before = evaluate(quantized, _test_loader(data, session.device))
    session.say(f"before fine-tuning: {before:.2%} of the test images")
    trainer = Trainer(
        quantized,
        _train_loader(config, data, session.device),
        config,
        phase="finetune",
        test=_test_loader(data, session.device),
        groups=parameter_groups(quantized, config.lr, config.weight_decay),
        teacher=_teacher(config, card, folder),
        folder=folder,
        progress=session.progress,
    )
    result = trainer.fit(_goes_on(session, "finetune"))
    plan = plan_of(quantized)
    card.write(folder)
    write_bytes(folder.file("plan.json"), plan.to_json().encode())
    checkpoint.save_weights(folder.file(FINAL), quantized)
    section = {
        **result.as_dict(),
        "accuracy_before": before,
        "bops": plan.bops(),
        "full_precision_bops": plan.full_precision_bops(),
        **_left_out(trainer.train),
        "config_hash": config.digest(),
    }
    folder.add_result("finetune", section)
    distributed.wait()
    return section


def _data_and_card(config: RunConfig, session: Session) -> tuple[lbs.data.ImageSet, NetworkCard]:
    """The data of a run, which must be what it began with, and the card of its network."""
    data = network.load_data(config.data, config.mean, config.std, config.max_unreadable)
    card = network.card_of(config, data)
    if session.resume:
        distributed.first(lambda: network.check_same_data(card, session.folder))
    if config.train_images:
        data = data.subset(config.train_images, config.seed)
    _check_counts(config, data)
    return data, card


def _settings(config: SearchRun) -> SearchConfig:
    """What is searched: the options the two configurations share, changed by the mode."""
    own = {field.name for field in fields(config)}
    options = {field.name: getattr(config, field.name) for field in fields(SearchConfig) if field.name in own}
    options["group_size"] = config.group_size or network.prune_group(config.model)
    return SearchConfig(**{**options, **mode_settings(config.mode)})


def _goes_on(session: Session, phase: str) -> bool:
    """Whether a phase has a checkpoint to go on from."""
    return distributed.first(lambda: session.resume and session.folder.checkpoint(phase).exists())


def _float_network(config: SearchRun, card: NetworkCard, session: Session) -> nn.Module:
    """The float network the search starts from: the run folder's own, made here if the configuration says how."""
    if config.weights or config.float_epochs:
        run_float(config.float_run(), session)
    elif not session.folder.file(FLOAT).exists():
        raise TrainingError("no float weights to start from; give --weights FILE, or train them with --float-epochs N")
    model = network.build(config.model, card.num_classes).to(session.device)
    network.load_float(model, session.folder.file(FLOAT), card)
    return model


def _start_of_finetuning(
    config: FinetuneRun, data: lbs.data.ImageSet, card: NetworkCard, session: Session
) -> tuple[nn.Module, NetworkCard]:
    """The quantized network fine-tuning starts from, and its card."""
    folder, batches = session.folder, _calibration_batches(config, data, session.device)
    if config.plan or config.uniform:
        path = network.weights_path(config.weights, folder)
        if path is None:
            raise TrainingError("a plan or uniform bits need float weights; give --weights FILE")
        model = network.build(config.model, card.num_classes)
        network.check_images(model, card, torch.device("cpu"))
        network.load_float(model, path, card)
        if config.uniform:
            quantized = uniform(model, card.example(), *config.uniform)
        else:
            quantized = network.apply_plan(model, card, Plan.load(config.plan))
        quantized = calibrate(quantized.to(session.device), batches, bits=None)
        return quantized, network.with_signs(card, quantized)
    if not folder.file(SEARCHED).exists():
        raise CheckpointError(
            f"{folder.path} holds no searched network; run lbs search there first, or give --plan or --uniform"
        )
    card = NetworkCard.read(folder)
    quantized = network.build(card.model, card.num_classes)
    quantized = network.apply_plan(quantized, card, Plan.load(folder.file("plan.json")))
    checkpoint.apply_weights(quantized, checkpoint.load_weights(folder.file(SEARCHED)), folder.file(SEARCHED))
    return quantized.to(session.device), card


def _teacher(config: FinetuneRun, card: NetworkCard, folder: RunFolder) -> nn.Module | None:
    if not config.distill:
        return None
    path = network.weights_path(config.weights, folder)
    if path is None:
        raise TrainingError(f"--distill {config.distill} needs the float network; give --weights FILE")
    teacher = network.build(card.model, card.num_classes)
    network.load_float(teacher, path, card)
    return teacher


def _check_counts(config: RunConfig, data: lbs.data.ImageSet) -> None:
    if not 1 <= config.batch_size <= data.train_count:
        raise TrainingError(f"--batch-size {config.batch_size}; it lies in 1..{data.train_count}, the training images")
    if config.calibration < 1:
        raise TrainingError(f"--calibration {config.calibration}; the ranges need at least one training image")


def _check_rates(config: SearchRun) -> None:
    for name in ("gate_lr", "prune_lr", "float_lr", "strength", "gain"):
        if getattr(config, name) < 0:
            raise TrainingError(f"--{name.replace('_', '-')} {getattr(config, name):g}; it must be 0 or more")


def _train_loader(config: RunConfig, data: lbs.data.ImageSet, device: torch.device) -> lbs.data.Loader:
    options: dict[str, Any] = {"device": device, "rank": distributed.rank(), "world_size": distributed.world_size()}
    return lbs.data.train_loader(data, config.batch_size, augment=config.augment, seed=config.seed, **options)


def _test_loader(data: lbs.data.ImageSet, device: torch.device) -> lbs.data.Loader:
    """This process's part of the test images."""
    return lbs.data.eval_loader(data, device=device, rank=distributed.rank(), world_size=distributed.world_size())


def _left_out(loader: lbs.data.Loader) -> dict[str, Any]:
    """Images that could not be read, where there were any."""
    unreadable = getattr(loader, "unreadable", {})
    return {"unreadable": unreadable} if unreadable else {}


def _calibration_batches(config: RunConfig, data: lbs.data.ImageSet, device: torch.device) -> list[Tensor]:
    size = min(128, data.train_count, config.calibration)
    loader = lbs.data.train_loader(data, size, augment=False, seed=config.seed, device=device)
    return [images for images, _ in itertools.islice(loader, -(-config.calibration // size))]


def _gate_row(model: nn.Module, budget: Budget) -> dict[str, Any]:
    """What a metrics row of the search shows besides the loss."""
    plan = plan_of(model)
    gates = {layer.name: [layer.w_bits, layer.a_bits, layer.kept_filters] for layer in plan.layers}
    return {"bops": plan.bops(), "lambda": budget.strength, "frozen": budget.frozen, "gates": gates}
