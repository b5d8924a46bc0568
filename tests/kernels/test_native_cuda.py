"""`lbs_kernels._cuda`: that it loads and complains in words without a GPU, and equals the reference with one."""

from __future__ import annotations

import pytest
import torch

from lbs_kernels import extension
from lbs_kernels.errors import BackendError, FormatError, ShapeError
from lbs_kernels.program.epilogue import encode_reference
from lbs_kernels.program.planes import pack_planes, unpack_planes
from lbs_kernels.program.steps import Consumer
from lbs_kernels.quantpack import cuda_impl

needs_module = pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}")


def test_a_missing_module_is_explained() -> None:
    if extension.cuda is None:
        assert extension.cuda_reason
        with pytest.raises(BackendError, match="native CUDA module is missing: "):
            extension.require_cuda()
    else:
        assert extension.cuda_reason == ""
        assert extension.require_cuda() is extension.cuda


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told_in_words() -> None:
    with pytest.raises(BackendError, match=r"counting GPUs failed: cuda\w+, "):
        extension.cuda.device_count()
    with pytest.raises(BackendError, match="failed: "):
        extension.cuda.pack_planes(64, 64, 1, 1, 1, 0, 0)


@needs_module
def test_bad_arguments_are_refused_before_a_launch() -> None:
    with pytest.raises(FormatError, match="with 9 bits; codes have 1 to 8 bits"):
        extension.cuda.pack_planes(64, 64, 1, 1, 9, 0, 0)
    with pytest.raises(FormatError, match="0 channels"):
        extension.cuda.unpack_planes(64, 64, 1, 0, 1, 0, 0)
    extension.cuda.pack_planes(0, 0, 0, 1, 1, 0, 0)  # nothing to do needs no GPU


def test_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(ShapeError, match="on cpu; the CUDA kernel takes contiguous"):
        cuda_impl.pack_planes(torch.zeros(4, dtype=torch.uint8), 1)


@pytest.mark.gpu
@needs_module
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_planes_equal_the_format(bits: int, channels: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 5, channels), dtype=torch.uint8)
    planes = cuda_impl.pack_planes(codes.cuda(), bits)
    assert torch.equal(planes.cpu(), pack_planes(codes, bits))
    back = cuda_impl.unpack_planes(planes, bits, channels)
    assert torch.equal(back.cpu(), codes)
    assert torch.equal(back.cpu(), unpack_planes(planes.cpu(), bits, channels))


@pytest.mark.gpu
@needs_module
@pytest.mark.parametrize(("bits", "zero", "signed"), [(8, 117, False), (4, 0, False), (3, 0, True)])
def test_images_equal_the_reference(bits: int, zero: int, signed: bool) -> None:
    x = torch.randn(3, 5, 17, 19) * 2
    x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    consumer = Consumer(0, bits, float(torch.tensor(((1 << bits) - 1) / 3.7)), zero, signed)
    codes = cuda_impl.encode_image(x.cuda(), consumer)
    assert torch.equal(codes.cpu(), encode_reference(x.permute(0, 2, 3, 1), consumer))
