"""The phases of a run, from configuration to files: float training, search, fine-tuning."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lbs.data
from lbs.config import FinetuneRun, FloatRun, RunConfig, SearchRun
from lbs.graph import record_of
from lbs.plan import RANGES, Plan
from lbs.quant import calibrate
from lbs.run_folder import RunFolder
from lbs.runs import network
from lbs.runs.limits import limits, targets_section
from lbs.runs.network import FINAL, FLOAT, SEARCHED, NetworkCard
from lbs.runs.searches import SearchJob, check_reach, left_out, search_of, search_settings
from lbs.runs.session import Session, calibration_batches, goes_on, one_writer, test_loader, train_loader
from lbs.search.baselines import evenly_pruned
from lbs.search.budget import parameter_groups
from lbs.search.freeze import plan_of
from lbs.search.prepare import uniform
from lbs.train import checkpoint, distributed
from lbs.train.evaluation import evaluate
from lbs.train.trainer import Trainer
from lbs_kernels import files
from lbs_kernels.errors import CheckpointError, PlanError, TrainingError


def file_digest(path: str) -> str:
    """sha256 of a file, first 16 hex digits; "" for no path. Raises CheckpointError where it cannot be read."""
    if not path:
        return ""
    try:
        return hashlib.sha256(files.read_regular(path)).hexdigest()[:16]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; give the path of a file") from error


def _digest_there(path: Path) -> str:
    return file_digest(str(path)) if path.exists() else ""


def _check_digest(path: str, digest: str) -> None:
    """Refuse a file that is not the one a run was begun with."""
    found = file_digest(path)
    if digest and found != digest:
        raise TrainingError(
            f"{path} has changed since the run began (its digest is {found}, it was {digest}); restore it, or start in "
            "a new run folder"
        )


@one_writer
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
    model = network.build_of(session.folder, config.model, card.num_classes).to(session.device)
    network.check_images(model, card, session.device)
    if config.weights:
        _check_digest(config.weights, config.weights_digest)
        network.load_float(model, Path(config.weights), card)
        section: dict[str, Any] = {"origin": config.weights}
        section["accuracy"] = evaluate(model, test_loader(data, session.device))
    elif not config.epochs:
        raise TrainingError(
            "a float network needs weights or training; give weights=FILE, or epochs above 0 (a search: float_epochs)"
        )
    else:
        trainer = Trainer(
            model,
            train_loader(config, data, session.device),
            config,
            phase="float",
            test=test_loader(data, session.device),
            folder=folder,
            progress=session.progress,
        )
        section = {"origin": "trained in this run", **trainer.fit(goes_on(session, "float")).as_dict()}
        section |= left_out(trainer.train, data)
    session.say(f"float network: {section['accuracy']:.2%} of the test images")
    checkpoint.save_weights(kept, model)
    distributed.wait()
    section |= {"bytes": kept.stat().st_size, "config_hash": config.digest()}
    folder.add_result("float", section)
    return section


@one_writer
def run_search(config: SearchRun, session: Session) -> dict[str, Any]:
    """Float network -> plan.json and searched.safetensors. Returns results.json's section `search`.

    Raises:
        LbsError: any of the family; nothing that was saved before is lost.
    """
    folder = session.folder
    tuned = folder.file(FINAL).exists() or folder.checkpoint("finetune").exists()
    if tuned and not folder.checkpoint("search").exists():
        raise TrainingError(f"{folder.path} holds a network of other bits; name a new folder")
    data, card = check_search(config, session)
    card.write(folder)
    model = _float_network(config, card, session)
    torch.manual_seed(config.seed)
    found = search_of(config.mode)(SearchJob(config, session, data, card.example()), model)
    accuracy = evaluate(found.network, test_loader(data, session.device))
    network.with_signs(card, found.network).write(folder)
    checkpoint.save_weights(folder.file(SEARCHED), found.network)
    network.save_plan(folder, found.plan)
    section = {
        **found.training,
        **targets_section(found.outcome),
        "full_precision_bops": found.plan.full_precision_bops(),
        "bops": found.plan.bops(),
        "float_bops": record_of(found.network).float_bops,
        "frozen_accuracy": accuracy,
        "in_float": found.plan.in_float,
        "conversion": [list(row) for row in found.report],
        "config_hash": config.digest(),
    }
    folder.add_result("search", section)
    distributed.wait()
    if not found.outcome.met:
        raise PlanError(f"{found.outcome}; search for more epochs, or with a larger strength")
    return section


def check_search(config: SearchRun, session: Session) -> tuple[lbs.data.ImageSet, NetworkCard]:
    """The data and the card of a search, once its options are seen to fit: a mistake shows before the training does.

    Raises:
        LbsError: options that contradict, a network that does not take these images, a target out of reach, or a layer
            whose time is asked for and not known.
    """
    data, card = _data_and_card(config, session)
    _check_rates(config)
    search_settings(config)
    limits(config)
    model = network.build_of(session.folder, config.model, card.num_classes)
    network.check_images(model, card, torch.device("cpu"))
    check_reach(config, model, card.example())
    return data, card


def check_teacher(config: FinetuneRun, session: Session) -> None:
    """Build the teacher that was named, if any, before anything is trained. Raises LbsError where it does not fit."""
    if config.teacher:
        _other_teacher(config, _data_and_card(config, session)[1], session.folder)


@one_writer
def run_finetune(config: FinetuneRun, session: Session) -> dict[str, Any]:
    """Searched (or hand-planned, or uniform) network -> model.safetensors. Returns the section `finetune`."""
    folder = session.folder
    if (config.plan or config.uniform) and folder.file(SEARCHED).exists():
        raise TrainingError(f"{folder.path} holds a searched network; name a new folder")
    data, card = _data_and_card(config, session)
    torch.manual_seed(config.seed)  # dropout, say, must not depend on which phases this process ran before
    quantized, card = _start_of_finetuning(config, data, card, session)
    before = evaluate(quantized, test_loader(data, session.device))
    session.say(f"before fine-tuning: {before:.2%} of the test images")
    trainer = Trainer(
        quantized,
        train_loader(config, data, session.device),
        config,
        phase="finetune",
        test=test_loader(data, session.device),
        groups=parameter_groups(quantized, config.lr, config.weight_decay),
        teacher=_teacher(config, card, folder),
        folder=folder,
        progress=session.progress,
    )
    result = trainer.fit(goes_on(session, "finetune"))
    plan = plan_of(quantized)
    card.write(folder)
    network.save_plan(folder, plan)
    final = folder.file(FINAL)
    earlier = _digest_there(final)
    checkpoint.save_weights(final, quantized)
    section = {
        **result.as_dict(),
        "accuracy_before": before,
        "bops": plan.bops(),
        "float_bops": record_of(quantized).float_bops,
        "full_precision_bops": plan.full_precision_bops(),
        **left_out(trainer.train, data),
        "config_hash": config.digest(),
    }
    stale = ("pack", "verify", "bench") if _digest_there(final) != earlier else ()  # a finished one may go on too
    folder.add_result("finetune", section, stale)
    distributed.wait()
    return section


def _data_and_card(config: RunConfig, session: Session) -> tuple[lbs.data.ImageSet, NetworkCard]:
    """The data of a run, which must be what it began with, and the card of its network."""
    data = session.data(config)
    card = network.card_of(config, data)
    if session.resume:
        distributed.first(lambda: network.check_same_data(card, session.folder))
    if config.train_images:
        data = data.subset(config.train_images, config.seed)
    _check_counts(config, data)
    return data, card


def _float_network(config: SearchRun, card: NetworkCard, session: Session) -> nn.Module:
    """The float network the search starts from: the run folder's own, made here if the configuration says how."""
    if config.weights or config.float_epochs:
        run_float(config.float_run(), session)
    elif not session.folder.file(FLOAT).exists():
        raise TrainingError("no float weights to start from; give weights=FILE, or train them with float_epochs=N")
    model = network.build_of(session.folder, config.model, card.num_classes).to(session.device)
    network.load_float(model, session.folder.file(FLOAT), card)
    return model


def _start_of_finetuning(
    config: FinetuneRun, data: lbs.data.ImageSet, card: NetworkCard, session: Session
) -> tuple[nn.Module, NetworkCard]:
    """The network fine-tuning starts from, quantized or pruned in float, and its card."""
    folder = session.folder
    if config.plan or config.uniform:
        path = network.weights_path(config.weights, folder)
        if path is None:
            raise TrainingError("a plan or uniform bits need float weights; give weights=FILE")
        _check_digest(config.plan, config.plan_digest)
        model = network.build_of(session.folder, config.model, card.num_classes)
        network.check_images(model, card, torch.device("cpu"))
        network.load_float(model, path, card)
        if config.uniform:
            quantized = _uniform(config, model, card)
        else:
            quantized = network.apply_plan(model, card, Plan.load(config.plan))
        quantized = quantized.to(session.device)
        if not plan_of(quantized).in_float:
            calibrate(quantized, calibration_batches(config, data, session.device))
        return quantized, network.with_signs(card, quantized)
    if not folder.file(SEARCHED).exists():
        raise CheckpointError(
            f"{folder.path} holds no searched network; search there first (run_search, in a shell lbs search), or give "
            "plan=FILE or uniform=(W, A)"
        )
    card = network.check_same_network(card, folder)
    quantized = network.build_of(folder, card.model, card.num_classes)
    quantized = network.apply_plan(quantized, card, network.plan_of_run(folder))
    checkpoint.apply_weights(quantized, checkpoint.load_weights(folder.file(SEARCHED)), folder.file(SEARCHED))
    return quantized.to(session.device), card


def _uniform(config: FinetuneRun, model: nn.Module, card: NetworkCard) -> nn.Module:
    """The float network at uniform bits, with all its filters or an even share of them."""
    w_bits, a_bits = config.uniform
    if config.ranges not in RANGES:
        raise PlanError(f"ranges={config.ranges!r} is unknown; use {' or '.join(RANGES)}")
    ranges: Any = config.ranges
    if not config.uniform_pruned:
        return uniform(model, card.example(), w_bits, a_bits, config.exclude, ranges=ranges, streams=config.streams)
    size = network.prune_group(config.model)
    plan = evenly_pruned(model, card.example(), config.uniform_pruned, group_size=size, exclude=config.exclude)
    plan = plan.with_bits(w_bits, a_bits)
    layers = (replace(layer, ranges=ranges) for layer in plan.layers)
    return network.apply_plan(model, card, replace(plan, layers=tuple(layers)))


def _teacher(config: FinetuneRun, card: NetworkCard, folder: RunFolder) -> nn.Module | None:
    if not config.distill:
        return None
    if config.teacher:
        return _other_teacher(config, card, folder)
    path = network.weights_path(config.weights, folder)
    _check_digest(config.weights, config.weights_digest)
    if path is None:
        raise TrainingError(f"distill={config.distill} needs the float network; give weights=FILE")
    teacher = network.build_of(folder, card.model, card.num_classes)
    network.load_float(teacher, path, card)
    return teacher


def _other_teacher(config: FinetuneRun, card: NetworkCard, folder: RunFolder) -> nn.Module:
    _check_digest(config.teacher_weights, config.teacher_weights_digest)
    teacher = network.build_of(folder, config.teacher, card.num_classes)
    network.check_images(teacher, replace(card, model=config.teacher), torch.device("cpu"))
    network.load_float(teacher, Path(config.teacher_weights), card)
    return teacher


def _check_counts(config: RunConfig, data: lbs.data.ImageSet) -> None:
    if not 1 <= config.batch_size <= data.train_count:
        raise TrainingError(f"batch_size={config.batch_size}; it lies in 1..{data.train_count}, the training images")
    if config.calibration < 1:
        raise TrainingError(f"calibration={config.calibration}; the ranges need at least one training image")


def _check_rates(config: SearchRun) -> None:
    for name in ("gate_lr", "prune_lr", "float_lr", "strength", "gain"):
        if getattr(config, name) < 0:
            raise TrainingError(f"{name}={getattr(config, name):g}; it must be 0 or more")
