"""GPU forms of tensors and the arena they lie in; none of it needs a GPU or Triton."""

from __future__ import annotations

import programs
import pytest
import torch

from lbs_kernels.errors import FormatError, ShapeError
from lbs_kernels.gpu.layout import arena_view, byte_pitch, from_logical, lifetimes, plan_arena, storage, to_logical
from lbs_kernels.program.steps import Program, TensorSpec


def codes_spec(channels: int, bits: int, height: int = 2, width: int = 3) -> TensorSpec:
    return TensorSpec("x", "codes", channels, height, width, bits)


# One channel, a pitch +-1, a word +-1.
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
def test_forms_have_an_exact_inverse(channels: int, bits: int) -> None:
    spec = codes_spec(channels, bits)
    generator = torch.Generator().manual_seed(channels * 10 + bits)
    codes = torch.randint(0, 1 << bits, (2, 2, 3, channels), generator=generator, dtype=torch.uint8)
    buffer = from_logical(codes, spec)
    assert (buffer.dtype, tuple(buffer.shape)) == storage(spec, "float32", batch=2)
    assert torch.equal(to_logical(buffer, spec), codes)


def test_bytes_are_biased_and_padded() -> None:
    buffer = from_logical(torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8), codes_spec(3, 8, 1, 1))
    assert buffer.flatten().tolist() == [-128, 0, 127] + [0] * 13
    assert [byte_pitch(channels) for channels in (1, 16, 17)] == [16, 16, 32]


def test_garbage_in_unused_bytes_is_ignored_and_in_unused_bits_refused() -> None:
    spec = codes_spec(3, 8, 1, 1)
    buffer = from_logical(torch.tensor([[[[1, 2, 3]]]], dtype=torch.uint8), spec)
    buffer[..., 3:] = 77
    assert to_logical(buffer, spec).flatten().tolist() == [1, 2, 3]
    with pytest.raises(FormatError, match="beyond channel 2"):
        to_logical(torch.full((1, 1, 1, 2, 1), 8, dtype=torch.int32), codes_spec(3, 2, 1, 1))


def test_a_tensor_too_large_to_count_is_refused() -> None:
    spec = TensorSpec("big", "stream", 1024, 1024, 1024)
    storage(spec, "float32", batch=1)
    with pytest.raises(ShapeError, match=r"2 x 1024 x 1024 pixels of 1024 elements.*split the batch"):
        storage(spec, "float32", batch=2)


def brute_force_overlaps(program: Program, batch: int) -> list[tuple[int, int]]:
    """Pairs of tensors that share bytes although a step between the first write and the last read needs both."""
    slots, _ = plan_arena(program, batch)
    spans = lifetimes(program)
    bad = []
    for a in slots:
        for b in slots:
            alive = range(max(spans[a][0], spans[b][0]), min(spans[a][1], spans[b][1]) + 1)
            one, two = (set(range(slots[i].offset, slots[i].offset + slots[i].nbytes, 256)) for i in (a, b))
            if a < b and alive and one & two:
                bad.append((a, b))
    return bad


@pytest.mark.parametrize("seed", range(30))
def test_tensors_alive_together_never_overlap(seed: int) -> None:
    program, _ = programs.random_program(seed)
    slots, size = plan_arena(program, batch=3)
    assert brute_force_overlaps(program, batch=3) == []
    assert max(slot.offset + slot.nbytes for slot in slots.values()) == size
    assert all(slot.offset % 256 == 0 for slot in slots.values())
    arena = torch.empty(size, dtype=torch.uint8)
    for index, slot in slots.items():
        spec = program.tensors[index]
        view = arena_view(arena, slot, spec, program.stream_dtype, batch=3)
        assert (view.dtype, tuple(view.shape)) == storage(spec, program.stream_dtype, batch=3)


def test_lifetimes_follow_reads_residuals_and_outputs() -> None:
    program, _ = programs.preact_residual(0)
    spans = lifetimes(program)
    assert program.inputs[0] not in spans
    residual = next(step for step in program.steps if step.emit.residual is not None)
    at = program.steps.index(residual)
    assert residual.emit.residual is not None
    assert spans[residual.emit.residual][1] == at
    assert all(spans[index][1] == len(program.steps) for index in program.outputs)


def test_the_arena_is_reused() -> None:
    program, _ = programs.imagenet_stem(0)
    slots, size = plan_arena(program, batch=4)
    assert size < sum(slot.nbytes for slot in slots.values())
