"""The parts of the GPU suite that run kernels, each in a process of its own."""

from __future__ import annotations

import functools
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_compile, gpu_device, gpu_layers, gpu_models, gpu_nets, gpu_roofs, gpu_steps
from benchmarks.gpu_run import Attempts, Run
from lbs_kernels.program.problem import Problem
from lbs_kernels.run.loaded import clear_runners
from lbs_kernels.tune import tuner

NETS = "nets"  # folder of packed networks
BUILDERS = 6  # processes that pack and compile networks while tests run
# The GPU would wait for the first networks of the list: so many processes compile each of their variants. The others
# have the time that these take.
FIRST, SHARES = 2, 3


def run(part: str, found: Run) -> None:
    """Run one part and save its results."""
    with torch.no_grad():
        PARTS[part](found, Attempts(found.scratch, part))


def roofs(run: Run, attempt: Attempts) -> None:
    """Copy bandwidth and tensor-core rates."""
    run.save("roofs", gpu_roofs.measure(functools.partial(run.save, "roofs"), attempt))


def known_roofs(run: Run) -> dict[str, float]:
    """Operations and bytes per second of the roofs that were measured in this run."""
    rows = run.load("roofs").get("rows", {})
    rates = {"int8": ("int8", "operations_per_s"), "copy": ("copy", "bytes_per_s")}
    return {name: rows[row][unit] for name, (row, unit) in rates.items() if row in rows}


def steps(run: Run, attempt: Attempts) -> None:
    """Every step of some networks; packing and compiling go on ahead in other processes."""
    folder, compiler = run.scratch / NETS, gpu_compile.Compiler(gpu_compile.workers())
    shares = [(share, SHARES) for share in range(SHARES)]
    jobs = [(*place, batch, share) for batch in gpu_steps.BATCHES for place in gpu_steps.NETWORKS for share in shares]
    for network, variant, batch, share in jobs:
        name = (network, variant, batch, share)
        compiler.submit(name, compile_contender, str(folder), network, variant, batch, share)

    def ready(network: str, variant: str) -> None:
        for name in jobs:
            if name[:2] == (network, variant):
                compiler.wait(name, run.end)

    save = functools.partial(run.save, "steps")
    save(gpu_steps.sweep(folder, run.end, run.clock, save, attempt, ready))
    compiler.stop()


def layers(run: Run, attempt: Attempts) -> None:
    """Tune and time the layers that take longest; compiling goes on ahead in other processes."""
    todo = gpu_layers.problems(run.load("steps").get("rows", []))
    torch.backends.cudnn.benchmark = True
    compiler = gpu_compile.Compiler(gpu_compile.workers())
    for problem in todo:
        compiler.submit((problem, gpu_layers.NEAR), gpu_compile.compile_layer, problem, gpu_layers.NEAR)
    for problem in todo:
        compiler.submit((problem, gpu_layers.FAR), gpu_compile.compile_layer, problem, gpu_layers.FAR)
    device = gpu_device.device()

    def measure(problem: Problem, limit: int) -> tuner.Measured:
        late = compiler.wait((problem, limit), run.end)
        if late:
            print(f"{problem}: not compiled ahead: {late}", flush=True)
        try:
            return tuner.measure_gpu(problem, device, limit, rounds=12, others=gpu_layers.half, attempt=attempt)
        except Exception as error:  # noqa: BLE001  one problem that cannot be measured must not cost the others
            gpu_device.survive()
            return tuner.Measured(problem, {}, {"all": f"{type(error).__name__}: {str(error)[:300]}"})

    earlier = run.load("layers").get("rows", [])
    body = gpu_layers.sweep(todo, measure, run.end, functools.partial(run.save, "layers"), earlier, known_roofs(run))
    run.save("layers", body)
    compiler.stop()


def models(run: Run, attempt: Attempts) -> None:
    """Time whole networks, in the order of gpu_models.ORDER; compiling goes on ahead in other processes."""
    torch.backends.cudnn.benchmark = True
    folder = run.scratch / NETS
    compiler = gpu_compile.Compiler(gpu_compile.workers())
    order = gpu_models.ORDER[: run.networks]
    shares = {place: SHARES if index < FIRST else 1 for index, place in enumerate(order)}
    jobs: dict[tuple[str, int], list[Any]] = {place: [] for place in order}
    for (network, batch), count in shares.items():
        for contender in gpu_models.contenders(network, batch):
            for share in range(count):
                name = (network, batch, contender, share)
                jobs[network, batch].append(name)
                compiler.submit(name, compile_contender, str(folder), network, contender, batch, (share, count))
    # Rows of this run's own earlier process, which the device failed; those of another run stood on other kernels.
    begun = run.scratch / ".models-begun"
    earlier = run.load("models") if begun.exists() else {}
    begun.touch()
    kept = {key: earlier[key] for key in ("rows", "missing", "compiled") if key in earlier}
    body: dict[str, Any] = {"rows": [], "missing": {}, "compiled": {}, **kept}
    done = {(row["network"], row["batch"]) for row in body["rows"]}
    left = [f"{network} {batch}" for network, batch in order if (network, batch) not in done]
    body.update(complete=False, left=left, timed=gpu_models.TIMED, l2="warm")
    for network, batch in order:
        if (network, batch) in done:
            continue
        if time.time() >= run.end:
            break
        mode = gpu_models.warmed(run.scratch, network, batch)
        # torch.compile takes seconds even for what is in its cache; meanwhile other processes compile ours.
        place, began = f"{network} {batch}", time.time()
        others, absent = gpu_models.baselines(network, batch, mode, attempt)
        print(f"{place}: {len(others)} baselines after {time.time() - began:.1f} s", flush=True)
        for name in jobs[network, batch]:
            compiler.wait(name, run.end)
        print(f"{place}: compiled after {time.time() - began:.1f} s", flush=True)
        if time.time() >= run.end:
            break
        ours, missing = gpu_models.packed_calls(folder, network, batch, attempt)
        print(f"{place}: {len(ours)} packed networks checked after {time.time() - began:.1f} s", flush=True)
        body["rows"] += gpu_models.measure(network, batch, {**others, **ours}, attempt)
        body["missing"][place] = {**missing, **absent}
        body["compiled"].update({place: mode} if mode else {})
        left.remove(place)
        run.save("models", body)
        ours.clear()
        others.clear()
        clear_runners()
        torch.cuda.empty_cache()
    else:
        body["complete"] = True
    run.save("models", body)
    compiler.stop()


def compile_contender(folder: str, network: str, contender: str, batch: int, share: tuple[int, int]) -> int:
    """For a compiling process: pack a network where that was not done, and compile a share of its launches."""
    with gpu_models.switches_of(contender) as variant:
        return gpu_compile.compile_network(gpu_nets.build(folder, network, variant), batch, share)


def warm_plain(folder: Path, network: str, batch: int, threads: int) -> None:
    """For a process of its own: the default way of torch.compile; marked also where it fails, as nobody need wait."""
    torch.set_num_threads(threads)  # inductor's cache may ask for as many as there will be
    try:
        gpu_models.warm(network, batch, gpu_models.PLAIN)
    finally:
        gpu_models.mark_of(folder, network, batch, gpu_models.PLAIN).touch()


def warm(run: Run, attempt: Attempts) -> None:
    """While nothing is timed: pack every network, and let torch.compile choose its kernels."""
    folder = str(run.scratch / NETS)
    compiler = gpu_compile.Compiler(BUILDERS)
    nets = dict.fromkeys(network for network, _ in gpu_models.ORDER[: run.networks])
    places = gpu_models.compiled_at(run.networks)
    for network, batch in places:
        compiler.submit((network, batch), warm_plain, run.scratch, network, batch, torch.get_num_threads())
    for network in nets:
        for variant in gpu_models.variants(network):
            compiler.submit((network, variant), gpu_nets.build, folder, network, variant)
    for place in places:  # first, for in a short run there is time for the default way alone
        compiler.wait(place, run.end)
    for network, batch in places:
        try:
            gpu_models.warm(network, batch, gpu_models.AUTOTUNED)
        except Exception:  # noqa: BLE001  the default way goes on beside it
            traceback.print_exc()
        else:
            gpu_models.mark_of(run.scratch, network, batch, gpu_models.AUTOTUNED).touch()
    for name in list(compiler.jobs):
        compiler.wait(name, run.end)


PARTS = {"steps": steps, "roofs": roofs, "layers": layers, "models": models, "warm": warm}
