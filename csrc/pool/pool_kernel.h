// Maximum of codes over a window, in the layout the convolutions read.
#pragma once

#include "bitconv2d/bitconv2d_kernel.h"
#include "program/plan.h"

namespace {

template <int kS>
void pool_codes_pieces(const lbs::PoolCodesPlan& plan, const lbs::RunContext& run, int first_group, int last_group) {
    constexpr uint32_t kAll = (1u << Simd::L) - 1u;
    for (int group = first_group; group < last_group; ++group) {
        const unsigned char* in = run.tensors[plan.input] + group * plan.in_pitch;
        unsigned char* out = run.tensors[plan.output] + group * plan.out_pitch;
        for (int vector = 0; vector < plan.vectors; ++vector) {
            const PixelLoader<kS> pixels(in, plan.in_map, vector);
            Simd::I best = pixels.load(plan.window_offsets[0]);
            for (int k = 1; k < plan.window; ++k) best = Simd::max_bytes(best, pixels.load(plan.window_offsets[k]));
            store_word(out, plan.out_map, vector, vector + 1 < plan.vectors ? kAll : plan.tail_mask, best);
        }
    }
}

void pool_codes_kernel(const lbs::PoolCodesPlan& plan, const lbs::RunContext& run, int first_group, int last_group) {
    switch (plan.in_map.pieces) {
        case 1: return pool_codes_pieces<1>(plan, run, first_group, last_group);
        case 2: return pool_codes_pieces<2>(plan, run, first_group, last_group);
        case 4: return pool_codes_pieces<4>(plan, run, first_group, last_group);
        default: return pool_codes_pieces<0>(plan, run, first_group, last_group);
    }
}

}  // namespace
