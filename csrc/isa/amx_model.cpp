#include "common/simd_avx512.h"

// Tiles of the convolution: row(vectors, filters), filters in multiples of four.
#define LBS_TILES(row) row(2, 12) row(3, 8) row(6, 4)
#define LBS_WINOGRAD_TILES(row) row(2, 8) row(2, 4)
#define LBS_LANES_VECTORS 3
#define LBS_WINOGRAD_LANES(row)
#define LBS_LANES_PIXELS 7

#include "bitconv2d/bitconv2d_amx.h"
#include "isa/kernel_table.h"

namespace lbs {

const KernelTable kAmxModelKernels = kernel_table(conv_amx_kernel, true);

bool amx_model_self_check() { return tiles_self_check(); }

}  // namespace lbs
