#include "common/simd_neon.h"

// Tiles of the convolution: row(vectors, filters), filters in multiples of four.
#define LBS_TILES(row) row(2, 4)
#define LBS_WINOGRAD_TILES(row) row(2, 4)
#define LBS_LANES_VECTORS 2
#define LBS_WINOGRAD_LANES(row)
#define LBS_LANES_PIXELS 5

#include "bitconv2d/bitconv2d_kernel.h"
#include "isa/kernel_table.h"

namespace lbs {

const KernelTable kNeonKernels = kernel_table(conv_kernel, false);

}  // namespace lbs
