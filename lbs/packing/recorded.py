"""A module or function recorded while it runs, where torch.fx cannot trace it: what Python decides by sizes is decided.

Every function of torch that reads what it is given is one node; modules that a file has a form for are one node each.
Sizes are numbers then, those of the batch too. So it is run for two batch sizes, and a number that grows with them
becomes a multiple of the batch. What does not depend on the values given (masks, positions) becomes a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lbs.packing.float_modules import kind_of
from lbs.packing.vocabulary import ATTRIBUTES, FUNCTION_NAMES, METHODS
from lbs.traced import Recorded

PART = "part"  # the name of what is recorded, in its own small graph
CONSTANTS = "constants"  # the name of tensors that are no part of it
BATCHES = (2, 3)  # it is run with
# Results that hold nothing of the tensor they are made like.
_FRESH = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"})
_OTHER_NAMES = {"div": "truediv"}  # of operators
# What may be asked of a tensor besides its values.
_ASKED = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "__len__", "stride", "is_contiguous", "is_floating_point"}
    | {"is_complex", "element_size", "get_device", "type", "is_same_size"}
)
_ASKED_ATTRIBUTES = frozenset(
    {"shape", "dtype", "device", "layout", "ndim", "names", "requires_grad", "is_cuda", "is_cpu", "is_meta"}
    | {"is_nested", "is_sparse", "is_quantized", "is_leaf", "grad_fn", "is_mkldnn", "is_xpu", "is_mps"}
)


class NotRecordable(Exception):
    """It changes what it is given in place, asks for values, or does what no graph can say."""


@dataclass(frozen=True)
class _Value:
    """An input (negative numbers: -1 is the first), or the result of a step, or one item of it."""

    step: int
    item: int | None = None


@dataclass(frozen=True)
class _Step:
    op: str
    target: Any
    args: Any  # with _Value and tensors (constants, parameters) for tensors
    kwargs: Any


@dataclass(frozen=True)
class _Run:
    """One run at one batch size."""

    steps: list[_Step]
    result: _Value
    batch: int


def recorded(call: Callable[..., Any], part: nn.Module, inputs: Callable[[int], list[Tensor]]) -> fx.GraphModule:
    """The graph of a call of tensors, which are its placeholders in their order.

    Args:
        part: the module that is called, whose modules and tensors are named `part.`...; an empty one for a function.
            Other tensors are `constants.`...
        inputs: examples for a batch size, which is the first size of one of them at least.

    Raises:
        NotRecordable: above, or another course for another batch. Others: whatever the part raises.
    """
    root = nn.Module()
    root.part, root.constants = part, nn.Module()
    one, other = (_run(call, root, inputs(batch), batch) for batch in BATCHES)
    batched = [
        place for place, sizes in enumerate(zip(*map(inputs, BATCHES), strict=True)) if _firsts(sizes) == BATCHES
    ]
    if not batched:
        raise NotRecordable("no tensor it is given has the batch in its first dimension")
    traced = Recorded(root, _Merge(root, one, other, batched[0], len(inputs(1))).graph)
    traced.graph.eliminate_dead_code()
    return traced


def _firsts(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(len(x) if x.dim() else 0 for x in tensors)


def _run(call: Callable[..., Any], root: nn.Module, inputs: list[Tensor], batch: int) -> _Run:
    mode = _Recorder(root.get_submodule(PART), inputs)
    with torch.no_grad(), _modules_seen(mode), mode:
        result = call(*inputs)
    value = mode.value_of(result) if isinstance(result, Tensor) else None
    if value is None:
        raise NotRecordable("its result is no tensor that depends on what it is given")
    return _Run(mode.steps, value, batch)


class _Recorder(TorchFunctionMode):
    def __init__(self, part: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.paths = {module: f"{PART}.{name}" for name, module in part.named_modules() if name}
        self.steps: list[_Step] = []
        self.inside = False  # a module that is one step
        self.held = list(inputs)  # alive, so that no two tensors share an id
        self.known = {id(x): _Value(-1 - place) for place, x in enumerate(inputs)}

    def value_of(self, tensor: Tensor) -> _Value | None:
        return self.known.get(id(tensor))

    def depends(self, value: Any) -> bool:
        """Whether a tensor in a nested value comes from what the part is given."""
        return any(isinstance(leaf, Tensor) and id(leaf) in self.known for leaf in _leaves(value))

    def note(self, op: str, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        """One more step."""
        step = _Step(op, target, *(_mapped(part, self._named) for part in (args, kwargs)))
        self.steps.append(step)
        items = [(None, result)] if isinstance(result, Tensor) else list(enumerate(result))
        for item, tensor in items:
            if isinstance(tensor, Tensor):
                self.held.append(tensor)
                self.known[id(tensor)] = _Value(len(self.steps) - 1, item)

    def _named(self, leaf: Any) -> Any:
        return self.known.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        depends = self.depends((args, kwargs))
        if depends and (name == "__setitem__" or "out" in kwargs):
            raise NotRecordable("it writes into a tensor")
        if depends and name == "__getitem__" and self._by_mask(args[1]):
            raise NotRecordable("sizes depend on values")
        result = func(*args, **kwargs)
        has_tensors = isinstance(result, Tensor) or (isinstance(result, tuple | list) and self._tensors(result))
        if depends and not has_tensors and not _is_asked(func, name):
            raise NotRecordable(f"what it does depends on values ({name})")
        if depends and has_tensors and name not in _FRESH:
            self.note(*_called(func, name, args), kwargs, result)  # in place or not, what follows reads the result
        return result

    def _by_mask(self, index: Any) -> bool:
        found = [leaf for leaf in _leaves(index) if isinstance(leaf, Tensor) and self.depends(leaf)]
        return any(leaf.dtype in (torch.bool, torch.uint8) for leaf in found)

    @staticmethod
    def _tensors(result: Any) -> bool:
        return bool(result) and all(isinstance(item, Tensor) for item in result)


def _is_asked(func: Any, name: str) -> bool:
    return name in _ASKED or (name == "__get__" and func.__self__.__name__ in _ASKED_ATTRIBUTES)


def _called(func: Any, name: str, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """(op, target, args) of a call as a graph says it."""
    if name == "__get__" and func.__self__.__name__ in ATTRIBUTES:
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name == "__getitem__":
        return "call_function", operator.getitem, args
    if func in FUNCTION_NAMES:
        return "call_function", func, args
    bare = name.strip("_")
    if name.startswith("__"):
        for plain, order in ((bare, args), (bare[1:], args[::-1] if bare[:1] == "r" else args)):
            found = getattr(operator, _OTHER_NAMES.get(plain, plain), None)
            if found in FUNCTION_NAMES:
                return "call_function", found, order
    if bare in METHODS and args and isinstance(args[0], Tensor) and hasattr(Tensor, name):
        return "call_method", bare, args
    raise NotRecordable(f"it calls {name}")


@contextmanager
def _modules_seen(mode: _Recorder) -> Iterator[None]:
    """Calls of modules that a file has a form for are steps."""
    plain = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = mode.paths.get(module)
        if mode.inside or path is None or kind_of(module) is None or not mode.depends((args, kwargs)):
            return plain(module, *args, **kwargs)
        mode.inside = True
        with torch._C.DisableTorchFunction():  # as if nobody looked, which decides how some modules compute
            result = plain(module, *args, **kwargs)
        mode.inside = False
        mode.note("call_module", path, args, kwargs, result)
        return result

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = plain  # type: ignore[method-assign]


class _Merge:
    """The graph that two runs have in common."""

    def __init__(self, root: nn.Module, one: _Run, other: _Run, batched: int, count: int) -> None:
        if len(one.steps) != len(other.steps) or one.result != other.result:
            raise NotRecordable("it takes another course for another batch")
        self.root, self.batches, self.batched = root, (one.batch, other.batch), batched
        owned = [*root.named_parameters(), *root.named_buffers()]
        self.names = {id(tensor): name for name, tensor in owned}
        self.graph = fx.Graph()
        self.inputs = [self.graph.placeholder(f"input_{place}") for place in range(count)]
        self.results: list[fx.Node] = []
        self.made: dict[Any, fx.Node] = {}
        for step, twin in zip(one.steps, other.steps, strict=True):
            if (step.op, step.target) != (twin.op, twin.target):
                raise NotRecordable("it takes another course for another batch")
            args, kwargs = _merged(step.args, twin.args, self._leaf), _merged(step.kwargs, twin.kwargs, self._leaf)
            self.results.append(self.graph.create_node(step.op, step.target, tuple(args), kwargs))
        self.graph.output(self._node(one.result))

    def _leaf(self, one: Any, other: Any) -> Any:
        if isinstance(one, _Value) and one == other:
            return self._node(one)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return self._constant(one, other)
        if type(one) is int and type(other) is int and one != other:
            first, second = self.batches
            factor = (other - one) // (second - first)
            if factor * first != one or factor * second != other:
                raise NotRecordable(f"it uses {one} and {other} for batches of {first} and {second}")
            return self._multiple(factor)
        if type(one) is not type(other) or one != other:
            raise NotRecordable(f"it uses {one} and {other} for different batches")
        return one

    def _node(self, value: _Value) -> fx.Node:
        if value.step < 0:
            return self.inputs[-1 - value.step]
        if value.item is None:
            return self.results[value.step]
        if value not in self.made:
            call = (self.results[value.step], value.item)
            self.made[value] = self.graph.call_function(operator.getitem, call)
        return self.made[value]

    def _multiple(self, factor: int) -> fx.Node:
        if 1 not in self.made:
            self.made[1] = self.graph.call_method("size", (self.inputs[self.batched], 0))
        if factor not in self.made:
            self.made[factor] = self.graph.call_function(operator.mul, (self.made[1], factor))
        return self.made[factor]

    def _constant(self, one: Tensor, other: Tensor) -> fx.Node:
        """A tensor of the part, or one that both runs make alike."""
        name = self.names.get(id(one))
        if name is None:
            if one.dtype != other.dtype or not torch.equal(one, other):
                raise NotRecordable("it makes a tensor that grows with the batch")
            kept = self.root.get_submodule(CONSTANTS)
            name = self.names[id(one)] = f"{CONSTANTS}.{len(kept._buffers)}"
            kept.register_buffer(str(len(kept._buffers)), one.detach().clone())
        if name not in self.made:
            self.made[name] = self.graph.get_attr(name)
        return self.made[name]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    elif isinstance(value, slice):
        value = [value.start, value.stop, value.step]
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    return _merged(value, value, lambda one, other: leaf(one))


def _merged(one: Any, other: Any, leaf: Callable[[Any, Any], Any]) -> Any:
    """Two nested values of one form as one."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return {key: _merged(one[key], other[key], leaf) for key in one}
    if isinstance(one, slice) and isinstance(other, slice):
        return slice(*(_merged(getattr(one, end), getattr(other, end), leaf) for end in ("start", "stop", "step")))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list) and len(one) == len(other):
        return (list if isinstance(one, list) else tuple)(_merged(a, b, leaf) for a, b in zip(one, other, strict=True))
    return leaf(one, other)
