"""The one stopwatch, for tuning and benchmarks: contenders interleaved in one run, medians with their spread.

Every round times each contender once, in an order that rotates, so that a machine that slows down for a while slows
all of them. On the CPU a measurement is wall clock over enough calls to last `MIN_SPAN`, after a pause in which the
threads of the contender before fall asleep, however long they spin, and `AWAKE` of calls that are not timed, in which
its own wake up: the speed of calls in a loop. The first call after a pause can be timed instead. On a GPU it is a pair
of CUDA events around calls one after the other for `GPU_SPAN`, or around one where the cache shall be cold. Ratios are
medians of the ratios inside each round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lbs_kernels.errors import ShapeError
from lbs_kernels.times.graph import record

SETTLE = 25e-3  # seconds: OpenMP's idle threads spin after a torch call and hold a core; 5 ms were too few (Zen 5)
LOOK = 5e-3  # seconds: after those, as long as threads of this process still work half of such a time
MAX_SETTLE = 2.0  # seconds; those of ONNX Runtime spin for longer than SETTLE
AWAKE = 2e-3  # seconds: a sleeping thread was seen to take 300 us to start on a virtual machine (Zen 4)
LEAST = 5  # rounds, whatever the limit: fewer have no quantiles worth the name
MIN_SPAN = 2e-4  # seconds of one CPU measurement: a thousand times the resolution and cost of the clock
# Seconds of one GPU measurement. The first event is over before the first call has reached the device, say 20 us
# later, which is counted once. A call of 60 us seems to take 80 while each is waited for, so 3 ms make 38 of them,
# 2.3 ms on the device, and the 20 us are 0.9 %; one of 25 us is called 67 times, and they are 1.2 %.
GPU_SPAN = 3e-3
L2_FLUSH_BYTES = 256 << 20  # more than four times the largest L2 of `device.GPUS`


@dataclass(frozen=True)
class Times:
    """Seconds per call of one contender, one number per round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        return quantile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.seconds, 0.8)

    def ratio(self, baseline: Times) -> float:
        """How many times faster than `baseline`: the median over rounds of baseline / this.

        Raises:
            ShapeError: times of different runs, whose rounds do not pair up.
        """
        if len(self.seconds) != len(baseline.seconds):
            rounds = (len(self.seconds), len(baseline.seconds))
            raise ShapeError(f"{self.name} and {baseline.name} have {rounds} rounds; time them in one run")
        return statistics.median(b / a for a, b in zip(self.seconds, baseline.seconds, strict=True))

    def __str__(self) -> str:
        return f"{self.name}: {self.median * 1e6:.1f} us [{self.p20 * 1e6:.1f} {self.p80 * 1e6:.1f}]"


@dataclass(frozen=True)
class SelfTimed:
    """A CPU contender that measures itself: `seconds()` does the work once and returns what it took.

    For one step inside a native call, which no clock outside can see.
    """

    seconds: Callable[[], float]

    def __call__(self) -> float:
        return self.seconds()


def quantile(values: tuple[float, ...] | list[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values.

    >>> quantile([4.0, 1.0, 3.0, 2.0], 0.5)
    2.5
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below, above = math.floor(place), math.ceil(place)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    device: str | torch.device = "cpu",
    rounds: int = 30,
    limit: float = math.inf,
    warmup: float = 0.1,
    cold_l2: bool = False,
    first_call: bool = False,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, Times]:
    """Time functions against each other.

    Args:
        contenders: name -> call without arguments; on a GPU it launches work on the current stream. A `SelfTimed`
            is timed by what it returns.
        device: "cpu" times by wall clock, "cuda" by events.
        rounds: measurements of each contender.
        limit: seconds after which no further round begins, once there are `LEAST`: a contender whose threads wait for
            a busy processor may take a thousand times as long.
        warmup: seconds spent on each contender before the first measurement.
        cold_l2: GPU only: overwrite the L2 cache before each measurement.
        first_call: CPU only: time one call after a pause of `SETTLE`, what a request that comes alone waits for.
        before: told, outside the clock, which contender is about to be called. Every measurement on a GPU waits for
            its end, so whoever was named last has broken a device that is found broken.

    Returns:
        name -> Times, in the order given.

    Raises:
        ShapeError: no rounds.
    """
    if rounds < 1:
        raise ShapeError(f"rounds = {rounds}; at least one measurement is needed")
    cpu_clock = _first_call_clock if first_call else _wall_clock
    measure = _cuda_clock(torch.device(device), cold_l2) if torch.device(device).type == "cuda" else cpu_clock
    calls: dict[str, int] = {}
    for name, call in contenders.items():
        before(name)
        calls[name] = _warm_up(call, warmup, torch.device(device))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    begun = time.perf_counter()
    for index in range(rounds):
        if index >= LEAST and time.perf_counter() - begun > limit:
            break
        first = index % max(1, len(names))
        for name in names[first:] + names[:first]:
            before(name)
            seconds[name].append(measure(contenders[name], calls[name]))
    return {name: Times(name, tuple(values)) for name, values in seconds.items()}


def cuda_graph(call: Callable[[], object]) -> Callable[[], None]:
    """`call` recorded once as a CUDA graph; the function returned replays it. Inputs must stay where they are.

    The first replay has been waited for: a kernel that breaks the device in it raises here, not in another's turn.
    """
    replay = record(call).replay
    replay()
    torch.cuda.synchronize()
    return replay


def _warm_up(call: Callable[[], object], seconds: float, device: torch.device) -> int:
    """Call for `seconds`; returns how many calls make one measurement long enough for the clock."""
    start = time.perf_counter()
    fastest, done = math.inf, False
    while not done:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        fastest = min(fastest, now - begin)
        done = now - start >= seconds
    return max(1, math.ceil((GPU_SPAN if device.type == "cuda" else MIN_SPAN) / fastest))


def _wall_clock(call: Callable[[], object], calls: int) -> float:
    if isinstance(call, SelfTimed):
        return sum(call.seconds() for _ in range(calls)) / calls
    _settle()
    start = time.perf_counter()
    while time.perf_counter() - start < AWAKE:
        call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _settle() -> None:
    """Wait until the threads of the contender before sleep."""
    time.sleep(SETTLE)
    end, worked = time.perf_counter() + MAX_SETTLE, LOOK
    while worked > LOOK / 2 and time.perf_counter() < end:
        before = time.process_time()
        time.sleep(LOOK)
        worked = time.process_time() - before


def _first_call_clock(call: Callable[[], object], calls: int) -> float:
    if isinstance(call, SelfTimed):
        return _wall_clock(call, calls)
    _settle()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_clock(device: torch.device, cold_l2: bool) -> Callable[[Callable[[], object], int], float]:
    flush = torch.empty(L2_FLUSH_BYTES if cold_l2 else 0, dtype=torch.uint8, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def measure(call: Callable[[], object], calls: int) -> float:
        count = 1 if cold_l2 else calls  # a second call would find the cache warm
        if cold_l2:
            flush.zero_()  # 60 us or more, in which what follows is enqueued: the launch's latency is not timed
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    return measure
