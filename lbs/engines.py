"""ONNX Runtime and OpenVINO as contenders of `lbs.bench`, float32 and int8, where they are installed.

The float network is exported to ONNX with norms folded; int8 is the engine's own post-training quantization: static,
per filter, the form each of them runs fastest. Both read the same file. Nothing here is needed to run a packed network.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization

from lbs.onnx.quiet import quiet
from lbs_kernels.errors import BackendError

# Name of the option -> name of the row.
ENGINES = {
    "onnxruntime": "ONNX Runtime float32",
    "onnxruntime8": "ONNX Runtime int8",
    "openvino": "OpenVINO float32",
    "openvino8": "OpenVINO int8",
}
_MODULES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_INPUT = "images"
# Relative distance of the logits from torch's float32. int8 rounds 8-bit values through tens of layers: a wrong layout
# or a lost layer gives about 1.4 (unrelated vectors of equal length), quantization a few hundredths.
_TOLERANCE = {"onnxruntime": 1e-3, "openvino": 1e-3, "onnxruntime8": 0.5, "openvino8": 0.5}


def why_not(name: str) -> str | None:
    """Why this engine cannot be timed here, or None."""
    needed = set(_MODULES[name.removesuffix("8")]) | ({"onnxruntime"} if name.endswith("8") else set())
    missing = sorted(module for module in needed if importlib.util.find_spec(module) is None)
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def onnx_file(folder: Path, bits: int, batch: int) -> Path:
    """Where a folder keeps the network in one width, 8 or 32, for one batch size."""
    return folder / f"model{bits}_n{batch}.onnx"


def session(name: str, path: Path, threads: int) -> Callable[[Any], Any]:
    """An ONNX file ready to run in an engine: images, a float32 array [N, C, H, W], to its outputs."""
    return _onnxruntime(path, threads) if name.startswith("onnxruntime") else _openvino(path, threads)


class EngineModels:
    """One float network in the forms the engines read."""

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        folder: Path | None = None,
        calibration: Tensor | None = None,
    ) -> None:
        """
        Args:
            model: float network in evaluation mode. input_shape: [C, H, W].
            folder: keeps the files, and those of this network that it has are read; None: they go with the object.
            calibration: float32 [N, C, H, W], images that set the ranges of int8; None: random numbers do.
        """
        plain = copy.deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._model = optimization.fuse(plain)
        self._shape = tuple(input_shape)
        self._calibration = calibration
        self._scratch = None if folder else tempfile.TemporaryDirectory(prefix="lbs-engines-")
        self._folder = folder or Path(self._scratch.name)  # type: ignore[union-attr]

    def call(self, name: str, images: Tensor, threads: int) -> Callable[[], object]:
        """A call that computes the logits of `images` float32 [N, C, H, W] with `threads` threads, checked once.

        Raises:
            BackendError: the engine refuses the network, or computes something else.
        """
        run = session(name, self.file(8 if name.endswith("8") else 32, images.shape[0]), threads)
        array = images.cpu().contiguous().numpy()
        with torch.inference_mode():
            expected = self._model(images.cpu())
        distance = float((torch.from_numpy(run(array).copy()) - expected).norm() / expected.norm())
        if not distance <= _TOLERANCE[name]:
            raise BackendError(
                f"{ENGINES[name]} differs from torch by {distance:.2g} of the logits' length (at most "
                f"{_TOLERANCE[name]:g}); a wrong result is not timed"
            )
        return lambda: run(array)

    def outputs(self, name: str, images: Tensor, batch: int, threads: int) -> Tensor:
        """Logits of any number of images, float32 [N, C, H, W], in calls of `batch`; the last one is filled up."""
        run = session(name, self.file(8 if name.endswith("8") else 32, batch), threads)
        rows = (torch.arange(-(-len(images) // batch) * batch) % len(images)).split(batch)
        parts = [torch.from_numpy(run(images[some].cpu().contiguous().numpy()).copy()) for some in rows]
        return torch.cat(parts)[: len(images)]

    def file(self, bits: int, batch: int) -> Path:
        """The ONNX file of one width and batch size, written on first use."""
        path = onnx_file(self._folder, bits, batch)
        if not path.exists():
            if bits == 8:
                _quantize(self.file(32, batch), path, self._ranges(batch))
            else:
                self._export(path, batch)
        return path

    def _ranges(self, batch: int) -> list[Tensor]:
        """Batches that set ranges; the last one of given images is filled up."""
        if self._calibration is None:
            count = max(1, 8 // batch)
            return [torch.randn(batch, *self._shape, dtype=torch.float32) for _ in range(count)]
        images = self._calibration.cpu()
        return [images[rows] for rows in (torch.arange(-(-len(images) // batch) * batch) % len(images)).split(batch)]

    def _export(self, path: Path, batch: int) -> None:
        with quiet():
            torch.onnx.export(
                self._model, (torch.randn(batch, *self._shape, dtype=torch.float32),), str(path), input_names=[_INPUT],
                dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip


def _quantize(source: Path, target: Path, images: list[Tensor]) -> None:
    """Static int8 quantization with ranges from batches of images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{_INPUT: batch.contiguous().numpy()} for batch in images])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    prepared = source.with_suffix(".prepared.onnx")
    with quiet():
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared), str(target), Images(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip


def _onnxruntime(path: Path, threads: int) -> Callable[[Any], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda array: session.run(None, {_INPUT: array})[0]


def _openvino(path: Path, threads: int) -> Callable[[Any], Any]:
    import openvino

    # float32 stays float32: left alone, OpenVINO computes it in bfloat16 where the processor has that.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda array: request.infer({_INPUT: array}, share_inputs=True, share_outputs=True)[0]
