"""Checkpoints of a training phase: tensors and JSON in one safetensors file, no pickle.

The file is complete or not there (temporary name, flush, rename), carries a digest of its tensors, and holds all that
the next step depends on: weights, momentum, random state, loader position, budget. On the CPU a resumed run is
bit-identical to one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lbs.run_folder import write_bytes
from lbs_kernels.errors import CheckpointError

CHECKPOINT_VERSION = 1
_KIND = "lbs-checkpoint"


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and a JSON-able state. Raises CheckpointError where the disk is full; the old file stays."""
    flat = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    header = {
        "kind": _KIND,
        "version": str(CHECKPOINT_VERSION),
        "digest": digest(flat),
        "state": json.dumps(state),
    }
    write_bytes(path, safetensors.torch.save(flat, metadata=header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read `save`'s file.

    Raises:
        CheckpointError: missing, truncated, damaged, foreign, or written by a newer release.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}; start without resume=True")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("kind") != _KIND:
                raise CheckpointError(f"{path} is no checkpoint of a run (kind {header.get('kind')!r})")
            if int(header["version"]) > CHECKPOINT_VERSION:
                raise CheckpointError(
                    f"{path} has version {header['version']}, this release reads {CHECKPOINT_VERSION}; upgrade lbs"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        state = json.loads(header["state"])
        expected = header["digest"]
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {error}; delete it and start the phase again") from error
    if digest(tensors) != expected:
        raise CheckpointError(f"{path} is damaged: its tensors do not match their digest; delete it and start again")
    return tensors, state


def save_weights(path: Path, model: nn.Module) -> None:
    """The model's state dict as a plain safetensors file, which any tool can read, with a digest of its tensors."""
    flat = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    write_bytes(path, safetensors.torch.save(flat, metadata={"lbs-digest": digest(flat)}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file (.pth, .pt) read without unpickling objects.

    Raises:
        CheckpointError: missing, damaged, or holding no state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        body = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}; save a plain state dict") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise CheckpointError(f"{path} holds more than tensors: {error}; save a plain state dict") from error
    for key in ("state_dict", "model"):
        if isinstance(body, dict) and isinstance(body.get(key), dict):
            body = body[key]
    if not isinstance(body, dict) or not body or not all(isinstance(value, Tensor) for value in body.values()):
        raise CheckpointError(f"{path} holds no state dict (names to tensors); save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in body.items()}


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors, which fit their digest where the file has one: those of other tools have none."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        expected = (file.metadata() or {}).get("lbs-digest")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    if expected is not None and digest(tensors) != expected:
        raise CheckpointError(f"{path} is damaged: its tensors do not match their digest; restore it")
    return tensors


def apply_weights(model: nn.Module, tensors: dict[str, Tensor], origin: str | Path) -> None:
    """load_state_dict with an error that names what does not fit. Raises CheckpointError.

    Floats of any width go into floats; integers and complex numbers, which torch would convert without a word, do not.
    """
    own = model.state_dict()
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & tensors.keys())
        if tensors[key].shape != own[key].shape
    ]
    kinds = [
        f"{key} {tensors[key].dtype} for {own[key].dtype}".replace("torch.", "")
        for key in sorted(own.keys() & tensors.keys())
        if _kind(tensors[key]) != _kind(own[key])
    ]
    missing = [key for key in missing if not key.endswith(("num_batches_tracked", "quantizer.zero_point"))]
    if missing or foreign or other or kinds:
        parts = [
            f"{label}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''} ({len(names)})"
            for label, names in (
                ("missing", missing),
                ("not in the model", foreign),
                ("other shape", other),
                ("other numbers", kinds),
            )
            if names
        ]
        raise CheckpointError(f"{origin} does not fit the model: {'; '.join(parts)}; name the model it was saved from")
    model.load_state_dict(tensors, strict=False)


def _kind(tensor: Tensor) -> str:
    """What a tensor's numbers are: floating, complex, bool or integer."""
    if tensor.is_floating_point():
        return "floating"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype == torch.bool else "integer"


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Momentum by parameter name."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            found[name] = momentum
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, momenta: dict[str, Tensor]) -> None:
    """Put momentum back. Raises CheckpointError for a parameter the model does not have."""
    parameters = dict(model.named_parameters())
    foreign = sorted(momenta.keys() - parameters.keys())
    if foreign:
        raise CheckpointError(f"the checkpoint holds momentum of {', '.join(foreign[:4])}, which the model lacks")
    optimizer.state.clear()
    for name, momentum in momenta.items():
        parameter = parameters[name]
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.detach()).copy_(momentum)


def random_tensors() -> dict[str, Tensor]:
    """The state of torch's generators."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore_random(states: dict[str, Tensor]) -> None:
    """Put the generators back; a CUDA state is ignored on a machine without a GPU."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes, in name order."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        total.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return total.hexdigest()
