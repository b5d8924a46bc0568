"""docs/format.md is enough to write a reader: one made from it alone computes what the project computes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import programs
import pytest
import stranger
import torch

import lbs
import lbs.models
import lbs.zoo
from lbs.packing import vocabulary
from lbs_kernels.program.steps import Program
from lbs_kernels.run.reference import ReferenceRunner


def _agree(program: Program, blob: torch.Tensor, batch: int, seed: int) -> None:
    images = programs.random_inputs(program, batch, seed)
    trace: dict[int, torch.Tensor] = {}
    expected = ReferenceRunner(program, blob).run(images, trace)
    reader = stranger.Stranger(program.to_json(), blob.numpy().tobytes())
    results = reader([image.numpy() for image in images])
    for index, spec in enumerate(program.tensors):
        if spec.form != "image":
            ours = trace[index].float().numpy()
            assert np.array_equal(reader.tensors[index].astype(np.float32), ours), f"tensor {index} ({spec.name})"
    for ours, theirs in zip(expected, results, strict=True):
        assert np.array_equal(ours.numpy(), theirs)
    assert programs.share_unsaturated(program, trace) > 0.2


@pytest.mark.parametrize("case", [name for name in programs.CASES if name != "one_pixel"])
def test_reader_written_from_the_page_agrees(case: str) -> None:
    program, blob = programs.CASES[case](11)
    _agree(program, blob, batch=2, seed=12)


@pytest.mark.parametrize("seed", range(4))
def test_reader_agrees_on_random_programs(seed: int) -> None:
    program, blob = programs.random_program(100 + seed)
    _agree(program, blob, batch=3, seed=seed)


@pytest.mark.parametrize(("name", "bits"), [("digits_resnet8", (2, 4)), ("cifar_resnet20", (4, 2))])
def test_reader_runs_a_packed_file(tmp_path: Path, name: str, bits: tuple[int, int]) -> None:
    torch.manual_seed(5)
    _, channels, height, width = lbs.models.example(name).shape
    images = torch.rand(6, channels, height, width)
    model = lbs.uniform(lbs.models.create(name), images[:2], *bits)
    lbs.calibrate(model, [images])
    path = tmp_path / "network.lbs.safetensors"
    lbs.pack(model.eval()).save(path)
    expected = lbs.load(path)(images)
    result = stranger.run_file(path, images.numpy())
    assert np.array_equal(expected.numpy(), result)
    assert expected.std() > 0


def test_reader_runs_a_packed_file_on_bytes(tmp_path: Path) -> None:
    torch.manual_seed(6)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    floats = (images / 255 - 0.3) / 0.36
    model = lbs.uniform(lbs.models.create("digits_resnet8"), floats[:2], 4, 4)
    lbs.calibrate(model, [floats])
    path = tmp_path / "network.lbs.safetensors"
    lbs.pack(model.eval(), normalize=((0.3,), (0.36,))).save(path)
    result = stranger.run_file(path, images.numpy())
    assert np.array_equal(lbs.load(path)(images).numpy(), result)
    assert result.std() > 0


def test_the_page_lists_what_a_file_may_name() -> None:
    """Classes with their arguments, functions and methods: the same words in the same order."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    section = page.partition("## 8. Modules, functions and methods")[2]
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|$", section, re.MULTILINE)
    listed = {
        name: re.findall(r"`(\w+)`", arguments) for names, arguments in rows for name in re.findall(r"`(\w+)`", names)
    }
    assert listed == {kind.__name__: list(arguments) for kind, arguments in vocabulary.MODULES.items()}
    blocks = {
        title: words.split()
        for title, words in re.findall(r"^(\w+ of [^:]*):\n\n((?:    .*\n)+)", section, re.MULTILINE)
    }
    functions = {f"{home}.{name}" for home in HOMES for name in blocks[f"Functions of `{home}`"]}
    assert set(vocabulary.FUNCTIONS) <= functions
    assert all(name in vocabulary.FUNCTIONS for name in functions if _is_there(name))
    assert set(blocks["Methods of tensors"]) == vocabulary.METHODS
    (attributes,) = (words for title, words in blocks.items() if title.startswith("Attributes of tensors"))
    assert set(attributes) == vocabulary.ATTRIBUTES


HOMES = ("operator", "torch", "torch.nn.functional", "torch.fft", "torch.linalg")


def _is_there(name: str) -> bool:
    """Whether this release of torch has a function."""
    home, _, leaf = name.rpartition(".")
    return hasattr(importlib.import_module(home), leaf)


def test_reader_runs_the_shipped_network(tmp_path: Path) -> None:
    """A really searched network: pruned filters, mixed bits; written by version 1 of the format."""
    path = lbs.zoo.entry("cifar100-resnet20").path
    assert stranger.read_file(path)[1]["version"] == "1"
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    packed = lbs.load(path)
    assert [program.version for program in packed.programs] == [1]
    assert np.array_equal(packed(images).numpy(), stranger.run_file(path, images.numpy()))
    packed.save(tmp_path / "again.lbs.safetensors")  # a file of version 2 around a program of version 1
    again = lbs.load(tmp_path / "again.lbs.safetensors")
    assert [program.to_json() for program in again.programs] == [program.to_json() for program in packed.programs]
    assert np.array_equal(again(images).numpy(), stranger.run_file(tmp_path / "again.lbs.safetensors", images.numpy()))


def test_example_of_the_page() -> None:
    planes = np.array([[5], [6]], np.int32)
    assert stranger.unpack(planes, 3).tolist() == [1, 2, 3]
