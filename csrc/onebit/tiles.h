// The kernels that are built: one row each. lbs_kernels/gpu/configs/cuda.py states the same rows and a test compares them.
#pragma once

#include "cuda/tile_row.h"
#include "onebit/kernel.h"

// row(machine, groups of 64 pixels, filters, stages). Stages fill the shared memory of as many blocks as the registers
// allow on sm_90: one, two, one and three of the wgmma rows. The mma rows fit the 99 KB of sm_86 and sm_89; 128 filters
// are not among them, because three accumulators and the operands of mma.sync spill.
#define LBS_ONEBIT_TILES(row) \
    row(wgmma, 2, 128, 6)     \
    row(wgmma, 1, 128, 4)     \
    row(wgmma, 2, 64, 8)      \
    row(wgmma, 1, 64, 4)      \
    row(mma, 2, 64, 3)        \
    row(mma, 1, 64, 3)

namespace lbs::onebit {

#define LBS_ROW(machine, groups, filters, stages) \
    {#machine, groups, filters, stages, Tile<groups, filters, stages>::kSharedBytes},
constexpr TileRow kTileRows[] = {LBS_ONEBIT_TILES(LBS_ROW)};
#undef LBS_ROW

}  // namespace lbs::onebit
