#include "common/simd_portable.h"

// Tiles of the convolution: row(vectors, filters), filters in multiples of four.
#define LBS_TILES(row) row(1, 4)

#include "bitconv2d/bitconv2d_kernel.h"
#include "bitlinear/bitlinear_kernel.h"
#include "fakequant/fakequant_kernel.h"
#include "isa/kernels.h"
#include "pool/pool_kernel.h"

namespace lbs {

const KernelTable kPortableKernels = {
    Simd::L,
    Simd::kNarrowDot ? 32767 : 0,
    false,
    kTileShapes,
    conv_kernel,
    linear_kernel,
    emit_planes_kernel,
    pool_codes_kernel,
    fake_quant_forward_kernel,
    fake_quant_backward_kernel,
};

}  // namespace lbs
