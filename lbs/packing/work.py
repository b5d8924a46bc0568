"""What one image costs in a packed file, by shapes alone: told before anything of it is computed or allocated.

A file of kilobytes may describe a network of gigabytes, or one that computes for hours. So a file has a budget: of the
elements it writes, of the numbers it multiplies, of the operations it consists of. The graph around the regions is run
with tensors that have shapes and no memory, which also finds arguments that torch refuses.
"""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lbs.packing.region import PackedRegion
from lbs_kernels.errors import CheckpointError, first_line
from lbs_kernels.program.rules import MAX_SIZE
from lbs_kernels.program.runner import empty_outputs
from lbs_kernels.program.steps import ConvStep, LinearStep, PoolStep, Program
from lbs_kernels.run.compiled import check_inputs

# Of one image. A ResNet-50 at 224 x 224 has 11 million elements, 4 thousand million products, 71 steps.
MAX_ELEMENTS = 1 << 27  # written by all operations together: 512 MiB as float32
MAX_PRODUCTS = 1 << 36
MAX_OPERATIONS = 1 << 13
_LIMITS = {"elements": MAX_ELEMENTS, "products": MAX_PRODUCTS, "operations": MAX_OPERATIONS}
_WINDOWS = ("avg_pool", "max_pool", "unfold")  # operations whose second argument is a window, read at every element
_MAX_NUMBER = 1 << 63
_MAX_POWER = 16


class _Over(Exception):
    """The budget is spent; the message says of what."""


@dataclass
class Work:
    """What one image costs so far; raises `_Over` beyond `budget` times what a file may cost."""

    budget: float = math.inf
    elements: int = 0
    products: int = 0
    operations: int = 0

    def add(self, elements: int, products: int, operations: int = 1) -> None:
        """One operation more, or several."""
        self.elements += elements
        self.products += products
        self.operations += operations
        for name, most in _LIMITS.items():
            if getattr(self, name) > self.budget * most:
                raise _Over(f"more than {self.budget * most:.0f} {name}")


def check_work(graph: fx.GraphModule, shape: tuple[int, ...], dtype: torch.dtype, budget: float | None) -> Work:
    """What one image [1, *shape] costs.

    Args:
        budget: how many times what a file may cost by itself it may; None: any, and nothing is run by shapes.

    Raises:
        CheckpointError: it costs more, or an operation refuses what it is given; its node is named.
    """
    if budget is None:
        return Work()
    if not budget > 0:
        raise CheckpointError(f"budget={budget}; give a positive number of times what a file may cost, or None for any")
    if math.prod(shape) > MAX_ELEMENTS * budget or max(shape, default=0) > MAX_SIZE:
        raise CheckpointError(
            f"it takes images of {' x '.join(map(str, shape))}, of more than {MAX_ELEMENTS * budget:.0f} elements; "
            "if they are meant, give a larger budget=, or budget=None for any"
        )
    work = Work(budget)
    walk = _Shapes(graph, work)
    try:
        for region in walk.regions:
            _add_program(work, region.program)
        walk.of_image(shape, dtype)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(walk.told(error)) from error
    return work


def _add_program(work: Work, program: Program) -> None:
    for spec in program.tensors:
        work.add(spec.channels * spec.height * spec.width, 0, 0)
    for step in program.steps:
        targets = [step.emit.stream, *(consumer.tensor for consumer in step.emit.consumers)]
        spec = program.tensors[next(target for target in targets if target is not None)]
        made, copied = spec.channels * spec.height * spec.width, 0
        if isinstance(step, ConvStep):
            made *= math.prod(step.kernel) * program.tensors[step.input].channels // step.groups
            copied = _padded(program, step)
        elif isinstance(step, LinearStep):
            made *= program.tensors[step.input].channels
        elif isinstance(step, PoolStep):
            source = program.tensors[step.input]
            made = max(made * math.prod(step.kernel), source.channels * source.height * source.width)
            copied = _padded(program, step)
        work.add(copied, made)


def _padded(program: Program, step: ConvStep | PoolStep) -> int:
    """Elements of the input with its padding, which kernels may copy."""
    source, (rows, columns) = program.tensors[step.input], step.padding
    return source.channels * (source.height + 2 * rows) * (source.width + 2 * columns) if rows or columns else 0


@dataclass
class _Shapes:
    """A walk along the graph by shapes alone."""

    graph: fx.GraphModule
    work: Work
    at: str = ""  # the node it has come to
    regions: list[PackedRegion] = field(init=False)

    def __post_init__(self) -> None:
        self.regions = [module for module in self.graph.children() if isinstance(module, PackedRegion)]

    def of_image(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Walk for one image."""
        walk = _Walk(self)  # not counted: weights are there, whatever images come
        with torch.no_grad(), _Counted(self.work):
            walk.run(torch.empty((1, *shape), dtype=dtype, device="meta"))

    def told(self, error: Exception) -> str:
        """What went wrong, in words of the file."""
        if isinstance(error, _Over):
            return (
                f"one image takes {error}, at {self.at or 'its programs'}; a file that asks for more is not run on its "
                "own word: if you trust it, give a larger budget=, or budget=None for any"
            )
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            return (
                f"what {self.at} gives has a shape that depends on values, so that nobody can tell what it costs "
                "before it is run: if you trust the file, give budget=None"
            )
        return f"its graph fails at {self.at} on an image ({type(error).__name__}: {first_line(error)}); write it again"


class _Walk(fx.Interpreter):
    """Runs the graph on the device that has no memory; regions give outputs of their shapes.

    FakeTensorMode would keep devices apart too, and imports the compiler, which takes 2 s.
    """

    def __init__(self, shapes: _Shapes) -> None:
        super().__init__(shapes.graph)
        self.extra_traceback = False
        self.shapes = shapes
        # Copies of modules hold these in the place of their weights: nn.LSTM keeps them in more than one list.
        tensors = (*shapes.graph.parameters(), *shapes.graph.buffers())
        self.bare = {id(tensor): _bare(tensor) for tensor in tensors}

    def run_node(self, n: fx.Node) -> Any:
        self.shapes.at = f"node {n.name} ({n.target if isinstance(n.target, str) else n.name})"
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n.target == "to" or "device" in kwargs:
            args, kwargs = tuple(map(_no_device, args)), {key: _no_device(value) for key, value in kwargs.items()}
        return args, kwargs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "__module__", "") == "_operator" and not _tensors((args, kwargs)):
            _check_numbers(target, args)
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        return self.bare.get(id(found), found)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, PackedRegion):
            return copy.deepcopy(module, dict(self.bare))(*args, **kwargs)
        if kwargs:
            raise TypeError(f"a packed region takes no {', '.join(kwargs)}")
        return _outputs(module, [x if x.dim() == 4 else x[:, :, None, None] for x in args])


def _check_numbers(target: Any, args: Any) -> None:
    """Refuse what makes Python's own numbers and lists grow: sizes are computed, and no more. Raises ValueError."""
    if target is operator.getitem:
        return
    odd = [value for value in args if not isinstance(value, int | float) or abs(value) >= _MAX_NUMBER]
    if odd or (target is operator.pow and abs(args[1]) > _MAX_POWER):
        raise ValueError(
            f"{target.__name__} of {odd or args!r}: sizes are numbers below 2^63, powers at most {_MAX_POWER}"
        )


def _bare(tensor: Tensor) -> Tensor:
    made = tensor.detach().to("meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _no_device(value: Any) -> Any:
    if isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda")):
        return torch.device("meta")
    return value


def _outputs(region: PackedRegion, images: list[Tensor]) -> list[Tensor]:
    check_inputs(images, region.loaded.images)
    return empty_outputs(region.program, images[0].shape[0], images[0].device)


class _Counted(TorchDispatchMode):
    """Adds up what every operation of torch writes and multiplies."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here; True would import the compiler, which takes 2 s."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.work.add(0, 0, _pieces(func.__name__, args))  # before they are made: views take no elements, and memory
        found = func(*args, **(kwargs or {}))
        _check_dim(func, args, kwargs or {}, found)
        if func.is_view:
            self.work.add(0, 0)
        else:
            written, read = (sum(x.numel() for x in _tensors(value)) for value in (found, (args, kwargs)))
            self.work.add(written, max(written, read, written * _terms(func.__name__, args)))
        return found


def _check_dim(func: Any, args: Any, kwargs: Any, found: Any) -> None:
    """Refuse a dimension that neither the tensors given nor those made have: softmax and sort do not look here."""
    rank = max((x.dim() for x in _tensors((args, kwargs, found))), default=0) or 1
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    dim = given.get("dim")
    if type(dim) is int and not -rank <= dim < rank:
        raise IndexError(f"dimension {dim} of {rank}")


def _pieces(name: str, args: Any) -> int:
    """How many views an operation makes."""
    operation = name.partition(".")[0]
    if operation not in ("unbind", "split") or not isinstance(args[0], Tensor) or not args[0].dim():
        return 0
    dim = args[1:2] if operation == "unbind" else args[2:3]
    size = args[0].shape[dim[0] if dim else 0]
    return size if operation == "unbind" else -(-size // max(1, int(args[1])))


def _terms(name: str, args: Any) -> int:
    """How many products every element is a sum of."""
    operation = name.partition(".")[0].strip("_")
    shapes: list[Any] = [value.shape if isinstance(value, Tensor) else () for value in args]
    if operation == "convolution":
        image, weight, transposed = shapes[0], shapes[1], args[6]
        return math.prod(weight[1:]) if not transposed else math.prod(weight) * math.prod(image) // max(1, image[1])
    if operation in ("mm", "bmm", "dot", "mv", "cdist_forward", "pdist_forward"):
        return int(shapes[0][-1])
    if operation in ("addmm", "baddbmm", "addmv"):
        return int(shapes[1][-1])
    if operation.startswith("scaled_dot_product"):
        return int(shapes[0][-1] + shapes[1][-2])
    if operation.startswith("linalg"):
        return int(max(shapes[0]))
    if any(window in operation for window in _WINDOWS) and len(args) > 1 and isinstance(args[1], list | tuple):
        return math.prod(args[1])
    return 1


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in _tensors(item)] if isinstance(value, list | tuple) else []
