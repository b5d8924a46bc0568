"""PackedModel as a module: torch.compile, torch.export, copies, state dicts, threads."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pack_nets
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lbs.packing.model import PackedModel
from lbs.packing.packing import pack
from lbs.packing.region import PackedRegion
from lbs_kernels.errors import FormatError, ShapeError
from lbs_kernels.run import loaded
from lbs_kernels.run.loaded import clear_runners, run_program

NETS = [pytest.param("digits", id="one_region"), pytest.param("gate", id="two_regions")]


def net(name: str) -> tuple[PackedModel, Tensor]:
    if name == "digits":
        return pack_nets.packed_digits(), pack_nets.images(4, (1, 8, 8))
    return pack_nets.packed_two_regions(), pack_nets.images(4, (3, 10, 10))


def in_threads(count: int, work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_one_graph_equals_eager(name: str, backend: str) -> None:
    packed, x = net(name)
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch in (4, 3, 1):
            result = compiled(x[:batch])
            if backend == "inductor" and name == "gate":  # inductor fuses the float parts its own way
                torch.testing.assert_close(result, packed(x[:batch]))
            else:
                assert torch.equal(result, packed(x[:batch]))


@pytest.mark.parametrize("name", NETS)
def test_exported_program_equals_eager_and_holds_one_op_per_region(name: str) -> None:
    packed, x = net(name)
    exported = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    calls = [node for node in exported.graph.nodes if node.target == torch.ops.lbs_kernels.run_program.default]
    assert len(calls) == len(packed.programs)
    for batch in (4, 7):
        images = x.repeat(2, 1, 1, 1)[:batch]
        assert torch.equal(exported.module()(images), packed(images))


class Seen(TorchDispatchMode):
    """The operations of this project that ran, with their last argument."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lbs_kernels":
            self.calls.append((str(func), args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETS)
def test_who_watches_sees_one_operation_per_region_with_its_handle(name: str) -> None:
    packed, x = net(name)
    expected = packed(x)
    with Seen() as seen:
        assert torch.equal(packed(x), expected)
    assert seen.calls == [("lbs_kernels.run.default", region.loaded.handle) for region in packed.regions]
    with torch.profiler.profile() as profile:
        packed(x)
    assert sum(event.name == "lbs_kernels::run" for event in profile.events()) == len(packed.regions)


class Functions(TorchFunctionMode):
    """The operations of this project that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("lbs_kernels"):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETS)
def test_hooks_and_modes_of_functions_see_every_region(name: str) -> None:
    packed, x = net(name)
    packed = copy.deepcopy(packed)
    expected, seen = packed(x), []
    for region in packed.regions:
        region.register_forward_hook(lambda module, images, outputs: seen.append(module))
    assert torch.equal(packed(x), expected)
    assert seen == packed.regions
    again = copy.deepcopy(net(name)[0])
    again.body.register_forward_pre_hook(lambda module, images: (images[0].clone().fill_(0),))
    assert torch.equal(again(x), again.body(x))
    assert not torch.equal(again(x), expected)
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        net(name)[0](x)
    finally:
        everywhere.remove()
    assert sum(isinstance(module, PackedRegion) for module in seen) == 2 * len(packed.regions)
    with Functions() as functions:
        net(name)[0](x)
    assert functions.calls == ["lbs_kernels.run.default"] * len(packed.regions)


@pytest.mark.parametrize("name", NETS)
def test_values_that_memory_does_not_hold_are_made_once_for_all_ways_to_run(name: str) -> None:
    """Views that stand for their negative, and zeros without memory, which a kernel must not read."""
    packed, x = net(name)
    part = torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag  # x again, negated twice, with gaps
    zeros = torch._efficientzerotensor(x.shape)
    assert part.is_neg()
    for lazy, plain in ((torch._neg_view(-x), x), (part, x), (zeros, torch.zeros_like(x))):
        expected = packed(plain)
        for backend in ("auto", "reference"):
            assert torch.equal(packed.run_traced(lazy, backend)[0], expected)
        assert torch.equal(packed(lazy), expected)
        region = packed.regions[0]
        if packed.body.graph.find_nodes(op="call_module")[0].target == "region0":
            found, wanted = (run_program(region.program, region.blob, [images]) for images in (lazy, plain))
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_pixels_that_are_no_numbers_and_inputs_with_gradients() -> None:
    packed, x = net("digits")
    lowest, odd = x.clone(), x.clone()
    lowest[:, :, 0], odd[:, :, 0] = -1e9, float("nan")
    assert torch.equal(packed(odd), packed(lowest))
    asking = x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        packed(asking).sum().backward()
    assert asking.grad is None


@pytest.mark.filterwarnings("ignore:lbs_kernels..run. an autograd kernel was not registered")
@pytest.mark.parametrize("name", NETS)
def test_tensors_without_plain_memory_go_through_the_dispatcher(name: str) -> None:
    """Negated lazily, wrapped by a transform, on the meta device: none has memory to read as it is."""
    packed, x = net(name)
    expected = packed(x)
    negated = torch._neg_view(-x)
    assert negated.is_neg()
    assert torch.equal(packed(negated), expected)
    assert torch.equal(torch.func.functionalize(packed)(x), expected)
    assert copy.deepcopy(packed).to("meta")(x.to("meta")).shape == expected.shape
    if name == "digits":  # float parts have gradients of their own
        gradient = torch.func.grad(lambda images: packed(images).sum())(x)
        assert torch.equal(gradient, torch.zeros_like(x))


def test_the_region_is_the_one_the_model_has_now() -> None:
    """A copy made by torch.nn.DataParallel shares attributes with its original, and has modules of its own."""
    shared, x = net("digits")
    packed = copy.deepcopy(shared)
    replica = packed._replicate_for_data_parallel()
    replica.body = copy.deepcopy(packed.body).to("meta")
    assert replica(x.to("meta")).is_meta
    assert torch.equal(packed(x), shared(x))
    packed.body.region0 = PackedRegion(packed.programs[0], torch.zeros_like(packed.regions[0].blob))
    with pytest.raises(FormatError, match="the weights are damaged"):
        packed(x)


def test_a_graph_of_this_process_holds_handles_and_no_text() -> None:
    packed, x = net("gate")
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    assert torch.equal(torch.compile(packed, fullgraph=True, backend=keep)(x), packed(x))
    calls = [node for node in graphs[0].graph.nodes if node.target == torch.ops.lbs_kernels.run.default]
    assert [node.args[-1] for node in calls] == [region.loaded.handle for region in packed.regions]


def test_a_graph_that_outlives_its_network_says_so() -> None:
    shared, x = net("digits")
    packed = copy.deepcopy(shared)
    region = packed.regions[0]
    blob, handle = region.blob, region.loaded.handle
    assert torch.equal(torch.ops.lbs_kernels.run([x], blob, handle)[0], packed(x))
    del packed, region
    gc.collect()
    with pytest.raises(FormatError, match=f"handle {handle} names no program that is loaded"):
        torch.ops.lbs_kernels.run([x], blob, handle)


def test_what_was_built_goes_with_the_network() -> None:
    shared, x = net("digits")
    packed = copy.deepcopy(shared)
    packed(x)
    runner = weakref.ref(packed.regions[0].compiled().runner)
    assert runner() is not None
    del packed
    gc.collect()
    assert runner() is None


def test_many_regions_are_built_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [copy.deepcopy(net("digits")[0]) for _ in range(5)]
    x = net("digits")[1]
    for packed in networks:
        packed(x)
    monkeypatch.setattr(loaded, "CompiledProgram", None)  # building one more would raise
    for packed in networks * 2:
        packed(x)


def test_inputs_that_do_not_fit_are_refused_in_words_of_the_model() -> None:
    packed, x = net("digits")
    for wrong, message in (
        (x[:, :, :7], r"the model was packed for \[N, 1, 8, 8\]"),
        (x.double(), "torch.float64; the program takes normalised float32"),
        (x.to("meta"), "the packed model on cpu"),
        (x[0], r"the model was packed for \[N, 1, 8, 8\]"),
        ([x], "input is a list"),
    ):
        with pytest.raises(ShapeError, match=message):
            packed(wrong)


@pytest.mark.parametrize("name", NETS)
def test_each_region_is_one_module_of_the_body(name: str) -> None:
    packed, _ = net(name)
    calls = [node for node in packed.body.graph.nodes if node.op == "call_module"]
    regions = [node for node in calls if isinstance(packed.body.get_submodule(str(node.target)), PackedRegion)]
    assert len(regions) == len(packed.programs)
    assert [region.program for region in packed.regions] == packed.programs


def test_nothing_is_trained_any_more() -> None:
    packed = pack_nets.packed_two_regions()
    assert not packed.train().training
    assert not any(module.training for module in packed.modules())


def test_results_do_not_depend_on_the_default_dtype() -> None:
    packed, x = net("digits")
    expected = packed(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(packed(x), expected)
        output, traces = packed.run_traced(x)
        assert torch.equal(output, expected)
        assert len(traces) == 1
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(packed(x), expected)


def test_threads_that_come_first_together_build_one_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = net("digits")
    expected, built = packed(x), []
    clear_runners()
    build = loaded.CompiledProgram
    monkeypatch.setattr(loaded, "CompiledProgram", lambda *args: built.append(args) or build(*args))
    start, found = threading.Barrier(4), []

    def call() -> None:
        start.wait()
        found.append(packed(x))

    in_threads(4, call)
    assert len(built) == 1
    assert all(torch.equal(one, expected) for one in found)


class Deep(nn.Module):
    """Layers with a sigmoid between any two, which makes each a region of its own."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


def test_however_many_regions_each_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = pack(pack_nets.quantized(Deep(300), (3, 2, 2)), verify=False), pack_nets.images(1, (3, 2, 2))
    assert len(packed.regions) == 300
    built, build = [], loaded.CompiledProgram
    monkeypatch.setattr(loaded, "CompiledProgram", lambda *args: built.append(args) or build(*args))
    expected = packed(x)
    assert len(built) == 300
    assert torch.equal(packed(x), expected)
    assert len(built) == 300


def test_what_a_network_was_built_into_goes_with_it() -> None:
    kept, x = net("digits")
    kept(x)
    gc.collect()
    count, built = len(loaded._loaded), []
    for _ in range(20):
        other = copy.deepcopy(kept)
        other(x)
        built.append(weakref.ref(other.regions[0].compiled()))
        del other
    gc.collect()
    assert len(loaded._loaded) == count
    assert not any(reference() for reference in built)


def test_copies_share_nothing() -> None:
    packed, x = net("digits")
    other = copy.deepcopy(packed)
    expected = packed(x)
    assert torch.equal(other(x), expected)
    assert other.regions[0].blob.data_ptr() != packed.regions[0].blob.data_ptr()
    del packed
    assert torch.equal(other.to("cpu")(x), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))])  # noqa: S301
def test_duplicates_have_handles_of_their_own(duplicate: Callable[[PackedModel], PackedModel]) -> None:
    packed, x = net("digits")
    expected = packed(x)
    other = duplicate(packed)
    assert other.regions[0].loaded.handle != packed.regions[0].loaded.handle
    del packed
    gc.collect()
    assert torch.equal(other(x), expected)
    with Seen():
        assert torch.equal(other(x), expected)


def test_state_dict_holds_the_blob_and_loads_into_a_copy() -> None:
    packed, x = net("digits")
    assert list(packed.state_dict()) == ["body.region0.blob"]
    other = copy.deepcopy(packed)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))
    assert not any(parameter.requires_grad for parameter in pack_nets.packed_two_regions().parameters())


def test_moving_the_model_moves_its_weights() -> None:
    moved = copy.deepcopy(pack_nets.packed_digits()).to("meta")
    assert moved.device.type == "meta"
    assert moved.regions[0].blob.is_meta


def test_half_the_model_changes_no_packed_weight() -> None:
    packed, x = net("digits")
    assert torch.equal(copy.deepcopy(packed).half()(x), packed(x))


def test_threads_of_the_caller() -> None:
    packed, x = net("gate")
    expected = packed(x)
    results: list[Tensor] = []
    in_threads(3, lambda: results.extend(packed(x) for _ in range(20)))
    assert len(results) == 60
    assert all(torch.equal(result, expected) for result in results)


def test_printing_tells_what_it_is() -> None:
    text = repr(pack_nets.packed_two_regions())
    assert "TwoRegions: 4 packed layers" in text
    assert "region1" in text


@pytest.mark.gpu
def test_on_a_gpu_it_equals_the_cpu() -> None:
    for name in ("digits", "gate"):
        packed, x = net(name)
        moved = copy.deepcopy(packed).to("cuda")
        if name == "digits":
            assert torch.equal(moved(x.cuda()).cpu(), packed(x))
        else:
            torch.testing.assert_close(moved(x.cuda()).cpu(), packed(x))
