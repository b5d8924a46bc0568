"""Loss-aware Bit Sharing: search bits and filters of a network, pack it into bit-planes, run it.

`import lbs` is light: a name of the public face is imported when it is first used. `lbs.bench`, `lbs.pack` and
`lbs.report` are modules and functions at once; their module objects can be called.

    >>> import lbs
    >>> lbs.SearchConfig(bits=(2, 4, 8)).bits
    (2, 4, 8)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_FACE = {
    "Budget": "lbs.search.budget",
    "PackedModel": "lbs.pack.model",
    "Plan": "lbs.plan",
    "SearchConfig": "lbs.search.prepare",
    "calibrate": "lbs.quant.calibrate",
    "explain": "lbs.pack.explain",
    "freeze": "lbs.search.freeze",
    "load": "lbs.pack.checkpoint",
    "prepare": "lbs.search.prepare",
    "uniform": "lbs.search.prepare",
    "verify": "lbs.pack.verify",
}
# Modules that are called like the function of the same name -> module that defines it.
_CALLABLE = {"bench": "lbs.bench", "pack": "lbs.pack.packing", "report": "lbs.report.page"}
_MODULES = {"errors": "lbs_kernels.errors"}

__all__ = [
    "Budget",
    "PackedModel",
    "Plan",
    "SearchConfig",
    "bench",
    "calibrate",
    "errors",
    "explain",
    "freeze",
    "load",
    "pack",
    "prepare",
    "report",
    "uniform",
    "verify",
]


class _CallableModule(ModuleType):
    """A module that can be called like the function that bears its name."""

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        name = self.__name__.rpartition(".")[2]
        function: Callable[..., Any] = getattr(importlib.import_module(_CALLABLE[name]), name)
        return function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


class _Face(ModuleType):
    """This package. The import system sets each sub-module as an attribute here, whoever imports it first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _FACE:
        value = getattr(importlib.import_module(_FACE[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in _CALLABLE:
        return importlib.import_module(f"lbs.{name}")
    else:
        raise AttributeError(f"module 'lbs' has no attribute {name!r}; it offers {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Face

if TYPE_CHECKING:
    from lbs.bench import bench as bench
    from lbs.pack.checkpoint import load as load
    from lbs.pack.explain import explain as explain
    from lbs.pack.model import PackedModel as PackedModel
    from lbs.pack.packing import pack as pack
    from lbs.pack.verify import verify as verify
    from lbs.plan import Plan as Plan
    from lbs.quant.calibrate import calibrate as calibrate
    from lbs.report.page import report as report
    from lbs.search.budget import Budget as Budget
    from lbs.search.freeze import freeze as freeze
    from lbs.search.prepare import SearchConfig as SearchConfig
    from lbs.search.prepare import prepare as prepare
    from lbs.search.prepare import uniform as uniform
    from lbs_kernels import errors as errors
