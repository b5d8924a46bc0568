from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from contenders import CONTENDERS, assert_same, filled_memory
from programs import CASES, one_conv, preact_residual, random_inputs, random_program, share_unsaturated
from torch import Tensor

from lbs_kernels.errors import BackendError, FormatError, ShapeError
from lbs_kernels.program.steps import Program, blob_digest
from lbs_kernels.run import compiled, loaded
from lbs_kernels.run.loaded import clear_runners, program_text, run_program


def compare(program: Program, blob: Tensor, batch: int, backend: str, device: str, seed: int = 5) -> None:
    """Every tensor of the program and every output, against the reference on the CPU."""
    images = random_inputs(program, batch, seed)
    expected: dict[int, Tensor] = {}
    outputs = run_program(program, blob, images, backend="reference", trace=expected)
    assert share_unsaturated(program, expected) > 0.3  # 2-bit codes after a ReLU are 0 half of the time
    actual: dict[int, Tensor] = {}
    moved = [x.to(device) for x in images]
    with filled_memory():
        traced = run_program(program, blob.to(device), moved, backend=backend, trace=actual)
        plain = run_program(program, blob.to(device), moved, backend=backend)
    assert sorted(actual) == sorted(expected) == list(range(len(program.tensors)))
    for index, spec in enumerate(program.tensors):
        assert_same(actual[index], expected[index], f"tensor {index} ({spec.form}, {spec.bits} bits)")
    for index, (first, second, wanted) in enumerate(zip(traced, plain, outputs, strict=True)):
        assert_same(first, wanted, f"traced output {index}")
        assert_same(second, wanted, f"output {index}")
        assert second.is_contiguous()


@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_named_programs_equal_the_reference(case: str, batch: int, backend: str, device: str) -> None:
    compare(*CASES[case](11), batch, backend, device)


@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("seed", range(12))
def test_random_programs_equal_the_reference(seed: int, backend: str, device: str) -> None:
    compare(*random_program(seed), 2, backend, device)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("seed", range(100, 400))
def test_many_random_programs_equal_the_reference(seed: int, backend: str, device: str) -> None:
    compare(*random_program(seed), seed % 4 + 1, backend, device)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_result(threads: int) -> None:
    program, blob = preact_residual(1)
    images = random_inputs(program, 5, 0)
    expected = run_program(program, blob, images, backend="reference")
    for actual, wanted in zip(run_program(program, blob, images, threads=threads), expected, strict=True):
        assert_same(actual, wanted, f"output of {threads} threads")


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_empty_batch_gives_empty_outputs(backend: str) -> None:
    program, blob = preact_residual(0)
    trace: dict[int, Tensor] = {}
    outputs = run_program(program, blob, random_inputs(program, 0, 0), backend=backend, trace=trace)
    assert [tuple(y.shape) for y in outputs] == [(0, 32, 4, 4), (0, 7)]
    assert sorted(trace) == list(range(len(program.tensors)))
    assert {trace[i].shape[0] for i in trace} == {0}


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_layout_of_the_image_does_not_matter(backend: str) -> None:
    program, blob = preact_residual(0)
    (image,) = random_inputs(program, 2, 0)
    expected = run_program(program, blob, [image], backend="reference")
    wide = torch.zeros(2, 3, 8, 20)
    wide[..., 3:11] = image
    for other in (image.to(memory_format=torch.channels_last), wide[..., 3:11]):
        for actual, wanted in zip(run_program(program, blob, [other], backend=backend), expected, strict=True):
            assert_same(actual, wanted, "output")


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_not_a_number_and_infinity_in_the_image(backend: str) -> None:
    program, blob = one_conv(0, channels=3, filters=5, size=(4, 4), w_bits=4, a_bits=8, zero=100)
    (image,) = random_inputs(program, 1, 0)
    image[0, 0, 0, 0], image[0, 1, 1, 1], image[0, 2, 2, 2] = float("nan"), float("inf"), -float("inf")
    trace: dict[int, Tensor] = {}
    run_program(program, blob, [image], backend=backend, trace=trace)
    codes = trace[1]
    assert [int(codes[0, 0, 0, 0]), int(codes[0, 1, 1, 1]), int(codes[0, 2, 2, 2])] == [0, 255, 0]
    expected: dict[int, Tensor] = {}
    run_program(program, blob, [image], backend="reference", trace=expected)
    assert_same(trace[2], expected[2], "stream")


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_calls_from_many_python_threads(backend: str) -> None:
    program, blob = preact_residual(0)
    batches = [random_inputs(program, 1 + i % 3, i) for i in range(24)]
    expected = [run_program(program, blob, images, backend="reference") for images in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda images: run_program(program, blob, images, backend=backend, threads=2), batches))
    for actual, wanted in zip(results, expected, strict=True):
        assert_same(actual[0], wanted[0], "features")
        assert_same(actual[1], wanted[1], "logits")


def test_outputs_are_fresh_memory() -> None:
    program, blob = preact_residual(0)
    images = random_inputs(program, 2, 0)
    for backend in ("reference", "auto"):
        trace: dict[int, Tensor] = {}
        first = run_program(program, blob, images, backend=backend, trace=trace)
        second = run_program(program, blob, images, backend=backend)
        kept = [y.clone() for y in second]
        for y in first:
            y.zero_()
        assert all(bool(trace[index].any()) for index in program.outputs)
        for y, wanted in zip(second, kept, strict=True):
            assert_same(y, wanted, "second output")


BAD_INPUTS = {
    "channels": (lambda x: [x[:, :2]], r"\[2, 2, 8, 8\]; the program was packed for \[N, 3, 8, 8\]"),
    "size": (lambda x: [x[..., :7]], r"\[2, 3, 8, 7\]"),
    "dimensions": (lambda x: [x[0]], r"\[3, 8, 8\]"),
    "float64": (lambda x: [x.double()], r"torch\.float64; the program takes normalised float32"),
    "float16": (lambda x: [x.half()], r"torch\.float16"),
    "device": (lambda x: [x.to("meta")], "lies on meta, the packed weights on cpu"),
    "number": (lambda x: [x, x], "2 inputs; the program was packed for 1"),
    "none": (lambda x: [], "0 inputs"),
}


@pytest.mark.parametrize("name", ["byte_image", "byte_image_of_five_channels"])
@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
def test_memory_formats_do_not_matter(name: str, backend: str, device: str) -> None:
    program, blob = CASES[name](1)
    images = random_inputs(program, 3, 2)
    expected = run_program(program, blob, images, backend="reference")
    for first, second in ((torch.channels_last, torch.contiguous_format), (torch.channels_last, torch.channels_last)):
        given = [
            x.to(device).contiguous(memory_format=layout) for x, layout in zip(images, (first, second), strict=True)
        ]
        for one, other in zip(run_program(program, blob.to(device), given, backend=backend), expected, strict=True):
            assert_same(one, other, "output")


def test_images_of_the_other_dtype_are_refused_with_the_way_out() -> None:
    program, blob = CASES["byte_image"](0)
    image, mask = random_inputs(program, 2, 0)
    with pytest.raises(ShapeError, match=r"torch.float32; the program takes the bytes of images \(uint8, 0 to 255\)"):
        run_program(program, blob, [image.float(), mask])
    with pytest.raises(ShapeError, match=r"torch.uint8; .*pack with normalize=\(mean, std\) to give bytes"):
        run_program(program, blob, [image, image])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(name: str, backend: str) -> None:
    change, message = BAD_INPUTS[name]
    program, blob = preact_residual(0)
    (image,) = random_inputs(program, 2, 0)
    with pytest.raises(ShapeError, match=message):
        run_program(program, blob, change(image), backend=backend)


def test_backends_that_cannot_run_are_named() -> None:
    program, blob = preact_residual(0)
    images = random_inputs(program, 1, 0)
    with pytest.raises(BackendError, match="'fpga' does not exist; choose one of auto, cpu, gpu, triton, reference"):
        run_program(program, blob, images, backend="fpga")
    with pytest.raises(ShapeError, match="threads = 0"):
        run_program(program, blob, images, threads=0)


def test_the_blob_of_another_program_is_refused() -> None:
    program, blob = preact_residual(0)
    _, other = preact_residual(1)
    images = random_inputs(program, 1, 0)
    with pytest.raises(FormatError, match="damaged or belong to another network"):
        run_program(program, other, images)
    with pytest.raises(FormatError, match="truncated"):
        run_program(program, blob[:-64].clone(), images)
    with pytest.raises(FormatError, match="expected contiguous uint8"):
        run_program(program, blob.view(torch.int32), images)


def test_a_flipped_bit_in_the_blob_is_noticed_after_a_first_run() -> None:
    program, blob = preact_residual(0)
    images = random_inputs(program, 1, 0)
    run_program(program, blob, images)
    blob[7] ^= 4
    with pytest.raises(FormatError, match="damaged"):
        run_program(program, blob, images)


def test_two_programs_of_equal_length_are_told_apart() -> None:
    made, blob = one_conv(0, channels=3, filters=5, size=(4, 4), w_bits=4, a_bits=4)
    step = made.steps[0]

    def scaled(scale: float) -> Program:
        consumer = replace(step.emit.consumers[0], scale=scale)
        return replace(made, steps=(replace(step, emit=replace(step.emit, consumers=(consumer,))), *made.steps[1:]))

    program, other = scaled(4.0), scaled(8.0)
    assert len(program_text(program)) == len(program_text(other))
    images = random_inputs(program, 1, 0)
    results = {}
    for backend in ("reference", "auto"):
        first, second, again = (run_program(p, blob, images, backend=backend)[0] for p in (program, other, program))
        assert not torch.equal(first, second)
        assert_same(again, first, "output")
        results[backend] = (first, second)
    for actual, wanted in zip(results["auto"], results["reference"], strict=True):
        assert_same(actual, wanted, "output")


def test_a_program_is_parsed_and_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_runners()
    count = {"parsed": 0, "hashed": 0}
    read, digest = loaded.read_program, compiled.blob_digest
    monkeypatch.setattr(loaded, "read_program", lambda *a: count.update(parsed=count["parsed"] + 1) or read(*a))
    monkeypatch.setattr(compiled, "blob_digest", lambda *a: count.update(hashed=count["hashed"] + 1) or digest(*a))
    program, blob = preact_residual(0)
    text = program_text(program)
    images = random_inputs(program, 1, 0)
    for _ in range(3):
        run_program(program, blob, images)
        run_program(text[:1] + text[1:], blob, images)
        torch.ops.lbs_kernels.run_program(images, blob, text)
    assert count == {"parsed": 1, "hashed": 1}


def test_threads_that_bring_a_text_first_together_build_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program, blob = preact_residual(2)
    images, text = random_inputs(program, 1, 0), program.to_json()
    clear_runners()
    read, build, together, built = loaded.read_program, loaded.CompiledProgram, threading.Barrier(4), []

    def read_together(*arguments: object) -> Program:
        together.wait(timeout=60)  # all have found the cache empty
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loaded, "read_program", read_together)
    monkeypatch.setattr(loaded, "CompiledProgram", lambda *given: built.append(given) or build(*given))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run_program(text, blob, images), range(4)))
    assert len(built) == 1
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_the_cache_is_bounded() -> None:
    clear_runners()
    cases = [CASES["one_pixel"](seed) for seed in range(loaded.MAX_TEXTS + 5)]
    for program, blob in cases:
        run_program(program, blob, random_inputs(program, 1, 0), backend="reference")
    assert len(loaded._texts) == loaded.MAX_TEXTS
    clear_runners()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_what_the_cache_alone_holds_goes_when_another_text_is_read(backend: str) -> None:
    """Programs whose blobs share memory stay while any of it is held."""
    clear_runners()
    program, blob = preact_residual(0)
    images, text, size = random_inputs(program, 1, 0), program.to_json(), blob.numel()
    shared = torch.cat([blob, blob])
    others = iter(range(10))

    def kept_when_another_is_read() -> int:
        other, own = CASES["one_pixel"](next(others))
        run_program(other, own, random_inputs(other, 1, 0), backend)
        return sum(found[0].text == text for found in loaded._texts.values())

    run_program(text, blob, images, backend)
    expected = run_program(text, shared[:size], images, backend)
    run_program(text, shared[size:], images, backend)
    assert kept_when_another_is_read() == 3
    del blob
    assert kept_when_another_is_read() == 2
    part = shared[1:2]
    del shared
    assert kept_when_another_is_read() == 2
    del part
    assert kept_when_another_is_read() == 0
    assert len(loaded._texts) == 1  # the others were dropped as well, one by one
    assert torch.equal(expected[0], run_program(text, preact_residual(0)[1], images, backend)[0])
    clear_runners()


def test_inference_mode_blob() -> None:
    with torch.inference_mode():
        program, blob = preact_residual(0)
        images = random_inputs(program, 1, 0)
        expected = run_program(program, blob, images, backend="reference")
        assert_same(run_program(program, blob, images)[1], expected[1], "output")


class Region(torch.nn.Module):
    """What a packed model does: one region between ordinary float operations."""

    def __init__(self, program: Program, blob: Tensor) -> None:
        super().__init__()
        self.text = program.to_json()
        self.register_buffer("blob", blob)

    def forward(self, x: Tensor) -> Tensor:
        features, logits = torch.ops.lbs_kernels.run_program([x * 0.5], self.blob, self.text)
        return logits + features.mean(dim=(1, 2, 3))[:, None]


@pytest.fixture
def region() -> Region:
    return Region(*preact_residual(0))


def test_op_is_well_formed(region: Region) -> None:
    program, blob = preact_residual(0)
    arguments = (random_inputs(program, 2, 0), blob, program.to_json())
    torch.library.opcheck(torch.ops.lbs_kernels.run_program.default, arguments, raise_exception=True)


def test_op_under_compile_with_any_batch(region: Region) -> None:
    graph = torch.compile(region, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5, 3):
        x = torch.randn(batch, 3, 8, 8)
        assert_same(graph(x), region(x), "compiled output")


@pytest.mark.slow
def test_op_under_inductor(region: Region) -> None:
    graph = torch.compile(region, fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(graph(x), region(x), rtol=1e-6)


def test_op_under_export_with_any_batch(region: Region) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(region, (torch.randn(2, 3, 8, 8),), dynamic_shapes={"x": {0: batch}})
    assert "lbs_kernels.run_program" in exported.graph_module.code
    for size in (1, 7):
        x = torch.randn(size, 3, 8, 8)
        assert_same(exported.module()(x), region(x), "exported output")


def test_fake_refuses_what_the_real_op_refuses(region: Region) -> None:
    with pytest.raises(ShapeError, match=r"packed for \[N, 3, 8, 8\]"):
        region.to("meta")(torch.randn(2, 3, 8, 9, device="meta"))
    with pytest.raises(ShapeError):
        region(torch.randn(2, 4, 8, 8, device="meta"))


def test_digest_is_that_of_the_bytes() -> None:
    program, blob = preact_residual(0)
    assert program.digest == blob_digest(blob.clone())
