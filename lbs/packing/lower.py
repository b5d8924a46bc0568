"""A traced model of quantized layers becomes programs: who consumes whom, and which form each tensor takes.

The walk follows the graph and keeps, for every node, where its float value lives: in the epilogue of a step that can
still absorb what follows (norm, activation, gate, sum, clamp), behind a norm that only quantizers read
(pre-activation), or behind a maximum that is taken on codes. A step stores its value as a stream only where somebody
needs floats. What no step can absorb becomes a step of its own that reads a stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor, fx, nn

from lbs.convolutions import TransposedConv2d
from lbs.graph import ModelGraph, called_module
from lbs.packing.checks import check_layer, check_stream
from lbs.packing.draft import Draft, Norm, Selection, Slot, Target, assemble
from lbs.packing.index_maps import Grid, IndexMap
from lbs.packing.patterns import Op, classify, shape_of
from lbs.packing.regions import Partition, operands, partition
from lbs.packing.transposed import NoWindow, expanded, parts_of
from lbs.quant.layers import QuantLayer
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer, StreamQuantizer
from lbs_kernels.errors import GraphError, LbsError, raise_together
from lbs_kernels.program.steps import Program


@dataclass(frozen=True)
class LoweredRegion:
    """One program, the nodes it reads and the nodes whose values it returns."""

    program: Program
    blob: Tensor
    nodes: frozenset[fx.Node]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[tuple[fx.Node, int], ...]  # node -> place among the program's outputs


@dataclass(frozen=True)
class Lowered:
    """All regions in execution order, and what stays in float: (name, reason). `free` nodes have become needless."""

    regions: tuple[LoweredRegion, ...]
    kept_float: tuple[tuple[str, str], ...]
    free: frozenset[fx.Node]


class _NotPackable(Exception):
    """A node that fits no program where it stands; it goes back to float."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


@dataclass(frozen=True)
class _Stream:
    """A node that makes codes stand for a value; `pool`: the maximum in front of it."""

    node: fx.Node
    quantizer: StreamQuantizer
    pool: fx.Node | None


@dataclass(frozen=True)
class _Value:
    """A float value: that of a step, of a norm (and ReLU) on it, or of a maximum of either.

    stream: what codes of the step's value stand for, or of maxima of it, which is the same.
    """

    draft: Draft
    norm: Norm | None = None
    relu: bool = False
    stream: _Stream | None = None
    pool: tuple[fx.Node, Op] | None = None

    @property
    def plain(self) -> bool:
        return self.norm is None and self.pool is None and self.stream is None


def _coding(quantizer: ActivationQuantizer | InputQuantizer) -> tuple[int, float, int, bool]:
    return quantizer.bits, quantizer.scale(), quantizer.zero, quantizer.signed


_HERE = (0, 0)


@dataclass(frozen=True)
class _Chosen:
    """What a selection takes: the step, its channel and the (top, left) of each; and which pixels, where they move."""

    entries: tuple[tuple[Draft, int, tuple[int, int]], ...]
    grid: Grid | None = None

    @staticmethod
    def all_of(draft: Draft) -> _Chosen:
        return _Chosen(tuple((draft, channel, _HERE) for channel in range(draft.shape[0])))

    @staticmethod
    def side_by_side(several: list[_Chosen]) -> _Chosen:
        """Of one grid."""
        grid = several[0].grid
        places = 1 if grid is None else grid.block[0] * grid.block[1]
        parts = [
            one.entries[place * len(one.entries) // places : (place + 1) * len(one.entries) // places]
            for place in range(places)
            for one in several
        ]
        return _Chosen(tuple(entry for part in parts for entry in part), grid)

    @property
    def inputs(self) -> list[tuple[Draft, tuple[int, int]]]:
        """Steps, each as often as pixels of it are read from different places."""
        return list(dict.fromkeys((step, corner) for step, _, corner in self.entries))

    def is_of_channels(self, draft: Draft) -> bool:
        """Whether nothing but channels is chosen for `draft`: of steps that have its pixels."""
        return self.grid is None and all(step.shape[1:] == draft.shape[1:] for step, _, _ in self.entries)

    def taken(self, channels: tuple[int, ...]) -> _Chosen:
        """Channels of this, which moves no pixels."""
        return _Chosen(tuple(self.entries[channel] for channel in channels))

    def moved(self, by: IndexMap) -> _Chosen:
        """Pixels of this, which moves none."""
        pairs = zip(by.channels, by.corners, strict=True)
        return _Chosen(tuple((*self.entries[channel][:2], corner) for channel, corner in pairs), by.grid)

    def selection(self, draft: Draft) -> Selection:
        """The same among the channels of `inputs` side by side."""
        widths = [step.shape[0] for step, _ in self.inputs]
        first = dict(zip(self.inputs, accumulate(widths, initial=0), strict=False))
        channels = tuple(first[step, corner] + channel for step, channel, corner in self.entries)
        channels = () if channels == tuple(range(sum(widths))) else channels
        if self.grid is not None:
            top, left = zip(*(corner for _, corner in self.inputs), strict=True)
            grid = self.grid
            return Selection(channels, (1, 1), grid.size, grid.block, grid.stride, top, left)
        (_, height, width), (_, rows, columns) = draft.shape, self.inputs[0][0].shape
        return Selection(channels, (height // rows, width // columns))


def step_names(module: fx.GraphModule) -> dict[fx.Node, str]:
    """Name of the step of every quantized layer call: the layer's, with `#2`, `#3` ... where it is called again."""
    names: dict[fx.Node, str] = {}
    calls: dict[str, int] = {}
    for node in module.graph.nodes:
        if isinstance(called_module(module, node), QuantLayer):
            target = str(node.target)
            calls[target] = calls.get(target, 0) + 1
            names[node] = target if calls[target] == 1 else f"{target}#{calls[target]}"
    return names


def lower(graph: ModelGraph, stream_dtype: str, pixels: tuple[Tensor, Tensor] | None = None) -> Lowered:
    """Programs of a traced model.

    Args:
        pixels: (scale, shift) float64 [C]; the model's input is given as bytes, which they normalise. None: as floats.

    Raises:
        GraphError: no layer can be packed, or a layer breaks a rule of the format. FormatError: an accumulator could
            overflow.
    """
    module = graph.module
    ops: dict[fx.Node, Op] = {}
    reasons: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        found = classify(module, node)
        if isinstance(found, Op):
            ops[node] = found
        elif node.op in ("call_module", "call_function", "call_method"):
            reasons[node] = found
    while True:
        parts = partition(module.graph, ops, reasons)
        if not any(op.kind == "layer" for op in ops.values()):
            raise GraphError(f"no layer can be packed ({_listed(module, reasons)}); nothing would run on codes")
        _check_layers(module, ops)
        try:
            walks = [_Walk(module, ops, region, parts, pixels, stream_dtype) for region in parts.regions]
            break
        except _NotPackable as refusal:
            reasons[refusal.node] = refusal.reason
            del ops[refusal.node]
    if pixels is not None:
        _check_bytes(module, ops, parts)
    regions = tuple(walk.finish() for walk in walks)
    return Lowered(regions, _kept(module, ops, reasons, parts), parts.free)


def _check_bytes(module: fx.GraphModule, ops: dict[fx.Node, Op], parts: Partition) -> None:
    packed = {node for region in parts.regions for node in region} | parts.free
    packed |= {node for node, op in ops.items() if op.kind == "shape"}
    for image in (node for node in module.graph.nodes if node.op == "placeholder"):
        floats = [user for user in image.users if user not in packed]
        if floats:
            raise GraphError(
                f"{label_of(floats[0])} stays in float and reads the images, which would be bytes; pack without "
                "normalize= and give normalised float32 images"
            )


def _kept(
    module: fx.GraphModule, ops: dict[fx.Node, Op], reasons: dict[fx.Node, str], parts: Partition
) -> tuple[tuple[str, str], ...]:
    left = {node: reason for node, reason in reasons.items() if node not in parts.free}
    for node, op in ops.items():
        if op.kind == "shape" and node not in parts.free:
            left[node] = "its sizes are read by float operations"
    ordered = [node for node in module.graph.nodes if node in left and "layout" not in node.meta]
    return tuple((label_of(node), left[node]) for node in ordered)


def _listed(module: fx.GraphModule, reasons: dict[fx.Node, str]) -> str:
    layers = [n for n in reasons if isinstance(called_module(module, n), QuantLayer)]
    return "; ".join(f"{label_of(n)}: {reasons[n]}" for n in layers) or "the forward pass calls none"


def label_of(node: fx.Node) -> str:
    """What reports call a node."""
    return str(node.target) if node.op == "call_module" else node.name


def _check_layers(module: fx.GraphModule, ops: dict[fx.Node, Op]) -> None:
    told: dict[str, LbsError] = {}
    for node, op in ops.items():
        layer = called_module(module, node)
        if op.kind == "layer" and isinstance(layer, QuantLayer):
            try:
                check_layer(str(node.target), layer)
            except GraphError as error:
                told[str(node.target)] = error
    raise_together(list(told.values()))


class _Walk:
    """One region: drafts of its steps, built in graph order."""

    def __init__(
        self,
        module: fx.GraphModule,
        ops: dict[fx.Node, Op],
        region: tuple[fx.Node, ...],
        parts: Partition,
        pixels: tuple[Tensor, Tensor] | None,
        stream_dtype: str,
    ) -> None:
        self.stream_dtype = stream_dtype
        self.module = module
        self.ops = ops
        self.region = set(region)
        self.free = parts.free
        self.pixels = pixels
        self.names = step_names(module)
        self.drafts: list[Draft] = []
        self.images: dict[fx.Node, Slot] = {}
        self.values: dict[fx.Node, _Value] = {}
        self.codes: dict[tuple[object, ...], Slot] = {}
        self.chosen: dict[Draft, _Chosen] = {}  # of selections
        self.constants: dict[tuple[float, int], Slot] = {}
        for node in region:
            getattr(self, f"_{ops[node].kind}")(node, ops[node])
        self.results = self._results(region)
        for draft in reversed(self.drafts):  # what a selection reads is stored where somebody reads the selection
            if draft in self.chosen and draft.written():
                draft.sources = tuple(step.stored() for step, _ in self.chosen[draft].inputs)
                draft.selection = self.chosen[draft].selection(draft)
        self.drafts = [part for draft in self.drafts for part in expanded(draft)]

    def finish(self) -> LoweredRegion:
        """Assemble the program."""
        outputs = list(dict.fromkeys(self.results.values()))
        program, blob = assemble(self.drafts, list(self.images.values()), outputs, self.stream_dtype)
        places = tuple((node, outputs.index(slot)) for node, slot in self.results.items())
        return LoweredRegion(program, blob, frozenset(self.region), tuple(self.images), places)

    # Nodes, one method per kind.

    def _layer(self, node: fx.Node, op: Op) -> None:
        layer, name = called_module(self.module, node), self.names[node]
        if not isinstance(layer, QuantLayer):
            raise GraphError(f"{name} is a {type(layer).__name__}, not a quantized layer")
        source = self._encode(self._operand(node), layer.quantizer, f"{name}.input")
        shape = shape_of(node)
        size = (shape[1], shape[2], shape[3]) if isinstance(layer, nn.Conv2d) else (shape[1], 1, 1)
        if isinstance(layer, TransposedConv2d):
            try:
                parts_of(layer, source.shape[1:], size[1:])
            except NoWindow as reason:
                raise _NotPackable(node, str(reason)) from reason
        self._add_draft(node, Draft(name, node, (source,), size, layer=layer))

    def _norm(self, node: fx.Node, op: Op) -> None:
        norm, label = called_module(self.module, node), label_of(node)
        if not isinstance(norm, nn.BatchNorm2d):
            raise GraphError(f"{label} is a {type(norm).__name__}, not a norm")
        source, draft = self._operand(node), self._absorber(self._source(node), node)
        readers = [user for reader in self._readers(node) for user in self._behind_relu(reader)]
        if draft is None or not draft.takes_norm():
            if source.plain and all(self._kind(reader) == "layer" for reader in readers):
                self.values[node] = replace(source, norm=(label, norm))
                return
            draft = self._copy(node, source)
        draft.norms.append((label, norm))
        draft.value = node
        self.values[node] = _Value(draft)

    def _clamp(self, node: fx.Node, op: Op) -> None:
        source = self._operand(node)
        if source.norm is not None and source.pool is None:  # _norm has looked at its readers
            self.values[node] = replace(source, relu=True)
            return
        draft = self._absorber(self._source(node), node) or self._copy(node, source)
        draft.clamp(op.low, op.high)
        draft.value = node
        self.values[node] = _Value(draft)

    def _add(self, node: fx.Node, op: Op) -> None:
        first, second = operands(node, op)
        # The later one absorbs the sum, so that the earlier is there in time.
        for main, other in sorted(((first, second), (second, first)), key=lambda pair: -self._age(pair[0])):
            draft = self._absorber(main, node) if main is not other else None
            if draft is not None and draft.takes_residual():
                break
        else:
            coded = self._read(first).stream is not None and self._read(second).stream is None
            main, other = (second, first) if coded else (first, second)
            draft = self._copy(node, self._read(main))
        residual, step = self._residual(other, node)
        if residual.shape != draft.shape:
            raise _NotPackable(node, f"it adds pixels of {draft.shape} and {residual.shape}, flattened")
        draft.add(residual, step)
        draft.value = node
        self.values[node] = _Value(draft)

    def _activation(self, node: fx.Node, op: Op) -> None:
        source = self._operand(node)
        draft = self._absorber(self._source(node), node)
        if draft is None or not draft.takes_function():
            draft = self._copy(node, source)
        slope = op.function.slope if op.function is not None else None
        if slope is not None and len(slope) != draft.shape[0]:
            raise _NotPackable(node, f"it has {len(slope)} slopes for {draft.shape[0]} channels, flattened")
        draft.function = op.function
        draft.value = node
        self.values[node] = _Value(draft)

    def _gate(self, node: fx.Node, op: Op) -> None:
        main, other = operands(node, op)
        gate = self._floats(other, node)
        draft = self._absorber(main, node) if main is not other else None
        if draft is None or not draft.takes_gate():
            draft = self._copy(node, self._read(main))
        draft.multiply(gate)
        draft.value = node
        self.values[node] = _Value(draft)

    def _scale(self, node: fx.Node, op: Op) -> None:
        source = self._operand(node)
        draft = self._absorber(self._source(node), node)
        if draft is None or not draft.takes_gate() or self.stream_dtype != "float32":
            draft = self._copy(node, source)
            draft.factor = op.factor
        else:
            draft.multiply(self._constant(op.factor, draft.shape[0]))
        draft.value = node
        self.values[node] = _Value(draft)

    def _max_pool(self, node: fx.Node, op: Op) -> None:
        source = self._operand(node)
        readers = self._readers(node)
        if readers and all(self._takes_maximum(source, reader) for reader in readers) and source.pool is None:
            self.values[node] = replace(source, pool=(node, op))
            return
        self._pool(node, op)

    def _takes_maximum(self, source: _Value, reader: fx.Node) -> bool:
        """Whether a reader of maxima of `source` may be given those of codes."""
        kinds = {"layer"}
        if source.stream is not None:
            kinds.add("add")
        elif source.norm is None:
            kinds.add("stream")
        return self._kind(reader) in kinds

    def _stream(self, node: fx.Node, op: Op) -> None:
        source, quantizer = self._operand(node), called_module(self.module, node)
        if not isinstance(quantizer, StreamQuantizer):
            raise GraphError(f"{label_of(node)} is a {type(quantizer).__name__}, not a quantizer of streams")
        check_stream(label_of(node), quantizer)
        if source.norm is not None or source.stream is not None or source.draft.is_spread():
            raise _NotPackable(node, "no step writes its value: it is read of a norm, of codes or of several pieces")
        pool = None if source.pool is None else source.pool[0]
        self.values[node] = replace(source, stream=_Stream(node, quantizer, pool))

    def _mean_pool(self, node: fx.Node, op: Op) -> None:
        self._pool(node, op)

    def _average_pool(self, node: fx.Node, op: Op) -> None:
        self._pool(node, op)

    def _resize(self, node: fx.Node, op: Op) -> None:
        self._pool(node, op)

    def _pool(self, node: fx.Node, op: Op) -> None:
        stream = self._floats(self._source(node), node)
        shape = (*shape_of(node), 1, 1)
        self._add_draft(node, Draft(node.name, node, (stream,), (shape[1], shape[2], shape[3]), pool=op))

    def _select(self, node: fx.Node, op: Op) -> None:
        found = []
        for source in operands(node, op):
            if (stream := self._read(source).stream) is not None:
                raise _NotPackable(stream.node, f"{label_of(node)} reads its floats")
            draft = self._read(source).draft
            if len(shape_of(source)) == 2 and draft.shape[1:] != (1, 1):
                raise _NotPackable(node, f"it reads pixels of {draft.shape}, flattened")
            found.append(self.chosen[draft] if draft.moves_only() else _Chosen.all_of(draft))
        grids = {one.grid for one in found}
        if op.moved is not None:
            chosen = found[0] if found[0].is_of_channels(draft) else _Chosen.all_of(draft)
            chosen = chosen.moved(op.moved)
        elif len(grids) > 1 or (grids != {None} and op.channels is not None):
            chosen = _Chosen.side_by_side([_Chosen.all_of(self._read(source).draft) for source in operands(node, op)])
        else:
            chosen = _Chosen.side_by_side(found)
        shape = (*shape_of(node), 1, 1)
        draft = Draft(node.name, node, (), (shape[1], shape[2], shape[3]), selection=Selection())
        self.chosen[draft] = chosen if op.channels is None else chosen.taken(op.channels)
        self._add_draft(node, draft)

    def _alias(self, node: fx.Node, op: Op) -> None:
        self.values[node] = self._operand(node)

    # Helpers.

    def _is_of_codes(self, draft: Draft) -> bool:
        """Whether the steps a selection reads encode for its readers: only layers are, and they read all of it."""
        if not draft.moves_only():
            return False
        parts = {(step, channel) for step, channel, _ in self.chosen[draft].entries}
        whole = len(parts) == sum(step.shape[0] for step in {step for step, _ in parts})
        return whole and not any(self._reads_floats(reader) for reader in self._readers(draft.value))

    def _reads_floats(self, reader: fx.Node) -> bool:
        kind = self._kind(reader)
        of_codes = kind == "max_pool" and all(self._kind(behind) == "layer" for behind in self._readers(reader))
        return not of_codes and kind not in ("layer", "select")

    def _add_draft(self, node: fx.Node, draft: Draft) -> None:
        self.drafts.append(draft)
        self.values[node] = _Value(draft)

    def _copy(self, node: fx.Node, source: _Value) -> Draft:
        """A step that reads a stored value and emits it anew."""
        draft = Draft(node.name, node, (self._stored(source, node),), source.draft.shape)
        self.drafts.append(draft)
        return draft

    def _constant(self, value: float, channels: int) -> Slot:
        """A gate that is the same everywhere: one pixel of what the region is given, clamped to one number."""
        key = (value, channels)
        if key not in self.constants:
            # A step of its own reads it: another may wait for what is multiplied.
            node, image = next(iter(self.images.items()))
            given = Draft(f"{node.name}.stored", node, (image,), image.shape)
            given.stream = Slot(given.name, "stream", given.shape)
            pixel = Selection((0,) * channels, size=(1, 1))
            step = Draft(f"constant {value:g}", node, (given.stream,), (channels, 1, 1), selection=pixel)
            step.clamp(value, value)
            step.stream = Slot(f"{step.name} for {channels}", "stream", step.shape)
            self.drafts += [given, step]
            self.constants[key] = step.stream
        return self.constants[key]

    def _source(self, node: fx.Node) -> fx.Node:
        return operands(node, self.ops[node])[0]

    def _operand(self, node: fx.Node) -> _Value:
        return self._read(self._source(node))

    def _read(self, node: fx.Node) -> _Value:
        """The value of a node; one outside the region becomes an image input."""
        if node not in self.region and node not in self.values:
            shape = shape_of(node)
            if len(shape) not in (2, 4):
                reader = next(user for user in node.users if user in self.region)
                raise _NotPackable(reader, f"it reads {len(shape)} dimensions; regions take [N, C, H, W] or [N, C]")
            size = (shape[1], shape[2], shape[3]) if len(shape) == 4 else (shape[1], 1, 1)
            pixels = self.pixels if node.op == "placeholder" else None
            self.images[node] = Slot(node.name, "image", size, dtype="float32" if pixels is None else "uint8")
            self._add_draft(node, Draft(f"{node.name}.quantize", node, (self.images[node],), size, pixels=pixels))
        return self.values[node]

    def _age(self, node: fx.Node) -> int:
        return self.drafts.index(self._read(node).draft)

    def _origin(self, node: fx.Node) -> fx.Node:
        """The node whose values an alias shows."""
        while node in self.region and self._kind(node) == "alias":
            node = self._source(node)
        return node

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """What reads a node's values, aliases looked through; of a node outside, the region's readers only."""
        found = []
        for user in node.users:
            if user in self.free or (node not in self.region and user not in self.region):
                continue
            found.extend(self._readers(user) if user in self.region and self._kind(user) == "alias" else [user])
        return found

    def _behind_relu(self, node: fx.Node) -> list[fx.Node]:
        op = self.ops.get(node)
        if node in self.region and op is not None and op.kind == "clamp" and (op.low, op.high) == (0.0, None):
            return self._readers(node)
        return [node]

    def _kind(self, node: fx.Node) -> str:
        return self.ops[node].kind if node in self.region else ""

    def _only_reader(self, node: fx.Node, reader: fx.Node) -> bool:
        return self._readers(self._origin(node)) == [reader]

    def _absorber(self, node: fx.Node, reader: fx.Node) -> Draft | None:
        """The step that computes `node`, if `reader` alone sees it and can therefore become part of that step."""
        value = self._read(node)
        return value.draft if value.plain and self._only_reader(node, reader) else None

    def _floats(self, node: fx.Node, reader: fx.Node) -> Slot:
        return self._stored(self._read(node), reader)

    def _residual(self, node: fx.Node, reader: fx.Node) -> tuple[Slot, float | None]:
        """What a sum adds, and the step of codes."""
        value = self._read(node)
        if value.stream is None:
            return self._stored(value, reader), None
        return self._coded(value), value.stream.quantizer.value_step()

    def _coded(self, value: _Value) -> Slot:
        """The codes of a value that codes stand for."""
        assert value.stream is not None
        return self._encode(value, value.stream.quantizer, "")

    def _stored(self, value: _Value, reader: fx.Node) -> Slot:
        if value.stream is not None:
            raise _NotPackable(value.stream.node, f"{label_of(reader)} reads its floats")
        if value.pool is not None:
            raise _NotPackable(value.pool[0], f"{label_of(reader)} reads its floats")
        if value.norm is not None:
            raise GraphError(f"{label_of(reader)} reads the floats of {value.norm[0]}, which no step stores")
        return value.draft.stored()

    def _encode(self, value: _Value, quantizer: ActivationQuantizer | InputQuantizer, name: str) -> Slot:
        """Codes of a value as `quantizer` wants them, shared between layers that want the same."""
        norm = value.norm[0] if value.norm is not None else None
        pool = value.pool[0] if value.pool is not None else None
        stream = value.stream
        key = (value.draft, norm, value.relu, pool, stream, *_coding(quantizer))
        if key in self.codes:
            return self.codes[key]
        held = None  # the codes that stand for the value, where others are made of it
        if stream is not None and _coding(quantizer) == _coding(stream.quantizer):
            name = stream.node.name if pool is stream.pool else f"{stream.node.name}@{name}"
        elif stream is not None and pool is None:
            held = self._coded(value)
        draft, scale = value.draft, quantizer.scale()
        bits, zero, signed = quantizer.bits, quantizer.zero, quantizer.signed
        if value.pool is not None:
            node, op = value.pool
            before = self._encode(replace(value, pool=None), quantizer, f"{node.name}.input")
            shape = (draft.shape[0], *shape_of(node)[2:])
            draft = Draft(f"{node.name}@{name}", node, (before,), (shape[0], shape[1], shape[2]), pool=op)
            self.drafts.append(draft)
        elif value.norm is None and self._is_of_codes(draft):
            steps = [step for step, _ in self.chosen[draft].inputs]
            parts = tuple(self._encode(_Value(step), quantizer, f"{step.name}@{name}") for step in steps)
            selection = self.chosen[draft].selection(draft)
            draft = Draft(f"{draft.name}@{name}", draft.value, parts, draft.shape, selection=selection)
            self.drafts.append(draft)
        slot = Slot(name, "codes", draft.shape, bits, zero, signed)
        target = Target(slot, scale)
        if value.pool is None:
            target.norm, target.relu = value.norm, value.relu
            target.behind = None if held is None or stream is None else self._standing(draft, held, stream)
        draft.targets.append(target)
        self.codes[key] = slot
        return slot

    def _standing(self, draft: Draft, held: Slot, stream: _Stream) -> Target:
        """The target of a stream's codes, which from now on stand for the value of the step."""
        target = draft.target_of(held)
        if not draft.stand_for_value(target, stream.quantizer.value_step()):
            raise _NotPackable(stream.node, "other codes stand for the same value")
        return target

    def _results(self, region: tuple[fx.Node, ...]) -> dict[fx.Node, Slot]:
        """Streams of the nodes that are read outside."""
        leaving = [n for n in region if any(user not in self.region and user not in self.free for user in n.users)]
        results: dict[fx.Node, Slot] = {}
        for node in sorted(leaving, key=lambda n: len(shape_of(n)) == 2):
            value = self.values[node]
            reader = next(user for user in node.users if user not in self.region and user not in self.free)
            slot = self._stored(value, reader)
            flat = len(shape_of(node)) == 2
            if not flat and slot.shape != shape_of(node)[1:]:
                raise _NotPackable(node, f"{label_of(reader)} reads it repeated over pixels")
            if flat and (slot.shape[1:] != (1, 1) or (slot in results.values() and not slot.flat)):
                raise _NotPackable(self._flattener(node), f"{label_of(reader)} reads the flattened floats")
            slot.flat = flat
            results[node] = slot
        return {node: results[node] for node in region if node in results}

    def _flattener(self, node: fx.Node) -> fx.Node:
        """The alias that made a value two-dimensional."""
        while self._kind(self._source(node)) == "alias" and len(shape_of(self._source(node))) == 2:
            node = self._source(node)
        return node
