"""CIFAR-100 (Krizhevsky 2009) from a .npz file or from the folder torchvision unpacks, without general unpickling."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lbs.data.image_data import ImageData, from_arrays
from lbs.data.npz import read_npz
from lbs_kernels import files
from lbs_kernels.errors import DataError

# The statistics most published CIFAR-100 weights were trained with.
MEAN = (0.5070, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2761)
FOLDER = "cifar-100-python"
SIZE = 32
CLASSES = 100


def cifar100(path: str | Path) -> ImageData:
    """CIFAR-100 from a .npz file (see `from_npz`), or a folder that is or holds `cifar-100-python`.

    Raises DataError for anything missing, damaged or of another shape.
    """
    path = Path(path)
    if path.is_dir():
        arrays, classes = read_python_layout(path)
    else:
        arrays, classes = read_npz(path), tuple(str(i) for i in range(CLASSES))
    for key in ("train_x", "test_x"):
        if arrays[key].shape[1:] != (SIZE, SIZE, 3):
            raise DataError(f"{path}: {key} is {arrays[key].shape}; CIFAR-100 images are [N, {SIZE}, {SIZE}, 3]")
    return from_arrays("cifar100", arrays, classes=classes, mean=MEAN, std=STD)


def is_python_layout(path: Path) -> bool:
    """Whether the folder is `cifar-100-python` or holds it."""
    return (path / FOLDER).is_dir() or (path / "train").is_file()


def read_python_layout(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Arrays train_x, train_y, test_x, test_y and the class names of torchvision's folder."""
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        content = load_plain_pickle(folder / part)
        pixels, labels = _field(folder / part, content, "data"), _field(folder / part, content, "fine_labels")
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != 3 * SIZE * SIZE:
            shape = getattr(pixels, "shape", type(pixels).__name__)
            raise DataError(f"{folder / part}: 'data' is {shape}; it must be uint8 [N, {3 * SIZE * SIZE}]")
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < CLASSES for label in labels):
            raise DataError(f"{folder / part}: 'fine_labels' must be a list of integers from 0 to {CLASSES - 1}")
        arrays[f"{part}_x"] = pixels.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
        arrays[f"{part}_y"] = np.array(labels, dtype=np.int64)
    names = _field(folder / "meta", load_plain_pickle(folder / "meta"), "fine_label_names")
    if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
        raise DataError(f"{folder / 'meta'}: 'fine_label_names' must be a list of strings")
    return arrays, tuple(name.decode(errors="replace") if isinstance(name, bytes) else name for name in names)


def _field(path: Path, content: Any, key: str) -> Any:
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; a dictionary with {key!r} is needed")
    for name in (key, key.encode()):
        if name in content:
            return content[name]
    raise DataError(f"{path} has no entry {key!r}; it holds {sorted(map(str, content))}")


class _Array:
    """Stands in for an array while its pickle is read; holds the bytes of a uint8 array and nothing else."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)) or order not in ("C", "F"):
            raise pickle.UnpicklingError("an array that is not plain uint8")
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order=order)
        return self


class _Dtype:
    """Stands in for numpy.dtype; only unsigned bytes pass."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}, only unsigned bytes are read")

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment mean nothing for single bytes."""


def _reconstruct(*_arguments: Any) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """How numpy writes arrays in protocol 5."""
    return _Array().fill(data, dtype, shape, order)


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes in protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _PlainUnpickler(pickle.Unpickler):
    """Builds bytes, text, numbers, lists, dictionaries and uint8 arrays; every other name is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the name {module}.{name}, which a CIFAR-100 file has no need of")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("a reference to an object outside the file")


def _check_memo(written: bytes) -> None:
    """Refuse numbers of remembered objects that no pickle of this length needs: their table would fill the memory."""
    for code, argument, _ in pickletools.genops(io.BytesIO(written)):
        if code.name.endswith("PUT") and int(argument or 0) > len(written):
            raise pickle.UnpicklingError(f"it remembers an object as number {argument}")


def load_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain values and uint8 arrays; no code of the file's choosing is imported or run.

    Raises DataError for a missing or damaged file and for any other content.
    """
    if not path.is_file():
        raise DataError(f"no file {path}; a {FOLDER} folder holds train, test and meta")
    try:
        written = files.read_regular(path)
        _check_memo(written)
        content = _PlainUnpickler(io.BytesIO(written), encoding="bytes").load()
    # A damaged pickle can fail in any of these ways; what it says of itself is in the message.
    except (
        pickle.UnpicklingError,
        OSError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        MemoryError,
        UnicodeError,
    ) as error:
        raise DataError(f"{path} is not a CIFAR-100 pickle: {error}; unpack the original archive again") from error
    if isinstance(content, dict):
        return {key: value.value if isinstance(value, _Array) else value for key, value in content.items()}
    return content
