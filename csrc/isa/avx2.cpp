#include "common/simd_avx2.h"
#include "fakequant/fakequant_kernel.h"
#include "isa/kernels.h"

namespace lbs {

const KernelTable kAvx2Kernels = {
    Simd::L,
    fake_quant_forward_kernel,
    fake_quant_backward_kernel,
};

}  // namespace lbs
