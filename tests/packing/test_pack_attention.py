"""Networks with attention, which stays in float: every one that packs can be saved, and loads as the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pack_nets
import pytest
import torch
from test_pack_files import Net, comes_back, rows
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lbs
from lbs.packing.packing import pack
from lbs.packing.recorded import NotRecordable, recorded
from lbs_kernels.errors import CheckpointError

SHAPE = (3, 10, 14)
WINDOW = 4


@fx.wrap
def windowed(
    x: Tensor, qkv: Tensor, project: Tensor, bias: Tensor, window: list[int], heads: int, shift: list[int],
    qkv_bias: Tensor | None = None, project_bias: Tensor | None = None, dropout: float = 0.0, training: bool = False,
) -> Tensor:  # fmt: skip
    """Attention in windows of [N, H, W, C] that are shifted against each other, as Swin has it: padded to whole ones,
    with a mask that is written piece by piece where windows come from both ends of the image."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    _, rows, columns, _ = x.shape
    shift = [0 if size >= whole else step for size, whole, step in zip(window, (rows, columns), shift, strict=True)]
    if sum(shift) > 0:
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    count, taps = (rows // window[0]) * (columns // window[1]), window[0] * window[1]

    def split(y: Tensor, *lead: int) -> Tensor:
        return y.view(*lead, rows // window[0], window[0], columns // window[1], window[1], -1)

    x = split(x, batch).permute(0, 1, 3, 2, 4, 5).reshape(batch * count, taps, channels)
    parts = F.linear(x, qkv, qkv_bias).reshape(x.size(0), x.size(1), 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    query, key, value = parts[0], parts[1], parts[2]
    query = query * (channels // heads) ** -0.5
    scores = query.matmul(key.transpose(-2, -1)) + bias
    if sum(shift) > 0:
        mask, number = x.new_zeros((rows, columns)), 0
        for down in ((0, -window[0]), (-window[0], -shift[0]), (-shift[0], None)):
            for across in ((0, -window[1]), (-window[1], -shift[1]), (-shift[1], None)):
                mask[down[0] : down[1], across[0] : across[1]] = number
                number += 1
        mask = split(mask).permute(0, 2, 1, 3, 4).reshape(count, taps)
        mask = mask.unsqueeze(1) - mask.unsqueeze(2)
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        scores = scores.view(x.size(0) // count, count, heads, taps, taps) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, heads, taps, taps)
    scores = F.dropout(F.softmax(scores, dim=-1), p=dropout, training=training)
    x = F.linear(scores.matmul(value).transpose(1, 2).reshape(x.size(0), taps, channels), project, project_bias)
    x = x.view(batch, rows // window[0], columns // window[1], window[0], window[1], channels)
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, channels)
    if sum(shift) > 0:
        x = torch.roll(x, shifts=(shift[0], shift[1]), dims=(1, 2))
    return x[:, :height, :width, :].contiguous()


@fx.wrap
def relative_bias(table: Tensor, index: Tensor, window: list[int]) -> Tensor:
    count = window[0] * window[1]
    return table[index].view(count, count, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


class WindowAttention(nn.Module):
    def __init__(self, channels: int, heads: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift, self.heads = [WINDOW, WINDOW], [shift, shift], heads
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
        apart = (place[:, :, None] - place[:, None, :]) + WINDOW - 1
        self.register_buffer("index", (apart[0] * (2 * WINDOW - 1) + apart[1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        bias = relative_bias(self.table, self.index, self.window)
        return windowed(
            x, self.qkv.weight, self.project.weight, bias, self.window, self.heads, shift=self.shift,
            qkv_bias=self.qkv.bias, project_bias=self.project.bias, training=self.training,
        )  # fmt: skip


@fx.wrap
def merged(x: Tensor) -> Tensor:
    """Four neighbours side by side."""
    height, width, _ = x.shape[-3:]
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    return torch.cat([x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)], -1)


class Swin(nn.Module):
    """Two stages of two blocks, the second of which shifts its windows; the later stage has but one window."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.stages, self.reduce = nn.ModuleList(), nn.Linear(32, 16, bias=False)
        self.norms, self.mlps = nn.ModuleList(), nn.ModuleList()
        for channels in (8, 8, 16, 16):
            self.stages.append(WindowAttention(channels, 2, (len(self.stages) % 2) * WINDOW // 2))
            self.norms.extend(nn.LayerNorm(channels) for _ in range(2))
            self.mlps.append(
                nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
            )
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for place, attention in enumerate(self.stages):
            if place == 2:
                x = self.reduce(merged(x))
            x = x + attention(self.norms[2 * place](x))
            x = x + self.mlps[place](self.norms[2 * place + 1](x))
        return self.last(x.mean((1, 2)))


def test_swin_comes_back(tmp_path: Path) -> None:
    loaded = comes_back(Swin(), tmp_path, SHAPE)
    calls = [node.target for node in loaded.body.graph.nodes if node.op == "call_function"]
    assert torch.roll in calls
    assert windowed not in calls
    assert len([name for name, _ in loaded.kept_float if name.startswith("windowed")]) == 4


def test_quantized_swin_is_saved_with_its_report(tmp_path: Path) -> None:
    torch.manual_seed(0)
    packed = lbs.quantize(Swin().eval(), pack_nets.images(8, SHAPE))
    packed.save(tmp_path / "swin")
    x = pack_nets.images(5, SHAPE, 4)
    with torch.no_grad():
        assert torch.equal(lbs.load(tmp_path / "swin")(x), packed(x))


class Encoder(nn.Module):
    """Patches, a token of the class, positions, an encoder of torch's or whatever else, a classifier."""

    def __init__(self, mixer: nn.Module, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.patches, self.mixer, self.use = nn.Conv2d(3, 8, 2, 2), mixer, use
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 36, 8))
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = rows(self.patches(x))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.last(self.use(self.mixer, x)[:, 0])


class Handmade(nn.Module):
    """Attention from einsum, softmax and a mask that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("mask", torch.full((36, 36), float("-inf")).triu(1))

    def parts(self, x: Tensor) -> list[Tensor]:
        whole = self.qkv(x).unflatten(2, (3, 2, 4))
        return [whole[:, :, place] for place in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2 + self.mask
        return self.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


class Fused(Handmade):
    """The same by torch's own function, causal."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.parts(x))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)


def decoder() -> nn.TransformerDecoder:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2, nn.LayerNorm(8))


CAUSAL = nn.Transformer.generate_square_subsequent_mask(36)
MIXERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "an encoder": (lambda: nn.TransformerEncoder(layer(), 2), lambda m, x: m(x)),
    "an encoder, norm first": (
        lambda: nn.TransformerEncoder(layer(norm_first=True, activation="gelu"), 2, nn.LayerNorm(8), False),
        lambda m, x: m(x),
    ),
    "an encoder with a mask": (lambda: nn.TransformerEncoder(layer(), 2), lambda m, x: m(x, mask=CAUSAL)),
    "a decoder of two tensors": (decoder, lambda m, x: m(x, x * 0.5)),
    "a decoder of one": (decoder, lambda m, x: m(x, x)),
    "a whole transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        lambda m, x: m(x, x * 0.5),
    ),
    "a whole transformer with a mask": (
        lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True),
        lambda m, x: m(x, x, tgt_mask=CAUSAL, tgt_is_causal=True),
    ),
    "attention alone": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "attention, weights left out": (
        lambda: nn.MultiheadAttention(8, 4, batch_first=True),
        lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    "from einsum": (Handmade, lambda m, x: m(x)),
    "torch's own function": (Fused, lambda m, x: m(x)),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("name", MIXERS)
def test_transformers_come_back(name: str, tmp_path: Path) -> None:
    make, use = MIXERS[name]
    torch.manual_seed(5)
    comes_back(Encoder(make(), use), tmp_path, SHAPE)


class Pooled(nn.Module):
    """Attention of the mean over all pixels to them, by torch's function with weights in three parts (CLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(37, 8))
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(1, 0, 2)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0) + self.place[:, None, :]
        y, _ = F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=2, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight, in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]), bias_k=None, bias_v=None,
            add_zero_attn=False, dropout_p=0.0, out_proj_weight=self.out.weight, out_proj_bias=self.out.bias,
            use_separate_proj_weight=True, training=self.training, need_weights=False,
        )  # fmt: skip
        return y.permute(1, 0, 2)


def test_attention_that_pools_comes_back(tmp_path: Path) -> None:
    comes_back(Encoder(Pooled(), lambda m, x: m(x)), tmp_path, SHAPE)


class Placed(nn.ReLU):
    """Numbers of places, which are made as they are needed, for every size others. A class that traces keep whole."""

    def forward(self, input: Tensor) -> Tensor:
        return input + torch.arange(input.shape[2] * input.shape[3]).view(1, 1, *input.shape[2:]) * 0.01


def test_constants_of_several_calls_are_told_apart(tmp_path: Path) -> None:
    """The same function, and the same module, on images of two sizes."""

    def twice(net: Any, x: Tensor) -> Tensor:
        x, small = net.placed(x), net.placed(F.avg_pool2d(x, 2))
        half = torch.full((8, 24), 0.1), torch.full((8, 8), 0.2), torch.zeros(1, 2, 16, 16)
        parts = [
            windowed(y.permute(0, 2, 3, 1), half[0].t(), half[1], half[2], [4, 4], 2, [1, 2]).permute(0, 3, 1, 2)
            for y in (x, small)
        ]
        return net.last(parts[0] + x) + F.interpolate(parts[1], scale_factor=2.0)[:, :4]

    loaded = comes_back(Net(twice, placed=Placed()), tmp_path, (3, 24, 16))
    kept = {name: value for name, value in loaded.body.named_buffers() if "constants" in name}
    assert len(kept) == 4
    assert len({tuple(value.shape) for value in kept.values()}) == 4


# Recording: what is taken for what it does, and what is not.


def batches(*shape: int) -> Callable[[int], list[Tensor]]:
    return lambda batch: [torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))]


def replayed(part: Callable[[Tensor], Tensor], batch: int) -> None:
    found = recorded(part, nn.Module(), batches(4, 6))
    (x,) = batches(4, 6)(batch)
    assert torch.equal(fx.Interpreter(found).run(x.clone()), part(x.clone()))


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sizes of the batch": lambda x: x.view(x.shape[0] * 2, 2, 6).mean(0, keepdim=True).expand(3 * len(x), 2, 6),
    "a course by sizes": lambda x: x.tan() if x.shape[1] > 3 else x,
    "what it makes itself": lambda x: x + torch.arange(6) * x.new_full((4, 1), 0.5),
    "in place": lambda x: (x * 2).add_(1).clamp_(min=0)[:, 1:],
    "with operators on both sides": lambda x: 1 - (2 / (x + 3)) ** 2 + (-x),
    "of several results": lambda x: torch.cat([y.sum(-1) for y in x.chunk(2, 1)], -1) + x.max(1)[0].sum(),
    "slices and attributes": lambda x: x[:, ::2, None].mT[..., 1:-1, 0].to(x.dtype),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_recorded_for_every_batch(name: str) -> None:
    for batch in (1, 2, 7):
        replayed(PARTS[name], batch)


def written(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 1
    return y


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a course by values": (lambda x: x if float(x.sum()) > 1e9 else x * 2, "depends on values"),
    "a course by a comparison": (lambda x: x * 2 if (x == x).all() else x, "depends on values"),
    "numbers out of values": (lambda x: x * len(x.flatten().tolist()), "depends on values"),
    "sizes by values": (lambda x: x[x > -100].view(x.shape), "sizes depend on values"),
    "a tensor that is written": (written, "writes into a tensor"),
    "a course by the batch": (lambda x: x * 2 if len(x) == 2 else x.tan(), "another course"),
    "a number by the batch": (lambda x: x * (len(x) + 1), "it uses 3 and 4"),
    "a tensor by the batch": (lambda x: x + torch.ones(len(x), 1, 1), "grows with the batch"),
    "what no file names": (lambda x: torch.nonzero(x), "it calls nonzero"),
    "no tensor": (lambda x: 3, "is no tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded(name: str) -> None:
    part, message = REFUSED[name]
    with pytest.raises(NotRecordable, match=message):
        recorded(part, nn.Module(), batches(4, 6))


@fx.wrap
def asked(x: Tensor, other: Tensor) -> Tensor:
    return x * 2 if float(other.sum()) > 0 else x


def test_what_asks_for_values_is_refused_by_save(tmp_path: Path) -> None:
    packed = pack(pack_nets.quantized(Net(lambda n, y: n.last(asked(y, torch.sigmoid(y)))), (3, 8, 8)))
    with pytest.raises(CheckpointError, match="asked calls asked"):
        packed.save(tmp_path / "net")
