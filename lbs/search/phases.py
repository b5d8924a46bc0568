"""The phases of a run, from configuration to files: float training, search, fine-tuning."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lbs.data
from lbs.config import FinetuneRun, RunConfig, SearchRun
from lbs.plan import Plan
from lbs.quant import calibrate
from lbs.run_folder import RunFolder
from lbs.search import checkpoint, network
from lbs.search.budget import Budget, parameter_groups
from lbs.search.freeze import freeze, plan_of
from lbs.search.network import FINAL, FLOAT, SEARCHED, NetworkCard
from lbs.search.prepare import SearchConfig, conversion_report, prepare, uniform
from lbs.search.recipe import Recipe
from lbs.search.trainer import Progress, Trainer, evaluate
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


def run_search(config: SearchRun, session: Session) -> dict[str, Any]:
    """Float network -> plan.json and searched.safetensors. Returns results.json's section `search`.

    Raises:
        LbsError: any of the family; nothing that was saved before is lost.
    """
    data = network.load_data(config.data, config.mean, config.std)
    _check_counts(config, data)
    _check_rates(config)
    card = network.card_of(config, data)
    card.write(session.folder)
    recipe = recipe_of(config, config.epochs, config.lr)  # a mistake in the options shows before the training does
    settings = SearchConfig(
        bits=config.bits,
        pruning=config.pruning,
        group_size=config.group_size or network.prune_group(config.model),
        max_pruning_ratio=config.max_pruning_ratio,
        importance=config.importance,
    )
    model = _float_network(config, data, card, session)
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
        recipe,
        phase="search",
        test=lbs.data.eval_loader(data, device=session.device),
        groups=groups,
        budget=budget,
        teacher=model,
        folder=session.folder,
        progress=session.progress,
        observe=lambda: _gate_row(searched, budget),
        stop=(lambda: budget.frozen) if config.stop_when_met else None,
    )
    result = trainer.fit(session.resume and session.folder.checkpoint("search").exists())
    outcome = budget.finish()
    session.say(str(outcome))
    frozen = freeze(searched)
    calibrate(frozen, _calibration_batches(config, data, session.device), bits=None)
    accuracy = evaluate(frozen, lbs.data.eval_loader(data, device=session.device))
    plan = plan_of(frozen)
    network.with_signs(card, frozen).write(session.folder)
    checkpoint.save_weights(session.folder.file(SEARCHED), frozen)
    plan.save(session.folder.file("plan.json"))
    section = {
        **result.as_dict(),
        "target_bops": outcome.target,
        "bops": outcome.value,
        "full_precision_bops": outcome.full_precision,
        "frozen_accuracy": accuracy,
        "conversion": [list(row) for row in report],
        "config_hash": config.digest(),
    }
    session.folder.add_result("search", section)
    if outcome.value > outcome.target:
        raise PlanError(f"{outcome}; search longer (--epochs), or with a larger --strength")
    return section


def run_finetune(config: FinetuneRun, session: Session) -> dict[str, Any]:
    """Searched (or hand-planned, or uniform) network -> model.safetensors. Returns the section `finetune`."""
    folder = session.folder
    data = network.load_data(config.data, config.mean, config.std)
    _check_counts(config, data)
    quantized, card = _start_of_finetuning(config, data, session)
    before = evaluate(quantized, lbs.data.eval_loader(data, device=session.device))
    session.say(f"before fine-tuning: {before:.2%} of the test images")
    trainer = Trainer(
        quantized,
        _train_loader(config, data, session.device),
        recipe_of(config, config.epochs, config.lr),
        phase="finetune",
        test=lbs.data.eval_loader(data, device=session.device),
        groups=parameter_groups(quantized, config.lr, config.weight_decay),
        teacher=_teacher(config, card, folder),
        folder=folder,
        progress=session.progress,
    )
    result = trainer.fit(session.resume and folder.checkpoint("finetune").exists())
    plan = plan_of(quantized)
    card.write(folder)
    plan.save(folder.file("plan.json"))
    checkpoint.save_weights(folder.file(FINAL), quantized)
    section = {
        **result.as_dict(),
        "accuracy_before": before,
        "bops": plan.bops(),
        "full_precision_bops": plan.full_precision_bops(),
        "config_hash": config.digest(),
    }
    folder.add_result("finetune", section)
    return section


def recipe_of(config: RunConfig, epochs: int, lr: float) -> Recipe:
    """The training numbers of a configuration."""
    return Recipe(
        epochs=epochs,
        lr=lr,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        milestones=config.milestones,
        warmup=config.warmup,
        label_smoothing=config.label_smoothing,
        distill=config.distill,
        amp=config.amp,
        log_every=config.log_every,
        eval_every=config.eval_every,
    )


def _float_network(config: SearchRun, data: lbs.data.ImageData, card: NetworkCard, session: Session) -> nn.Module:
    """The float network with the user's weights, or trained here; measured, and kept as float.safetensors."""
    torch.manual_seed(config.seed)
    model = network.build(config.model, card.num_classes).to(session.device)
    network.check_images(model, card, session.device)
    folder, section = session.folder, {"origin": config.weights or "trained in this run"}
    kept = folder.file(FLOAT)
    source = Path(config.weights) if config.weights else kept if session.resume and kept.exists() else None
    if source is not None:
        checkpoint.apply_weights(model, checkpoint.load_weights(source), source)
    elif config.float_epochs:
        section |= _train_float(model, config, data, session)
    else:
        raise TrainingError("no float weights to start from; give --weights FILE, or train them with --float-epochs N")
    if session.resume and "float" in folder.results():
        return model
    accuracy = evaluate(model, lbs.data.eval_loader(data, device=session.device))
    session.say(f"float network: {accuracy:.2%} of the test images")
    checkpoint.save_weights(kept, model)
    folder.add_result("float", {**section, "accuracy": accuracy, "bytes": kept.stat().st_size})
    return model


def _train_float(model: nn.Module, config: SearchRun, data: lbs.data.ImageData, session: Session) -> dict[str, Any]:
    recipe = Recipe(config.float_epochs, config.float_lr, weight_decay=5e-4, warmup=1.0, amp=config.amp)
    trainer = Trainer(
        model,
        _train_loader(config, data, session.device),
        recipe,
        phase="float",
        test=lbs.data.eval_loader(data, device=session.device),
        folder=session.folder,
        progress=session.progress,
    )
    return trainer.fit(session.resume and session.folder.checkpoint("float").exists()).as_dict()


def _start_of_finetuning(
    config: FinetuneRun, data: lbs.data.ImageData, session: Session
) -> tuple[nn.Module, NetworkCard]:
    """The quantized network fine-tuning starts from, and its card."""
    folder, batches = session.folder, _calibration_batches(config, data, session.device)
    if config.plan or config.uniform:
        card = network.card_of(config, data)
        path = network.weights_path(config.weights, folder)
        if path is None:
            raise TrainingError("a plan or uniform bits need float weights; give --weights FILE")
        model = network.build(config.model, card.num_classes)
        network.check_images(model, card, torch.device("cpu"))
        checkpoint.apply_weights(model, checkpoint.load_weights(path), path)
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
    checkpoint.apply_weights(teacher, checkpoint.load_weights(path), path)
    return teacher


def _check_counts(config: RunConfig, data: lbs.data.ImageData) -> None:
    if not 1 <= config.batch_size <= len(data.train_x):
        raise TrainingError(f"--batch-size {config.batch_size}; it lies in 1..{len(data.train_x)}, the training images")
    if config.calibration < 1:
        raise TrainingError(f"--calibration {config.calibration}; the ranges need at least one training image")


def _check_rates(config: SearchRun) -> None:
    for name in ("gate_lr", "prune_lr", "float_lr", "strength", "gain"):
        if getattr(config, name) < 0:
            raise TrainingError(f"--{name.replace('_', '-')} {getattr(config, name):g}; it must be 0 or more")


def _train_loader(config: RunConfig, data: lbs.data.ImageData, device: torch.device) -> lbs.data.TensorLoader:
    return lbs.data.train_loader(data, config.batch_size, augment=config.augment, seed=config.seed, device=device)


def _calibration_batches(config: RunConfig, data: lbs.data.ImageData, device: torch.device) -> list[Tensor]:
    size = min(128, len(data.train_x), config.calibration)
    loader = lbs.data.train_loader(data, size, augment=False, seed=config.seed, device=device)
    return [images for images, _ in itertools.islice(loader, -(-config.calibration // size))]


def _gate_row(model: nn.Module, budget: Budget) -> dict[str, Any]:
    """What a metrics row of the search shows besides the loss."""
    plan = plan_of(model)
    gates = {layer.name: [layer.w_bits, layer.a_bits, layer.kept_filters] for layer in plan.layers}
    return {"bops": plan.bops(), "lambda": budget.strength, "frozen": budget.frozen, "gates": gates}
