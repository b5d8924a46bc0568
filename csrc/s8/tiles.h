// The kernels that are built: one row each. lbs_kernels/gpu/configs/cuda.py states the same rows and a test compares them.
#pragma once

#include "cuda/tile_row.h"
#include "s8/split.h"

// row(machine, groups of 64 pixels, filters, stages): three kernels, one of each kind of Reads. Stages of bytes fill the
// shared memory of one block: the registers of its three groups of threads allow no second one.
#define LBS_S8_TILES(row) \
    row(wgmma, 2, 128, 6) \
    row(wgmma, 1, 128, 8) \
    row(wgmma, 2, 96, 7)  \
    row(wgmma, 2, 64, 8)  \
    row(wgmma, 2, 48, 9)  \
    row(wgmma, 1, 64, 12)
// Of clusters whose blocks share K (split.h): few stages, as a share is short, so that two blocks have room on a
// multiprocessor, of which one may belong to the next kernel.
#define LBS_S8_CLUSTER_TILES(row) row(wgmma, 1, 64, 5)

namespace lbs::s8 {

#define LBS_ROW(machine, groups, filters, stages) \
    {#machine, groups, filters, stages, Tile<groups, filters, stages, Reads::kSummed>::kSharedBytes},
#define LBS_CLUSTER_ROW(machine, groups, filters, stages) \
    {#machine, groups, filters, stages, ClusterTile<filters, stages, Reads::kSummed>::kSharedBytes, true},
constexpr TileRow kTileRows[] = {LBS_S8_TILES(LBS_ROW) LBS_S8_CLUSTER_TILES(LBS_CLUSTER_ROW)};
#undef LBS_ROW
#undef LBS_CLUSTER_ROW

}  // namespace lbs::s8
