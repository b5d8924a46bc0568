"""A row of the results, from float weights to its record: every phase in order, each skipped where it is done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lbs.config import FinetuneRun, FloatRun, RunConfig, SearchRun, open_runs
from lbs.run_folder import RunFolder, environment, read_json, write_sealed, writes
from lbs.runs import network
from lbs.runs.limits import targets_met
from lbs.runs.modes import mode_settings
from lbs.runs.phases import Session, check_search, check_teacher, run_finetune, run_float, run_search
from lbs.runs.rows import Row, row_named
from lbs.runs.session import one_writer
from lbs.runs.stages import pack_run, verify_run
from lbs.train import distributed
from lbs_kernels.errors import LbsError, TrainingError

RECORD = "record.json"
_NETWORK = ("exclude", "streams")  # options of a search that its fine-tuning has too
Options = dict[str, dict[str, Any]]
C = TypeVar("C", bound=RunConfig)


def open_row(row: Row, named: Options, folder: RunFolder, resume: bool, processes: int = 1) -> dict[str, RunConfig]:
    """The configuration of each phase by its command: the row's, changed by what the user named.

    Raises:
        TrainingError: a run that goes on was begun with other options; they are listed. Or fine-tuning would have
            another network than its search. PlanError: an unknown mode.
    """
    kinds: list[type[RunConfig]] = [FloatRun, *([SearchRun] if row.search is not None else []), FinetuneRun]
    wanted = []
    for kind in kinds:
        asked = {"row": row.name, **named["common"], **named[kind.command]}
        if not resume:
            asked = {**_of_row(row, kind.command), **asked}
        if kind is SearchRun and "mode" in asked:
            mode_settings(asked["mode"])  # before anything is trained
        if kind is FinetuneRun and row.search is not None:
            asked = {**_of_search(row, named, resume), **asked}
        wanted.append((kind, asked))
    return {config.command: config for config in open_runs(wanted, folder, resume, processes=processes)}


def _of_search(row: Row, named: Options, resume: bool) -> dict[str, Any]:
    """What fine-tuning takes over of its search, but for what a run that goes on holds already."""
    asked = named["search"] if resume else {**_of_row(row, SearchRun.command), **named["search"]}
    found = {key: asked[key] for key in _NETWORK if key in asked}
    for key in () if resume else _NETWORK:
        searched = found.get(key, getattr(SearchRun, key))
        own = named["finetune"].get(key, searched)
        if own != searched:
            raise TrainingError(
                f"{key}={own} for fine-tuning, of a network that is searched with {key}={searched}; "
                "name it for the search alone"
            )
    return found


def row_of(folder: RunFolder) -> Row:
    """The row that a run folder was begun with. Raises LbsError where it holds none."""
    path = folder.file("config.json")
    sections = read_json(path).values() if path.exists() else ()
    names = {str(section["row"]) for section in sections if isinstance(section, dict) and section.get("row")}
    if len(names) != 1:
        found = f"runs of {', '.join(sorted(names))}" if names else "no run of a row"
        raise LbsError(f"{folder.path} holds {found}; name the row too: lbs reproduce ROW --out {folder.path}")
    return row_named(names.pop())


def _of_row(row: Row, command: str) -> dict[str, Any]:
    own = {"float": {}, "search": row.search or {}, "finetune": row.finetune}[command]
    return {"model": row.network.model, **row.network.common, **getattr(row.network, command), **own}


@one_writer
def reproduce(row: Row, configs: dict[str, RunConfig], session: Session) -> dict[str, Any]:
    """Float network, search, fine-tuning, packing, verification, record. Returns the record.

    Stopped anywhere, it goes on there with `session.resume`.

    Raises:
        LbsError: any of the family; nothing that was saved before is lost.
    """
    folder, start = session.folder, _config(configs, FloatRun)
    if row.search is not None and not _done(session, start):
        check_search(_config(configs, SearchRun), session)
    finetune = _config(configs, FinetuneRun)
    if not _done(session, finetune):
        check_teacher(finetune, session)
    run_float(start, session)
    if row.search is not None:
        search = _config(configs, SearchRun)
        if not _done(session, search):
            run_search(search, session)
    if not _done(session, finetune):
        run_finetune(finetune, session)
    if writes():
        with distributed.alone():
            if not network.plan_of_run(folder).in_float:
                session.say("pack and verify")
                pack_run(folder)
                verify_run(folder, budget=None)  # packed by this very command
            write_sealed(folder.file(RECORD), record_of(row, configs, folder))
    distributed.wait()
    return record_of(row, configs, folder)


def _config(configs: dict[str, RunConfig], kind: type[C]) -> C:
    found = configs[kind.command]
    if not isinstance(found, kind):
        raise LbsError(f"{kind.command} has the configuration of another command, {type(found).__name__}")
    return found


def _done(session: Session, config: RunConfig) -> bool:
    """Whether results.json has this phase, made by this configuration, within all its targets."""

    def look() -> bool:
        section = session.folder.results().get(config.command, {}) if session.resume else {}
        return bool(section.get("config_hash") == config.digest() and targets_met(section))

    return distributed.first(look)


def record_of(row: Row, configs: dict[str, RunConfig], folder: RunFolder) -> dict[str, Any]:
    """What is published of a run: accuracies in percent, last and best epoch, cost, schedule, seeds, machine.

    A network that stays in float is not packed: what packing would tell is None.
    """
    results, plan = folder.results(), network.plan_of_run(folder)
    tuned, verified, packed = (results.get(name, {}) for name in ("finetune", "verify", "pack"))
    phases = [name for name in ("float", "search", "finetune", "pack", "verify") if name in results]
    pruned = {e.name: f"{e.kept_filters}/{e.filters}" for e in plan.layers if e.kept_filters < e.filters}
    return {
        "row": row.name,
        "network": row.network.name,
        "model": row.network.model,
        "variant": row.variant,
        "published": asdict(row.published) if row.published else None,
        "schedule": schedule_text(configs, results),
        "epochs_run": {name: results[name].get("epochs") for name in phases if "epochs" in results[name]},
        "seeds": {name: config.seed for name, config in configs.items()},
        "float_top1": _percent(results["float"]["accuracy"]),
        "fine_tuned_top1": _percent(tuned["accuracy"]),
        "epoch": "last",
        "best_epoch_top1": _percent(tuned["best_accuracy"]),
        "best_epoch": tuned["best_epoch"],
        "packed_top1": _percent(verified.get("packed_accuracy")),
        "images": verified.get("images"),
        "equal_predictions": verified.get("equal_predictions"),
        "identical_outputs": verified.get("identical_outputs"),
        "verified": verified.get("passed"),
        "in_float": plan.in_float,
        "targets": results.get("search", {}).get("targets"),
        "target_bops": results.get("search", {}).get("target_bops"),
        "unreadable": len(tuned.get("unreadable", {})),
        "bops": plan.bops(),
        "full_precision_bops": plan.full_precision_bops(),
        "bits": sorted({(layer.w_bits, layer.a_bits) for layer in plan.layers}),
        "pruned_layers": pruned,
        "bytes": packed.get("bytes"),
        "latency": packed.get("latency"),
        "seconds": {name: results[name].get("seconds") for name in phases},
        "config": {name: _without_paths(config) for name, config in configs.items()},
        "environment": {key: value for key, value in environment().items() if key != "command"},
    }


def _without_paths(config: RunConfig) -> dict[str, Any]:
    """A record is read elsewhere: files by their names, which the digests beside them make certain."""
    body = config.as_dict()
    return {
        **body,
        **{key: Path(body[key]).name for key in ("data", "weights", "plan", "teacher_weights") if body.get(key)},
    }


def schedule_text(configs: dict[str, RunConfig], results: dict[str, Any]) -> str:
    """`8+30 of 30+200 epochs`, or `30+200 epochs` for the full schedule.

    What a limit in minutes cut off is not counted. A search that met its budget early was not shortened by that.
    """
    searched = [name for name in ("search", "finetune") if name in configs]
    planned = [_epochs(configs[name], results.get(name, {})) for name in searched]
    full = [configs[name].full_epochs or configs[name].epochs for name in searched]
    text = "+".join(map(str, planned))
    text = f"{text} epochs" if planned == full else f"{text} of {'+'.join(map(str, full))} epochs"
    share = configs["finetune"].train_images
    notes = [f"{share} training images"] if share else []
    notes += ["bfloat16 autocast"] if configs["finetune"].amp == "bf16" else []
    teacher = getattr(configs["finetune"], "teacher", "")
    notes += [f"distilled from {teacher}"] if teacher else []
    return ", ".join([text, *notes])


def _epochs(config: RunConfig, result: dict[str, Any]) -> int:
    """Those that were asked for, or those begun where the minutes ended them."""
    seconds = result.get("phases", {}).get(config.command, result).get("seconds", 0.0)
    cut = config.minutes and seconds >= 60 * config.minutes
    return min(config.epochs, result["epochs"]) if cut else config.epochs


def _percent(accuracy: float | None) -> float | None:
    return None if accuracy is None else round(100 * accuracy, 4)
