"""Reading printed launch configurations back. Needs no Triton."""

from __future__ import annotations

import re

from lbs_kernels.errors import FormatError


def match_text(pattern: str, text: str, kernel: str, example: object) -> re.Match[str]:
    """The whole of `text` matched by `pattern`.

    Raises:
        FormatError: `text` is no configuration of `kernel`; `example` is one.
    """
    found = re.fullmatch(pattern, text)
    if found is None:
        raise FormatError(f"{text!r} is no configuration of the {kernel}; expected one like {example}")
    return found
