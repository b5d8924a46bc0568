#include "common/simd_avx512.h"
#include "fakequant/fakequant_kernel.h"
#include "isa/kernels.h"

namespace lbs {

const KernelTable kAvx512VnniKernels = {
    Simd::L,
    fake_quant_forward_kernel,
    fake_quant_backward_kernel,
};

}  // namespace lbs
