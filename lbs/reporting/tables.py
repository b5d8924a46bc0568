"""The tables of a report: a header, rows of text, and a line about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lbs.cost import FULL_PRECISION_BITS
from lbs.reporting.records import BEFORE, EVEN8, PACKED, PHASES, Record
from lbs.reporting.units import bops, percent, quantity, seconds, size, times

TARGET_NAMES = {"bops": "bit operations", "size_mb": "packed weights", "latency_ms": "latency of one image"}


MOST_LOST = 0.01  # accuracy that a network may lose and still count as one that does the same faster
PAYS = 1.03  # ratios nearer to 1 differ from run to run
EVEN_BITS = 8


@dataclass(frozen=True)
class Table:
    """Columns whose name begins with `#` hold numbers and are set to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """One figure of the summary."""

    label: str
    value: str
    detail: str = ""
    state: str = ""  # good | bad | ""


def tiles(record: Record) -> list[Tile]:
    """The summary: what went in, what came out."""
    found = [*_accuracy_tiles(record), *_cost_tiles(record), *_check_tiles(record)]
    return [tile for tile in found if tile is not None]


def _accuracy_tiles(record: Record) -> list[Tile | None]:
    before, after = record.value("float", "accuracy"), record.value("finetune", "accuracy")
    packed = record.value("verify", "packed_accuracy")
    if packed is None and after is None:  # a packed file has its benchmark alone
        before, packed = record.accuracy(BEFORE), record.accuracy(PACKED)
    result = packed if packed is not None else after
    if result is None:
        return []
    label = "Accuracy, packed" if packed is not None else "Accuracy, fine-tuned"
    even = record.value("uniform8", "accuracy")
    others = (("float", before), ("uniform 8 bits", even))
    detail = "; ".join(f"{name} {percent(x)}, {100 * (result - x):+.2f} points" for name, x in others if x is not None)
    return [Tile(label, percent(result), detail)]


def _cost_tiles(record: Record) -> list[Tile | None]:
    if not record.layers:
        return []
    now, full = sum(row.bops for row in record.layers), sum(row.full_bops for row in record.layers)
    detail = f"per image; float {bops(full)}, {times(full / now)} fewer"
    if more := record.value("finetune", "float_bops") or record.value("search", "float_bops"):
        detail += f"; layers left in float {bops(more)} more"
    found: list[Tile | None] = [Tile("Bit operations", bops(now), detail)]
    packed, before = record.value("pack", "bytes"), record.value("float", "bytes")
    if packed is not None:
        coded = record.value("pack", "coded_streams")
        parts = [f"float weights {size(before)}" if before else ""]
        parts += [f"{len(coded)} residual streams of 8 bits" if coded else ""]
        found.append(Tile("Packed file", size(packed), "; ".join(filter(None, parts))))
    targets = record.targets()
    if targets:
        met = all((row["value"] or 0) <= (row["target"] or 0) for row in targets.values())
        told = (
            f"{quantity(name, row['value'])} of {quantity(name, row['target'], row['modelled'])}"
            for name, row in targets.items()
        )
        found.append(Tile("Budget", "met" if met else "missed", f"{', '.join(told)} allowed", _state(met)))
    return found


def _check_tiles(record: Record) -> list[Tile | None]:
    found: list[Tile | None] = []
    equal, images = record.value("verify", "equal_predictions"), record.value("verify", "images")
    if equal is not None:
        passed = bool(record.value("verify", "passed"))
        rest = ", the rest on rounding boundaries" if passed and equal != images else ""
        text = f"{equal} of {images} predictions equal{rest}"
        found.append(Tile("Packed = trained", "yes" if passed else "no", text, _state(passed)))
    rivals = record.rivals()
    if rivals:
        least = min(ratio for _, _, ratio in rivals)
        good = least > 1 and all(_as_accurate(record, name) for _, name, _ in rivals)
        found.append(Tile("Against the fastest other", times(least), "; ".join(speeds(record)), _state(good)))
    return found


def speeds(record: Record) -> list[str]:
    """One line per batch: which other contender is the fastest, its accuracy, and what the search gains on it."""
    lines = []
    for batch, name, ratio in record.rivals():
        right = record.accuracy(name)
        of_images = "" if right is None else f" ({percent(right)} right)"
        lines.append(f"batch {batch}: {times(ratio)} as fast as {name}{of_images}")
    return lines


def kept_filters(record: Record) -> str:
    """How many filters are left, and of which layers some are gone."""
    kept, all_of_them = (
        sum(row.layer.kept_filters for row in record.layers),
        sum(x.layer.filters for x in record.layers),
    )
    cut = [f"{x.name} {x.kept_filters} of {x.filters}" for x in (y.layer for y in record.layers) if x.kept is not None]
    return f"filters kept: {kept} of {all_of_them}" + (f"; {', '.join(cut)}" if cut else "")


def bits_pay(record: Record) -> str:
    """What fewer bits alone bring, the same filters kept; "" where that was not timed."""
    ratios = record.value("bench", "of_bits") or {}
    if not ratios:
        return ""
    told = ", ".join(f"{times(ratio)} at batch {batch}" for batch, ratio in ratios.items())
    paid = ", ".join(batch for batch, ratio in ratios.items() if ratio >= PAYS)
    verdict = f"fewer bits pay at batch {paid}" if paid else "fewer bits save memory here and no time"
    return f"against the same filters at 8 bits: {told}; {verdict}"


def _as_accurate(record: Record, contender: str) -> bool:
    """Whether the packed network loses no more than MOST_LOST to a contender: to float, where that was not measured."""
    measured = (record.accuracy(name) for name in (contender, "torch float32"))
    ours, theirs = record.accuracy("packed"), next((found for found in measured if found is not None), None)
    return ours is None or theirs is None or ours >= theirs - MOST_LOST


def _state(good: bool) -> str:
    return "good" if good else "bad"


def tables(record: Record) -> list[Table]:
    """All tables below the pictures for which there is something."""
    made = (
        budget_table(record),
        layer_table(record),
        latency_table(record),
        phase_table(record),
        environment_table(record),
    )
    return [table for table in made if table.rows]


def before_after_table(record: Record) -> Table:
    """What the network was and what it is: accuracy, costs and times, and between them the same at uniform 8 bits."""
    rows: list[tuple[str, ...]] = []
    whole = (BEFORE, EVEN8, PACKED)
    found = [record.accuracy(name) for name in whole]
    if found[2] is not None:
        change = f"{100 * (found[2] - found[0]):+.2f} pts" if found[0] is not None else "-"
        rows.append(("top-1 accuracy", *map(percent, found), change))
    alike = [record.agreement(name) for name in whole]
    if alike[2] is not None:
        rows.append(("class of float32", *map(percent, alike), "-"))
    if record.layers:
        full, now = sum(row.full_bops for row in record.layers), sum(row.bops for row in record.layers)
        even = full * EVEN_BITS**2 // FULL_PRECISION_BITS**2
        rows.append(("bit operations", bops(full), bops(even), bops(now), times(full / now)))
        all_of_them, kept = (
            sum(row.layer.filters for row in record.layers),
            sum(row.layer.kept_filters for row in record.layers),
        )
        rows.append(("filters", str(all_of_them), str(all_of_them), str(kept), f"{1 - kept / all_of_them:.0%} gone"))
    sizes = [record.bytes(name) for name in whole]
    if sizes[2] is not None:
        smaller = times(sizes[0] / sizes[2]) if sizes[0] else "-"
        rows.append(("file or weights", *("-" if count is None else size(count) for count in sizes), smaller))
    for batch in dict.fromkeys(row["batch"] for row in record.bench_rows()):
        took = [record.seconds(name, batch) for name in whole]
        faster = times(took[0] / took[2]) if took[0] and took[2] else "-"
        rows.append((f"call, batch {batch}", *("-" if one is None else seconds(one) for one in took), faster))
    images = record.value("bench", "images")
    asked = record.value("bench", "accuracy") or record.value("bench", "agreement")
    note = f"Classes of {images} images. " if images and asked else ""
    header = ("", "#Before: float32", "#Uniform 8 bits", "#After: packed", "#Gain")
    return Table(
        "Before and after",
        header,
        tuple(rows),
        note + "Bit operations: of one image. Bytes: of the file, in float of all weights.",
    )


def budget_table(record: Record) -> Table:
    """One row per target: what was allowed, what was reached, and by the thresholds alone."""
    rows = []
    for name, row in record.targets().items():
        before, value = row["thresholds"], row["value"]
        rest = "-"
        if before is not None and value is not None:
            rest = "closed by projection" if before > value else "opened by projection" if before < value else "nothing"
        shown = [quantity(name, amount, row["modelled"]) for amount in (row["target"], before, value)]
        rows.append((TARGET_NAMES[name], *shown, rest))
    header = ("Target", "#Allowed", "#Reached by thresholds", "#Result", "The rest")
    note = (
        "By thresholds: what the trained thresholds had reached when the search ended; a projection then closed the "
        "cheapest gates until the target held, or opened what still fitted. A dash: no thresholds were trained, or the "
        "run is of an older release, which did not note it."
    )
    return Table("Budget", header, tuple(rows), note)


def layer_table(record: Record) -> Table:
    """One row per layer, and the totals."""
    header: tuple[str, ...] = (
        "Layer",
        "Kind",
        "#Weight bits",
        "#Activation bits",
        "#Filters",
        "#BOPs",
        "#Full",
        "#Bytes",
        "#float32",
    )
    timed = {str(row["name"]): row["seconds"] for row in record.layer_times()}
    if timed:
        header += ("#Time", "#at 8 bits", "#in float32")
    rows = []
    for row in record.layers:
        layer = row.layer
        size_of, down = "x".join(map(str, layer.kernel)), layer.stride[0]
        kernel = "linear" if layer.kind == "linear" else size_of + (f" /{down}" if down > 1 else "")
        filters = f"{layer.kept_filters} / {layer.filters}"
        costs = (bops(row.bops), bops(row.full_bops), size(row.bytes), size(row.full_bytes))
        took = [timed.get(layer.name, {}).get(name) for name in (PACKED, EVEN8, BEFORE)] if timed else []
        cells = ("-" if one is None else seconds(one) for one in took)
        rows.append((layer.name, kernel, str(layer.w_bits), str(layer.a_bits), filters, *costs, *cells))
    if rows:
        sums = [sum(getattr(row, key) for row in record.layers) for key in ("bops", "full_bops", "bytes", "full_bytes")]
        kept = sum(row.layer.kept_filters for row in record.layers)
        filters = f"{kept} / {sum(row.layer.filters for row in record.layers)}"
        total = ["total", "", "", "", filters, bops(sums[0]), bops(sums[1]), size(sums[2]), size(sums[3])]
        for name in (PACKED, EVEN8, BEFORE) if timed else ():
            known = [took[name] for took in timed.values() if name in took]
            total.append(seconds(sum(known)) if known else "-")
        rows.append(tuple(total))
    note = (
        "Kind: the kernel, behind / its stride. BOPs: bit operations of one image. Full: 32 x 32 bits, nothing pruned. "
        "Bytes: planes, multiplier and bias; "
        "planes fill words of 32 channels, so a layer that reads few channels can be larger than its floats."
    )
    if timed:
        note += (
            " Times are of calls at the first batch: packed layers with what follows them, norm and activation "
            "included; those of torch without."
        )
    return Table("Layers", header, tuple(rows), note)


def latency_table(record: Record) -> Table:
    """Benchmark rows as they were measured."""
    rows = []
    ours = {row["batch"]: row.get("ratios", {}) for row in record.bench_rows() if row["contender"] == "packed"}
    for row in record.bench_rows():
        ratio = ours.get(row["batch"], {}).get(row["contender"])
        spread = f"{seconds(row['p20'])} - {seconds(row['p80'])}"
        rate = f"{row['batch'] / row['median']:,.0f}"
        ratio_text = times(ratio) if ratio else "-"
        shares = (percent(record.accuracy(row["contender"])), percent(record.agreement(row["contender"])))
        weight = record.bytes(row["contender"])
        held = "-" if weight is None else size(weight)
        times_of = (seconds(row["median"]), spread, rate, ratio_text)
        rows.append((row["contender"], str(row["batch"]), *times_of, *shares, held))
    header = (
        "Contender",
        "#Batch",
        "#Median",
        "#20 - 80 %",
        "#Images / s",
        "#Packed is faster",
        "#Top-1",
        "#As float32",
        "#Size",
    )
    bench = record.results.get("bench", {})
    about = f"{bench.get('device', 'cpu')}, {bench.get('threads', '?')} threads. " if rows else ""
    bits, missing = bits_pay(record), bench.get("missing", {})
    told = "".join(f" {line[0].upper()}{line[1:]}." for line in bench.get("bits", []))
    left_out = " Not measured: " + "; ".join(f"{k}: {v}" for k, v in missing.items()) + "." if missing else ""
    note = (
        f"{about}All contenders in one process, interleaved, on the same images; ratios are medians of pairs. "
        f"{'Packed ' + bits + '.' if bits else ''}{told}{left_out}"
    )
    return Table("Latency", header, tuple(rows), note)


def phase_table(record: Record) -> Table:
    """One row per training phase."""
    rows = []
    for phase in PHASES:
        section: dict[str, Any] = record.results.get(phase, {})
        if "epochs" not in section:
            continue
        best = (
            f"{percent(section['best_accuracy'])} (epoch {section['best_epoch']})" if section["best_accuracy"] else "-"
        )
        last, seed = percent(section["accuracy"]), record.seed(phase)
        rows.append(
            (
                phase,
                "-" if seed is None else str(seed),
                str(section["epochs"]),
                f"{section['steps']:,}",
                seconds(section["seconds"]),
                last,
                best,
            )
        )
    header = ("Phase", "#Seed", "#Epochs", "#Steps", "#Time", "#Test, last epoch", "#Test, best")
    return Table(
        "Training",
        header,
        tuple(rows),
        "The weights of the last epoch are kept. The best epoch was picked on the test images.",
    )


def environment_table(record: Record) -> Table:
    """Versions and machine."""
    rows = [(key, str(value)) for key, value in record.environment.items() if value is not None]
    for command, section in record.config.items():
        if isinstance(section, dict) and "hash" in section:
            rows.append((f"{command}, configuration", str(section.get("hash", ""))))
    return Table("Environment", ("What", "Value"), tuple(rows))
