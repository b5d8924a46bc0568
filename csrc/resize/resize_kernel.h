// resize: bilinear interpolation of a stream, four channels at a time, row by row.
//
//     t[r, j] = x[r, k] * (1 - w) + x[r, k + 1] * w      along columns
//     y[i, j] = t[k, j] * (1 - w) + t[k + 1, j] * w      along rows
//
// A row of the input is spread to the columns that are written once; what is written from it lies in the cache.
#pragma once

#include "program/emit_kernel.h"
#include "program/plan.h"

namespace {

LBS_INLINE Simd::F resize_blend(Simd::F a, Simd::F b, Simd::F other, Simd::F weight) {
    return Simd::fadd(Simd::fmul(a, other), Simd::fmul(b, weight));
}

// Columns of one row of the input, in whole vectors.
inline void resize_across(const lbs::ResizePlan& plan, const float* in, float* out) {
    const lbs::ResizeSide& side = plan.across;
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(in);
    const lbs::Piece* span = side.spans;
    for (int j = 0; j < plan.columns; j += Simd::L) {
        Simd::F a, b;
        if (span) {  // one load, its lanes moved: gathers take three quarters of the time otherwise (Zen 5)
            const Simd::I x = Simd::iload_mask(Simd::izero(), span->mask, bytes + span->offset);
            a = Simd::fbits(Simd::ipermute(x, Simd::iload(side.first + j)));
            b = Simd::fbits(Simd::ipermute(x, Simd::iload(side.second + j)));
            ++span;
        } else {
            a = Simd::fbits(Simd::igather(in, side.first + j));
            b = Simd::fbits(Simd::igather(in, side.second + j));
        }
        Simd::fstore(out + j, resize_blend(a, b, Simd::fload(side.others + j), Simd::fload(side.weights + j)));
    }
}

void resize_kernel(const lbs::ResizePlan& plan, const lbs::EmitPlan& e, const lbs::RunContext& run, float* floats,
                   int first_vector, int last_vector) {
    if (first_vector == last_vector) return;
    const int columns = plan.columns;
    const int64_t pitch = plan.pitch;
    const int64_t last_pixel = int64_t{last_vector} * Simd::L < e.pixels ? int64_t{last_vector} * Simd::L : e.pixels;
    const int first_row = static_cast<int>(int64_t{first_vector} * Simd::L / columns);
    const int last_row = static_cast<int>((last_pixel - 1) / columns);
    float* lines = floats + 8 * pitch;  // of four channels: pixels `base` to `base + held` of what is written
    for (int channel = 0; channel < e.channels; channel += 4) {
        const float* planes[4];
        for (int j = 0; j < 4; ++j) {
            const int there = channel + j < e.channels ? channel + j : e.channels - 1;
            planes[j] = reinterpret_cast<const float*>(run.tensors[plan.input]) + there * plan.pixels;
        }
        int kept[2] = {-1, -1};  // rows of the input that are spread: even ones, odd ones
        const auto spread = [&](int row) {
            float* rows = floats + row % 2 * 4 * pitch;
            if (kept[row % 2] != row) {
                kept[row % 2] = row;
                for (int j = 0; j < 4; ++j)
                    resize_across(plan, planes[j] + int64_t{row} * plan.width, rows + j * pitch);
            }
            return rows;
        };
        int64_t base = int64_t{first_row} * columns;
        int held = 0, vector = first_vector;
        for (int row = first_row; row <= last_row; ++row) {
            const float* one = spread(plan.down.first[row]);
            const float* two = spread(plan.down.second[row]);
            const Simd::F other = Simd::fset(plan.down.others[row]), weight = Simd::fset(plan.down.weights[row]);
            for (int c = 0; c < 4; ++c)
                for (int j = 0; j < columns; j += Simd::L)
                    Simd::fstore(lines + c * pitch + held + j,
                                 resize_blend(Simd::fload(one + c * pitch + j), Simd::fload(two + c * pitch + j), other,
                                              weight));
            held += columns;
            const bool ends = row == last_row;
            for (; vector < last_vector && (ends || (vector + 1) * int64_t{Simd::L} <= base + held); ++vector) {
                const int64_t at = int64_t{vector} * Simd::L - base;
                Quad y;
                for (int c = 0; c < 4; ++c) y.v[c] = Simd::fload(lines + c * pitch + at);
                emit4_any(e, run, channel, vector, y);
            }
            const int64_t done = int64_t{vector} * Simd::L - base;  // fewer pixels than a vector has are left
            if (ends || done <= 0) continue;
            held -= static_cast<int>(done);
            base += done;
            for (int c = 0; c < 4; ++c)
                Simd::fstore(lines + c * pitch, Simd::fload(lines + c * pitch + done));
        }
    }
}

}  // namespace
