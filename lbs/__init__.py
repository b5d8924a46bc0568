"""Loss-aware Bit Sharing: search bits and filters of a network, pack it into bit-planes, run it.

`import lbs` is light: a name of the public face is imported when it is first used.

    >>> import lbs
    >>> lbs.SearchConfig(bits=(2, 4, 8)).bits
    (2, 4, 8)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_FACE = {
    "Budget": "lbs.search.budget",
    "PackedModel": "lbs.packing.model",
    "Plan": "lbs.plan",
    "SearchConfig": "lbs.search.prepare",
    "bench": "lbs.benchmark",
    "calibrate": "lbs.quant.calibrate",
    "explain": "lbs.packing.explain",
    "fidelity": "lbs.quantization_report",
    "freeze": "lbs.search.freeze",
    "load": "lbs.packing.checkpoint",
    "pack": "lbs.packing.packing",
    "prepare": "lbs.search.prepare",
    "quantize": "lbs.post_training",
    "report": "lbs.reporting.page",
    "uniform": "lbs.search.prepare",
    "verify": "lbs.packing.verify",
}
_MODULES = {"errors": "lbs.errors"}

__all__ = [
    "Budget",
    "PackedModel",
    "Plan",
    "SearchConfig",
    "bench",
    "calibrate",
    "errors",
    "explain",
    "fidelity",
    "freeze",
    "load",
    "pack",
    "prepare",
    "quantize",
    "report",
    "uniform",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _FACE:
        from lbs.extras import asked_for

        with asked_for(f"lbs.{name}"):
            value = getattr(importlib.import_module(_FACE[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'lbs' has no attribute {name!r}; it offers {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from lbs import errors as errors
    from lbs.benchmark import bench as bench
    from lbs.packing.checkpoint import load as load
    from lbs.packing.explain import explain as explain
    from lbs.packing.model import PackedModel as PackedModel
    from lbs.packing.packing import pack as pack
    from lbs.packing.verify import verify as verify
    from lbs.plan import Plan as Plan
    from lbs.post_training import quantize as quantize
    from lbs.quant.calibrate import calibrate as calibrate
    from lbs.quantization_report import fidelity as fidelity
    from lbs.reporting.page import report as report
    from lbs.search.budget import Budget as Budget
    from lbs.search.freeze import freeze as freeze
    from lbs.search.prepare import SearchConfig as SearchConfig
    from lbs.search.prepare import prepare as prepare
    from lbs.search.prepare import uniform as uniform
