"""A network of several regions, or with parts in float, as torch's exporter writes it, with a node for each region."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping

import onnx
import torch
from torch import Tensor, fx, nn

from lbs.onnx.quiet import quiet
from lbs_kernels.errors import BackendError, GraphError, first_line
from lbs_kernels.program.steps import Program

DOMAIN = "lbs"  # of the nodes that stand for regions until their steps are put in their place


class _Region(nn.Module):
    """A region as a node that torch's exporter passes on."""

    def __init__(self, program: Program, index: int) -> None:
        super().__init__()
        self.specs, self.index = [program.tensors[i] for i in program.outputs], index

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        images = [x if x.dim() == 4 else x[:, :, None, None] for x in inputs]
        batch = images[0].shape[0]
        shapes = [(batch, s.channels) if s.flat else (batch, s.channels, s.height, s.width) for s in self.specs]
        return list(
            torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::Region",
                images,
                {"index": self.index},
                dtypes=[torch.float32] * len(shapes),
                shapes=shapes,
                version=1,
            )
        )


class _Graph(nn.Module):
    """A graph whose input has one name, whatever the model called it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> object:
        return self.body(images)


def outer_model(
    body: fx.GraphModule, programs: Mapping[str, Program], images: Tensor, opset: int, kept_float: str
) -> onnx.ModelProto:
    """The graph around the regions, float parts as torch's exporter writes them.

    Args:
        programs: of the regions, by the names of their modules, in order. images: two at least, for the trace; the
            batch is free. kept_float: the parts in float, for the message.

    Raises:
        GraphError: a part in float that has no form in ONNX. BackendError: onnxscript is missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise BackendError(
            f"to_onnx: parts stay in float ({kept_float}), which onnxscript writes: pip install onnxscript"
        )
    graph = fx.GraphModule(body, copy.deepcopy(body.graph))  # a graph belongs to one module
    for index, (name, program) in enumerate(programs.items()):
        setattr(graph, name, _Region(program, index))
    module = copy.deepcopy(_Graph(graph)).cpu().eval()
    try:
        with quiet(), torch.no_grad():
            made = torch.onnx.export(
                module, (images.cpu(),), dynamo=True, input_names=["images"], opset_version=opset, verbose=False,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            )  # fmt: skip
    except Exception as error:  # whatever torch's exporter makes of a part it does not know
        reason = first_line(error.__cause__ or error)
        raise GraphError(
            f"to_onnx: what stays in float has no form in ONNX for any number of images ({kept_float}): "
            f"{type(error).__name__}: {reason}. Replace that part by torch's own layers and pack again"
        ) from error
    assert made is not None
    return _anonymous(made.model_proto)


def _anonymous(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the traces of this machine that the exporter leaves: which line of which file made a node."""
    del model.metadata_props[:], model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    return model
