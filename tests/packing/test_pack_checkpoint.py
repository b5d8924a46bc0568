"""One file: what is saved comes back bit for bit, and nothing else is believed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pack_nets
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import lbs
from lbs.packing import container
from lbs.packing.packing import pack
from lbs.packing.parts import time_parts
from lbs_kernels.errors import BackendError, CheckpointError, FormatError

Header = dict[str, Any]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "digits.lbs.safetensors"
    pack_nets.packed_digits().save(path)
    return path


def header_of(path: Path) -> tuple[Header, bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(path: Path, header: Header, data: bytes, seal: bool = True) -> None:
    """Write a header and data, with a digest that fits them."""
    header["__metadata__"]["digest"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head + data).hexdigest() if seal else "0" * 64
    path.write_bytes(head.replace(b"0" * 64, digest.encode(), 1) + data)


def test_round_trip_is_bit_identical(saved: Path) -> None:
    packed, x = pack_nets.packed_digits(), pack_nets.images(5, (1, 8, 8))
    loaded = lbs.load(saved)
    assert torch.equal(loaded(x), packed(x))
    assert [p.to_json() for p in loaded.programs] == [p.to_json() for p in packed.programs]
    assert all(torch.equal(a.blob, b.blob) for a, b in zip(loaded.regions, packed.regions, strict=True))
    assert (loaded.plan, loaded.kept_float, loaded.input_shape, loaded.name) == (
        packed.plan,
        packed.kept_float,
        packed.input_shape,
        packed.name,
    )
    again = saved.with_name("again.lbs.safetensors")
    loaded.save(again)
    assert again.read_bytes() == saved.read_bytes()
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)
    assert lbs.verify(model, loaded, x).ok


def test_round_trip_with_float_parts(tmp_path: Path) -> None:
    for model, shape in ((pack_nets.two_regions(), (3, 10, 10)), (pack_nets.network("preresnet20", 4, 4), (3, 32, 32))):
        packed, x = pack(model, verify=False), pack_nets.images(2, shape)
        packed.save(tmp_path / "net")
        loaded = lbs.load(str(tmp_path / "net"))
        assert torch.equal(loaded(x), packed(x))
        assert loaded.kept_float == packed.kept_float
        assert set(loaded.state_dict()) == set(packed.state_dict())
        assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
        assert not loaded.training


def test_float_layers_of_many_kinds_come_back(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.loose = nn.Sequential(
                nn.GroupNorm(2, 8),
                nn.SiLU(),
                nn.AvgPool2d(2),
                nn.Upsample(scale_factor=2.0),
                nn.LeakyReLU(0.2),
                nn.GELU(),
            )
            self.register_buffer("shift", torch.arange(8.0).reshape(1, 8, 1, 1) / 8)
            self.conv, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.loose(self.stem(x))
            y = torch.cat([y[:, 4:], y[:, :4]], dim=1) + self.shift
            y = nn.functional.pad(self.conv(y).clamp(-1.0, 0.5), (1, 1), value=0.25)
            y = y.sigmoid().view(y.shape[0], 8, -1).reshape(y.shape)
            return {"logits": self.fc(y.mean((2, 3))), "slope": nn.functional.softmax(y, dim=1)}

    torch.manual_seed(0)
    packed = pack(pack_nets.quantized(Many(), (3, 8, 8)))
    x = pack_nets.images(2, (3, 8, 8))
    packed.save(tmp_path / "many")
    loaded = lbs.load(tmp_path / "many")(x)
    assert loaded.keys() == {"logits", "slope"}
    pack_nets.assert_same(loaded, packed(x))


def test_any_safetensors_library_reads_the_file(saved: Path) -> None:
    packed = pack_nets.packed_digits()
    program, region = packed.programs[0], packed.regions[0]
    with safetensors.safe_open(str(saved), framework="pt") as file:
        assert file.metadata()["format"] == "lbs-packed"
        assert json.loads(file.metadata()["program0"])["digest"] == program.digest
        for key in program.arrays:
            assert torch.equal(file.get_tensor(f"region0.{key}"), program.array(region.blob, key))


# Damage and lies. Each: one CheckpointError, before anything large is allocated.


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1, -64, -5000])
def test_truncated(saved: Path, size: int) -> None:
    raw = saved.read_bytes()
    saved.write_bytes(raw[:size])
    with pytest.raises(CheckpointError, match=r"truncated|holds .* bytes of data"):
        lbs.load(saved)


def test_bytes_appended(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="bytes of data, its header"):
        lbs.load(saved)


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    raw = saved.read_bytes()
    chance = random.Random(0)
    length = int.from_bytes(raw[:8], "little")
    places = list(range(40)) + chance.sample(range(8, 8 + length), 60) + chance.sample(range(8 + length, len(raw)), 60)
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << chance.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            lbs.load(saved)


def test_missing_file_folder_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        lbs.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        lbs.load(tmp_path)
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickled.pt")
    with pytest.raises(CheckpointError, match="truncated or no packed network"):
        lbs.load(tmp_path / "pickled.pt")
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="its header has no metadata"):
        lbs.load(tmp_path / "plain")
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "other", {"format": "pt", "digest": "x"})
    with pytest.raises(CheckpointError, match=r"has format 'pt', expected 'lbs-packed'"):
        lbs.load(tmp_path / "other")


def change_metadata(key: str, value: str | None) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value

    return change


def change_tensor(**fields: Any) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header["region0.conv1.planes"].update(fields)

    return change


def change_json(key: str, old: str, new: str) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        assert old in header["__metadata__"][key]
        header["__metadata__"][key] = header["__metadata__"][key].replace(old, new)

    return change


LIES: dict[str, tuple[Callable[[Header], None], str]] = {
    "newer": (change_metadata("version", "5"), "has version 5; this release reads 1 to 4: upgrade lbs"),
    "no_version": (change_metadata("version", None), "which is no number"),
    "version_zero": (change_metadata("version", "0"), "has version 0"),
    "no_program": (change_metadata("program0", None), "damaged|no program|region0"),
    "no_graph": (change_metadata("graph", None), "damaged"),
    "huge_shape": (change_tensor(shape=[1 << 30, 1 << 30]), "claims 4611686018427387904 bytes"),
    "absurd_shape": (change_tensor(shape=[1 << 60]), "no legal shape"),
    "negative_shape": (change_tensor(shape=[-4, -4]), "no legal shape"),
    "fractional_shape": (change_tensor(shape=[1.5]), "no legal shape"),
    "another_dtype": (change_tensor(dtype="F8_E4M3"), "has dtype 'F8_E4M3'"),
    "overlapping": (change_tensor(data_offsets=[0, 64]), "claims|lacks"),
    "offset_text": (change_tensor(data_offsets=["0", "64"]), "offsets that are no whole numbers"),
    "offset_fractions": (change_tensor(data_offsets=[0.0, 64.0]), "offsets that are no whole numbers"),
    "dtype_list": (change_tensor(dtype=["I32"]), "has dtype \\['I32'\\]"),
    "empty_and_endless": (change_tensor(shape=[0, 1 << 39, 1 << 39]), "no legal shape"),
    "graph_with_a_number_of_arguments": (change_json("graph", '"args": {"tuple": []}', '"args": 5'), "damaged"),
    "graph_that_gives_nothing": (change_json("graph", '"op": "output"', '"op": "placeholder"'), "damaged"),
    "unknown_field": (change_tensor(extra=1), "lacks dtype, shape or offsets"),
    "float_planes": (change_tensor(dtype="F32"), "array conv1.planes is torch.float32"),
    "program_of_a_newer_version": (change_json("program0", '"version":5', '"version":7'), "program has version 7"),
    "program_with_huge_tensor": (change_json("program0", '"height":8', '"height":16777216'), "at most 268435456 per"),
    "array_outside": (change_json("program0", '"offset":0', '"offset":6400000'), "ends at byte"),
    "other_digest": (change_json("program0", '"digest":"', '"digest":"0'), "digest|sha256|hexadecimal"),
    "graph_calls_the_system": (change_json("graph", "operator.getitem", "os.system"), "calls 'os.system', which"),
    "graph_looks_up_attributes": (change_json("graph", "operator.getitem", "operator.attrgetter"), "does not know"),
    "graph_with_code_as_name": (change_json("graph", '"name": "x"', '"name": "x=print(1)"'), "no identifier"),
    "graph_with_code_as_target": (change_json("graph", '"target": "x"', '"target": "x, y=print(1)"'), "no identifier"),
    "graph_without_its_region": (change_json("graph", '"target": "region0"', '"target": "region1"'), "does not have"),
    "graph_of_nothing": (change_metadata("graph", "{}"), "damaged"),
    "graph_not_json": (change_metadata("graph", "{"), "damaged"),
    "input_size": (change_json("model", "[1, 8, 8]", "[1, 8, -8]"), "input size -8"),
    "plan": (change_json("plan", '"version": 2', '"version": 9'), "plan version 9 is newer"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_with_a_fitting_digest(saved: Path, name: str) -> None:
    header, data = header_of(saved)
    change, message = LIES[name]
    change(header)
    rewrite(saved, header, data)
    with pytest.raises(CheckpointError, match=message):
        lbs.load(saved)


def test_another_weight_with_a_fitting_digest_of_the_file(saved: Path) -> None:
    header, data = header_of(saved)
    place = header["region0.conv1.planes"]["data_offsets"][0]
    rewrite(saved, header, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(CheckpointError, match="program 0 was packed with other arrays than the file holds"):
        lbs.load(saved)


def test_rewriting_itself_is_harmless(saved: Path) -> None:
    """The lies above are refused for what they say, not for how they were written."""
    rewrite(saved, *header_of(saved))
    assert torch.equal(lbs.load(saved)(torch.zeros(1, 1, 8, 8)), pack_nets.packed_digits()(torch.zeros(1, 1, 8, 8)))
    rewrite(saved, *header_of(saved), seal=False)
    with pytest.raises(CheckpointError, match="do not match its digest"):
        lbs.load(saved)


def test_a_file_of_version_3_is_the_same_network(tmp_path: Path) -> None:
    """Two regions with parts in float between them, which no node of that version names."""
    packed, path = pack_nets.packed_two_regions(), tmp_path / "old"
    packed.save(path)
    header, data = header_of(path)
    metadata = header["__metadata__"]
    metadata["version"] = "3"
    for index, program in enumerate(packed.programs):
        metadata[f"program{index}"] = replace(program, version=3).to_json()
    graph = json.loads(metadata["graph"])
    assert any(node.pop("part", None) for node in graph["nodes"])
    metadata["graph"] = json.dumps(graph)
    rewrite(path, header, data)
    loaded, x = lbs.load(path), pack_nets.images(3, (3, 10, 10))
    assert [program.version for program in loaded.programs] == [3, 3]
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))
    assert {"softplus", "region 1"} <= {part.name for part in time_parts(loaded, x, 1)}
    loaded.save(path)
    with torch.no_grad():
        assert torch.equal(lbs.load(path)(x), packed(x))


@pytest.mark.parametrize("claim", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_header_length_beyond_the_file(saved: Path, claim: int) -> None:
    saved.write_bytes(claim.to_bytes(8, "little") + saved.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=f"claims a header of {claim}"):
        lbs.load(saved)


def test_header_longer_than_any_network_needs(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write((container.MAX_HEADER + 8).to_bytes(8, "little"))
        file.truncate(container.MAX_HEADER + 100)  # a hole: no memory and no disk
    with pytest.raises(CheckpointError, match="at most"):
        lbs.load(path)


def assert_refused_within(
    path: Path, megabytes: int, word: str, imports: str = "lbs.packing.checkpoint", timeout: float = 120
) -> None:
    """A process that may grow by so little, once it has its imports, refuses the file, and its error has the word."""
    code = f"""
        import resource, lbs, {imports}
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ({megabytes} << 20),) * 2)
        try:
            lbs.load({str(path)!r})
        except lbs.errors.CheckpointError as error:
            print("refused", {word!r} in str(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout
    )
    assert done.stdout.strip() == "refused True", done.stderr


def test_claims_are_refused_before_memory_is_asked_for(saved: Path) -> None:
    """The process may not grow by the terabyte it is promised: it would be refused here, as it is limited."""
    header, data = header_of(saved)
    header["region0.conv1.planes"]["shape"] = [8, 1 << 35, 9, 1]
    rewrite(saved, header, data)
    assert_refused_within(saved, 64, "claims")


def test_repeated_key_and_nested_brackets(saved: Path) -> None:
    twice = b'{"__metadata__":{},"__metadata__":{}}'
    for text in (twice, b"[" * 100000, b'{"__metadata__":{"digest":1}}', b"[]", b"\xff\xfe"):
        saved.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(CheckpointError, match="is no packed network"):
            lbs.load(saved)


def test_unknown_device(saved: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="torch sees no GPU here"):
        lbs.load(saved, device="cuda")


@pytest.mark.parametrize("device", ["meta", "gpu"])
def test_devices_nothing_runs_on(saved: Path, device: str) -> None:
    with pytest.raises(BackendError, match=r"networks run on cpu or cuda"):
        lbs.load(saved, device=device)


# A save that cannot finish leaves the old file.


def test_full_disk_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        pack_nets.packed_two_regions().save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_places_that_cannot_be_written_are_not_called_full(saved: Path) -> None:
    for path in (saved / "below", saved.parent):
        with pytest.raises(CheckpointError, match=r"could not be written .*give a path that can be written"):
            pack_nets.packed_digits().save(path)
    assert list(saved.parent.iterdir()) == [saved]
    assert not list(saved.parent.parent.glob("*.part"))


def test_file_size_limit_leaves_the_old_file(saved: Path) -> None:
    """A real failure of write(2): the process may not write files as large as this one."""
    before = saved.read_bytes()
    code = f"""
        import resource, signal, lbs
        packed = lbs.load({str(saved)!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            packed.save({str(saved)!r})
        except lbs.errors.CheckpointError as error:
            print("refused")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "refused", done.stderr
    assert saved.read_bytes() == before


def test_kill_during_saving_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    code = f"""
        import os, signal, lbs
        packed = lbs.load({str(saved)!r})
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        packed.save({str(saved)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9
    assert saved.read_bytes() == before
    lbs.load(saved)


def test_saving_into_a_folder_that_is_not_there_makes_it(tmp_path: Path) -> None:
    pack_nets.packed_digits().save(tmp_path / "new" / "net.lbs.safetensors")
    assert lbs.load(tmp_path / "new" / "net.lbs.safetensors").input_shape == (1, 8, 8)


def test_state_dict_of_another_network_is_noticed() -> None:
    packed = copy.deepcopy(pack_nets.packed_digits())
    state = {key: value.clone() for key, value in packed.state_dict().items()}
    state["body.region0.blob"][0] ^= 1
    packed.load_state_dict(state)
    with pytest.raises(FormatError, match="damaged or belong to another network"):
        packed(torch.zeros(1, 1, 8, 8))


def test_weights_beyond_the_last_channel_are_refused(saved: Path) -> None:
    """A file that is sealed and in order but for one bit of a channel that does not exist."""
    header, data = header_of(saved)
    program = json.loads(header["__metadata__"]["program0"])
    step = next(s for s in program["steps"] if "planes" in s and program["tensors"][s["input"]]["channels"] % 32)
    damaged = bytearray(data)
    damaged[header[f"region0.{step['planes']}"]["data_offsets"][0] + 3] |= 0x80
    lengths = {key: header[f"region0.{key}"]["data_offsets"] for key in program["arrays"]}
    blob = bytearray(sum(-(-(end - begin) // 64) * 64 for begin, end in lengths.values()))
    for key, (begin, end) in lengths.items():
        at = program["arrays"][key]["offset"]
        blob[at : at + end - begin] = damaged[begin:end]
    program["digest"] = hashlib.sha256(blob).hexdigest()
    header["__metadata__"]["program0"] = json.dumps(program)
    rewrite(saved, header, bytes(damaged))
    with pytest.raises(CheckpointError, match=r"bits beyond channel .*unused bits are 0"):
        lbs.load(saved)
