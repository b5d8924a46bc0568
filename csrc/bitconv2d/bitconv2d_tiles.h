// The tile shapes an instruction set offers, LBS_TILES(row): one row per block width, read by the dispatch below and by
// the planner, which chooses block widths by their cost.
#pragma once

#include "bitconv2d/bitconv2d_kernel.h"
#include "isa/kernels.h"

namespace {

template <bool kWide>
void conv_blocks(const lbs::ConvPlan& plan, const lbs::RunContext& run, int first_vector, int last_vector, int first_block,
                 int last_block) {
    if (plan.acc.needs_sum && plan.shared_ones) conv_sums<LBS_SUM_VECTORS, kWide>(plan, run, first_vector, last_vector);
    for (int b = first_block; b < last_block; ++b) {
        const lbs::FilterBlock& block = plan.blocks[b];
        switch (block.width) {
#define LBS_TILE(vectors, filters) \
    case filters: conv_block<vectors, filters, kWide>(plan, run, block, first_vector, last_vector); break;
            LBS_TILES(LBS_TILE)
#undef LBS_TILE
            default: break;
        }
    }
}

void conv_kernel(const lbs::ConvPlan& plan, const lbs::RunContext& run, int first_vector, int last_vector, int first_block,
                 int last_block) {
    if constexpr (Simd::kNarrowDot) {
        if (plan.wide) return conv_blocks<true>(plan, run, first_vector, last_vector, first_block, last_block);
    }
    conv_blocks<false>(plan, run, first_vector, last_vector, first_block, last_block);
}

#define LBS_TILE(vectors, filters) {vectors, filters},
constexpr lbs::TileShape kTileShapes[] = {LBS_TILES(LBS_TILE){0, 0}};
#undef LBS_TILE

}  // namespace
