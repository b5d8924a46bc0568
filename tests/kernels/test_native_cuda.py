"""`lbs_kernels._cuda`: that it loads, and complains in words without a GPU. test_onebit_gpu.py runs its kernels."""

from __future__ import annotations

import pytest
import torch

from lbs_kernels import extension
from lbs_kernels.errors import BackendError


def test_a_missing_module_is_explained() -> None:
    if extension.cuda is None:
        assert extension.cuda_reason
        with pytest.raises(BackendError, match="native CUDA module is missing: "):
            extension.require_cuda()
    else:
        assert extension.cuda_reason == ""
        assert extension.require_cuda() is extension.cuda


@pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told_in_words() -> None:
    with pytest.raises(BackendError, match=r"counting GPUs failed: cuda\w+, "):
        extension.cuda.device_count()
