// From a float value to everything made of it: activation, gate, residual, clamp, stream, codes (steps 3 to 6 of the
// epilogue).
#pragma once

#include "program/activation_kernel.h"
#include "program/plan.h"

// The vectors of a quad stay in registers only where everything on their way is inlined.
#define LBS_INLINE inline __attribute__((always_inline))

namespace {

LBS_INLINE Simd::F round_to_stream(Simd::F y, lbs::StreamType type) {
    if (type == lbs::StreamType::kFloat16) return Simd::fround_f16(y);
    if (type == lbs::StreamType::kBfloat16) return Simd::fround_bf16(y);
    return y;
}

// Four vectors: four channels of the same pixels.
struct Quad {
    Simd::F v[4];
};

template <class Op>
LBS_INLINE Quad each(Quad a, const Op& op) {
    return {{op(a.v[0], 0), op(a.v[1], 1), op(a.v[2], 2), op(a.v[3], 3)}};
}

// Codes of what is rounded already.
LBS_INLINE void add_zero(int zero, Simd::I (&q)[4]) {
    if (zero)
        for (int j = 0; j < 4; ++j) q[j] = Simd::iadd(q[j], Simd::iset(zero));
}

// What codes q - zero stand for.
LBS_INLINE Quad stood_for(const lbs::ConsumerPlan& c, const Simd::I* units) {
    const Simd::F step = Simd::fset(c.step);
    Quad y;
    for (int j = 0; j < 4; ++j) y.v[j] = Simd::fmul(Simd::fcvt(units[j]), step);
    return y;
}

// Codes of four channels, packed: q = clamp(rint(u * scale [+ n / 2]) + zero, 0, n). Clamping before rounding gives the
// same, its bounds being integers; not a number becomes the low bound. `y` becomes what codes with a step stand for.
LBS_INLINE Simd::I encode4(const lbs::ConsumerPlan& c, int channel, bool positive, Quad& y) {
    Quad u = y;
    if (c.gain)
        u = each(u, [&](Simd::F x, int j) {
            return Simd::ffma(x, Simd::fset(c.gain[channel + j]), Simd::fset(c.offset[channel + j]));
        });
    if (c.relu) u = each(u, [](Simd::F x, int) { return Simd::fmax(x, Simd::fset(0.0f)); });
    const Simd::F scale = Simd::fset(c.scale), high = Simd::fset(c.high);
    Quad t = each(u, [&](Simd::F x, int) { return Simd::fmul(x, scale); });
    if (c.shifted) t = each(t, [&](Simd::F x, int) { return Simd::fadd(x, Simd::fset(c.half)); });
    if (!positive || c.gain || c.zero) t = each(t, [&](Simd::F x, int) { return Simd::fmax(x, Simd::fset(c.low)); });
    t = each(t, [&](Simd::F x, int) { return Simd::fmin(x, high); });
    Simd::I q[4] = {Simd::ifromf(t.v[0]), Simd::ifromf(t.v[1]), Simd::ifromf(t.v[2]), Simd::ifromf(t.v[3])};
    if (c.step > 0.0f) y = stood_for(c, q);
    add_zero(c.zero, q);
    return Simd::ipack4(q[0], q[1], q[2], q[3]);
}

__attribute__((noinline)) void store_lanes(unsigned char* base, lbs::PixelMap map, int vector, uint32_t valid,
                                           Simd::I word) {
    int32_t lanes[Simd::L];
    Simd::istore(lanes, word);
    const int32_t* offsets = map.lanes + static_cast<int64_t>(vector) * lbs::kMaxLanes;
    for (int i = 0; i < Simd::L; ++i)
        if (valid >> i & 1) __builtin_memcpy(base + offsets[i], &lanes[i], 4);
}

// Pieces of a vector; of a compressing map the lanes of each one after the other.
LBS_INLINE void store_cut(unsigned char* base, const lbs::Piece* piece, int pieces, bool compress, Simd::I word) {
    constexpr uint32_t kEven = 0x55555555u & ((1u << Simd::L) - 1u);
    if (compress && piece[0].mask == kEven && piece[1].mask == kEven << 1)
        return Simd::istore_apart(base + piece[0].offset, base + piece[1].offset, word);
    if (!compress && pieces <= 2) {  // without a branch on whether a row ends here
        Simd::istore_mask(base + piece[0].offset, piece[0].mask, word);
        if (pieces == 2) Simd::istore_mask(base + piece[1].offset, piece[1].mask, word);
        return;
    }
    for (int i = 0; i < pieces; ++i) {
        if (piece[i].mask == 0) break;
        if (compress) Simd::istore_compress(base + piece[i].offset, piece[i].mask, word);
        else Simd::istore_mask(base + piece[i].offset, piece[i].mask, word);
    }
}

LBS_INLINE void store_pieces(unsigned char* base, const lbs::PixelMap& map, int vector, uint32_t valid, Simd::I word) {
    if (map.pieces == 0) return store_lanes(base, map, vector, valid, word);
    store_cut(base, map.table + static_cast<int64_t>(vector) * map.pieces, map.pieces, map.compress, word);
}

// Asks for the lines of a vector that is stored a little later. Stores that miss the cache wait for each other (on
// Zen 5 an expanding 1x1 convolution spent half of its time so).
LBS_INLINE void prefetch_stores(const unsigned char* base, const lbs::PixelMap& map, int vector) {
    if (map.pieces == 0) return;
    const lbs::Piece* piece = map.table + static_cast<int64_t>(vector + lbs::kPrefetched) * map.pieces;
    const int apart = map.compress ? map.pieces : 1;  // pieces of a plain map follow one another, but for a row's end
    for (int i = 0; i < apart; ++i) __builtin_prefetch(base + piece[i].offset + 4 * (Simd::L - 1), 1);
}

LBS_INLINE void store_word(unsigned char* base, const lbs::PixelMap& map, int vector, uint32_t valid, Simd::I word) {
    if (map.pieces == 1 && !map.masked) Simd::istore(base + map.table[vector].offset, word);
    else store_pieces(base, map, vector, valid, word);
}

// What store_pieces stores, but for lanes that nothing was stored in.
LBS_INLINE Simd::I load_pieces(const unsigned char* base, const lbs::PixelMap& map, int vector) {
    if (map.pieces == 0) return Simd::igather(base, map.lanes + static_cast<int64_t>(vector) * lbs::kMaxLanes);
    const lbs::Piece* piece = map.table + static_cast<int64_t>(vector) * map.pieces;
    // Slack: the first piece is read as a whole vector, as in PixelLoader.
    Simd::I word = Simd::iload(base + piece[0].offset);
    for (int i = 1; i < map.pieces && piece[i].mask; ++i)
        word = Simd::iload_mask(word, piece[i].mask, base + piece[i].offset);
    return word;
}

// A residual of codes, of the channels [channel, channel + 4): those past the end lie in the padding.
LBS_INLINE const unsigned char* coded_base(const lbs::CodedPlan& c, const lbs::RunContext& run, int channel) {
    return run.tensors[c.tensor] + c.first + static_cast<int64_t>(static_cast<uint32_t>(channel) / 4) * c.group_pitch;
}
LBS_INLINE Simd::I coded_pieces(const lbs::PixelMap& map, const unsigned char* base, int vector) {
    // Slack: as in load_pieces.
    return map.pieces == 1 ? Simd::iload(base + map.table[vector].offset) : load_pieces(base, map, vector);
}
LBS_INLINE Simd::I coded_word(const lbs::CodedPlan& c, const lbs::RunContext& run, int channel, int vector) {
    return coded_pieces(c.map, coded_base(c, run, channel), vector);
}

// What codes of a residual stand for.
LBS_INLINE Simd::F coded_value(const lbs::CodedPlan& c, Simd::I codes) {
    Simd::F units = Simd::fcvt(codes);
    if (c.zero != 0.0f) units = Simd::fsub(units, Simd::fset(c.zero));
    return Simd::fmul(units, Simd::fset(c.step));
}

LBS_INLINE Quad add_coded(const lbs::CodedPlan& c, const lbs::RunContext& run, int channel, int vector, Quad y) {
    const Simd::I word = coded_word(c, run, channel, vector);
    return each(y, [&](Simd::F x, int j) { return Simd::fadd(x, coded_value(c, Simd::ibyte(word, j))); });
}

// Activation, gate and residual of the first `live` channels from `channel` on, in the lanes of `valid`.
__attribute__((noinline)) Quad combine4(const lbs::EmitPlan& e, const lbs::RunContext& run, int channel, int vector,
                                        int live, uint32_t valid, Quad y) {
    activate4(e.before, channel, y.v);
    if (e.gate >= 0) {
        const float* gate = reinterpret_cast<const float*>(run.tensors[e.gate]) + channel;
        y = each(y, [&](Simd::F x, int j) { return Simd::fmul(x, Simd::fset(j < live ? gate[j] : 0.0f)); });
    }
    if (e.residual >= 0) {
        const float* residual = reinterpret_cast<const float*>(run.tensors[e.residual]) + channel * e.pixels +
                                static_cast<int64_t>(vector) * Simd::L;
        y = each(y, [&](Simd::F x, int j) {
            return Simd::fadd(x, Simd::fload_mask(residual + j * e.pixels, j < live ? valid : 0));
        });
    } else if (e.coded.tensor >= 0) {
        y = add_coded(e.coded, run, channel, vector, y);
    }
    activate4(e.behind, channel, y.v);
    return y;
}

// Emits `vector` of the channels [channel, channel + 4). kWhole: all four exist and all lanes are valid.
template <bool kWhole>
LBS_INLINE void emit4(const lbs::EmitPlan& e, const lbs::RunContext& run, int channel, int vector, uint32_t valid,
                      Quad y) {
    const int live = kWhole || e.channels - channel >= 4 ? 4 : e.channels - channel;
    const int64_t first = channel * e.pixels + static_cast<int64_t>(vector) * Simd::L;
    if (e.is_plain && e.coded.tensor >= 0) {
        y = add_coded(e.coded, run, channel, vector, y);
    } else if (e.is_plain && e.residual >= 0) {
        const float* residual = reinterpret_cast<const float*>(run.tensors[e.residual]) + first;
        y = each(y, [&](Simd::F x, int j) {
            if constexpr (kWhole) return Simd::fadd(x, Simd::fload(residual + j * e.pixels));
            else return Simd::fadd(x, Simd::fload_mask(residual + j * e.pixels, j < live ? valid : 0));
        });
    } else if (!e.is_plain) {
        y = combine4(e, run, channel, vector, live, valid, y);
    }
    // The bound second: not a number becomes the bound.
    if (e.has_low) y = each(y, [&](Simd::F x, int) { return Simd::fmax(x, Simd::fset(e.low)); });
    if (e.has_high) y = each(y, [&](Simd::F x, int) { return Simd::fmin(x, Simd::fset(e.high)); });
    if (e.stream >= 0) {
        if (e.stream_type != lbs::StreamType::kFloat32)
            y = each(y, [&](Simd::F x, int) { return round_to_stream(x, e.stream_type); });
        float* stream = reinterpret_cast<float*>(run.tensors[e.stream]) + first;
        for (int j = 0; j < 4; ++j) {
            if constexpr (kWhole) Simd::fstore(stream + j * e.pixels, y.v[j]);
            else if (j < live) Simd::fstore_mask(stream + j * e.pixels, valid, y.v[j]);
        }
    }
    const bool positive = e.has_low && e.low >= 0.0f;
    for (int k = 0; k < e.consumer_count; ++k) {
        const lbs::ConsumerPlan& c = e.consumers[k];
        const Simd::I word = encode4(c, channel, positive, y);
        store_word(run.tensors[c.tensor] + channel / 4 * c.group_pitch, c.map, vector, valid, word);
    }
}

// Whether channels up to `last` may be computed without looking which of them exist: codes of channels past the end lie
// in the padding of their group, where nothing reads them as more than zero times something.
inline bool channels_are_free(const lbs::EmitPlan& e, int last) {
    return last <= e.channels || (e.gate < 0 && e.residual < 0 && e.stream < 0);
}

// Chooses between the two; most vectors are whole.
LBS_INLINE void emit4_any(const lbs::EmitPlan& e, const lbs::RunContext& run, int channel, int vector, const Quad& y) {
    constexpr uint32_t kAll = (1u << Simd::L) - 1u;
    const uint32_t valid = vector + 1 < e.vectors ? kAll : e.tail_mask;
    if (valid == kAll && channels_are_free(e, channel + 4)) emit4<true>(e, run, channel, vector, kAll, y);
    else emit4<false>(e, run, channel, vector, valid, y);
}

// Steps 1 and 2 for four filters: y = fma(float(acc), M, B). `dots` and `sums` are [4] rows of `dot_pitch` and
// `sum_pitch` integers (a pitch of 0 shares one row), `constant` those of all channels, or none.
LBS_INLINE void finish4(const lbs::AccumulatorPlan& a, const lbs::EmitPlan& e, const lbs::RunContext& run, int channel,
                        int vector, const int32_t* dots, int64_t dot_pitch, const int32_t* sums, int64_t sum_pitch,
                        const int32_t* constant) {
    Simd::I acc[4];
    for (int j = 0; j < 4; ++j) acc[j] = Simd::iload(dots + j * dot_pitch);
    if (a.shift)
        for (int j = 0; j < 4; ++j) acc[j] = Simd::ishl(acc[j], a.shift);
    if (sums)
        for (int j = 0; j < 4; ++j)
            acc[j] = Simd::iadd(acc[j], Simd::ishl(Simd::iload(sums + j * sum_pitch), a.sum_shift));
    if (constant)
        for (int j = 0; j < 4; ++j) acc[j] = Simd::iadd(acc[j], Simd::iset(constant[channel + j]));
    Quad y;
    for (int j = 0; j < 4; ++j)
        y.v[j] = Simd::ffma(Simd::fcvt(acc[j]), Simd::fset(a.multiplier[channel + j]), Simd::fset(a.bias[channel + j]));
    emit4_any(e, run, channel, vector, y);
}

}  // namespace
