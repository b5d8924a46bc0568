"""What a file may name: torch's modules with their constructors' arguments, functions, methods and attributes.

A file may come from anywhere, so nothing in it is looked up by a name that is not here. Everything here computes on
tensors and has no other effect. What draws random numbers in evaluation mode, reads or writes files, or takes code is
left out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

# Classes -> arguments; `argument=attribute` where the module keeps it under another name or in a part, `argument?` of
# newer releases of torch only: a flag that is written where it is false.
_CONV = "in_channels out_channels kernel_size stride padding"
_NORM = "num_features eps momentum affine track_running_stats bias?"
_POOL = "kernel_size stride padding"
_TRANSFORMER = (
    "d_model=self_attn.embed_dim nhead=self_attn.num_heads dim_feedforward=linear1.out_features dropout=dropout.p "
    "activation layer_norm_eps=norm1.eps batch_first=self_attn.batch_first norm_first bias=linear1.bias"
)
_RECURRENT = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
_TABLE = {
    "Conv1d Conv2d Conv3d": f"{_CONV} dilation groups bias padding_mode",
    "ConvTranspose1d ConvTranspose2d ConvTranspose3d": f"{_CONV} output_padding groups bias dilation padding_mode",
    "Linear": "in_features out_features bias",
    "Bilinear": "in1_features in2_features out_features bias",
    "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm": _NORM,
    "InstanceNorm1d InstanceNorm2d InstanceNorm3d": _NORM,
    "GroupNorm": "num_groups num_channels eps affine bias?",
    "LayerNorm": "normalized_shape eps elementwise_affine bias",
    "RMSNorm": "normalized_shape eps elementwise_affine",
    "LocalResponseNorm CrossMapLRN2d": "size alpha beta k",
    "ReLU ReLU6 SiLU Mish Hardswish Hardsigmoid SELU": "inplace",
    "Hardtanh": "min_val max_val inplace",
    "LeakyReLU": "negative_slope inplace",
    "ELU CELU": "alpha inplace",
    "RReLU": "lower upper inplace",
    "Threshold": "threshold value inplace",
    "PReLU": "num_parameters",
    "GELU": "approximate",
    "Softplus": "beta threshold",
    "Softshrink Hardshrink": "lambd",
    "GLU Softmax LogSoftmax Softmin": "dim",
    "Sigmoid Tanh LogSigmoid Softsign Tanhshrink Softmax2d Identity": "",
    "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout": "p inplace",
    "Flatten": "start_dim end_dim",
    "Unflatten": "dim unflattened_size",
    "MaxPool1d MaxPool2d MaxPool3d": f"{_POOL} dilation return_indices ceil_mode",
    "MaxUnpool1d MaxUnpool2d MaxUnpool3d": _POOL,
    "AvgPool1d": f"{_POOL} ceil_mode count_include_pad",
    "AvgPool2d AvgPool3d": f"{_POOL} ceil_mode count_include_pad divisor_override",
    "LPPool1d LPPool2d LPPool3d": "norm_type kernel_size stride ceil_mode",
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d": "output_size",
    "AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d": "output_size return_indices",
    "ConstantPad1d ConstantPad2d ConstantPad3d": "padding value",
    "ZeroPad1d ZeroPad2d ZeroPad3d CircularPad1d CircularPad2d CircularPad3d": "padding",
    "ReflectionPad1d ReflectionPad2d ReflectionPad3d": "padding",
    "ReplicationPad1d ReplicationPad2d ReplicationPad3d": "padding",
    "Upsample": "size scale_factor mode align_corners recompute_scale_factor",
    "UpsamplingNearest2d UpsamplingBilinear2d": "size scale_factor",
    "PixelShuffle": "upscale_factor",
    "PixelUnshuffle": "downscale_factor",
    "ChannelShuffle": "groups",
    "Fold": "output_size kernel_size dilation padding stride",
    "Unfold": "kernel_size dilation padding stride",
    "Embedding": "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
    "EmbeddingBag": "num_embeddings embedding_dim max_norm norm_type scale_grad_by_freq mode sparse "
    "include_last_offset padding_idx",
    "CosineSimilarity": "dim eps",
    "PairwiseDistance": "p=norm eps keepdim",
    "MultiheadAttention": "embed_dim num_heads dropout bias=in_proj_bias add_bias_kv=bias_k add_zero_attn kdim vdim "
    "batch_first",
    "TransformerEncoderLayer TransformerDecoderLayer": _TRANSFORMER,
    "RNN": f"{_RECURRENT} nonlinearity",
    "LSTM": f"{_RECURRENT} proj_size",
    "GRU": _RECURRENT,
    "LSTMCell GRUCell": "input_size hidden_size bias",
    "RNNCell": "input_size hidden_size bias nonlinearity",
}
OPTIONAL = {getattr(nn, name) for names, text in _TABLE.items() if "bias?" in text for name in names.split()}
PRESENT = ("bias", "add_bias_kv")  # flags kept as the parameter itself, or None

# What an argument is: a flag, a word, a number, or sizes (a whole number, several, or a word such as "same").
_FLAGS = """
    bias affine track_running_stats elementwise_affine inplace return_indices ceil_mode count_include_pad align_corners
    recompute_scale_factor scale_grad_by_freq sparse include_last_offset keepdim add_bias_kv add_zero_attn batch_first
    bidirectional norm_first
"""
_WORDS = "padding_mode approximate mode nonlinearity activation"
_NUMBERS = """
    eps momentum alpha beta k min_val max_val negative_slope lower upper threshold value lambd p dropout norm_type
    max_norm scale_factor layer_norm_eps
"""
FLAGS, WORDS, NUMBERS = (frozenset(names.split()) for names in (_FLAGS, _WORDS, _NUMBERS))


def _modules() -> dict[type[nn.Module], dict[str, str]]:
    found = {}
    for names, arguments in _TABLE.items():
        pairs = [word.rstrip("?").partition("=") for word in arguments.split()]
        attributes = {argument: attribute or argument for argument, _, attribute in pairs}
        found.update({getattr(nn, name): attributes for name in names.split()})
    return found


MODULES: dict[type[nn.Module], dict[str, str]] = _modules()  # class -> {argument: attribute}
CLASSES = {kind.__name__: kind for kind in MODULES}

_OPERATORS = """
    add iadd sub isub mul imul truediv itruediv floordiv mod pow neg pos abs matmul getitem lt le gt ge eq ne and_ or_
    xor invert
"""
_TORCH = """
    abs acos add addcdiv addcmul addmm all amax amin any argmax argmin argsort asin atan atan2 baddbmm bmm broadcast_to
    bucketize cat cdist ceil chunk clamp clamp_max clamp_min clip clone column_stack concat concatenate conj cos cosh
    cross cummax cummin cumprod cumsum deg2rad diag_embed diagonal diff div divide dot einsum eq erf erfc erfinv exp
    exp2 expand_copy expm1 flatten flip fliplr flipud floor floor_divide fmax fmin fmod frac full_like gather ge gt
    heaviside histc hstack hypot imag index_select inner isclose isfinite isinf isnan kron le lerp log log10 log1p log2
    logaddexp logical_and logical_not logical_or logical_xor logsumexp lt masked_fill matmul max maximum mean median
    meshgrid min minimum moveaxis movedim mul multiply mv nan_to_num narrow ne neg negative norm not_equal ones_like
    outer permute polar positive pow prod rad2deg ravel real reciprocal relu relu_ remainder repeat_interleave reshape
    roll rot90 round rsqrt scatter scatter_add select sgn sigmoid sign sin sinc sinh softmax sort split sqrt square
    squeeze stack std std_mean sub subtract sum swapaxes swapdims t take_along_dim tan tanh tensor_split tensordot tile
    topk trace transpose tril triu true_divide trunc unbind unflatten unsqueeze var var_mean vdot view_as_complex
    view_as_real vstack where xlogy zeros_like log_softmax
"""
_FFT = "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn fftshift ifftshift"
_LINALG = "norm vector_norm matrix_norm"
_FUNCTIONAL = """
    relu relu6 hardtanh leaky_relu elu gelu silu hardswish hardsigmoid sigmoid tanh softmax log_softmax softplus dropout
    max_pool2d avg_pool2d adaptive_avg_pool2d interpolate pad normalize adaptive_avg_pool1d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d affine_grid alpha_dropout avg_pool1d avg_pool3d
    batch_norm bilinear celu channel_shuffle conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    cosine_similarity dropout1d dropout2d dropout3d embedding embedding_bag feature_alpha_dropout fold glu grid_sample
    group_norm hardshrink instance_norm layer_norm linear local_response_norm logsigmoid lp_pool1d lp_pool2d lp_pool3d
    max_pool1d max_pool3d max_unpool1d max_unpool2d max_unpool3d mish one_hot pairwise_distance pdist pixel_shuffle
    pixel_unshuffle prelu relu_ rms_norm rrelu scaled_dot_product_attention selu softmin softshrink softsign tanhshrink
    threshold unfold upsample upsample_bilinear upsample_nearest leaky_relu_ elu_ hardtanh_ celu_ selu_ threshold_
    multi_head_attention_forward
"""
_METHODS = """
    add sub mul div neg mean sum amax relu sigmoid tanh softmax clamp flatten view reshape permute transpose contiguous
    squeeze unsqueeze chunk split size exp sqrt abs acos add_ addcdiv addcmul addmm all amin any argmax argmin argsort
    asin atan atan2 baddbmm bfloat16 bmm bool broadcast_to ceil clamp_ clamp_max clamp_min clip clone conj cos cosh
    cross cummax cummin cumprod cumsum detach diag_embed diagonal diff dim div_ divide dot double eq erf erfc exp2
    exp_ expand expand_as expm1 flip fliplr flipud float floor floor_divide fmax fmin fmod frac gather ge gt half
    index_select inner int is_floating_point isclose isfinite isinf isnan le lerp log log10 log1p log2 log_softmax
    logical_and logical_not logical_or logical_xor logsumexp long lt masked_fill masked_fill_ matmul max maximum median
    min minimum moveaxis movedim mul_ multiply mv nan_to_num narrow ndimension ne neg_ negative new_full new_ones
    new_zeros norm numel outer pow prod ravel reciprocal relu_ remainder repeat repeat_interleave reshape_as roll rot90
    round rsqrt scatter scatter_add select sgn sigmoid_ sign sin sinc sinh sort sqrt_ square squeeze_ std sub_ subtract
    sum_to_size swapaxes swapdims t take_along_dim tan tanh_ tensor_split tile to topk trace tril triu true_divide trunc
    type_as unbind unflatten unfold unsqueeze_ var view_as where xlogy
"""
METHODS = frozenset(_METHODS.split())
_ATTRIBUTES = "dtype device T mT H mH ndim real imag"
ATTRIBUTES = frozenset(_ATTRIBUTES.split())


def _functions(*homes: tuple[str, Any, str]) -> Iterable[tuple[str, Callable[..., Any]]]:
    for label, home, names in homes:
        for name in names.split():
            if hasattr(home, name):  # not in every release of torch
                yield f"{label}.{name}", getattr(home, name)


FUNCTIONS: dict[str, Callable[..., Any]] = dict(
    _functions(
        ("operator", operator, _OPERATORS),
        ("torch", torch, _TORCH),
        ("torch.nn.functional", nn.functional, _FUNCTIONAL),
        ("torch.fft", torch.fft, _FFT),
        ("torch.linalg", torch.linalg, _LINALG),
    )
)
FUNCTION_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}
_DTYPES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64"
_MEMORY_FORMATS = "contiguous_format channels_last channels_last_3d preserve_format"
DTYPES = {name: getattr(torch, name) for name in _DTYPES.split()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MEMORY_FORMATS = {name: getattr(torch, name) for name in _MEMORY_FORMATS.split()}
MEMORY_FORMAT_NAMES = {value: name for name, value in MEMORY_FORMATS.items()}
