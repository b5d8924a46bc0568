"""For every rule of a program at least one mutant that breaks it first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from program_mutants import SOURCES, Mutant, Pairs, Raw, dump, source

from lbs_kernels.program.rules import MAX_COUNT, MAX_SIZE, MAX_TEXT

Body = dict[str, Any]


def top(body: Body) -> Body:
    return body


def conv(body: Body) -> Body:
    return next(step for step in body["steps"] if step["op"] == "bitconv2d")


def second_conv(body: Body) -> Body:
    return [step for step in body["steps"] if step["op"] == "bitconv2d"][1]


def conv_emit(body: Body) -> Body:
    return conv(body)["emit"]


def conv_consumer(body: Body) -> Body:
    return conv(body)["emit"]["consumers"][0]


def maximum(body: Body) -> Body:
    return next(step for step in body["steps"] if step.get("kind") == "max")


def max_emit(body: Body) -> Body:
    return maximum(body)["emit"]


def max_consumer(body: Body) -> Body:
    return maximum(body)["emit"]["consumers"][0]


def mean(body: Body) -> Body:
    return next(step for step in body["steps"] if step.get("kind") == "mean")


def average(body: Body) -> Body:
    return next(step for step in body["steps"] if step.get("kind") == "average")


def selection(body: Body) -> Body:
    return next(step for step in body["steps"] if step["op"] == "select")


def selected_codes(body: Body) -> Body:
    return selection(body)["emit"]["consumers"][0]


def repeated(body: Body) -> Body:
    return next(step for step in body["steps"] if step["op"] == "select" and step["repeat"] != [1, 1])


def interpolation(body: Body) -> Body:
    return next(step for step in body["steps"] if step["op"] == "resize")


def last_step(body: Body) -> Body:
    return body["steps"][-1]


def quantpack(body: Body) -> Body:
    return body["steps"][0]


def activation(body: Body) -> Body:
    return next(step["emit"]["activation"] for step in body["steps"] if step["emit"]["activation"])


def gated_emit(body: Body) -> Body:
    return next(step["emit"] for step in body["steps"] if step["emit"]["gate"] is not None)


def coded_emit(body: Body) -> Body:
    return next(step["emit"] for step in body["steps"] if step["emit"]["residual_step"] is not None)


def standing(body: Body) -> Body:
    return next(c for step in body["steps"] for c in step["emit"]["consumers"] if c["step"] is not None)


def consumer(body: Body) -> Body:
    return body["steps"][0]["emit"]["consumers"][0]


def codes(body: Body) -> Body:
    return body["tensors"][consumer(body)["tensor"]]


def stream(body: Body) -> Body:
    return next(spec for spec in body["tensors"] if spec["form"] == "stream")


def planes(body: Body) -> Body:
    return body["arrays"][conv(body)["planes"]]


def bias(body: Body) -> Body:
    return body["arrays"][conv(body)["bias"]]


def signed_codes(body: Body) -> None:
    for item in (consumer(body), codes(body)):
        item.update(signed=True, zero=0)


def signed_standing(body: Body) -> None:
    held = standing(body)
    for item in (held, body["tensors"][held["tensor"]]):
        item.update(signed=True, zero=0)


def narrow_standing(body: Body) -> None:
    held = standing(body)
    for item in (held, body["tensors"][held["tensor"]]):
        item.update(bits=7, zero=0)


def many_arrays(body: Body) -> None:
    spec = {"dtype": "float32", "shape": [1], "offset": 0}
    body["arrays"] = {str(number): spec for number in range(MAX_COUNT + 1)}


def too_many_channels(body: Body) -> None:
    """Of one tensor many times over, taking the first only."""
    selection(body).update(inputs=selection(body)["inputs"][:1] * (MAX_SIZE // 13 + 1), channels=[0])


def wide_linear(body: Body) -> None:
    """33026 channels of one pixel, 8 by 8 bits, everything else in order."""
    body["tensors"] = [
        {"name": "x", "form": "image", "channels": 33026, "height": 1, "width": 1},
        {"name": "q", "form": "codes", "channels": 33026, "height": 1, "width": 1, "bits": 8},
        {"name": "y", "form": "stream", "channels": 1, "height": 1, "width": 1},
    ]
    body["arrays"] = {
        "p": {"dtype": "int32", "shape": [8, 1, 1, 1033], "offset": 0},
        "m": {"dtype": "float32", "shape": [1], "offset": 0},
    }
    written = {"tensor": 1, "bits": 8, "scale": 1.0}
    linear = {"w_bits": 8, "total_filters": 1, "planes": "p", "multiplier": "m", "bias": "m"}
    body["steps"] = [
        {"op": "quantpack", "name": "a", "input": 0, "emit": {"consumers": [written]}},
        {"op": "bitlinear", "name": "b", "input": 1, "emit": {"stream": 2}, **linear},
    ]
    body.update(inputs=[0], outputs=[2])


# rule, program, the object that is changed, and what is put into it: one mutant for each.
VALUES: list[tuple[str, str, Callable[[Body], Body], list[Body]]] = [
    ("version", "chain", top, [{"version": v} for v in (0, 6, -1, True, "2", None, 2.0, 10**30)]),
    ("type", "chain", codes, [{"channels": c} for c in (3.0, True, "3", None, [], {})]),
    ("type", "chain", top, [{"inputs": {}}, {"arrays": []}, {"digest": None}, {"steps": [1]}]),
    ("type", "chain", consumer, [{"scale": True}, {"scale": "1"}, {"relu": 0}, {"pre_scale": 1}]),
    ("unknown-key", "chain", consumer, [{"shift": 1}, {"op": "pool"}]),
    ("choice", "chain", codes, [{"form": f} for f in ("planes", "Codes", None, 1)]),
    ("items", "chain", conv, [{"kernel": k} for k in ([], [3], [3, 3, 3])]),
    ("finite", "chain", consumer, [{"scale": Raw(s)} for s in ("1e999", "-1e999", "1" + "0" * 400)]),
    ("op", "chain", conv, [{"op": op} for op in ("fft", None, [], "Pool")]),
    ("json", "chain", consumer, [{"scale": Raw(s)} for s in ("NaN", "Infinity", "-Infinity", "01", "1.", "+1")]),
    ("json", "chain", codes, [{"name": Raw(s)} for s in ('"\t"', '"\\x"', "'x'")]),
    ("stream-dtype", "chain", top, [{"stream_dtype": "float64"}]),
    ("digest", "chain", top, [{"digest": d} for d in ("0" * 63, "G" * 64, "0" * 64 + "\n", "A" * 64, "é" * 32)]),
    ("name", "chain", codes, [{"name": n} for n in ("", "a" * 257, "\x7f", "\ud800", "\u200b", "a\x00", "\ue000")]),
    ("name", "chain", last_step, [{"name": "\x01"}]),
    ("size", "chain", codes, [{"channels": c} for c in (0, -1, MAX_SIZE + 1, 10**30)]),
    ("elements", "chain", codes, [{"channels": MAX_SIZE, "height": MAX_SIZE, "width": MAX_SIZE}]),
    ("bits", "chain", codes, [{"bits": b} for b in (0, 9, -1, 10**30)]),
    ("zero", "chain", codes, [{"zero": z} for z in (-1, 256)]),
    ("signed-zero", "chain", codes, [{"signed": True}]),
    ("codes-only", "chain", stream, [{"signed": True}, {"bits": 1}, {"zero": 1}]),
    ("image-dtype", "chain", stream, [{"dtype": "uint8"}]),
    ("flat", "chain", stream, [{"flat": True}]),
    ("version-1", "byte_image", top, [{"version": 1}]),
    ("version-1", "normed_stream", top, [{"version": 1}]),
    ("version-2", "weights_with_a_zero", top, [{"version": 2}, {"version": 1}]),
    ("version-2", "gated", top, [{"version": v} for v in (1, 2)]),
    ("version-2", "concatenated", top, [{"version": v} for v in (1, 2)]),
    ("version-2", "averaged", top, [{"version": v} for v in (1, 2)]),
    ("version-3", "interpolated", top, [{"version": 3}]),
    ("version-3", "moved", top, [{"version": 3}]),
    ("version-3", "moved_streams", top, [{"version": 3}]),
    ("version-4", "coded_residual", top, [{"version": v} for v in (3, 4)]),
    ("select-size", "concatenated", selection, [{"top": [0, 0]}, {"left": [0]}, {"block": [1, 2]}, {"stride": [2, 1]}]),
    ("select-size", "moved", selection, [{"size": s} for s in ([16, 0], [-1, 12], [16, MAX_SIZE + 1], [1, 12])]),
    ("select-size", "moved", selection, [{"repeat": [1, 2]}, {"block": [0, 2]}, {"stride": [1, 10**30]}]),
    (
        "select-window",
        "moved",
        selection,
        [{"top": [1]}, {"left": [1]}, {"top": [-1]}, {"left": [10**30]}, {"top": [0, 0]}],
    ),
    (
        "select-window",
        "moved",
        selection,
        [{"stride": [2, 1]}, {"size": [17, 12]}, {"size": [16, 13]}, {"channels": [0]}],
    ),
    ("select-window", "moved_streams", selection, [{"top": [3]}, {"left": [3]}, {"size": [10, 9]}]),
    ("select-channels", "moved", selection, [{"channels": [0, 1, 2, 52]}]),
    ("shape", "moved", selection, [{"channels": [0, 1, 2, 3]}, {"size": [15, 12]}]),
    ("shape", "moved_streams", selection, [{"size": [7, 9]}]),
    ("array-dtype", "chain", planes, [{"dtype": "object"}]),
    ("array-shape", "chain", bias, [{"shape": s} for s in ([], [1] * 5, [0], [-1], [MAX_SIZE + 1])]),
    ("array-place", "chain", bias, [{"offset": o} for o in (-64, 4, 2**40, 2**62, 2**63, 2**70)]),
    ("array-place", "chain", bias, [{"shape": [MAX_SIZE] * 4}]),
    ("tensor-number", "chain", top, [{"outputs": [i]} for i in (-1, 99, 2**40)]),
    ("tensor-number", "chain", conv_emit, [{"residual": -1}, {"stream": -1}, {"stream": 99}]),
    ("input-form", "chain", top, [{"inputs": [1]}]),
    ("written-twice", "chain", top, [{"inputs": [0, 0]}]),
    ("written-twice", "chain", consumer, [{"tensor": 0}]),
    ("read-unwritten", "chain", conv, [{"input": 3}]),
    ("form", "chain", second_conv, [{"input": 0}]),
    ("form", "chain", conv_emit, [{"residual": 1}, {"gate": 1}]),
    ("shape", "gated", gated_emit, [{"gate": 2}]),
    ("shape", "chain", conv, [{"stride": [2, 2]}]),
    ("affine-pair", "byte_image", quantpack, [{"bias": None}, {"multiplier": None}]),
    ("array-missing", "chain", conv, [{"planes": "nothing"}, {"planes": ""}, {"bias": "nothing"}]),
    ("array-missing", "chain", quantpack, [{"multiplier": "", "bias": ""}]),
    ("array-kind", "chain", conv, [{"w_bits": 4}, {"bias": "planes3"}]),
    ("window", "chain", conv, [{"dilation": [MAX_SIZE + 1, 1]}, {"stride": [0, 1]}, {"kernel": [-1, 3]}]),
    ("window", "imagenet_stem", maximum, [{"stride": [0, 1]}, {"kernel": [0, 1]}]),
    ("padding", "chain", conv, [{"padding": [-1, 1]}, {"padding": [4, 1]}]),
    ("padding", "imagenet_stem", maximum, [{"padding": [2, 1]}, {"padding": [1, -1]}]),
    ("padded-elements", "chain", conv, [{"dilation": [MAX_SIZE] * 2, "padding": [MAX_SIZE] * 2}]),
    ("padded-elements", "imagenet_stem", maximum, [{"kernel": [MAX_SIZE] * 2, "padding": [MAX_SIZE // 2] * 2}]),
    ("one-pixel", "chain", last_step, [{"input": 1}]),
    ("weight-bits", "chain", conv, [{"w_bits": b} for b in (0, 9)]),
    ("groups", "chain", conv, [{"groups": g} for g in (0, -1, 2, 10**30)]),
    ("filter-groups", "chain", conv, [{"groups": 3}]),
    ("total-filters", "chain", conv, [{"total_filters": c} for c in (15, -1, MAX_SIZE + 1)]),
    ("output-pixels", "chain", conv, [{"dilation": [9, 9], "padding": [0, 0]}]),
    ("output-pixels", "imagenet_stem", maximum, [{"kernel": [99, 99]}]),
    ("form", "averaged", average, [{"input": 1}]),
    ("padding", "averaged", average, [{"padding": [2, 1]}]),
    ("window", "averaged", average, [{"stride": [0, 1]}]),
    ("mean-window", "chain", mean, [{"kernel": [2, 2]}, {"padding": [1, 0]}]),
    ("codes-unchanged", "imagenet_stem", max_emit, [{"low": 0.0}, {"high": 1.0}, {"consumers": []}]),
    ("codes-unchanged", "imagenet_stem", max_consumer, [{"relu": True}, {"bits": 3}, {"pre_scale": "bias1"}]),
    ("codes-unchanged", "imagenet_stem", max_emit, [{"activation": {"kind": "silu"}}, {"gate": 0}]),
    ("codes-unchanged", "concatenated", selected_codes, [{"relu": True}, {"bits": 3}, {"zero": 0}, {"pre_scale": "a"}]),
    ("codes-unchanged", "concatenated", lambda b: selection(b)["emit"], [{"high": 1.0}, {"consumers": []}]),
    ("select-inputs", "concatenated", selection, [{"inputs": []}]),
    ("select-inputs", "selected_streams", selection, [{"inputs": [2, 1]}]),
    ("form", "selected_streams", selection, [{"inputs": [0, 2]}, {"inputs": [0]}]),
    ("tensor-number", "concatenated", selection, [{"inputs": [1, 99]}, {"inputs": [-1]}]),
    ("read-unwritten", "concatenated", selection, [{"inputs": [2, 9]}]),
    ("select-channels", "concatenated", selection, [{"channels": [c]} for c in (-1, 46, 10**30)]),
    ("repeat", "selected_streams", repeated, [{"repeat": [r, 3]} for r in (0, -1, 1, 3, MAX_SIZE, 10**30)]),
    ("shape", "selected_streams", repeated, [{"repeat": [4, 3]}, {"channels": [0]}]),
    ("items", "concatenated", selection, [{"repeat": [1]}]),
    ("type", "concatenated", selection, [{"channels": [1.0]}, {"inputs": 1}]),
    ("unknown-key", "concatenated", selection, [{"input": 1}]),
    ("form", "interpolated", interpolation, [{"input": 0}, {"input": 1}]),
    ("resize", "interpolated", interpolation, [{"size": [s, 10]} for s in (0, -1, MAX_SIZE + 1, 10**30)]),
    ("resize", "interpolated", interpolation, [{"scale": [0.5, s]} for s in (0, -0.5, Raw("-0"), Raw("1e-400"))]),
    ("shape", "interpolated", interpolation, [{"size": [14, 9]}]),
    ("items", "interpolated", interpolation, [{"size": [14]}, {"scale": [0.5, 0.5, 0.5]}, {"offset": []}]),
    ("type", "interpolated", interpolation, [{"scale": ["1", 1]}, {"size": [14.0, 10]}, {"offset": 0.0}]),
    ("finite", "interpolated", interpolation, [{"offset": [Raw("1e999"), 0]}]),
    ("choice", "gated", activation, [{"kind": k} for k in ("relu", "SiLU", None, 1)]),
    ("missing-key", "chain", conv_emit, [{"activation": {"value": 1.0}}]),
    ("activation-value", "gated", activation, [{"value": 1}, {"kind": "elu", "value": 0.1}]),
    ("activation-slope", "gated", activation, [{"slope": "bias3"}, {"kind": "prelu"}]),
    ("array-missing", "gated", activation, [{"kind": "prelu", "slope": "nothing"}]),
    ("bound", "chain", conv_emit, [{"low": low} for low in (0.1, 1e300, 16777217)]),
    ("clamp", "chain", conv_emit, [{"low": 2.0, "high": 1.0}]),
    ("writes-nothing", "chain", conv_emit, [{"consumers": []}]),
    ("code-kind", "chain", consumer, [{"bits": 4}, {"zero": 5}, {"signed": True}]),
    ("scale", "chain", consumer, [{"scale": s} for s in (0.1, 0, -1.0, 1e300, Raw("1e-400"), Raw("-0"))]),
    ("code-step", "coded_residual", coded_emit, [{"residual_step": s} for s in (0.1, 0, -1.0, 1e300, Raw("1e-400"))]),
    ("code-step", "coded_residual", coded_emit, [{"residual": None}]),
    ("code-step", "coded_residual", standing, [{"step": s} for s in (0.1, 0, -1.0, 1e300, Raw("1e-400"))]),
    ("code-step", "chain", conv_consumer, [{"step": 1.0}]),
    ("form", "coded_residual", coded_emit, [{"residual_step": None}, {"residual": 0}]),
    ("shape", "coded_residual", coded_emit, [{"residual": 1}]),
    ("codes-unchanged", "coded_residual", max_consumer, [{"step": 1.0}]),
    ("codes-unchanged", "coded_residual", max_emit, [{"residual_step": 1.0}]),
    ("tensor-number", "coded_residual", coded_emit, [{"residual": -1}, {"residual": 99}]),
    ("read-unwritten", "coded_residual", coded_emit, [{"residual": 5}]),
    ("norm-pair", "preact_residual", conv_consumer, [{"pre_bias": None}, {"pre_scale": None}]),
    ("output-form", "chain", top, [{"outputs": [1]}]),
    ("outputs", "chain", top, [{"outputs": []}]),
]
# The rest of them, for which something is done.
ACTIONS: list[tuple[str, str, Callable[[Body], object]]] = [
    ("repeated-key", "chain", lambda b: b.update(arrays=Pairs([*b["arrays"].items()] * 2))),
    ("version", "chain", lambda b: b.pop("version")),
    ("missing-key", "chain", lambda b: conv(b).pop("stride")),
    ("missing-key", "chain", lambda b: b.pop("inputs")),
    ("op", "chain", lambda b: conv(b).pop("op")),
    ("count", "one_pixel", many_arrays),
    ("name", "chain", lambda b: b["arrays"].update({"": bias(b)})),
    ("read-unwritten", "chain", lambda b: b["steps"].reverse()),
    ("select-channels", "selected_streams", too_many_channels),
    ("signed-padding", "chain", signed_codes),
    ("accumulator", "imagenet_stem", wide_linear),
    ("code-step", "coded_residual", signed_standing),
    ("code-step", "coded_residual", narrow_standing),
    ("outputs", "chain", lambda b: b.update(outputs=b["outputs"] * 2)),
    ("never-written", "chain", lambda b: b["tensors"].append(dict(codes(b)))),
]


def breaches() -> Iterator[tuple[str, Mutant]]:
    """The rule, and a mutant that breaks it before any other."""
    for rule, case, where, changes in VALUES:
        for change in changes:
            yield rule, _mutant(case, lambda body, put=where, what=change: put(body).update(what), f"{rule}: {change}")
    for rule, case, action in ACTIONS:
        yield rule, _mutant(case, action, rule)
    text, blob = source(1)
    yield "text-size", Mutant(text.encode() + b" " * (MAX_TEXT + 1 - len(text)), blob, "text-size")
    for case in ("chain", "preact_residual", "imagenet_stem"):
        text, blob = source(SOURCES.index(case))
        damaged = blob.clone()
        damaged[planes(json.loads(text))["offset"] + 3] = 0x80  # bit 31 of three channels
        yield "unused-bits", Mutant(text.encode(), damaged, f"unused-bits of {case}")


def _mutant(case: str, change: Callable[[Body], object], what: str) -> Mutant:
    text, blob = source(SOURCES.index(case))
    body = json.loads(text)
    change(body)
    return Mutant(dump(body).encode("utf-8", "surrogatepass"), blob, what)
