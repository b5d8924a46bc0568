"""A reader of packed networks written from docs/format.md alone: numpy and the standard library, nothing of lbs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

F32 = np.float32


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once to float32: the float64 sum is rounded to odd first."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    even = (total.view(np.int64) & 1) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even, np.nextafter(total, toward), total).astype(F32)


def round_stream(y: np.ndarray, dtype: str) -> np.ndarray:
    """y as the stream type stores it, as float32."""
    if dtype == "float32":
        return y
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return y.astype(np.float16).astype(F32)
    bits = y.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(F32)


def unpack(planes: np.ndarray, channels: int) -> np.ndarray:
    """Codes int64 [..., C] of planes int32 [bits, ..., CW]."""
    bits = (planes.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    flat = bits.reshape(*planes.shape[:-1], -1)
    assert not flat[..., channels:].any()
    return sum(flat[p, ..., :channels].astype(np.int64) << p for p in range(len(planes)))


def read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a file, its digest checked."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "lbs-packed"
    assert metadata["version"] in ("1", "2", "3", "4")
    blank = raw.replace(f'"digest":"{metadata["digest"]}"'.encode(), f'"digest":"{"0" * 64}"'.encode(), 1)
    assert hashlib.sha256(blank).hexdigest() == metadata["digest"]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kind = {"F32": "<f4", "I32": "<i4", "I64": "<i8"}[entry["dtype"]]
        tensors[name] = np.frombuffer(data[begin:end], kind).reshape(entry["shape"])
    return tensors, metadata


def lay_blob(program: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """The blob of a program from its arrays by key."""
    blob = bytearray(sum(-(-array.nbytes // 64) * 64 for array in arrays.values()))
    for key, spec in program["arrays"].items():
        assert arrays[key].shape == tuple(spec["shape"])
        blob[spec["offset"] : spec["offset"] + arrays[key].nbytes] = arrays[key].tobytes()
    return bytes(blob)


def run_file(path: Path, images: np.ndarray) -> np.ndarray:
    """What a network that is packed whole computes."""
    tensors, metadata = read_file(path)
    regions = {}
    for index in range(sum(key.startswith("program") for key in metadata)):
        prefix, text = f"region{index}.", metadata[f"program{index}"]
        arrays = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        regions[f"region{index}"] = Stranger(text, lay_blob(json.loads(text), arrays))
    values: dict[str, Any] = {}

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, body),) = value.items()
        return values[body] if kind == "node" else tuple(decode(item) for item in body)

    for node in json.loads(metadata["graph"])["nodes"]:
        args = decode(node["args"])
        if node["op"] == "output":
            return args[0]
        if node["op"] == "placeholder":
            values[node["name"]] = images
        elif node["op"] == "call_module":
            inputs = [x if x.ndim == 4 else x[:, :, None, None] for x in args]
            values[node["name"]] = regions[node["target"]](inputs)
        else:
            assert node["target"] == "operator.getitem"
            values[node["name"]] = args[0][args[1]]
    raise AssertionError("a graph without an output")


def power(h: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k = np.rint((h + low) * F32(1.44269504))
    r = ((h - k * F32(0.693359375)) - k * F32(-0.000212194442)) + low
    e = np.polyval([F32(c) for c in (0.00139463006, 0.00836651865, 0.0416662879, 0.166665435, 0.5)], r)
    return ((k.astype(np.int32) + 127) << 23).view(F32), (r * r) * e + r


def exp(h: np.ndarray, low: np.ndarray | float = 0) -> np.ndarray:
    s, p = power(h, F32(low))
    return s * p + s


def expm1(h: np.ndarray) -> np.ndarray:
    s, p = power(h, F32(0))
    return s * p + (s - F32(1))


def gelu(x: np.ndarray, value: np.ndarray) -> np.ndarray:
    a = np.fmin(np.fmax(x, -x), F32(12.5))
    c = np.rint(a * F32(16)) * F32(0.0625)
    t = F32(1) / (a * F32(0.25) + F32(1))
    tail = [0.0997532234, 0.0993970037, 0.0962540731, 0.0687736273, 0.0954482481, -0.00280956761, 0.0462159291]
    tail = np.polyval([F32(c) for c in [*tail, 0.0388888195, -0.0575736649, 0.0156523045][::-1]], t)
    return np.fmax(x, F32(0)) - a * (exp((c * c) * F32(-0.5), ((a - c) * (a + c)) * F32(-0.5)) * (t * tail))


def gelu_tanh(x: np.ndarray, value: np.ndarray) -> np.ndarray:
    x = np.fmax(x, F32(-9.5))
    c = np.fmin(x, F32(9.5))
    return x / (exp(-(c * ((c * c) * F32(0.0713548163) + F32(1.59576912)))) + F32(1))


def mish(x: np.ndarray, value: np.ndarray) -> np.ndarray:
    x = np.fmax(x, F32(-80))
    e = exp(np.fmin(x, F32(20)))
    n = e * (e + F32(2))
    return x * (n / (n + F32(2)))


def leaky_relu(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    return np.fmax(x, F32(0)) + slope * np.fmax(np.fmin(x, F32(0)), np.finfo(F32).min)


def tanh(x: np.ndarray, value: np.ndarray) -> np.ndarray:
    x = np.fmin(np.fmax(x, F32(-10)), F32(10))
    e = expm1(x + x)
    return e / (e + F32(2))


def elu(x: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.fmax(x, F32(0)) + alpha * expm1(np.fmax(np.fmin(x, F32(0)), F32(-20)))


def sigmoid(x: np.ndarray, value: np.ndarray) -> np.ndarray:
    return F32(1) / (exp(-np.fmin(np.fmax(x, F32(-80)), F32(80))) + F32(1))


def silu(x: np.ndarray, value: np.ndarray) -> np.ndarray:
    x = np.fmax(x, F32(-80))
    return x / (exp(-np.fmin(x, F32(80))) + F32(1))


def hardsigmoid(x: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.fmin(np.fmax(x + F32(3), F32(0)), F32(6)) * F32(0.166666672)


def hardswish(x: np.ndarray, value: np.ndarray) -> np.ndarray:
    x = np.fmax(x, F32(-3))
    return x * (np.fmin(x + F32(3), F32(6)) * F32(0.166666672))


FUNCTIONS = {
    f.__name__: f for f in (elu, gelu, gelu_tanh, hardsigmoid, hardswish, leaky_relu, mish, sigmoid, silu, tanh)
}


class Stranger:
    """One program: `Stranger(text, blob)(images)` gives its outputs; `tensors` holds everything computed."""

    def __init__(self, text: str, blob: bytes) -> None:
        self.program: dict[str, Any] = json.loads(text)
        assert self.program["version"] in (1, 2, 3, 4, 5)
        digest = self.program.get("digest", "")
        assert digest in ("", hashlib.sha256(blob).hexdigest())
        self.blob = blob
        self.tensors: dict[int, np.ndarray] = {}

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray]:
        program = self.program
        self.tensors = {i: x.transpose(0, 2, 3, 1) for i, x in zip(program["inputs"], images, strict=True)}
        for index, x in self.tensors.items():
            assert x.dtype == program["tensors"][index].get("dtype", "float32")
        for step in program["steps"]:
            if step["op"] == "select":
                y, emit = self.select(step), step["emit"]
                if y.dtype == np.uint8:
                    self.tensors[emit["consumers"][0]["tensor"]] = y
                else:
                    self.emit(emit, y)
                continue
            x, spec = self.tensors[step["input"]], program["tensors"][step["input"]]
            if step["op"] == "quantpack":
                self.emit(step["emit"], self.affine(step, x.astype(F32)))
            elif step["op"] == "resize":
                self.emit(step["emit"], self.resize(step, x))
            elif step["op"] == "pool" and step["kind"] == "max" and spec["form"] == "codes":
                self.tensors[step["emit"]["consumers"][0]["tensor"]] = self.pool_max(step, x)
            elif step["op"] == "pool":
                pool = {"max": self.pool_max, "mean": self.pool_mean, "average": self.pool_average}[step["kind"]]
                self.emit(step["emit"], pool(step, x))
            else:
                self.emit(step["emit"], self.affine(step, self.integer_layer(step, x, spec).astype(F32)))
        results = []
        for index in program["outputs"]:
            y = self.tensors[index]
            results.append(y[:, 0, 0, :] if program["tensors"][index].get("flat") else y.transpose(0, 3, 1, 2))
        return results

    def array(self, key: str) -> np.ndarray:
        spec = self.program["arrays"][key]
        count = int(np.prod(spec["shape"]))
        return np.frombuffer(self.blob, f"<{spec['dtype'][0]}4", count, spec["offset"]).reshape(spec["shape"])

    def affine(self, step: dict[str, Any], x: np.ndarray) -> np.ndarray:
        if step.get("multiplier") is None:
            return x
        return fma(x, self.array(step["multiplier"]), self.array(step["bias"]))

    def integer_layer(self, step: dict[str, Any], x: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
        kernel, stride = step.get("kernel", [1, 1]), step.get("stride", [1, 1])
        padding, dilation, groups = step.get("padding", [0, 0]), step.get("dilation", [1, 1]), step.get("groups", 1)
        depth = spec["channels"] // groups
        weight = unpack(self.array(step["planes"]), depth)  # [O, T, C]
        if step.get("w_grid", "odd") == "odd":
            weight = 2 * weight - (2 ** step["w_bits"] - 1)
        else:
            weight = weight - 2 ** (step["w_bits"] - 1)
        if spec.get("signed"):
            value = 2 * x.astype(np.int64) - (2 ** spec["bits"] - 1)
        else:
            value = x.astype(np.int64) - spec.get("zero", 0)
        value = np.pad(value, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)))
        size = [(value.shape[1 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
        filters = len(weight) // groups
        acc = np.zeros((len(x), *size, len(weight)), np.int64)
        for row in range(kernel[0]):
            for column in range(kernel[1]):
                r, c = row * dilation[0], column * dilation[1]
                window = value[:, r : r + stride[0] * size[0] : stride[0], c : c + stride[1] * size[1] : stride[1]]
                window = window[:, : size[0], : size[1]]
                for g in range(groups):
                    taps = weight[g * filters : (g + 1) * filters, row * kernel[1] + column]
                    acc[..., g * filters : (g + 1) * filters] += window[..., g * depth : (g + 1) * depth] @ taps.T
        assert np.abs(acc).max(initial=0) < 2**31
        return acc

    def select(self, step: dict[str, Any]) -> np.ndarray:
        inputs, (rows, columns) = [self.tensors[index] for index in step["inputs"]], step.get("repeat", [1, 1])
        height, width = inputs[0].shape[1] * rows, inputs[0].shape[2] * columns
        if tuple(step.get("size", (0, 0))) != (0, 0):
            return self.moved(step, inputs)
        h, w = np.ogrid[:height, :width]
        whole = [x[:, h // (height // x.shape[1]), w // (width // x.shape[2])] for x in inputs]
        y = np.concatenate(whole, axis=3)
        return y[..., step["channels"]] if step.get("channels") else y

    def resize(self, step: dict[str, Any], x: np.ndarray) -> np.ndarray:
        y = x.astype(F32)
        for axis in (2, 1):
            last, count = y.shape[axis] - 1, step["size"][axis - 1]
            p = np.clip(np.arange(count) * step["scale"][axis - 1] + step["offset"][axis - 1], 0.0, last)
            k = np.floor(p).astype(int)
            w = (p - k).astype(F32).reshape(-1, *[1] * (3 - axis))
            y = np.take(y, k, axis) * (F32(1) - w) + np.take(y, np.minimum(k + 1, last), axis) * w
        return y

    @staticmethod
    def moved(step: dict[str, Any], inputs: list[np.ndarray]) -> np.ndarray:
        (height, width), (rows, columns), stride = (step[key] for key in ("size", "block", "stride"))
        holders = [(x, k, i) for i, x in enumerate(inputs) for k in range(x.shape[3])]
        chosen = [holders[c] for c in step["channels"]] or holders
        each = len(chosen) // (rows * columns)
        y = np.empty((len(inputs[0]), height, width, each), inputs[0].dtype)
        for h, w, c in np.ndindex(height, width, each):
            x, k, i = chosen[(h % rows * columns + w % columns) * each + c]
            top, left = (step[key][i] if step[key] else 0 for key in ("top", "left"))
            y[:, h, w, c] = x[:, top + stride[0] * (h // rows), left + stride[1] * (w // columns), k]
        return y

    def pool_max(self, step: dict[str, Any], x: np.ndarray) -> np.ndarray:
        kernel, stride, padding = (
            step.get(k, d) for k, d in (("kernel", [1, 1]), ("stride", [1, 1]), ("padding", [0, 0]))
        )
        lowest = -np.inf if x.dtype == F32 else 0
        x = np.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)), constant_values=lowest)
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(1, 2))[:, :: stride[0], :: stride[1]]
        return windows.max(axis=(-2, -1))

    def pool_average(self, step: dict[str, Any], x: np.ndarray) -> np.ndarray:
        kernel, (rows, columns), (down, across) = step["kernel"], step["stride"], step["padding"]
        x = np.pad(x, ((0, 0), (down,) * 2, (across,) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(1, 2))[:, ::rows, ::columns]
        taps = windows.reshape(*windows.shape[:4], -1)
        total = taps[..., 0].copy()
        for index in range(1, taps.shape[-1]):
            total += taps[..., index]
        return total * F32(1 / taps.shape[-1])

    def pool_mean(self, step: dict[str, Any], x: np.ndarray) -> np.ndarray:
        pixels = x.reshape(len(x), -1, x.shape[3])
        total = pixels[:, 0].copy()
        for index in range(1, pixels.shape[1]):
            total += pixels[:, index]
        return (total * F32(1 / pixels.shape[1]))[:, None, None]

    def activate(self, activation: dict[str, Any], y: np.ndarray) -> np.ndarray:
        kind = activation["kind"]
        if kind is None:
            return y
        if kind == "prelu":
            return FUNCTIONS["leaky_relu"](y, self.array(activation["slope"]))
        return FUNCTIONS[kind](y, F32(activation.get("value", 0.0)))

    def emit(self, emit: dict[str, Any], y: np.ndarray) -> None:
        activation = emit.get("activation") or {"kind": None}
        if activation.get("first"):
            y = self.activate(activation, y)
        if emit.get("gate") is not None:
            y = y * self.tensors[emit["gate"]]
        if emit.get("residual_step") is not None:
            y = y + self.decoded(emit["residual"], emit["residual_step"])
        elif emit.get("residual") is not None:
            y = y + self.tensors[emit["residual"]]
        if not activation.get("first"):
            y = self.activate(activation, y)
        if emit.get("low") is not None:
            y = np.fmax(y, F32(emit["low"]))
        if emit.get("high") is not None:
            y = np.fmin(y, F32(emit["high"]))
        if emit.get("stream") is not None:
            y = round_stream(y, self.program.get("stream_dtype", "float32"))
            self.tensors[emit["stream"]] = y
        for consumer in emit.get("consumers", []):
            n = 2 ** consumer["bits"] - 1
            u = y
            if consumer.get("pre_scale") is not None:
                u = fma(y, self.array(consumer["pre_scale"]), self.array(consumer["pre_bias"]))
            if consumer.get("relu"):
                u = np.fmax(u, F32(0))
            t = u * F32(consumer["scale"])
            if consumer.get("signed"):
                t = t + F32(n / 2)
            q = np.fmin(np.fmax(np.rint(t) + F32(consumer.get("zero", 0)), F32(0)), F32(n))
            self.tensors[consumer["tensor"]] = q.astype(np.uint8)
            if consumer.get("step") is not None:
                y = self.decoded(consumer["tensor"], consumer["step"])

    def decoded(self, index: int, step: float) -> np.ndarray:
        zero = self.program["tensors"][index].get("zero", 0)
        return (self.tensors[index].astype(F32) - F32(zero)) * F32(step)
