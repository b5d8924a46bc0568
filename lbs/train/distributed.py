"""Several processes, one training: what they share, and the proof that they agree.

`torchrun --nproc-per-node N -m -- lbs search ...` starts N processes; `start` joins them. Everything here does nothing
in a single process, so callers need no second path. Only rank 0 writes files (`lbs.run_folder.writes`); what depends
on files is therefore decided by rank 0 alone and told to the others (`first`).
"""

from __future__ import annotations

import inspect
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lbs_kernels.errors import BackendError, LbsError, TrainingError, first_line

T = TypeVar("T")
_WAY_ON = (
    "The last checkpoint is from before; go on with resume=True, and if it happens again look for what is not drawn "
    "from the run's seed"
)
_WAY_TO_START = "Give all the same weights, and draw new ones from torch's random state, which the run's seed sets"
_PATIENCE = timedelta(days=2)  # what rank 0 does alone, such as verifying on all images of ImageNet, takes no longer
# Seconds that a process waits for the others within a step; LBS_RANK_TIMEOUT, in seconds, sets another time.
_STEP_SECONDS = 600.0
_GRACE = 5.0  # seconds in which whoever lives says so, after somebody did not answer
_TALKING = ("gloo", "NCCL", "Connection", "Timed out")  # in messages of errors of communication
_alone = False
_waiting: dist.ProcessGroup | None = None  # of processes that wait for rank 0 longer than exchanges may take
_steps: dist.ProcessGroup | None = None  # on the processor, wherever gradients are exchanged


def active() -> bool:
    """Whether this process is one of several and talks to them."""
    return not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, nothing is exchanged: for what only some of the processes run."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """This process, 0 .. world_size() - 1."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if active() else 1


def start(device: torch.device) -> torch.device:
    """Join the processes torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), and return this one's device.

    Raises:
        BackendError: more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise BackendError(f"process {local} of this machine has no GPU, there are {count}; start at most {count}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    global _waiting, _steps
    patience = _patience()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    _waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)
    _steps = dist.new_group(backend="gloo", timeout=patience)
    return device


def _patience() -> timedelta:
    text = os.environ.get("LBS_RANK_TIMEOUT", "")
    try:
        seconds = float(text or _STEP_SECONDS)
        if not 0 < seconds < _PATIENCE.total_seconds():
            raise ValueError
    except ValueError as error:
        raise BackendError(
            f"LBS_RANK_TIMEOUT={text!r}; give the seconds that a process may keep others waiting"
        ) from error
    return timedelta(seconds=seconds)


def stop() -> None:
    """Leave the group, if there is one."""
    global _waiting, _steps
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        _waiting = _steps = None


def reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes; the tensor itself in a single one. No gradient passes."""
    return reduce_sum(tensor) / world_size() if active() else tensor


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself in a single one. No gradient passes."""
    if not active():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether a flag is up on any process."""
    return bool(reduce_sum(torch.tensor(float(flag), dtype=torch.float32, device=device)) > 0) if active() else flag


def asked(stop: bool) -> bool:
    """Whether any process was asked to stop; once for each step, on the processor, so that no device is waited for."""
    if not active():
        return stop
    if _steps is None:  # the caller has joined the processes, not `start`
        return any(gather(stop))
    total = torch.tensor(float(stop), dtype=torch.float32, device="cpu")
    dist.all_reduce(total, group=_steps)
    return bool(total > 0)


@contextmanager
def answered() -> Iterator[None]:
    """Inside, what a process meets that talks to one which is gone becomes TrainingError, which names it.

    Errors of its own, such as memory that is used up, stay what they are.
    """
    try:
        yield
    except LbsError:
        raise
    except RuntimeError as error:
        missing = _missing() if active() and _of_talking(error) else []
        if not missing:
            raise
        noun, verb = ("rank", "gives") if len(missing) == 1 else ("ranks", "give")
        ranks = f"{noun} {', '.join(map(str, missing))} of {world_size()} {verb}"
        raise TrainingError(
            f"rank {rank()}: {ranks} no answer ({first_line(error)[:99]}): killed, stopped, or "
            "at something that takes longer than LBS_RANK_TIMEOUT. End what is left of the processes, and go on with "
            "resume=True from the last checkpoint"
        ) from error


def _of_talking(error: RuntimeError) -> bool:
    """Whether an error is one of communication; gloo's own have no class."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _TALKING)


def _missing() -> list[int]:
    """Ranks that do not say within some seconds that they are there. Everybody who lives asks when one is gone."""
    keys = [f"lbs/here/{number}" for number in range(world_size())]
    found = [0]  # it keeps the store: without it there is no answer at all

    def ask() -> None:
        with suppress(RuntimeError, OSError):
            store = dist.distributed_c10d._get_default_store()
            store.set(keys[rank()], "1")
            time.sleep(_GRACE)
            found[:] = [number for number, key in enumerate(keys) if not store.check([key])]

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(3 * _GRACE)
    return found


def gather(value: T) -> list[T]:
    """Everybody's value, by rank."""
    if not active():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def first(call: Callable[[], T], in_step: bool = False) -> T:
    """What `call` gives on rank 0, which alone runs it. Its error is raised on every rank.

    The others wait as long as it takes, or with `in_step` no longer than for an exchange of a step.
    """
    if not active():
        return call()
    told: list[Any] = [None]
    try:
        if rank() == 0:
            told = [("value", call())]
    except (LbsError, OSError) as error:
        told = [("error", str(error))]
        raise
    finally:  # the others wait for an answer, also where there was an error
        dist.broadcast_object_list(told, src=0, group=_steps if in_step else _waiting)
    kind, value = told[0]
    if kind == "error":
        raise TrainingError(f"rank 0: {value}")
    return value


def wait() -> None:
    """Until every process is here, so that what rank 0 wrote can be read."""
    if active():
        dist.barrier(group=_waiting)


def wrap(module: nn.Module, find_unused: bool) -> nn.Module:
    """DistributedDataParallel that averages gradients and touches nothing else.

    Weights are equal from the start, or `check_agreement` says so; norms keep statistics of their own (`share_norms`).
    """
    kind = nn.parallel.DistributedDataParallel
    name = "forward_sync_buffers"  # torch 2.13 renamed broadcast_buffers
    buffers = name if name in inspect.signature(kind).parameters else "broadcast_buffers"
    # Weights of 1x1 convolutions have two names for one order in channels_last; the gradients are right either way.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    options: dict[str, Any] = {buffers: False, "find_unused_parameters": find_unused, "init_sync": False}
    return kind(module, **options)


def share_norms(model: nn.Module) -> None:
    """Rank 0's running statistics to everybody.

    Not their mean: a run that goes on from rank 0's checkpoint must see what it would have seen without the stop.
    """
    if active():
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                dist.broadcast(buffer, src=0)


def check_agreement(parts: dict[str, str], trained: bool = True) -> None:
    """Compare digests by name over all processes; `trained`: after steps of training, not before the first.

    Raises:
        TrainingError: on every rank; names the ranks that are not like most others, and in what they differ.
    """
    everybody = gather(parts)
    common, _ = Counter(tuple(sorted(own.items())) for own in everybody).most_common(1)[0]
    expected = dict(common)
    complaints = []
    for number, own in enumerate(everybody):
        odd = sorted(name for name in own.keys() | expected.keys() if own.get(name) != expected.get(name))
        if odd:
            more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
            complaints.append(f"rank {number} in {', '.join(odd[:4])}{more}")
    if complaints:
        happened, way_out = ("trained apart", _WAY_ON) if trained else ("do not start alike", _WAY_TO_START)
        raise TrainingError(
            f"{len(everybody)} processes {happened}: {'; '.join(complaints)} differ from the rest. {way_out}"
        )
