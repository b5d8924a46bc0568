"""What an operating system calls a file and is none, and numbers that files claim: refused before they are waited for,
read on without end, or allocated.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lbs
import lbs.models
from lbs.data.pictures import read_pictures
from lbs.run_folder import RunFolder, sealed
from lbs.runs import network
from lbs.runs.phases import file_digest
from lbs.runs.quantized import quantize_files
from lbs.train import checkpoint
from lbs_kernels.errors import CheckpointError, DataError, LbsError, PlanError
from lbs_kernels.times import table

Command = Callable[[str], tuple[int, Any, str]]
CARD = network.NetworkCard("digits_resnet8", "digits", 10, (1, 8, 8), (0.3,), (0.4,))


@pytest.fixture(autouse=True)
def not_for_ever() -> Iterator[None]:
    """A test that waits for a pipe ends here."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path / "pipe.png"


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(str(path))).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def test_pipes_and_folders_among_images_are_left_out(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            picture(tmp_path / part / name / "one.png")
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    (tmp_path / "train/dog/folder.png").mkdir()
    with pytest.raises(DataError, match=r"2 of 4 images cannot be read.*a pipe; only regular files are read"):
        lbs.data.load(str(tmp_path), 0.0)
    with pytest.warns(UserWarning, match="left out: .*pipe.png"):
        data: Any = lbs.data.load(str(tmp_path), 0.5)
    assert (data.train_count, len(data.unreadable)) == (2, 2)
    assert len(read_pictures(tmp_path / "train", 4)[0]) == 2


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lbs.Plan.load, PlanError),
        (lbs.load, CheckpointError),
        (checkpoint.load_weights, CheckpointError),
        (checkpoint.load, CheckpointError),
        (lambda path: file_digest(str(path)), CheckpointError),
        (table.read, OSError),
        (lambda path: lbs.data.load(f"{path}"), DataError),
    ],
)
def test_a_pipe_or_a_device_is_no_file(pipe: Path, read: Callable[[Path], object], error: type[Exception]) -> None:
    for place in (pipe, Path("/dev/zero"), pipe.parent):
        with pytest.raises(error, match=r"regular files|Is a directory|no checkpoint|no weights|no data set|no folder"):
            read(place)


def test_a_device_as_a_plan_is_one_line(lbs_command: Command, tmp_path: Path) -> None:
    common = f"--run {tmp_path / 'run'} --data digits --model digits_resnet8"
    code, body, _ = lbs_command(f"finetune {common} --plan /dev/zero")
    assert (code, "a device; only regular files are read" in body["error"]) == (2, True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
def test_weights_of_other_numbers_do_not_train(tmp_path: Path, dtype: torch.dtype) -> None:
    model = lbs.models.create("digits_resnet8")
    state = model.state_dict()
    torch.save({**state, "conv1.weight": state["conv1.weight"].to(dtype)}, tmp_path / "w.pth")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"other numbers: conv1.weight {kind} for float32"):
        network.load_float(model, tmp_path / "w.pth", CARD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_widths_do(tmp_path: Path, dtype: torch.dtype) -> None:
    model = lbs.models.create("digits_resnet8")
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    network.load_float(model, tmp_path / "w.pth", CARD)
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"].float())


def test_absurd_numbers_of_classes_are_refused_unbuilt(tmp_path: Path) -> None:
    for classes in (0, -3, 1 << 40):
        with pytest.raises(LbsError, match="classes; networks are built for 1 to 65536"):
            network.build("digits_resnet8", classes)
    torch.save({"fc.weight": torch.zeros(1 << 40, 0, dtype=torch.float32)}, tmp_path / "w.pth")
    picture(tmp_path / "images/a.png")
    with pytest.raises(LbsError, match="1099511627776 classes"):
        quantize_files(
            "digits_resnet8", str(tmp_path / "images"), weights=str(tmp_path / "w.pth"), out=str(tmp_path / "a")
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_classes": "10"}, "num_classes '10'"),
        ({"num_classes": True}, "num_classes True"),
        ({"input_shape": [1, 1 << 40, 1 << 40]}, "an image has at most"),
        ({"input_shape": [1, 8]}, "no three sizes"),
        ({"model": 3}, "model is 3, no text"),
        ({"mean": ["\x1b[2J"]}, r"mean is \('\\x1b\[2J',\)"),
        ({"signed": 4}, "signed is 4"),
        ({"more": 4}, "more"),
    ],
)
def test_odd_fields_of_a_card_are_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = RunFolder(tmp_path)
    CARD.write(folder)
    assert network.NetworkCard.read(folder) == CARD
    body = json.loads((tmp_path / "network.json").read_text())
    body.pop("hash")
    (tmp_path / "network.json").write_text(json.dumps(sealed({**body, **changes})))
    with pytest.raises(CheckpointError, match=says):
        network.NetworkCard.read(folder)
