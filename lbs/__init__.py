"""Loss-aware Bit Sharing: search bits and filters of a network, pack it into bit-planes, run it."""

from __future__ import annotations

__version__ = "0.1.0"
