"""A torch.fx graph that computes what a model computes of one image tensor, and the comparison that says so.

Beside what torch.fx records by itself

- other arguments of `forward` have their defaults, as constants;
- hooks that change values are operations of the graph, so modules are run by their `forward`, without hooks;
- a torch layer whose forward is patched on the instance is traced through;
- operations in place become operations that are not, and who reads the changed tensor reads their result.

What the graph still misses (Python that asks what a tensor is, random numbers) is found by running both on an example.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from lbs.agreement import difference, hooked, hooked_modules, is_meta, same
from lbs.traced import AUGMENTED, Recorded, evaluating, run, settle
from lbs_kernels.errors import GraphError

ACTIVATIONS = (
    *(nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.LeakyReLU),
    *(nn.Mish, nn.PReLU, nn.Sigmoid, nn.SiLU, nn.Tanh),
)
LEAVES = (
    *ACTIVATIONS,
    *(nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Identity, nn.Dropout),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.Flatten),
)


class Whole:
    """A mark on modules of this package: a graph holds a call of one as a whole, like those of torch's layers."""


def check_example(model: nn.Module, example: object) -> None:
    """Refuse what is no batch, and a forward that needs more than one.

    Raises:
        GraphError: names the type, or the arguments.
    """
    name = type(model).__name__
    if not isinstance(example, Tensor):
        raise GraphError(
            f"the example for {name} is a {type(example).__name__}; give one batch as a tensor [N, C, H, W]"
        )
    needed = [
        p.name for p in _arguments(model) if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    extra = [p.name for p in _arguments(model)[1:] if p.name in needed]
    if extra:
        raise GraphError(
            f"forward of {name} needs {', '.join(needed)}; networks of one image tensor are served: give "
            f"{', '.join(extra)} defaults, or wrap the model in a module whose forward(x) passes them"
        )


def _arguments(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def symbolic(model: nn.Module, example: Tensor, strict: bool = True) -> fx.GraphModule:
    """The graph of a model in eval mode; node.meta holds "shape", or "number" where it is made of shapes.

    Arguments:
        strict: refuse a graph that computes something else than the model on the example.

    Raises:
        GraphError: control flow that depends on values (file and line are named), an example that does not fit, a
            tensor that is changed in place while another view of it is read later, or other outputs than the model's.
    """
    check_example(model, example)
    with evaluating(model):
        expected = run(model, example)
        # Hooks that only look are not shown proxies: the graph has hooks where the outputs need them.
        last = bool(hooked_modules(model))
        found: list[tuple[fx.GraphModule, Any]] = []
        for hooks in sorted({False, last}):
            try:
                module = record(model, hooks)
                found.append((module, settle(module, example)))
            except GraphError:
                if hooks is last and (strict or not found):
                    raise
                continue
            if same(expected, found[-1][1]) and (hooks is last or not is_meta(expected)):
                return module
        if strict:
            raise GraphError(difference(model, found[-1][0], example, expected, found[-1][1]))
    return found[-1][0]


def record(model: nn.Module, hooks: bool) -> fx.GraphModule:
    """The graph as it is recorded in the present mode; `meta["hooks"]` says whether hooks are part of it."""
    try:
        module = Recorded(model, _Tracer(hooks).trace(model))
    except Exception as error:
        raise GraphError(_trace_message(model, error)) from error
    module.meta["hooks"] = hooks
    return module


class ValueHook:
    """A hook that a plain copy hung on a layer, which changes values: part of every graph. Others may only look."""


class _Proxy(fx.Proxy):
    """A proxy of which `a += b` changes the tensor, as torch does, and not the name only."""


def _augmented(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in AUGMENTED:
    setattr(_Proxy, f"__{_function.__name__}__", _augmented(_function))


class _Tracer(fx.Tracer):
    """Keeps the layers of a network whole, also those that subclass torch's."""

    def __init__(self, hooks: bool) -> None:
        super().__init__()
        self.hooks = hooks

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The images alone; what else `forward` takes has its default, and hooks of the model are run."""
        name = next((p.name for p in _arguments(self.root)), "x")
        images = self.create_proxy("placeholder", name, (), {})

        def call(root: nn.Module, x: Any) -> Any:
            return root(x)

        return call, [self.root, images]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m is self.root or is_patched(m):
            return False
        return isinstance(m, (*LEAVES, Whole)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Every node knows which modules return it, the innermost first."""
        result = self._called(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            result.node.meta.setdefault("returned_by", []).append(self.path_of_module(m))
        return result

    def _called(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        if not self.hooks:
            return self._call_alone(m, args, kwargs)
        if not self.is_leaf_module(m, name):
            return super().call_module(m, m._call_impl, args, kwargs)
        if not hooked(m):
            return super().call_module(m, forward, args, kwargs)
        m.forward = lambda *a, **k: self.create_proxy("call_module", name, a, k)
        try:
            return m._call_impl(*args, **kwargs)
        finally:
            del m.forward

    def _call_alone(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Without hooks but those that belong to the layer."""
        for before in m._forward_pre_hooks.values():
            if isinstance(before, ValueHook):
                args, kwargs = before(m, args, kwargs)
        result = super().call_module(m, m.forward, args, kwargs)
        for behind in m._forward_hooks.values():
            if isinstance(behind, ValueHook):
                result = behind(m, args, result)
        return result


def is_patched(module: nn.Module) -> bool:
    """Whether the instance has a forward that its class does not know."""
    return "forward" in vars(module) or "_conv_forward" in vars(module)


def _trace_message(model: nn.Module, error: Exception) -> str:
    """Name the user's own line: the last frame outside torch."""
    patched = [name or "the model" for name, module in model.named_modules() if is_patched(module)]
    if patched and isinstance(error, NameError):
        return (
            f"{type(model).__name__} cannot be traced: forward of {', '.join(patched)} is patched on the instance and "
            f"calls modules that are no part of the copy ({error}); make it a method of the class"
        )
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch" not in f.filename.split("/")]
    frames = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<")]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "unknown place"
    return (
        f"{type(model).__name__} cannot be traced ({type(error).__name__}: {error}) at {where}; "
        "move control flow that depends on tensor values out of forward. Without a trace bits can still be searched "
        "and fine-tuned with prepare(..., SearchConfig(pruning=False, trace=False)), but filters cannot be removed "
        "and the model cannot be packed"
    )
