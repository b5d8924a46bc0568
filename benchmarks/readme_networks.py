"""The rows of the table about networks against engines, of a file that bench_networks.py wrote."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
Part = tuple[list[str], list[tuple[str, ...]]]
TIMES = ["network", "threads", "batch", "contender", "ms per batch, median [p20 p80]"]
OF_OURS = ["speed over the faster engine", "of the fastest rounds", "over w8a8", "layers by algorithm"]
STARTS = ["network", "threads", "contender", "load and first call, ms", "growth of the peak, MB"]


def network_parts(body: Row) -> list[Part]:
    """(heads, rows) of the table of times, and of that of starts where there are any."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in body["rows"]:
        groups.setdefault((row["network"], row["threads"], row["batch"]), []).append(row)
    rows = [line for key in sorted(groups) for line in _lines(groups[key])]
    starts = [
        (row["network"], str(row["threads"]), row["contender"], f"{row['seconds'] * 1e3:.0f}", _megabytes(row))
        for row in sorted(body["starts"], key=lambda row: (row["network"], row["threads"]))
    ]
    return [([*TIMES, *OF_OURS], rows), *([(STARTS, starts)] if starts else [])]


def _lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """A group: those contenders that ran side by side."""
    engines = [row for row in rows if row["algorithms"] is None]
    faster = min(engines, key=lambda row: row["median"])["contender"] if engines else None
    fastest = min((row["fastest"] for row in engines), default=None)
    lines = []
    for row in rows:
        times = f"{row['median'] * 1e3:.3f} [{row['p20'] * 1e3:.3f} {row['p80'] * 1e3:.3f}]"
        told = ("", "", "", "")
        if row["algorithms"] is not None:
            over = f"{row['ratios'][faster]:.2f}x {faster}" if faster else ""
            best = f"{fastest / row['fastest']:.2f}x" if fastest else ""
            uniform = f"{row['ratios']['w8a8']:.2f}x" if "w8a8" in row["ratios"] else ""
            by = ", ".join(f"{count} {name}" for name, count in row["algorithms"].items() if count)
            told = (over, best, uniform, by)
        lines.append((row["network"], str(row["threads"]), str(row["batch"]), row["contender"], times, *told))
    return lines


def _megabytes(row: Row) -> str:
    return f"{row['peak_bytes'] / 1e6:.0f}"
