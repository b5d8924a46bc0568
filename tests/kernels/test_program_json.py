from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from program_breaches import wide_linear
from programs import CASES, chain, preact_residual, random_inputs, random_program

from lbs_kernels.errors import FormatError
from lbs_kernels.program.checks import check_planes, check_program
from lbs_kernels.program.rules import MAX_DEPTH
from lbs_kernels.program.steps import Program
from lbs_kernels.program.text import parse_json, read_program
from lbs_kernels.run.loaded import run_program


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_round_trip(case: Callable[[int], tuple[Program, torch.Tensor]]) -> None:
    program, blob = case(3)
    assert read_program(program.to_json(), blob.numel()) == program


@pytest.mark.parametrize("seed", range(8))
def test_round_trip_of_random_programs(seed: int) -> None:
    program, blob = random_program(seed)
    assert read_program(program.to_json(), blob.numel()) == program


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_are_read_and_written_without_the_additions(version: int) -> None:
    program, blob = preact_residual(3)
    old = replace(program, version=version)
    text = old.to_json()
    assert any("dtype" in spec for spec in json.loads(text)["tensors"]) is (version > 1)
    affine = {"multiplier", "bias"} if version > 1 else set()
    assert json.loads(text)["steps"][0].keys() == {"op", "name", "input", "emit", *affine}
    assert json.loads(text)["steps"][0]["emit"].keys() == {"residual", "low", "high", "stream", "consumers"}
    assert read_program(text, blob.numel()) == old
    assert "w_grid" not in conv(json.loads(text))
    images = random_inputs(program, 2, 1)
    for backend in ("reference", "auto"):
        new = run_program(program, blob, images, backend=backend)
        for one, other in zip(run_program(text, blob, images, backend=backend), new, strict=True):
            assert torch.equal(one, other)


def test_version_3_moves_no_pixels() -> None:
    program, blob = CASES["concatenated"](0)
    old = replace(program, version=3)
    assert '"repeat"' in old.to_json()
    assert not any(f'"{key}"' in old.to_json() for key in ("size", "block", "top", "left"))
    again = read_program(old.to_json(), blob.numel())
    assert again == old
    with pytest.raises(FormatError, match="moves pixels in a program of version 3"):
        read_program(CASES["moved"](0)[0].to_json().replace('"version":5', '"version":3'))


def test_version_4_has_no_residuals_of_codes() -> None:
    program, blob = CASES["moved"](0)
    old = replace(program, version=4)
    assert not any(f'"{key}"' in old.to_json() for key in ("residual_step", "step"))
    assert read_program(old.to_json(), blob.numel()) == old
    with pytest.raises(FormatError, match="has a step of codes in a program of version 4; write it as version 5"):
        read_program(CASES["coded_residual"](0)[0].to_json().replace('"version":5', '"version":4'))


def test_version_2_has_no_grid_of_weights() -> None:
    program, blob = preact_residual(3)
    old = replace(program, version=2)
    text = json.loads(old.to_json())
    assert "w_grid" not in conv(text)
    assert "dtype" in text["tensors"][0]
    assert read_program(old.to_json(), blob.numel()) == old


def test_what_has_a_default_may_be_left_out() -> None:
    program, blob = preact_residual(0)
    text = json.loads(program.to_json())
    for spec in text["tensors"]:
        for key in [k for k in ("bits", "zero", "signed", "flat", "dtype") if spec[k] in (0, False, "float32")]:
            del spec[key]
    for step in text["steps"]:
        step["emit"] = {key: value for key, value in step["emit"].items() if value is not None}
    images = random_inputs(program, 2, 1)
    expected = run_program(program, blob, images, backend="reference")
    for one, other in zip(run_program(json.dumps(text), blob, images), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "text",
    ['{{"a": "[[{{", "b": {0}}}', '{{"\\\\": "\\"", "b": {0}}}', '[{{"a": [{{}}, []]}}, {0}]'],
)
def test_lists_in_one_another_have_a_limit_wherever_they_lie(text: str) -> None:
    """Brackets in strings count for nothing, and those that are closed no longer."""
    inside = MAX_DEPTH - 1
    parse_json(text.format("[" * inside + "]" * inside), "it")
    for depth in (MAX_DEPTH, 5000):
        with pytest.raises(
            FormatError, match=r"it is not JSON: nested too deeply at character \d+; at most 64"
        ) as found:
            parse_json(text.format("[" * depth + "]" * depth), "it")
        assert found.value.rule == "json"
    with pytest.raises(FormatError, match="repeats the key 'a'"):  # told first
        parse_json('[{"a": 1, "a": 2}, ' + "[" * MAX_DEPTH, "it")
    with pytest.raises(FormatError, match="it is not JSON: Expecting value: line 1 column 2 "):
        parse_json("[," + "[" * MAX_DEPTH, "it")


def body() -> tuple[dict[str, Any], int]:
    program, blob = preact_residual(0)
    return json.loads(program.to_json()), blob.numel()


def conv(text: dict[str, Any], which: int = 0) -> dict[str, Any]:
    return [step for step in text["steps"] if step["op"] == "bitconv2d"][which]


def consumer(text: dict[str, Any]) -> dict[str, Any]:
    return text["steps"][0]["emit"]["consumers"][0]


def first_array(text: dict[str, Any]) -> dict[str, Any]:
    return text["arrays"][conv(text)["planes"]]


def code_tensor(text: dict[str, Any]) -> dict[str, Any]:
    return text["tensors"][consumer(text)["tensor"]]


def signed_codes(text: dict[str, Any]) -> None:
    for item in (consumer(text), code_tensor(text)):
        item.update(signed=True, zero=0)


# What is done to a good program -> what the message says.
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer version": (lambda t: t.update(version=6), "version 6; this library reads 1 to 5"),
    "no version": (lambda t: t.pop("version"), "version None"),
    "version is true": (lambda t: t.update(version=True), "version True"),
    "unknown key": (lambda t: t.update(extra=1), "unknown key 'extra'"),
    "unknown key deep": (lambda t: consumer(t).update(shift=1), r"steps\[0\]\.emit\.consumers\[0\] has an unknown key"),
    "missing key": (lambda t: conv(t).pop("stride"), "lacks the key 'stride'"),
    "unknown step": (lambda t: conv(t).update(op="fft"), "op is 'fft'; this library runs"),
    "step is a list": (lambda t: t["steps"].append([]), "JSON list; expected a dict"),
    "op is a list": (lambda t: conv(t).update(op=[]), r"op is \[\]"),
    "tensors is null": (lambda t: t.update(tensors=None), "JSON NoneType"),
    "channels is text": (lambda t: code_tensor(t).update(channels="3"), "channels is '3'; expected int"),
    "channels is a float": (lambda t: code_tensor(t).update(channels=3.0), "channels is 3.0; expected int"),
    "channels is true": (lambda t: code_tensor(t).update(channels=True), "channels is True; expected int"),
    "negative height": (lambda t: code_tensor(t).update(height=-8), "height = -8; sizes are 1 to"),
    "zero width": (lambda t: code_tensor(t).update(width=0), "width = 0; sizes are 1 to"),
    "huge channels": (lambda t: code_tensor(t).update(channels=10**30), "sizes are 1 to"),
    "huge product": (lambda t: code_tensor(t).update(channels=2**20, height=2**20), "elements; at most"),
    "nine bits": (lambda t: code_tensor(t).update(bits=9), "9 bits; codes have 1 to 8"),
    "bits of a stream": (lambda t: t["tensors"][-1].update(bits=4), "only codes have them"),
    "zero beyond bits": (lambda t: code_tensor(t).update(zero=256), "zero = 256; it is a code"),
    "negative zero": (lambda t: code_tensor(t).update(zero=-1), "zero = -1"),
    "form": (lambda t: code_tensor(t).update(form="planes"), "form is 'planes'"),
    "flat of many pixels": (
        lambda t: t["tensors"][t["outputs"][0]].update(flat=True),
        "is flat; only a stream of 1 x 1",
    ),
    "bytes of codes": (lambda t: code_tensor(t).update(dtype="uint8"), "is a codes of uint8; only images have a dtype"),
    "image of another dtype": (lambda t: t["tensors"][0].update(dtype="int8"), "dtype is 'int8'"),
    "dtype is a list": (lambda t: t["tensors"][0].update(dtype=[]), r"dtype is \[\]"),
    "multiplier alone": (lambda t: t["steps"][0].update(multiplier="m"), "only one of multiplier and bias"),
    "multiplier that is missing": (lambda t: t["steps"][0].update(multiplier="m", bias="m"), "needs array 'm'"),
    "multiplier of other channels": (
        lambda t: t["steps"][0].update(multiplier=conv(t)["bias"], bias=conv(t)["bias"]),
        r"float32 \(16,\); the step needs float32 \(3,\)",
    ),
    "multiplier of integers": (
        lambda t: t["steps"][0].update(multiplier=conv(t)["planes"], bias=conv(t)["planes"]),
        "the step needs float32",
    ),
    "multiplier of a maximum": (lambda t: t["steps"][-2].update(multiplier="m"), "unknown key 'multiplier'"),
    "bytes in version 1": (
        lambda t: (t["tensors"][0].update(dtype="uint8"), t.update(version=1)),
        "image image0 is uint8 in a program of version 1",
    ),
    "multiplier in version 1": (
        lambda t: (t["steps"][0].update(multiplier="m", bias="m"), t.update(version=1)),
        "step 'step0' has a multiplier or bias in a program of version 1",
    ),
    "unnamed": (lambda t: code_tensor(t).update(name=""), "1 to 256 printable characters"),
    "name breaks utf-8": (lambda t: code_tensor(t).update(name="\ud800"), "printable characters"),
    "input is codes": (lambda t: t.update(inputs=[consumer(t)["tensor"]]), "a program is given images"),
    "input twice": (lambda t: t.update(inputs=[0, 0]), "a second time"),
    "input out of range": (lambda t: t.update(inputs=[-1]), "an input is tensor -1"),
    "no inputs": (lambda t: t.update(inputs=[]), "before it is written"),
    "no outputs": (lambda t: t.update(outputs=[]), "returns at least one tensor"),
    "output twice": (lambda t: t.update(outputs=t["outputs"] * 2), "each once"),
    "output is codes": (lambda t: t.update(outputs=[consumer(t)["tensor"]]), "a program returns streams"),
    "output out of range": (lambda t: t.update(outputs=[99]), "an output is tensor 99"),
    "reads a missing tensor": (lambda t: conv(t).update(input=99), "is tensor 99; the program has"),
    "reads a negative tensor": (lambda t: conv(t).update(input=-1), "is tensor -1"),
    "reads before writing": (lambda t: t["steps"].reverse(), "before it is written; order the steps"),
    "residual before writing": (
        lambda t: conv(t)["emit"].update(residual=len(t["tensors"]) - 1),
        "before it is written",
    ),
    "residual of codes": (lambda t: conv(t)["emit"].update(residual=1), "expected stream"),
    "two writers": (
        lambda t: conv(t, 3)["emit"].update(stream=conv(t)["emit"]["stream"]),
        "a second time; each is written once",
    ),
    "writes its input": (lambda t: consumer(t).update(tensor=0), "writes tensor 0 .* a second time"),
    "never written": (lambda t: t["tensors"].append(dict(code_tensor(t))), "is never written"),
    "writes nothing": (lambda t: t["steps"][0]["emit"].update(consumers=[]), "writes nothing"),
    "conv of a stream": (lambda t: conv(t, 1).update(input=conv(t)["emit"]["stream"]), "expected codes"),
    "other bits": (lambda t: consumer(t).update(bits=4), r"\(bits, zero, signed\) = \(4, 117, False\)"),
    "other zero": (lambda t: consumer(t).update(zero=5), r"\(8, 5, False\)"),
    "padded signed codes": (signed_codes, "pads signed codes"),
    "infinite scale": (lambda t: consumer(t).update(scale=1e999), "numbers are finite"),
    "scale beyond floats": (lambda t: consumer(t).update(scale=10**400), "beyond the range of a float"),
    "scale is no float32": (lambda t: consumer(t).update(scale=0.1), "exact in float32"),
    "scale beyond float32": (lambda t: consumer(t).update(scale=1e300), "exact in float32"),
    "negative scale": (lambda t: consumer(t).update(scale=-1.0), "scale -1.0; it is positive"),
    "low above high": (lambda t: conv(t)["emit"].update(low=2.0, high=1.0), "clamps to 2.0 .. 1.0"),
    "low is no float32": (lambda t: conv(t)["emit"].update(low=0.1), "low = 0.1; bounds are exact float32"),
    "half a norm": (
        lambda t: conv(t)["emit"]["consumers"][0].update(pre_bias=None),
        "only one of pre_scale and pre_bias",
    ),
    "kernel of three": (lambda t: conv(t).update(kernel=[3, 3, 3]), "has 3 items; expected 2"),
    "zero kernel": (lambda t: conv(t).update(kernel=[0, 3]), r"kernel \(0, 3\); sizes are 1 to"),
    "zero stride": (lambda t: conv(t).update(stride=[0, 1]), r"stride \(0, 1\)"),
    "negative padding": (lambda t: conv(t).update(padding=[-1, 1]), r"padding \(-1, 1\); it is 0 to the extent"),
    "huge padding": (lambda t: conv(t).update(padding=[10**6, 1]), "it is 0 to the extent"),
    "huge dilation": (lambda t: conv(t).update(dilation=[10**9, 1]), "dilation .* sizes are 1 to"),
    "window beyond the image": (lambda t: conv(t).update(dilation=[9, 9]), "turns 8 x 8 pixels into -8 x -8"),
    "another stride": (lambda t: conv(t).update(stride=[2, 2]), "the step computes"),
    "zero groups": (lambda t: conv(t).update(groups=0), "0 groups of 3 channels"),
    "groups do not divide the filters": (lambda t: conv(t).update(groups=3), "16 filters in 3 groups"),
    "groups do not divide": (lambda t: conv(t).update(groups=2), "groups divide the channels"),
    "nine weight bits": (lambda t: conv(t).update(w_bits=9), "9 weight bits"),
    "other weight bits": (lambda t: conv(t).update(w_bits=4), "the step needs int32"),
    "missing array": (lambda t: conv(t).update(planes="nothing"), "needs array 'nothing'"),
    "planes are floats": (lambda t: first_array(t).update(dtype="float32"), "the step needs int32"),
    "array dtype": (lambda t: first_array(t).update(dtype="object"), "has dtype 'object'"),
    "array is flat": (lambda t: first_array(t).update(shape=[100]), "the step needs int32"),
    "array has five dimensions": (lambda t: first_array(t).update(shape=[1] * 5), "expected 1 to 4 sizes"),
    "array of negative size": (lambda t: first_array(t).update(shape=[-8, 16, 9, 1]), "expected 1 to 4 sizes"),
    "negative offset": (lambda t: first_array(t).update(offset=-64), "starts at byte -64"),
    "unaligned offset": (lambda t: first_array(t).update(offset=4), "multiples of 64"),
    "offset beyond the blob": (lambda t: first_array(t).update(offset=2**40), "the blob has"),
    "keeps more than all": (lambda t: conv(t).update(total_filters=15), "keeps 16 of 15 filters"),
    "short multiplier": (
        lambda t: t["arrays"][conv(t)["multiplier"]].update(shape=[15]),
        r"\(15,\); the step needs float32 \(16,\)",
    ),
    "accumulator overflow": (wide_linear, "33026 products"),
    "pool kind": (lambda t: t["steps"][-2].update(kind="median"), "kind is 'median'"),
    "windowed mean": (lambda t: t["steps"][-2].update(kernel=[2, 2]), "the mean is global"),
    "linear of many pixels": (lambda t: t["steps"][-1].update(input=conv(t)["input"]), "8 x 8 pixels; it needs one"),
    "stream dtype": (lambda t: t.update(stream_dtype="float64"), "stream_dtype is 'float64'"),
    "digest": (lambda t: t.update(digest="../../etc"), "64 hexadecimal digits"),
    "too many tensors": (lambda t: t.update(tensors=[t["tensors"][0]] * 70000), "70000 tensors; at most"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_refused(name: str) -> None:
    change, message = HOSTILE[name]
    text, blob_bytes = body()
    change(text)
    if name == "accumulator overflow":
        blob_bytes *= 100  # the planes must lie inside for the guard to speak
    with pytest.raises(FormatError, match=message):
        read_program(json.dumps(text), blob_bytes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "JSON list; expected an object"),
        ('{"version": 1, "version": 1}', "repeats the key 'version'"),
        ('{"version": NaN}', "holds NaN"),
        ('{"version": ' + "1" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_texts_that_are_no_program(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_program(text)


def test_arrays_must_end_inside_the_blob() -> None:
    program, _ = chain(0)
    last = max(spec.offset + spec.nbytes for spec in program.arrays.values())
    check_program(program, last)
    with pytest.raises(FormatError, match=f"the blob has {last - 1}"):
        check_program(program, last - 1)
    check_program(program)  # without a blob, nothing is said about its size


def test_a_maximum_of_codes_passes_them_unchanged() -> None:
    program, _ = CASES["imagenet_stem"](0)
    index = next(i for i, step in enumerate(program.steps) if step.op == "pool")
    step = program.steps[index]
    for changed in (
        replace(step.emit, low=0.0),
        replace(step.emit, consumers=(replace(step.emit.consumers[0], relu=True),)),
    ):
        steps = (*program.steps[:index], replace(step, emit=changed), *program.steps[index + 1 :])
        with pytest.raises(FormatError, match="one plain consumer"):
            check_program(replace(program, steps=steps))
    steps = (*program.steps[:index], replace(step, padding=(2, 1)), *program.steps[index + 1 :])
    with pytest.raises(FormatError, match="at most half of the kernel"):
        check_program(replace(program, steps=steps))


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    found = [path] if path else []
    for key, item in items:
        found += _leaves(item, (*path, key))
    return found


@pytest.mark.parametrize("seed", range(150))
def test_a_damaged_program_is_refused_or_runs(seed: int) -> None:
    """Replace one value by a nasty one: either FormatError, or a program that runs without touching foreign memory."""
    choice = random.Random(seed)
    program, blob = CASES[choice.choice(list(CASES))](seed)
    text = json.loads(program.to_json())
    *parents, last = choice.choice(_leaves(text))
    place = text
    for key in parents:
        place = place[key]
    nasty = [
        None,
        True,
        0,
        1,
        -1,
        2,
        3,
        8,
        31,
        33,
        64,
        2**31,
        2**63,
        -(2**31),
        0.5,
        1e38,
        1e-45,
        "",
        "x",
        [],
        [1, 1],
        {},
    ]
    place[last] = choice.choice(nasty)
    try:
        damaged = read_program(json.dumps(text), blob.numel())
        check_planes(damaged, blob)  # other channels leave bits of the planes unused
    except FormatError:
        return
    images = random_inputs(damaged, batch=1, seed=seed)
    for backend in ("reference", "auto"):
        outputs = run_program(replace(damaged, digest=""), blob, images, backend=backend)
        assert len(outputs) == len(damaged.outputs)
