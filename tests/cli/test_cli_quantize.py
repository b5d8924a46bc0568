"""`lbs quantize`: a folder of pictures without classes, weights and a name become a file; what is wrong is one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cli_nets import SOURCE
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import lbs
import lbs.models
from lbs.cli import main
from lbs.runs import network
from lbs_kernels.errors import LbsError

Command = Callable[[str], tuple[int, Any, str]]


def trained(model: nn.Module, channels: int = 1) -> nn.Module:
    """Norms that have seen images, so that they are not estimated anew."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(16, channels, 8, 8, generator=generator))
    return model.eval()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of digits_resnet8 in both forms, and 12 grey pictures of 8 x 8, flat and nested, of several formats."""
    torch.manual_seed(0)
    state = trained(lbs.models.create("digits_resnet8")).state_dict()
    torch.save(state, tmp_path / "net.pth")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "net.safetensors")
    draw = np.random.default_rng(1)
    for index in range(12):
        folder = tmp_path / "pictures" / ("" if index < 4 else f"deep/{index % 3}")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.{('png', 'bmp', 'PNG')[index % 3]}")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_filters_go_and_training_follows(place: Path, lbs_command: Command) -> None:
    line = f"{ASKED} --weights net.pth --out packed --size-mb 0.03 --prune 0.5 --distill 2"
    code, section, told = lbs_command(line)
    assert code == 0
    assert section["targets"]["size_mb"]["value"] <= 0.03e6
    assert [line for line in told.splitlines() if line in ("plan ...", "convert ...", "distill ...")]
    plan = lbs.load(place / section["file"]).plan
    assert plan is not None
    assert any(layer.kept_filters < layer.filters for layer in plan.layers)


def of_its_own(place: Path, channels: int = 1) -> str:
    """module:function of a network of 7 classes whose weights are own.pth; a module is imported once in a process."""
    name = f"own_{place.name.replace('-', '_')}"
    source = SOURCE.replace("nn.Conv2d(1,", f"nn.Conv2d({channels},")
    (place / f"{name}.py").write_text(source)
    module: dict[str, Any] = {}
    exec(source, module)
    torch.save(trained(module["Net"](7), channels).state_dict(), place / "own.pth")
    return f"{name}:Net"


ASKED = "quantize --model digits_resnet8 --images pictures --mean .3 --std .4"


@pytest.mark.parametrize("weights", ["net.pth", "net.safetensors"])
def test_pictures_and_weights_become_a_file(place: Path, lbs_command: Command, weights: str) -> None:
    code, section, told = lbs_command(f"{ASKED} --weights {weights} --out packed")
    assert (code, section["file"], section["images"]) == (0, "packed.lbs.safetensors", 12)
    packed = lbs.load(place / section["file"])
    assert section["bytes"] == (place / section["file"]).stat().st_size
    assert packed.input_dtype is torch.float32
    assert section["agreement"] >= 0.9
    assert section["widths"] == [[8, 8, 10]]
    assert [line for line in told.splitlines() if line.endswith("...")] == [
        "convert ...",
        "calibrate ...",
        "pack and verify ...",
        "compare ...",
    ]
    assert not list(place.glob("*.part"))


def test_the_report_goes_to_stdout_and_progress_to_stderr(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*ASKED.split(), "--weights", "net.pth", "--out", "a.lbs.safetensors", "--bits", "4,8"]) == 0
    captured = capsys.readouterr()
    assert "8 at 4/8 bits, 2 at 8/8 bits" in captured.out
    assert "next: lbs explain or lbs bench a.lbs.safetensors" in captured.out
    assert "calibrate ..." in captured.err
    assert "calibrate ..." not in captured.out


def test_one_width_counts_for_weights_and_activations(place: Path, lbs_command: Command) -> None:
    code, section, told = lbs_command(f"{ASKED} --weights net.pth --out a --bits 4")
    assert code == 0, told
    assert [4, 4, 8] in section["widths"]


def test_a_budget_of_each_kind(place: Path, lbs_command: Command) -> None:
    code, section, _ = lbs_command(f"{ASKED} --weights net.pth --out a --bops 0.03 --count 8")
    assert code == 0
    assert section["images"] == 8
    assert section["targets"]["bops"]["value"] <= section["targets"]["bops"]["target"]
    code, section, _ = lbs_command(f"{ASKED} --weights net.pth --out a --size-mb 0.05")
    assert (code, section["targets"]["size_mb"]["value"] <= 50_000) == (0, True)
    code, section, _ = lbs_command(f"{ASKED} --weights net.pth --out b --latency-ms 1")
    assert code == 2
    assert "lbs tune --shapes digits_resnet8" in section["error"]
    assert not (place / "b.lbs.safetensors").exists()


def test_bytes_in(place: Path, lbs_command: Command) -> None:
    code, _, _ = lbs_command(f"{ASKED} --weights net.pth --out a --uint8")
    packed = lbs.load(place / "a.lbs.safetensors")
    assert (code, packed.input_dtype, packed.normalize.mean) == (0, torch.uint8, (0.3,))


def test_a_network_of_the_users_own(place: Path, lbs_command: Command) -> None:
    """Classes are those of the weights; pictures keep their size unless one is named."""
    own = of_its_own(place)
    asked = f"quantize --model {own} --weights own.pth --images pictures --mean .3 --std .4 --out a"
    assert lbs_command(asked)[0] == 0
    assert lbs.load(place / "a.lbs.safetensors").input_shape == (1, 8, 8)
    assert lbs_command(f"{asked} --size 16 --exclude conv1")[0] == 0
    packed = lbs.load(place / "a.lbs.safetensors")
    assert packed.input_shape == (1, 16, 16)
    assert packed(torch.zeros(1, 1, 16, 16)).shape == (1, 7)
    assert ("conv1", "excluded by name") in packed.kept_float


def test_pictures_that_cannot_be_read_are_named(place: Path, lbs_command: Command) -> None:
    (place / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n")
    code, section, told = lbs_command(f"{ASKED} --weights net.pth --out a")
    assert (code, section["images"], list(section["unreadable"])) == (0, 12, ["pictures/broken.png"])
    assert "left out: pictures/broken.png cannot be read as an image" in told


def test_imagenet_statistics_are_named_where_none_are_given(place: Path, lbs_command: Command) -> None:
    own = of_its_own(place, channels=3)
    code, _, told = lbs_command(f"quantize --model {own} --weights own.pth --images pictures --out a")
    assert code == 0
    assert "normalised by ImageNet's mean (0.485, 0.456, 0.406)" in told


REFUSED = {
    "a folder that is not there": ("--images nowhere --weights net.pth", "no folder nowhere; give one that holds"),
    "a folder without pictures": ("--images . --weights net.pth --count 0", "0 images of size 8; both are at least"),
    "no weights": ("--weights nothing.pth", "no weights at nothing.pth"),
    "weights of another network": ("--weights other.pth", "does not fit the model"),
    "weights without a matrix": ("--weights flat.pth", "holds no matrix that says .* give --classes N"),
    "statistics of three channels": ("--weights net.pth --mean .1,.2,.3", "for images of 1 channels"),
    "a folder as the file": ("--weights net.pth --out pictures", r"pictures.lbs.safetensors is a folder; name a file"),
    "whose times, and no budget of them": (
        "--weights net.pth --latency-device cuda",
        "^--latency-device cuda says whose times .*: give --latency-ms X too",
    ),
    "three widths": ("--weights net.pth --bits 8,4,2", "^--bits 8,4,2; give one width, .* such as --bits 4,8$"),
    "filters without a budget": ("--weights net.pth --prune 0.3", "^--prune 0.3: filters go for a budget; name --bops"),
    "filters all gone": ("--weights net.pth --bops .1 --prune 1", r"^--prune 1.0; it lies in \[0, 1\)"),
    "widths and a budget": ("--weights net.pth --bits 4 --bops .1", "--bits .* and a budget"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_one_line(place: Path, lbs_command: Command, name: str) -> None:
    options, message = REFUSED[name]
    torch.save({"a": torch.zeros(3, 3)}, place / "other.pth")
    torch.save({"a": torch.zeros(3)}, place / "flat.pth")
    (place / "pictures.lbs.safetensors").mkdir()
    code, section, _ = lbs_command(f"{ASKED} --out new {options}")
    assert code == 2
    assert "\n" not in section["error"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(section["error"])
    assert not (place / "new.lbs.safetensors").exists()


def test_a_picture_of_another_size_is_named_without_one(place: Path, lbs_command: Command) -> None:
    own = of_its_own(place)
    Image.new("L", (9, 8)).save(place / "pictures" / "zz.png")
    asked = f"quantize --model {own} --weights own.pth --images pictures --mean .3 --std .4 --out a"
    code, section, _ = lbs_command(asked)
    assert code == 2
    assert "zz.png is 9x8, those before it are 8x8; give --size" in section["error"]


def test_the_network_may_come_first_and_the_file_is_called_after_it(place: Path, lbs_command: Command) -> None:
    asked = "quantize digits_resnet8 --images pictures --mean .3 --std .4 --weights net.pth"
    code, section, _ = lbs_command(asked)
    assert (code, section["file"]) == (0, "digits_resnet8.lbs.safetensors")
    code, section, _ = lbs_command(f"{asked} --model digits_resnet8")
    assert (code, "name one network" in section["error"]) == (2, True)


def test_a_function_may_have_its_own_weights_and_a_name_may_not(place: Path, lbs_command: Command) -> None:
    own = of_its_own(place)
    module = own.partition(":")[0]
    body = f"def trained():\n    net = Net(7)\n    net.load_state_dict(torch.load('{place}/own.pth'))\n    return net\n"
    source = f"\n\n{body}"
    (place / f"{module}.py").write_text((place / f"{module}.py").read_text() + source)
    code, section, _ = lbs_command(f"quantize {module}:trained --images pictures --mean .3 --std .4")
    assert (code, section["file"]) == (0, "trained.lbs.safetensors")
    code, section, _ = lbs_command("quantize digits_resnet8 --images pictures")
    assert code == 2
    assert "random weights, and none are downloaded; give --weights FILE" in section["error"]


@pytest.mark.parametrize(
    ("package", "module", "function", "offline"),
    [
        ("timm", "timm", "create_model", {"pretrained": False}),
        ("torchvision", "torchvision.models", "get_model", {"weights": None}),
    ],
)
def test_architectures_of_other_packages_are_built_by_name_and_download_nothing(
    monkeypatch: pytest.MonkeyPatch, package: str, module: str, function: str, offline: dict[str, Any]
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def make(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        if name == "none":
            raise ValueError("unknown")
        return nn.Conv2d(3, 4, 1)

    fake = ModuleType(module)
    setattr(fake, function, make)
    monkeypatch.setitem(sys.modules, package, fake)
    monkeypatch.setitem(sys.modules, module, fake)
    assert isinstance(network.build(f"{package}:resnet18d.a1_in1k", 7), nn.Conv2d)
    assert asked == [("resnet18d.a1_in1k", {**offline, "num_classes": 7})]
    with pytest.raises(LbsError, match=rf"model={package}:none: ValueError: unknown; give a name of {package}"):
        network.build(f"{package}:none", 7)
    with pytest.raises(LbsError, match=f"'hf-hub:owner/net' is no name of {package}"):
        network.build(f"{package}:hf-hub:owner/net", 7)
    assert len(asked) == 2
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LbsError, match=f"pip install {package}"):
        network.build(f"{package}:resnet18", 7)


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), [("timm", "resnet18d"), ("torchvision", "resnet18")])
def test_a_network_of_another_package_is_quantized(place: Path, lbs_command: Command, package: str, name: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    torch.manual_seed(0)
    model = trained(network.build(f"{package}:{name}", 5).to(memory_format=torch.contiguous_format), 3)
    torch.save(model.state_dict(), place / "zoo.pth")
    code, section, _ = lbs_command(f"quantize {package}:{name} --weights zoo.pth --images pictures --size 64 --count 4")
    assert (code, section["file"]) == (0, f"{name}.lbs.safetensors")
    assert lbs.load(place / section["file"]).input_shape == (3, 64, 64)
