// Maximum over a window: of codes in the layout the convolutions read, and of planes of floats.
#pragma once

#include "bitconv2d/bitconv2d_kernel.h"
#include "program/plan.h"

namespace {

// All groups of a vector follow one another, as they do in memory: rows that several windows read stay in the cache.
template <int kS>
void pool_codes_pieces(const lbs::PoolCodesPlan& plan, const lbs::RunContext& run, int first_group, int last_group) {
    constexpr uint32_t kAll = (1u << Simd::L) - 1u;
    for (int vector = 0; vector < plan.vectors; ++vector) {
        const uint32_t valid = vector + 1 < plan.vectors ? kAll : plan.tail_mask;
        const PixelLoader<kS> pixels(run.tensors[plan.input], plan.in_map, vector);
        for (int group = first_group; group < last_group; ++group) {
            const int32_t first = group * plan.in_pitch;
            Simd::I best = pixels.load(first + plan.window_offsets[0]);
            for (int k = 1; k < plan.window; ++k)
                best = Simd::max_bytes(best, pixels.load(first + plan.window_offsets[k]));
            store_word(run.tensors[plan.output] + group * plan.out_pitch, plan.out_map, vector, valid, best);
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

// kNumbers: where there is nothing but numbers; fmax then keeps its second operand of equals, as flarger does.
template <bool kNumbers>
LBS_INLINE Simd::F larger(Simd::F best, Simd::F value) {
    if constexpr (kNumbers) return Simd::fmax(value, best);
    return Simd::flarger(best, value);
}

// A row of maxima of `row`, padding included. Vectors may write past its end, never before it.
template <int kStride, bool kNumbers>
void max_of_row(const lbs::PoolStreamPlan& plan, const float* row, float* out) {
    for (int x = 0; x < plan.columns; x += Simd::L) {
        const float* first = row + static_cast<int64_t>(x) * plan.column_stride;
        Simd::F best = load_apart<kStride>(first, plan.column_stride);
        for (int tap = 1; tap < plan.kernel_columns; ++tap)
            best = larger<kNumbers>(best, load_apart<kStride>(first + tap, plan.column_stride));
        Simd::fstore(out + x, best);
    }
}

// A row of maxima over the rows of a window; `row` has padding on both sides.
template <bool kNumbers>
void max_of_rows(const lbs::PoolStreamPlan& plan, const float* plane, int start, float* row) {
    const int whole = plan.width / Simd::L * Simd::L;
    const uint32_t valid = (1u << (plan.width - whole)) - 1u;  // of the vector behind the whole ones
    const int first = start > 0 ? start : 0;
    const int last = start + plan.kernel_rows < plan.height ? start + plan.kernel_rows : plan.height;
    const float* const source = plane + static_cast<int64_t>(first) * plan.width;
    const int64_t rows_end = static_cast<int64_t>(last - first) * plan.width;
    for (int x = 0; x < whole; x += Simd::L) {
        Simd::F best = Simd::fload(source + x);
        for (int64_t at = plan.width; at < rows_end; at += plan.width)
            best = larger<kNumbers>(best, Simd::fload(source + at + x));
        Simd::fstore(row + plan.left + x, best);
    }
    if (!valid) return;
    Simd::F best = Simd::fload_mask(source + whole, valid);
    for (int64_t at = plan.width; at < rows_end; at += plan.width)
        best = larger<kNumbers>(best, Simd::fload_mask(source + at + whole, valid));
    Simd::fstore_mask(row + plan.left + whole, valid, best);
}

// kPoolRows together: a load of what two stores have just written waits until both are in the cache.
template <bool kNumbers>
void max_plane(const lbs::PoolStreamPlan& plan, const float* plane, float* rows, float* out) {
    const int64_t pitch = plan.row_floats;
    for (int64_t i = 0; i < lbs::kPoolRows * pitch; ++i) rows[i] = -__builtin_inff();
    for (int y = 0; y < plan.rows; y += lbs::kPoolRows) {
        const int count = plan.rows - y < lbs::kPoolRows ? plan.rows - y : lbs::kPoolRows;
        for (int i = 0; i < count; ++i)
            max_of_rows<kNumbers>(plan, plane, (y + i) * plan.row_stride - plan.top, rows + i * pitch);
        for (int i = 0; i < count; ++i, out += plan.columns) {
            const float* row = rows + i * pitch;
            switch (plan.column_stride) {
                case 1: max_of_row<1, kNumbers>(plan, row, out); break;
                case 2: max_of_row<2, kNumbers>(plan, row, out); break;
                default: max_of_row<0, kNumbers>(plan, row, out);
            }
        }
    }
}

// Maximum over each window of one plane; padding never wins, not a number does. `rows` holds kPoolRows of
// plan.row_floats, `out` L floats more than the result.
void max_plane_kernel(const lbs::PoolStreamPlan& plan, const float* plane, float* rows, float* out) {
    if (plan.numbers) max_plane<true>(plan, plane, rows, out);
    else max_plane<false>(plan, plane, rows, out);
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
