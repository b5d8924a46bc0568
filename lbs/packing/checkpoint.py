"""`load`: a packed network from its file."""

from __future__ import annotations

from pathlib import Path

import torch

from lbs.packing.model import PackedModel
from lbs.packing.serial import read
from lbs_kernels.errors import BackendError


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    fallback: str | None = None,
    budget: float | None = 1.0,
) -> PackedModel:
    """Read a packed network that `PackedModel.save` wrote, onto any device.

    Nothing is unpickled and no code of the file is run. Sizes are compared with the file before anything is allocated.

    Args:
        path: a `.lbs.safetensors` file.
        device: where the model shall run.
        fallback: "fp16" lets a layer for which half precision was MEASURED faster (`lbs tune`) run in it, on a GPU.
            Then results are no longer those of the reference: such a layer's sum is rounded to float16, and codes near
            a rounding boundary differ by one. `lbs.explain` names these layers, `lbs.verify` widens its tolerance for
            them. None, the default, stays exact. Not saved with the model.
        budget: how many times what a file may ask of one image this one may: 2^27 elements written (512 MiB of floats),
            2^36 products, 2^13 operations. None, for a file you trust: any, and the graph is not run by shapes first.

    Raises:
        CheckpointError: missing, truncated, damaged, foreign, of a newer version, or over its budget.
        BackendError: a device this machine does not have, or that packed networks do not run on; a fallback that does
            not exist.

    Example:
        packed = lbs.load("network.lbs.safetensors", device="cuda")
        logits = packed(images.to("cuda"))
    """
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"device {device!r} is no device; packed networks run on cpu or cuda") from error
    if target.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device}: packed networks run on cpu or cuda")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {device}: torch sees no GPU here; load onto the CPU, or install a torch with CUDA")
    parts = read(Path(path), budget)
    packed = PackedModel(
        parts.graph,
        input_shape=parts.input_shape,
        kept_float=parts.kept_float,
        plan=parts.plan,
        name=parts.name,
        normalize=parts.normalize,
    )
    packed.fallback = fallback
    return packed.to(target)
