"""Numbers as people read them."""

from __future__ import annotations

from lbs_kernels.errors import printable


def bops(value: float) -> str:
    """Bit operations in the units papers use.

    >>> bops(40_960), bops(630_600_000), bops(34.7e9)
    ('41.0k', '630.6M', '34.70G')
    """
    if value < 1e6:
        return f"{value / 1e3:.1f}k" if value else "0"
    return f"{value / 1e9:.2f}G" if value >= 1e10 else f"{value / 1e6:.1f}M"


def size(count: float) -> str:
    """Bytes.

    >>> size(840), size(123_456), size(3_500_000)
    ('840 B', '123.5 kB', '3.50 MB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def seconds(value: float) -> str:
    """Time.

    >>> seconds(4.2e-5), seconds(0.0123), seconds(95), seconds(7260)
    ('42.0 us', '12.30 ms', '1 min 35 s', '2 h 1 min')
    """
    if value < 1e-3:
        return f"{value * 1e6:.1f} us"
    if value < 1:
        return f"{value * 1e3:.2f} ms"
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"


def quantity(name: str, value: float | None, modelled: str = "") -> str:
    """What a budget counts, by its name and in base units, and whether a model tells it; a dash where there is none.

    >>> quantity("bops", 630_600_000), quantity("size_mb", 5500), quantity("latency_ms", 0.0002), quantity("bops", None)
    ('630.6M', '5.5 kB', '200.0 us', '-')
    """
    if value is None:
        return "-"
    shown = {"bops": bops, "size_mb": size, "latency_ms": seconds}[name](value)
    return f"{shown} ({modelled})" if modelled else shown


def percent(value: float | None) -> str:
    """A share 0..1 with two digits; a dash where there is none.

    >>> percent(0.6883), percent(None)
    ('68.83 %', '-')
    """
    return "-" if value is None else f"{value:.2%}".replace("%", " %")


def plain(text: str) -> str:
    """A name as a picture shows it: its dollars begin no formula.

    >>> plain("conv$1"), plain("bell\a")
    ('conv\\\\$1', 'bell\\\\x07')
    """
    return printable(text).replace("$", r"\$")


def times(value: float) -> str:
    """A ratio.

    >>> times(0.97), times(8.04), times(63.2)
    ('0.97x', '8.0x', '63x')
    """
    return f"{value:.0f}x" if value >= 20 else f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"
