"""The one-bit kernels on a GPU against the reference, every element; run with -m gpu on a machine that has one."""

from __future__ import annotations

import one_step
import programs
import pytest
import torch
from contenders import assert_same
from cuda_steps import bound, check_replays, check_steps
from s8_cases import deep

from lbs_kernels import extension
from lbs_kernels.errors import BackendError
from lbs_kernels.gpu.configs.cuda import OneBitConfig, machines
from lbs_kernels.gpu.layout import from_logical, storage, to_logical
from lbs_kernels.program.planes import pack_weights
from lbs_kernels.program.problem import problem_of
from lbs_kernels.program.steps import Emit
from lbs_kernels.run.reference import ReferenceRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}"),
]
CONFIGS = [OneBitConfig(*tile) for tile in OneBitConfig.tiles]


def require(config: OneBitConfig) -> None:
    if config.machine not in machines("cuda"):
        pytest.skip(f"this GPU has no {config.machine}")


# (channels, filters, size, window): words by one, two and four; K of odd steps and of whole chunks; filters and pixels
# around the tiles; borders under a stride, dilation, windows beyond the image, one output pixel.
SHAPES = {
    "stem": (3, 64, (30, 31), {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)}),
    "pairs": (64, 64, (28, 28), {"kernel": (3, 3), "padding": (1, 1)}),
    "units": (128, 129, (14, 15), {"kernel": (3, 3), "padding": (1, 1)}),
    "wide": (512, 127, (7, 7), {"kernel": (3, 3), "padding": (1, 1), "stride": (2, 2)}),
    "odd": (130, 13, (9, 8), {"kernel": (3, 3), "padding": (1, 0), "stride": (2, 1)}),
    "dilated": (96, 40, (12, 12), {"kernel": (3, 3), "padding": (2, 3), "dilation": (2, 3)}),
    "outside": (32, 5, (3, 4), {"kernel": (5, 1), "padding": (5, 1)}),
    "pixel": (33, 70, (3, 3), {"kernel": (3, 3)}),
    "pointwise": (256, 300, (13, 11), {"kernel": (1, 1)}),
}


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 2), (2, 4), (4, 2), (4, 4)])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_accumulator(config: OneBitConfig, w_bits: int, a_bits: int, shape: str) -> None:
    require(config)
    channels, filters, size, window = SHAPES[shape]
    generator = torch.Generator().manual_seed(w_bits + a_bits)
    x = torch.randint(0, 1 << a_bits, (5, *size, channels), generator=generator, dtype=torch.uint8)
    codes = torch.randint(
        0, 1 << w_bits, (filters, *window["kernel"], channels), generator=generator, dtype=torch.uint8
    )
    planes = pack_weights(codes, w_bits)
    step = one_step.conv(x, planes, a_bits=a_bits, **window)
    for _ in range(3):  # a race need not show at once
        assert check_steps(step.program, step.blob, [step.image], "cuda", config) == [one_step.STEP]


@pytest.mark.parametrize("rows", [1, 63, 64, 1000])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_linear(config: OneBitConfig, rows: int) -> None:
    require(config)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(0, 4, (rows, 512), generator=generator, dtype=torch.uint8)
    planes = pack_weights(torch.randint(0, 4, (1000, 1, 1, 512), generator=generator, dtype=torch.uint8), 2)
    step = one_step.linear(x, planes, a_bits=2)
    assert check_steps(step.program, step.blob, [step.image], "cuda", config) == [one_step.STEP]


@pytest.mark.parametrize("weight", [0, 15])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_accumulator_near_the_overflow_corner(config: OneBitConfig, weight: int) -> None:
    require(config)
    channels = 5_000_000  # twice the sum of products passes 2^31 and wraps around
    x = torch.full((1, channels), 15, dtype=torch.uint8)
    planes = pack_weights(torch.full((1, 1, 1, channels), weight, dtype=torch.uint8), 4)
    step = one_step.linear(x, planes, a_bits=4)
    assert step.run("reference").item() == float(torch.tensor(channels * 15 * (2 * weight - 15)))
    assert check_steps(step.program, step.blob, [step.image], "cuda", config) == [one_step.STEP]


@pytest.mark.parametrize("name", sorted(programs.CASES))
@pytest.mark.parametrize("config", [*CONFIGS, None], ids=str)
def test_named_programs(name: str, config: OneBitConfig | None) -> None:
    if config is not None:
        require(config)
    program, blob = programs.CASES[name](seed=5)
    check_steps(program, blob, programs.random_inputs(program, batch=5, seed=3), "cuda", config)


@pytest.mark.parametrize("seed", range(400, 424))
def test_random_programs(seed: int) -> None:
    program, blob = programs.random_program(seed)
    check_steps(program, blob, programs.random_inputs(program, 1 + seed % 4, seed), "cuda")


@pytest.mark.parametrize("limit", [0, 4])
@pytest.mark.parametrize("out_bits", [1, 2, 4])
def test_codes_alone_by_thresholds_and_by_floats(out_bits: int, limit: int) -> None:
    b = programs.Builder(out_bits)
    image = b.image(128, 14, 14)
    codes = b.consumer((14, 14, 128), 2)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, 200)
    b.conv(codes.tensor, Emit(low=0.0, consumers=(b.consumer(shape, out_bits),)), 200, w_bits=2)
    b.conv(codes.tensor, Emit(stream=b.stream(shape, output=True)), 200, w_bits=2)
    program, blob = b.build()
    for config in CONFIGS:
        if config.machine in machines("cuda"):
            used = OneBitConfig(config.machine, config.block_m, config.block_o, config.stages, limit)
            check_steps(program, blob, programs.random_inputs(program, 4, 1), "cuda", used)


def test_a_captured_launch_replays_and_follows_its_inputs() -> None:
    """Neither binding's allocations nor a synchronisation are part of a launch: else the capture fails."""
    program, blob = programs.one_conv(0, channels=128, filters=64, size=(14, 14), w_bits=2, a_bits=2, out_bits=2)
    source, step = program.tensors[program.steps[1].input], program.steps[1]
    arrays = {key: program.array(blob, key).cuda() for key in program.arrays}
    images = [programs.random_inputs(program, 3, seed) for seed in range(2)]
    traces: list[dict[int, torch.Tensor]] = [{}, {}]
    for image, trace in zip(images, traces, strict=True):
        ReferenceRunner(program, blob).run(image, trace)
    written = [step.emit.stream, step.emit.consumers[0].tensor]
    buffers = {step.input: from_logical(traces[0][step.input], source).cuda()}
    for index in written:
        assert index is not None
        dtype, shape = storage(program.tensors[index], program.stream_dtype, 3)
        buffers[index] = torch.zeros(shape, dtype=dtype, device="cuda")
    problem = problem_of(step, program, 3, "cuda")
    launch = bound(program, arrays, step, problem, next(OneBitConfig.candidates(problem)), buffers)  # type: ignore[arg-type]
    launch([])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch([])
    for trace in traces[::-1]:
        buffers[step.input].copy_(from_logical(trace[step.input], source))
        graph.replay()
        for index in written:
            assert index is not None
            assert_same(to_logical(buffers[index], program.tensors[index]), trace[index], "replayed output")


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("pdl", ["0", "1"])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], CONFIGS[5]], ids=str)
def test_kernels_that_overlap(config: OneBitConfig, pdl: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep network whose memory is written again two steps later; the first step is a kernel in Triton."""
    require(config)
    gpu_runner = pytest.importorskip("lbs_kernels.gpu.runner", reason="Triton is not installed: pip install triton")
    monkeypatch.setenv("LBS_PDL", pdl)
    program, blob = deep(8, channels=128, bits=2)
    configs = {step.name: config for step in program.steps[1:]}
    check_replays(gpu_runner.GpuRunner(program, blob, "cuda", configs), program, blob, batch)


@pytest.mark.parametrize("machine", ["wgmma", "mma"])
def test_the_roof_multiplies(machine: str) -> None:
    if machine not in machines("cuda"):
        pytest.skip(f"this GPU has no {machine}")
    native = extension.require_cuda()
    out = torch.zeros(native.onebit_peak_threads(0), dtype=torch.int32, device="cuda:0")
    sums = []
    for repeats in (1, 2, 4):  # an even number of steps meets both halves of the operands equally often
        count = native.onebit_peak(machine, repeats, out.data_ptr(), 0, torch.cuda.current_stream(0).cuda_stream)
        columns = 128 if machine == "wgmma" else 64
        assert count == torch.cuda.get_device_properties(0).multi_processor_count * repeats * 4 * 128 * 256 * columns
        sums.append(out.cpu().clone())
    assert bool((sums[1] > 0).all())
    assert torch.equal(2 * sums[1], sums[2])


def test_another_gpu_is_refused_in_words() -> None:
    if "wgmma" in machines("cuda"):
        pytest.skip("this GPU runs every kernel")
    planes = pack_weights(torch.zeros(8, 3, 3, 32, dtype=torch.uint8), 2)
    made = one_step.conv(torch.zeros(1, 4, 4, 32, dtype=torch.uint8), planes, a_bits=2, kernel=(3, 3))
    program, step = made.program, made.program.steps[1]
    arrays = {key: program.array(made.blob, key).cuda() for key in program.arrays}
    with pytest.raises(BackendError, match="has no wgmma"):
        bound(program, arrays, step, problem_of(step, program, 1, "cuda"), OneBitConfig("wgmma", 64, 64, 4), {})  # type: ignore[arg-type]
