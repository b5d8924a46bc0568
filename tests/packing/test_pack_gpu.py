"""A packed network on a GPU: loaded there, recorded, compiled, on side streams; run with -m gpu where there is one."""

from __future__ import annotations

from pathlib import Path

import pack_nets
import pytest
import torch
from torch import Tensor

import lbs
from lbs.packing.model import PackedModel

pytestmark = pytest.mark.gpu
SHAPE = (3, 32, 32)


def on_gpu(tmp_path: Path) -> tuple[PackedModel, PackedModel]:
    """A mixed network on the processor, and the same file loaded onto the GPU."""
    packed = lbs.pack(pack_nets.mixed_network(), verify=False)
    path = tmp_path / "net.lbs.safetensors"
    packed.save(path)
    return packed, lbs.load(path, device="cuda")


def expected(packed: PackedModel, x: Tensor) -> Tensor:
    return packed(x.cpu())


def test_the_same_bits_as_on_the_processor(tmp_path: Path) -> None:
    cpu, gpu = on_gpu(tmp_path)
    assert {region.compiled().backend for region in gpu.regions} == {"gpu"}
    for batch in (1, 5, 64):
        x = pack_nets.images(batch, SHAPE, seed=batch)
        assert torch.equal(gpu(x.cuda()).cpu(), expected(cpu, x))


def test_recorded_at_several_batch_sizes(tmp_path: Path) -> None:
    cpu, gpu = on_gpu(tmp_path)
    captured = gpu.capture(pack_nets.images(1, SHAPE).cuda(), pack_nets.images(7, SHAPE).cuda())
    for seed, batch in enumerate((7, 1, 7, 1)):
        x = pack_nets.images(batch, SHAPE, seed + 10)
        assert torch.equal(captured(x.cuda()).cpu(), expected(cpu, x))
        assert torch.equal(gpu(x.cuda()).cpu(), expected(cpu, x))


def test_calls_and_replays_on_other_streams(tmp_path: Path) -> None:
    cpu, gpu = on_gpu(tmp_path)
    captured = gpu.capture(pack_nets.images(16, SHAPE).cuda(), clone=True)
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [pack_nets.images(16, SHAPE, seed).cuda() for seed in range(3)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in streams]
    for _ in range(10):  # enqueued side by side; nothing waits
        for stream, x, found in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                found.extend([gpu(x), captured(x)])
    torch.cuda.synchronize()
    for x, found in zip(inputs, results, strict=True):
        wanted = expected(cpu, x)
        assert all(torch.equal(result.cpu(), wanted) for result in found)


def test_recorded_by_torch_itself(tmp_path: Path) -> None:
    cpu, gpu = on_gpu(tmp_path)
    static = pack_nets.images(3, SHAPE).cuda()
    gpu(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = gpu(static)
    for seed in (1, 2):
        x = pack_nets.images(3, SHAPE, seed)
        static.copy_(x)
        graph.replay()
        gpu(pack_nets.images(3, SHAPE, seed + 50).cuda())  # a call of its own must not disturb the replay's buffers
        assert torch.equal(result.cpu(), expected(cpu, x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_as_one_graph(tmp_path: Path, mode: str) -> None:
    cpu, gpu = on_gpu(tmp_path)
    torch._dynamo.reset()
    compiled = torch.compile(gpu, fullgraph=True, mode=mode)
    for seed in range(4):  # the first calls warm up, later ones replay
        x = pack_nets.images(4, SHAPE, seed)
        with torch.no_grad():
            assert torch.equal(compiled(x.cuda()).clone().cpu(), expected(cpu, x))


def test_weights_freed_early_stay_until_the_work_is_done(tmp_path: Path) -> None:
    cpu, gpu = on_gpu(tmp_path)
    x = pack_nets.images(64, SHAPE)
    x_gpu, stream = x.cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        result = gpu(x_gpu)
    from lbs_kernels.run.loaded import clear_runners

    clear_runners()
    del gpu
    torch.full((64 << 20,), 255, dtype=torch.uint8, device="cuda")  # would take freed memory at once
    torch.cuda.synchronize()
    assert torch.equal(result.cpu(), expected(cpu, x))
