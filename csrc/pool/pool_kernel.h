// Maximum over a window: of codes in the layout the convolutions read, and of planes of floats.
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

// L values of a row, `stride` apart; kStride: 1, 2, or 0 for any.
template <int kStride>
LBS_INLINE Simd::F load_apart(const float* row, int stride) {
    if constexpr (kStride == 1) return Simd::fload(row);
    if constexpr (kStride == 2) return Simd::fload_even(row);
    float lanes[Simd::L];
    for (int i = 0; i < Simd::L; ++i) lanes[i] = row[i * stride];
    return Simd::fload(lanes);
}

// A row of maxima of `row`, padding included. Vectors may write past its end, never before it.
template <int kStride>
void max_of_row(const lbs::PoolStreamPlan& plan, const float* row, float* out) {
    for (int x = 0; x < plan.columns; x += Simd::L) {
        const float* first = row + static_cast<int64_t>(x) * plan.column_stride;
        Simd::F best = load_apart<kStride>(first, plan.column_stride);
        for (int tap = 1; tap < plan.kernel_columns; ++tap)
            best = Simd::flarger(best, load_apart<kStride>(first + tap, plan.column_stride));
        Simd::fstore(out + x, best);
    }
}

// Maximum over each window of one plane; padding never wins, not a number does. `row` holds plan.row_floats, `out` L
// floats more than the result.
void max_plane_kernel(const lbs::PoolStreamPlan& plan, const float* plane, float* row, float* out) {
    for (int64_t i = 0; i < plan.row_floats; ++i) row[i] = -__builtin_inff();
    for (int y = 0; y < plan.rows; ++y) {
        const int start = y * plan.row_stride - plan.top;
        const int first = start > 0 ? start : 0;
        const int last = start + plan.kernel_rows < plan.height ? start + plan.kernel_rows : plan.height;
        for (int x = 0; x < plan.width; x += Simd::L) {
            const uint32_t valid = plan.width - x < Simd::L ? (1u << (plan.width - x)) - 1u : (1u << Simd::L) - 1u;
            const float* source = plane + static_cast<int64_t>(first) * plan.width + x;
            Simd::F best = Simd::fload_mask(source, valid);
            for (int tap = first + 1; tap < last; ++tap)
                best = Simd::flarger(best, Simd::fload_mask(source += plan.width, valid));
            Simd::fstore_mask(row + plan.left + x, valid, best);
        }
        switch (plan.column_stride) {
            case 1: max_of_row<1>(plan, row, out); break;
            case 2: max_of_row<2>(plan, row, out); break;
            default: max_of_row<0>(plan, row, out);
        }
        out += plan.columns;
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
