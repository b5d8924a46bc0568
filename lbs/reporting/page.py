"""`lbs.report(...)`: one self-contained HTML page, and the pictures as SVG files beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from lbs.reporting import plots, records, tables
from lbs.reporting.records import Record
from lbs.reporting.style import svg
from lbs.run_folder import write_bytes
from lbs_kernels.errors import CheckpointError, LbsError, first_line, printable

_TEMPLATES = Path(__file__).parent
_TALL = 5.0  # inches; low pictures and tall ones do not share a row


def report(
    source: str | Path,
    *,
    bench: str | Path | None = None,
    out: str | Path | None = None,
    budget: float | None = 1.0,
) -> Path:
    """Write report.html and the SVG files of one network, before and after; returns the path of the page.

    Parts that are missing are left out and named on the page.

    Args:
        source: a run folder, or a packed file. bench: what `lbs bench FILE --json` printed of a packed file.
        out: the folder that is written into; by default the run folder, or beside a packed file a folder of its name
            with "-report" behind it.
        budget: what the packed file may cost, as for `lbs.load`.

    Raises:
        CheckpointError: no run folder and no packed file, nothing in it, a damaged file, or a full disk. LbsError:
        bench= with a run folder.
    """
    path = Path(source)
    record = records.read(path, bench, budget)
    own = path if path.is_dir() else path.with_name(f"{record.name}-report")
    folder = Path(out) if out is not None else own
    with odd_told(path):
        pictures = plots.draw(record)
        text = render(record, save_pictures(pictures, folder)).encode()
    write_bytes(folder / "report.html", text)
    return folder / "report.html"


@dataclass(frozen=True)
class Shown:
    """A picture as a page shows it: address is the image itself; note: what is not in it; tall: of many layers."""

    stem: str
    caption: str
    address: str
    note: str = ""
    tall: bool = False


def save_pictures(
    pictures: dict[str, tuple[str, Figure]], folder: Path, notes: dict[str, str] | None = None
) -> list[Shown]:
    """Write <stem>.svg of every picture into a folder."""
    shown = []
    for stem, (caption, figure) in pictures.items():
        image = svg(figure)
        write_bytes(folder / f"{stem}.svg", image)
        address = "data:image/svg+xml;base64," + base64.b64encode(image).decode()
        shown.append(Shown(stem, caption, address, (notes or {}).get(stem, ""), figure.get_figheight() > _TALL))
    return shown


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


def render(record: Record, figures: list[Shown]) -> str:
    """The page as text. Names and numbers from files are escaped; pictures are inlined as SVG data."""
    return template("page.html").render(
        title=record.name,
        record=record,
        tiles=tables.tiles(record),
        summary=[table for table in [tables.before_after_table(record)] if table.rows],
        tables=tables.tables(record),
        figures=figures,
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
    environment.filters["words"] = lambda text: re.sub(r"\.(?=[^\W\d])", ".\u200b", str(text))
    environment.filters["rows"] = lambda shown: [list(some) for _, some in groupby(shown, lambda one: one.tall)]
    return environment.get_template(name)


def _spelled_out(value: object) -> object:
    """Text of files without its control characters; the places where words may be broken stay."""
    return "\u200b".join(map(printable, value.split("\u200b"))) if type(value) is str else value


def missing_parts(record: Record) -> list[tuple[str, str]]:
    """(what is missing, the command that makes it)."""
    run = record.path or record.name
    if record.packed_alone:
        again = f"lbs bench {run} --model NAME --json > bench.json; lbs report {run} --bench bench.json"
        return [] if record.bench_rows() else [("benchmark", again)]
    wanted = (
        ("search", not record.metrics.get("search") and "search" not in record.results, f"lbs search --run {run} ..."),
        ("fine-tuning", "finetune" not in record.results, f"lbs finetune --run {run}"),
        ("packed file", "pack" not in record.results, f"lbs pack --run {run}"),
        ("verification", "verify" not in record.results, f"lbs verify --run {run}"),
        ("benchmark", not record.bench_rows(), f"lbs bench --run {run}"),
    )
    return [(what, command) for what, absent, command in wanted if absent]
