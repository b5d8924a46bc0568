"""The network of a run: built by name, and rebuilt from the files of its folder."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lbs.data
import lbs.models
from lbs.config import RunConfig
from lbs.data.image_data import MAX_CLASSES
from lbs.graph import record_of
from lbs.plan import Plan
from lbs.quant import QuantLayer
from lbs.run_folder import RunFolder, read_sealed, write_sealed
from lbs.search.freeze import freeze
from lbs.search.layers import FULL_BITS
from lbs.search.prepare import SearchConfig, check_sum, prepare
from lbs.search.streams import FLOAT as FLOAT_STREAMS
from lbs.train import checkpoint
from lbs_kernels.errors import CheckpointError, DataError, GraphError, LbsError, TrainingError
from lbs_kernels.program.rules import MAX_ELEMENTS

FLOAT, SEARCHED, FINAL = "float.safetensors", "searched.safetensors", "model.safetensors"


@dataclass(frozen=True)
class NetworkCard:
    """network.json: what is needed to rebuild the network of a run, and to feed it images."""

    model: str
    data: str
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    signed: tuple[str, ...] = ()  # layers whose input codes are signed
    exclude: tuple[str, ...] = ()  # patterns of layers the search left in float
    fingerprint: str = ""  # of the data
    streams: int = 32  # bits of residual streams

    def example(self) -> Tensor:
        """Zeros float32 [1, C, H, W]."""
        return torch.zeros(1, *self.input_shape, dtype=torch.float32)

    def write(self, folder: RunFolder) -> None:
        """Save as network.json."""
        write_sealed(folder.file("network.json"), self.__dict__)

    @staticmethod
    def read(folder: RunFolder) -> NetworkCard:
        """Raises CheckpointError where the folder holds no run, or a damaged one."""
        path = folder.file("network.json")
        body = read_sealed(path)
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in body.items()}
        try:
            card = NetworkCard(**values)
            card._check()
            return card
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} lacks or has odd fields: {error}; restore it, or start the run in a new folder"
            ) from error

    def _check(self) -> None:
        """Raises ValueError for a field of another kind, or of a size that nothing is allocated for."""
        for name in ("model", "data", "fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}, no text")
        for name, kind in (("mean", int | float), ("std", int | float), ("signed", str), ("exclude", str)):
            found = getattr(self, name)
            if not isinstance(found, tuple) or not all(isinstance(value, kind) for value in found):
                raise ValueError(f"{name} is {found!r}")
        sizes = self.input_shape
        if not isinstance(sizes, tuple) or len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"input_shape is {sizes!r}, no three sizes")
        if math.prod(sizes) > MAX_ELEMENTS:
            raise ValueError(f"input_shape is {sizes!r}; an image has at most {MAX_ELEMENTS} values")
        if type(self.num_classes) is not int or type(self.streams) is not int:
            raise ValueError(f"num_classes {self.num_classes!r} and streams {self.streams!r} are whole numbers")


def build(name: str, num_classes: int | None) -> nn.Module:
    """A float network by registry name, `timm:NAME`, `torchvision:NAME`, or by `module:function`, called with the
    number of classes (None: with nothing). Weights of the first three are random: nothing is downloaded.

    It is in channels_last memory, as the trainer wants it, so that a network read back from a file sums in the same
    order as the one that was trained.

    Raises:
        LbsError: an unknown name, more classes than networks are built for, or a function that gives no module.
    """
    if num_classes is not None and not 1 <= num_classes <= MAX_CLASSES:
        raise LbsError(f"{num_classes} classes; networks are built for 1 to {MAX_CLASSES}, leave out or merge some")
    package, _, inner = name.partition(":")
    if ":" not in name:
        made = lbs.models.create(name, num_classes)
    elif package in _ZOOS:
        made = _of_zoo(package, inner, {} if num_classes is None else {"num_classes": num_classes})
    else:
        made = _import(name, () if num_classes is None else (num_classes,))
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_of(folder: RunFolder, name: str, num_classes: int) -> nn.Module:
    """As `build`, of a name that a file of the folder may have given.

    Raises:
        CheckpointError: it is a function that the user did not name: nothing of a folder is called on its own word.
    """
    if ":" in name and name not in folder.named:
        raise CheckpointError(
            f"the run in {folder.path} is of a function, {name!r}, and one is only called where it is named with "
            f"the command, since a folder may be a stranger's: if you trust it, give model={name}"
        )
    return build(name, num_classes)


# Package of architectures -> (module, function, what keeps it from downloading weights).
_ZOOS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "timm": ("timm", "create_model", {"pretrained": False}),
    "torchvision": ("torchvision.models", "get_model", {"weights": None}),
}


def _of_zoo(package: str, name: str, options: dict[str, Any]) -> nn.Module:
    """An architecture by name. Raises LbsError."""
    if not name.replace(".", "_").isidentifier():  # timm takes names of a hub as well, and downloads what they say
        raise LbsError(f"model={package}:{name}: {name!r} is no name of {package}; give one such as {package}:resnet18")
    module, function, offline = _ZOOS[package]
    try:
        made: nn.Module = getattr(importlib.import_module(module), function)(name, **offline, **options)
    except ImportError as error:
        raise LbsError(f"model={package}:{name}: {error}; pip install {package}") from error
    except Exception as error:
        raise LbsError(f"model={package}:{name}: {type(error).__name__}: {error}; give a name of {package}") from error
    return made


def _import(name: str, arguments: tuple[int, ...]) -> nn.Module:
    module_name, _, function = name.partition(":")
    try:
        # A module beside the user, where none of that name is installed: what lies in a folder takes no other's place.
        if "" not in sys.path and importlib.util.find_spec(module_name.partition(".")[0]) is None:
            sys.path.append("")
        made = getattr(importlib.import_module(module_name), function)(*arguments)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise LbsError(
            f"model={name}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno}); give "
            "module:function, called with the number of classes"
        ) from error
    if not isinstance(made, nn.Module):
        raise LbsError(f"model={name} made a {type(made).__name__}; it must return a torch.nn.Module")
    return made


def is_function(name: str) -> bool:
    """Whether a name is a `module:function` of the user's."""
    package = name.partition(":")[0]
    return ":" in name and package not in _ZOOS


@dataclass(frozen=True)
class ImageForm:
    """What images a float network takes. side: None where nothing says; mean, std: empty where nothing does."""

    channels: int
    side: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def image_form(name: str, model: nn.Module) -> ImageForm:
    """Of a network that `build` has made: by the registry, by what timm tells of it, or its first convolution."""
    if name in lbs.models.REGISTRY:
        channels, side, _ = lbs.models.entry(name).input_shape
        return ImageForm(channels, side)
    told: Any = getattr(model, "pretrained_cfg", None)
    if name.startswith("timm:") and told:
        return ImageForm(told["input_size"][0], told["input_size"][1], tuple(told["mean"]), tuple(told["std"]))
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return ImageForm(3 if first is None else first.in_channels, 224 if name.startswith("torchvision:") else None)


def prune_group(name: str) -> int:
    """Filters pruned together unless the user says otherwise."""
    return lbs.models.REGISTRY[name].prune_group if name in lbs.models.REGISTRY else 4


def load_data(
    source: str, mean: tuple[float, ...] = (), std: tuple[float, ...] = (), max_unreadable: float = 1.0
) -> lbs.data.ImageSet:
    """The image set, with other pixel statistics where they are given."""
    data = lbs.data.load(source, max_unreadable)
    if bool(mean) != bool(std):
        raise DataError(f"mean {mean} and std {std} must be given together, one value per channel each")
    return replace(data, mean=mean, std=std) if mean else data


def check_images(model: nn.Module, card: NetworkCard, device: torch.device) -> None:
    """One image through the float network, before anything is trained. Raises GraphError where they do not fit."""
    example, was_training = card.example().to(device), model.training
    try:
        with torch.inference_mode():
            logits = model.eval()(example)
    except Exception as error:
        raise GraphError(
            f"{card.model} fails on an image {card.input_shape} of {card.data}: {type(error).__name__}: {error}; "
            "name a model for such images, or other data"
        ) from error
    finally:
        model.train(was_training)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (1, card.num_classes):
        raise GraphError(
            f"{card.model} gives {shape} for one image of {card.data}; a classifier gives {(1, card.num_classes)}, "
            "one value per class"
        )


def card_of(config: RunConfig, data: lbs.data.ImageSet) -> NetworkCard:
    """The card of a configuration's network for its image set."""
    return NetworkCard(
        config.model,
        config.data,
        len(data.classes),
        data.image_shape,
        data.mean,
        data.std,
        exclude=getattr(config, "exclude", ()),
        fingerprint=data.fingerprint,
        streams=getattr(config, "streams", 32),
    )


def check_same_data(card: NetworkCard, folder: RunFolder) -> None:
    """Refuse to go on with other data than a run began with. Raises TrainingError."""
    if folder.file("network.json").exists():
        _check_fingerprint(NetworkCard.read(folder), card.fingerprint)


def check_same_network(card: NetworkCard, folder: RunFolder) -> NetworkCard:
    """The card of a run folder, where `card`, that of a configuration, names the same network and images.

    Raises:
        TrainingError: names what differs.
    """
    there = NetworkCard.read(folder)
    _check_fingerprint(there, card.fingerprint)
    for label in ("model", "num_classes", "input_shape", "mean", "std", "streams"):
        old, new = getattr(there, label), getattr(card, label)
        if old != new:
            raise TrainingError(
                f"{folder.path} holds a network of {label} {old}, asked is {new}; leave that option out to go on with "
                "it, or name a new folder"
            )
    return there


def _check_fingerprint(card: NetworkCard, found: str) -> None:
    if card.fingerprint and card.fingerprint != found:
        raise TrainingError(
            f"another data set: {card.data} has the fingerprint {found} now, the run was begun with "
            f"{card.fingerprint}; restore the data, or start in a new run folder"
        )


def load_float(model: nn.Module, path: Path, card: NetworkCard) -> None:
    """Put float weights into a network made for the data of `card`.

    Raises:
        CheckpointError: damaged, made for another number of classes, or for another network.
    """
    tensors = checkpoint.load_weights(path)
    for key, own in reversed(model.state_dict().items()):
        if own.dim() == 2:  # the classifier: the last matrix
            there = tensors.get(key)
            if there is not None and there.dim() == 2 and there.shape[1] == own.shape[1] and len(there) != len(own):
                raise CheckpointError(
                    f"{path} is for {len(there)} classes ({key} is {tuple(there.shape)}), the data set {card.data} has "
                    f"{card.num_classes}; give weights trained on this data, or the data of these weights"
                )
            break
    checkpoint.apply_weights(model, tensors, path)


def with_signs(card: NetworkCard, network: nn.Module) -> NetworkCard:
    """The card that also notes which inputs are signed, which calibration decides."""
    layers = {name: m for name, m in network.named_modules() if isinstance(m, QuantLayer)}
    return replace(card, signed=tuple(name for name, m in layers.items() if m.quantizer.signed))


def apply_plan(model: nn.Module, card: NetworkCard, plan: Plan) -> nn.Module:
    """Float network -> network of fixed bits, or pruned in float, by `plan`; ranges are those of no calibration."""
    prunes = any(layer.kept is not None for layer in plan.layers)
    # Any width but 32 makes layers that take the bits of the plan; the least lets every sum pass that the plan allows.
    bits = FULL_BITS if plan.in_float else min(min(layer.w_bits, layer.a_bits) for layer in plan.layers)
    settings = SearchConfig(bits=(bits,), pruning=prunes, exclude=card.exclude)
    streams = FLOAT_STREAMS if plan.in_float else card.streams
    network = freeze(prepare(model, card.example(), settings, streams), plan)
    for layer in () if plan.in_float else record_of(network).plan.layers:
        check_sum(layer, layer.w_bits, layer.a_bits)
    for name in card.signed:
        quantizer: Any = network.get_submodule(name).quantizer
        quantizer.signed = True
    return network


def save_plan(folder: RunFolder, plan: Plan) -> None:
    """Write plan.json."""
    write_sealed(folder.file("plan.json"), json.loads(plan.to_json()))


def plan_of_run(folder: RunFolder) -> Plan:
    """The plan of a run folder. Raises CheckpointError where it is missing or edited, PlanError where it is none."""
    return Plan.from_json(json.dumps(read_sealed(folder.file("plan.json"))))


def load_network(folder: RunFolder) -> tuple[nn.Module, NetworkCard]:
    """The quantized network of a run folder, fine-tuned if it was, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: no finished search in the folder, or weights that do not fit the plan.
    """
    card = NetworkCard.read(folder)
    path = folder.file(FINAL) if folder.file(FINAL).exists() else folder.file(SEARCHED)
    if not path.exists() or not folder.file("plan.json").exists():
        raise CheckpointError(
            f"{folder.path} holds no searched network yet; search there first (run_search, in a shell lbs search --run "
            f"{folder.path})"
        )
    network = apply_plan(build_of(folder, card.model, card.num_classes), card, plan_of_run(folder))
    checkpoint.apply_weights(network, checkpoint.load_weights(path), path)
    return network.eval(), card


def images_of(card: NetworkCard) -> lbs.data.ImageSet:
    """The image set the network was made for, normalised as it expects. Raises TrainingError where it has changed."""
    data = load_data(card.data, card.mean, card.std)
    _check_fingerprint(card, data.fingerprint)
    return data


def weights_path(config_weights: str, folder: RunFolder) -> Path | None:
    """Where the float weights of a run are: the file the user named, or the folder's own; None if neither."""
    if config_weights:
        return Path(config_weights)
    return folder.file(FLOAT) if folder.file(FLOAT).exists() else None
