"""One file of tensors and text: the safetensors layout, written and read with a digest over every byte.

    8 bytes     length of the header, little-endian
    header      JSON: tensor name -> {dtype, shape, data_offsets}, and "__metadata__": text -> text; padded with spaces
    data        the tensors, contiguous, row-major, little-endian, in the order of the header

The metadata entry `digest` is the sha256 of the whole file in which the 64 digits of the digest itself are "0". Any
safetensors library reads such a file; this reader also refuses what a damaged or hostile file may hold, before it
allocates anything from the numbers in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbs.run_folder import write_bytes
from lbs_kernels import files
from lbs_kernels.errors import CheckpointError

MAX_HEADER = 1 << 24  # a ResNet-152 has about 2^19; the values of one may take twenty times its bytes
MAX_TENSORS = 1 << 16
_LENGTH_BYTES = 8
_NO_DIGEST = "0" * 64
_META = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_container(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the file under a temporary name, flush it to the disk, rename.

    Raises:
        CheckpointError: a dtype the layout does not have, or a disk that is full or not writable; an old file stays.
    """
    # By size, so that every tensor lies aligned, then by name, so that a network has one file.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {_META: {**metadata, "digest": _NO_DIGEST}}
    chunks: list[bytes] = []
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name} is {tensor.dtype}, which safetensors does not store; convert it first")
        chunk = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        end = offset + len(chunk)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        chunks.append(chunk)
        offset = end
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    data = b"".join(chunks)
    digest = hashlib.sha256(head + data).hexdigest()
    write_bytes(path, head.replace(_digest_entry(_NO_DIGEST), _digest_entry(digest), 1) + data)


def read_container(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a file whose metadata say `format` = kind.

    Raises:
        CheckpointError: missing, truncated, damaged, foreign, of a newer version, or claiming what it does not hold.
    """
    try:
        with files.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise CheckpointError(
                    f"{path} has {size} bytes and claims a header of {length}; it is truncated or no packed network: "
                    "copy it again"
                )
            if length > MAX_HEADER:
                raise CheckpointError(f"{path} claims a header of {length} bytes; at most {MAX_HEADER} are read")
            text = file.read(length)
            entries, metadata = _parse(text, path)
            _check_kind(metadata, kind, version, path)
            _check_layout(entries, size - _LENGTH_BYTES - length, path)
            data = bytearray(file.read())  # the layout has just been compared with the file's size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; give the path of a packed network") from error
    _check_digest(prefix + text, data, metadata["digest"], path)
    return {name: _tensor(entry, data) for name, entry in entries.items()}, metadata


def _digest_entry(digest: str) -> bytes:
    return f'"digest":"{digest}"'.encode()


def _parse(text: bytes, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)  # of bytes, json would guess the encoding
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no packed network, its header is no JSON ({error}); copy it again") from error
    if not isinstance(header, dict) or not isinstance(header.get(_META), dict):
        raise CheckpointError(f"{path} is no packed network, its header has no metadata; write one with save(path)")
    metadata = header.pop(_META)
    digest = metadata.get("digest")
    if not all(isinstance(value, str) for value in metadata.values()) or not digest or not digest.isascii():
        raise CheckpointError(f"{path} is no packed network: its metadata are not texts with a digest")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path} claims {len(header)} tensors; at most {MAX_TENSORS} are read")
    return header, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key comes twice")
    return result


def _check_kind(metadata: dict[str, str], kind: str, version: int, path: Path) -> None:
    if metadata.get("format") != kind:
        raise CheckpointError(
            f"{path} has format {metadata.get('format')!r}, expected {kind!r}; give a file written by PackedModel.save"
        )
    found = metadata.get("version", "")
    if not found.isascii() or not found.isdigit() or len(found) > 9:
        raise CheckpointError(f"{path} has version {found[:20]!r}, which is no number; it is damaged, copy it again")
    if not 1 <= int(found) <= version:
        raise CheckpointError(f"{path} has version {found}; this release reads 1 to {version}: upgrade lbs")


def _check_layout(entries: dict[str, Any], data_bytes: int, path: Path) -> None:
    """Every tensor known by dtype, of the size its shape says, and all of them together exactly the data."""
    expected = 0
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{path}: tensor {name!r} lacks dtype, shape or offsets; the file is damaged")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; known are {known}")
        if not isinstance(shape, list) or len(shape) > 8 or not all(type(s) is int and 0 <= s < 1 << 40 for s in shape):
            raise CheckpointError(f"{path}: tensor {name!r} has no legal shape; the file is damaged")
        if not isinstance(offsets, list) or not all(type(offset) is int for offset in offsets):
            raise CheckpointError(f"{path}: tensor {name!r} has offsets that are no whole numbers; the file is damaged")
        # A tensor without elements still has sizes, whose product torch takes.
        if math.prod(size for size in shape if size) >= 1 << 63:
            raise CheckpointError(f"{path}: tensor {name!r} has no legal shape; the file is damaged")
        nbytes = math.prod(shape) * _DTYPES[entry["dtype"]].itemsize
        if offsets != [expected, expected + nbytes] or offsets[1] > data_bytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {shape} claims {nbytes} bytes from byte {expected}, and the file "
                f"has {data_bytes} bytes of data; it is truncated or damaged, copy it again"
            )
        expected += nbytes
    if expected != data_bytes:
        raise CheckpointError(f"{path} holds {data_bytes} bytes of data, its header {expected}; copy it again")


def _check_digest(head: bytes, data: bytearray, digest: str, path: Path) -> None:
    if head.count(_digest_entry(digest)) != 1:
        raise CheckpointError(f"{path} has no legible digest; it is damaged, copy it again")
    total = hashlib.sha256(head.replace(_digest_entry(digest), _digest_entry(_NO_DIGEST)))
    total.update(data)
    if total.hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its bytes do not match its digest {digest[:12]}...; copy it again")


def _tensor(entry: dict[str, Any], data: bytearray) -> Tensor:
    begin, end = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    if begin == end:
        return torch.empty(entry["shape"], dtype=dtype, device="cpu")
    return torch.frombuffer(data[begin:end], dtype=torch.uint8).view(dtype).reshape(entry["shape"])
