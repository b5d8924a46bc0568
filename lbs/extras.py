"""Packages beyond torch, numpy and safetensors: imported where they are used, and asked for where they are missing.

A wheel installs none of them. What does not need one runs without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lbs_kernels.errors import LbsError

# Module -> its package, and the extra of lbs that has it.
EXTRAS = {
    "PIL": ("pillow", "train"),
    "jinja2": ("jinja2", "report"),
    "matplotlib": ("matplotlib", "report"),
    "sklearn": ("scikit-learn", "train"),
    "tqdm": ("tqdm", "train"),
}


@contextmanager
def asked_for(what: str) -> Iterator[None]:
    """Turns the import of a package that is not installed into an error with the command that installs it.

    Args:
        what: needs the package, in words of an error.

    Raises:
        LbsError: one of the packages above is missing. Other failures of an import stay what they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        package, extra = EXTRAS[module]
        together = " ".join(name for name, of in EXTRAS.values() if of == extra)
        raise LbsError(f"{what} needs {package}, which is not installed: pip install {together}") from error
