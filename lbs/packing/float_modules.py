"""Modules that stay in float as JSON: a class of torch.nn and its constructor's arguments, and back."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lbs.packing.values import NoForm, decode, encode
from lbs.packing.vocabulary import CLASSES, FLAGS, MODULES, NUMBERS, OPTIONAL, PRESENT, WORDS
from lbs_kernels.errors import CheckpointError

ACTIVATIONS = {nn.functional.relu: "relu", nn.functional.gelu: "gelu"}  # as transformers take them, by name
MAX_NUMBER = 1 << 31  # a whole number among the arguments
MAX_SIZES = 16  # numbers in one argument
# What a class derived from torch's may say for itself and still compute as that does.
_OWN = """
    __init__ __module__ __doc__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ __qualname__
    __firstlineno__ __static_attributes__ __constants__ __repr__ extra_repr reset_parameters reset_running_stats
    __orig_bases__ __parameters__ __type_params__ __slots__ __hash__ __eq__ _version
"""
_HARMLESS = frozenset(_OWN.split())


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch's that computes what `module` does, of those a file may name."""
    classes = type(module).__mro__
    kind = next((kind for kind in classes if kind in MODULES), None)
    if kind is None or "forward" in vars(module):
        return None
    derived = classes[: classes.index(kind)]
    own = {name for cls in derived for name in vars(cls) if hasattr(kind, name)}
    return kind if own <= _HARMLESS else None


def module_to_json(module: nn.Module) -> dict[str, Any]:
    """Class and arguments of a module.

    Raises:
        NoForm: another class, a forward of its own, or parameters that a new module of these arguments lacks.
    """
    kind = kind_of(module)
    if kind is None:
        raise NoForm(f"is a {type(module).__name__}")
    arguments = {}
    for name, attribute in MODULES[kind].items():
        value = attrgetter(attribute)(module)
        if name == "activation":
            value = ACTIVATIONS.get(value, value)
        if name in PRESENT and not isinstance(value, bool):
            value = value is not None
        if name == "bias" and kind in OPTIONAL and (value or module.weight is None):
            continue
        arguments[name] = value
    entry = {"class": kind.__name__, "arguments": encode(arguments)}
    try:
        module_from_json("it", entry, {key: value.detach() for key, value in module.state_dict().items()})
    except Exception as error:
        raise NoForm(f"is a {type(module).__name__} that its arguments do not make again ({error})") from error
    return entry


def module_from_json(path: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module of an entry, with these tensors as its parameters and buffers; nothing else is allocated.

    Raises:
        CheckpointError: a class or an argument that is not known, or of another type or size. Others where torch
            refuses the arguments, or the tensors are not those of such a module.
    """
    kind = CLASSES.get(entry["class"])
    if kind is None:
        raise CheckpointError(f"{path} is a {entry['class']!r}, which this release does not know: upgrade lbs")
    arguments = decode(entry["arguments"], {})
    if not isinstance(arguments, dict) or not set(arguments) <= set(MODULES[kind]):
        raise CheckpointError(f"{path}: a {kind.__name__} takes {', '.join(MODULES[kind])}; the file gives {arguments}")
    for name, value in arguments.items():
        if not _legal(name, value):
            raise CheckpointError(f"{path}: a {kind.__name__} has {name} = {value!r}; it is damaged")
    if arguments.get("num_layers", 0) > len(tensors):  # torch would make them one by one
        raise CheckpointError(f"{path} has {arguments['num_layers']} layers and {len(tensors)} tensors; it is damaged")
    with torch.device("meta"):
        module = kind(**arguments)
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module


def _legal(name: str, value: Any) -> bool:
    if value is None:
        return True
    if name in FLAGS:
        return isinstance(value, bool)
    if name in WORDS:
        return isinstance(value, str)
    if name in NUMBERS:
        return _is_number(value) or (_is_series(value) and all(map(_is_number, value)))
    if name == "padding" and value in ("same", "valid"):
        return True
    return _is_size(value) or (_is_series(value) and all(map(_is_size, value)))


def _is_series(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) <= MAX_SIZES


def _is_number(value: Any) -> bool:
    return _is_size(value) or isinstance(value, float)


def _is_size(value: Any) -> bool:
    """A whole number, or none where a size stays as it is (AdaptiveAvgPool2d((None, 1)))."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_NUMBER)
