"""`lbs.report(run_dir)`: one self-contained HTML page, and the pictures as PNG files beside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from lbs.reporting import plots, records, tables
from lbs.reporting.records import Record
from lbs.run_folder import write_bytes
from lbs_kernels.errors import CheckpointError, LbsError, first_line, printable

_TEMPLATES = Path(__file__).parent
_PNG_DPI = 160


def report(run_dir: str | Path) -> Path:
    """Write report.html and the PNG files into the run folder; returns the path of the page.

    Parts of the run that are missing are left out and named on the page.

    Raises:
        CheckpointError: no run folder, nothing in it, a damaged file, or a full disk.
    """
    folder = Path(run_dir)
    record = records.read(folder)
    page = folder / "report.html"
    with odd_told(folder):
        pictures = plots.draw(record)
        for stem, (_, figure) in pictures.items():
            write_bytes(folder / f"{stem}.png", png(figure))
        write_bytes(page, render(record, pictures).encode())
    return page


@contextmanager
def odd_told(where: str | Path) -> Iterator[None]:
    """Inside, what a record's odd types raise becomes CheckpointError: its files may be edited, or a stranger's."""
    try:
        yield
    except LbsError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.TemplateError) as error:
        raise CheckpointError(
            f"{where} holds a record of another form ({type(error).__name__}: {first_line(error)}); restore its JSON "
            "files, or delete the odd one and make it again"
        ) from error


def render(record: Record, pictures: dict[str, tuple[str, Figure]]) -> str:
    """The page as text. Names and numbers from files are escaped; pictures are inlined as SVG data."""
    return template("page.html").render(
        title=record.name,
        record=record,
        tiles=tables.tiles(record),
        tables=tables.tables(record),
        figures=[(stem, caption, svg_data(figure)) for stem, (caption, figure) in pictures.items()],
        missing=missing_parts(record),
    )


def template(name: str) -> jinja2.Template:
    """One of the pages beside this file. What is put into it is escaped and printable; a name it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_spelled_out,
        trim_blocks=True,
    )
    environment.filters["words"] = lambda text: re.sub(r"\.(?=\w)", ".\u200b", str(text))
    return environment.get_template(name)


def _spelled_out(value: object) -> object:
    """Text of files without its control characters; the places where words may be broken stay."""
    return "\u200b".join(map(printable, value.split("\u200b"))) if type(value) is str else value


def missing_parts(record: Record) -> list[tuple[str, str]]:
    """(what is missing, the command that makes it)."""
    run = record.path or record.name
    wanted = (
        ("search", not record.metrics.get("search") and "search" not in record.results, f"lbs search --run {run} ..."),
        ("fine-tuning", "finetune" not in record.results, f"lbs finetune --run {run}"),
        ("packed file", "pack" not in record.results, f"lbs pack --run {run}"),
        ("verification", "verify" not in record.results, f"lbs verify --run {run}"),
        ("benchmark", not record.bench_rows(), f"lbs bench --run {run}"),
    )
    return [(what, command) for what, absent, command in wanted if absent]


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_PNG_DPI)
    return buffer.getvalue()


def svg_data(figure: Figure) -> str:
    """The figure as a data address of an SVG image. Equal figures give equal text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lbs"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
