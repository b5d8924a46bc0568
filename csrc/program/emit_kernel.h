// From a float value to everything made of it: residual, clamp, stream, codes (steps 3 to 6 of the epilogue).
#pragma once

#include "program/plan.h"

namespace {

inline Simd::F round_to_stream(Simd::F y, lbs::StreamType type) {
    if (type == lbs::StreamType::kFloat16) return Simd::fround_f16(y);
    if (type == lbs::StreamType::kBfloat16) return Simd::fround_bf16(y);
    return y;
}

// q = clamp(rint(u * scale [+ n / 2]) + zero, 0, n). Clamping before rounding gives the same, its bounds being integers;
// not a number becomes the low bound.
inline Simd::I encode(const lbs::ConsumerPlan& c, Simd::F u) {
    Simd::F t = Simd::fmul(u, Simd::fset(c.scale));
    if (c.shifted) t = Simd::fadd(t, Simd::fset(c.half));
    t = Simd::fmin(Simd::fmax(t, Simd::fset(c.low)), Simd::fset(c.high));
    return Simd::ifromf(t);
}

inline void store_lanes(unsigned char* base, const lbs::PixelMap& map, int vector, uint32_t valid, Simd::I word) {
    int32_t lanes[Simd::L];
    Simd::istore(lanes, word);
    const int32_t* offsets = map.lanes + static_cast<int64_t>(vector) * lbs::kMaxLanes;
    for (int i = 0; i < Simd::L; ++i)
        if (valid >> i & 1) __builtin_memcpy(base + offsets[i], &lanes[i], 4);
}

inline void store_word(unsigned char* base, const lbs::PixelMap& map, int vector, uint32_t valid, Simd::I word) {
    if (map.pieces == 0) return store_lanes(base, map, vector, valid, word);
    const lbs::Piece* piece = map.table + static_cast<int64_t>(vector) * map.pieces;
    if (map.pieces == 1) return Simd::istore(base + piece->offset, word);
    for (int i = 0; i < map.pieces; ++i) {
        if (piece[i].mask == 0) break;
        if (map.compress) Simd::istore_compress(base + piece[i].offset, piece[i].mask, word);
        else Simd::istore_mask(base + piece[i].offset, piece[i].mask, word);
    }
}

// Emits `vector` of the channels [channel, channel + 4), of which those below e.channels exist.
inline void emit4(const lbs::EmitPlan& e, const lbs::RunContext& run, int channel, int vector, Simd::F (&y)[4]) {
    constexpr uint32_t kAll = (1u << Simd::L) - 1u;
    const uint32_t valid = vector + 1 < e.vectors ? kAll : e.tail_mask;
    const int live = e.channels - channel < 4 ? e.channels - channel : 4;
    const int64_t first = channel * e.pixels + static_cast<int64_t>(vector) * Simd::L;
    if (e.residual >= 0) {
        const float* residual = reinterpret_cast<const float*>(run.tensors[e.residual]) + first;
        for (int j = 0; j < live; ++j) y[j] = Simd::fadd(y[j], Simd::fload_mask(residual + j * e.pixels, valid));
    }
    if (e.has_low)
        for (int j = 0; j < 4; ++j) y[j] = Simd::fmax(Simd::fset(e.low), y[j]);
    if (e.has_high)
        for (int j = 0; j < 4; ++j) y[j] = Simd::fmin(Simd::fset(e.high), y[j]);
    if (e.stream >= 0) {
        float* stream = reinterpret_cast<float*>(run.tensors[e.stream]) + first;
        for (int j = 0; j < live; ++j) {
            y[j] = round_to_stream(y[j], e.stream_type);
            Simd::fstore_mask(stream + j * e.pixels, valid, y[j]);
        }
    }
    for (int k = 0; k < e.consumer_count; ++k) {
        const lbs::ConsumerPlan& c = e.consumers[k];
        Simd::I q[4];
        for (int j = 0; j < 4; ++j) {
            Simd::F u = y[j];
            if (c.gain) u = Simd::ffma(u, Simd::fset(c.gain[channel + j]), Simd::fset(c.offset[channel + j]));
            if (c.relu) u = Simd::fmax(Simd::fset(0.0f), u);
            q[j] = encode(c, u);
            if (c.zero) q[j] = Simd::iadd(q[j], Simd::iset(c.zero));
        }
        store_word(run.tensors[c.tensor] + channel / 4 * c.group_pitch, c.map, vector, valid, Simd::ipack4(q[0], q[1], q[2], q[3]));
    }
}

// Steps 1 and 2 for four filters: y = fma(float(acc), M, B). `dots` and `sums` are [4] rows of `dot_pitch` and `sum_pitch`
// integers (a pitch of 0 shares one row).
inline void finish4(const lbs::AccumulatorPlan& a, const lbs::EmitPlan& e, const lbs::RunContext& run, int channel, int vector,
                    const int32_t* dots, int dot_pitch, const int32_t* sums, int sum_pitch) {
    Simd::F y[4];
    for (int j = 0; j < 4; ++j) {
        Simd::I acc = Simd::iload(dots + j * dot_pitch);
        if (a.shift) acc = Simd::ishl(acc, a.shift);
        if (sums) acc = Simd::iadd(acc, Simd::ishl(Simd::iload(sums + j * sum_pitch), a.sum_shift));
        if (a.constant) acc = Simd::iadd(acc, Simd::iset(a.constant[channel + j]));
        y[j] = Simd::ffma(Simd::fcvt(acc), Simd::fset(a.multiplier[channel + j]), Simd::fset(a.bias[channel + j]));
    }
    emit4(e, run, channel, vector, y);
}

// Emits channel groups [first, last) of float planes [channel][pixels]; plane 0 of `values` is channel `base_channel`.
void emit_planes_kernel(const lbs::EmitPlan& e, const lbs::RunContext& run, const float* values, int base_channel,
                        int first_group, int last_group, int first_vector, int last_vector) {
    constexpr uint32_t kAll = (1u << Simd::L) - 1u;
    for (int group = first_group; group < last_group; ++group) {
        const int channel = 4 * group;
        const int live = e.channels - channel < 4 ? e.channels - channel : 4;
        const float* plane = values + (channel - base_channel) * e.pixels;
        for (int vector = first_vector; vector < last_vector; ++vector) {
            const uint32_t valid = vector + 1 < e.vectors ? kAll : e.tail_mask;
            Simd::F y[4] = {Simd::fset(0.0f), Simd::fset(0.0f), Simd::fset(0.0f), Simd::fset(0.0f)};
            for (int j = 0; j < live; ++j)
                y[j] = Simd::fload_mask(plane + j * e.pixels + static_cast<int64_t>(vector) * Simd::L, valid);
            emit4(e, run, channel, vector, y);
        }
    }
}

}  // namespace
