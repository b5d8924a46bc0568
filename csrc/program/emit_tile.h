// The epilogue of a tile, written to run in the shadow of the next tile's dot products.
//
// A tile's results wait in memory while the next tile computes; between parts of that tile's K loop one vector after
// the other is finished. The processor overlaps the two, which a separate epilogue does not allow: its chain of
// dependent operations is longer than the reorder buffer (on Zen 5: 30 cycles per four vectors of results apart, 12
// interleaved).
#pragma once

#include "program/emit_kernel.h"
#include "program/plan.h"

namespace {

constexpr uint32_t kAllLanes = (1u << Simd::L) - 1u;

// What the epilogue of one step needs, gathered before its loops.
struct FastEmit {
    const lbs::AccumulatorPlan* acc;
    const lbs::EmitPlan* plan;
    const lbs::RunContext* run;
    bool usable;  // nothing rarer than an activation, a gate, a residual, bounds, a float32 stream, no signed codes
    bool plain;   // the dot product is the accumulator
    bool positive;
    // Where codes for one reader, without a norm, are all that is made, of numbers that an integer holds before they
    // are clamped; and the bounds of its codes, what ReLU and the like leave.
    const lbs::ConsumerPlan* only;
    Simd::I lowest, highest;
    int64_t pixels;
    const float* residual;
    const lbs::CodedPlan* coded;  // the residual, where it is of codes
    float* stream;

    LBS_INLINE FastEmit(const lbs::AccumulatorPlan& a, const lbs::EmitPlan& e, const lbs::RunContext& context)
        : acc(&a),
          plan(&e),
          run(&context),
          usable(e.stream_type == lbs::StreamType::kFloat32),
          plain(!a.shift && !a.needs_sum && !a.constant),
          positive(e.has_low && e.low >= 0.0f),
          only(nullptr),
          lowest(Simd::izero()),
          highest(Simd::izero()),
          pixels(e.pixels),
          residual(e.residual >= 0 ? reinterpret_cast<const float*>(context.tensors[e.residual]) : nullptr),
          coded(e.coded.tensor >= 0 ? &e.coded : nullptr),
          stream(e.stream >= 0 ? reinterpret_cast<float*>(context.tensors[e.stream]) : nullptr) {
        for (int k = 0; k < e.consumer_count; ++k) usable = usable && !e.consumers[k].shifted;
        if (!e.is_usual) return;
        only = e.consumers;
        float floor = only->least;  // multiplying by a scale and rounding keep the order of floats
        if (e.has_low && e.low * only->scale > floor) floor = e.low * only->scale;
        lowest = Simd::iset_bytes(code(floor < only->high ? floor : only->high));
        highest = Simd::iset_bytes(code(only->high));
    }
    LBS_INLINE int code(float t) const { return static_cast<int>(__builtin_nearbyintf(t)) + only->zero; }
    LBS_INLINE unsigned char* codes(const lbs::ConsumerPlan& c, int channel) const {
        return run->tensors[c.tensor] + static_cast<uint32_t>(channel) / 4 * c.group_pitch;
    }
};

// Filters by vectors, computed and not yet emitted: rows of L integers.
struct Tile {
    int channel = 0, filters = 0, vector = 0, quads = 0;  // a quad: four filters of one vector
    int64_t filter_pitch = Simd::L, vector_pitch = 0;     // of dots
    int fast_vectors = 0;                                 // at its start: whole ones with nothing rare about them
    bool own_sums = false;                                // sums lie as dots do, otherwise one row per vector
    const int32_t* dots = nullptr;
    const int32_t* sums = nullptr;
    int64_t first = 0;  // of the stream: channel, vector

    Tile() = default;
    LBS_INLINE Tile(const FastEmit& f, int channel_, int filters_, int vector_, int vectors, const int32_t* dots_)
        : channel(channel_),
          filters(filters_),
          vector(vector_),
          quads(vectors * filters_ / 4),
          vector_pitch(filters_ * Simd::L),
          dots(dots_),
          first(channel_ * f.pixels + static_cast<int64_t>(vector_) * Simd::L) {
        const lbs::EmitPlan& e = *f.plan;
        if (!f.usable || !channels_are_free(e, channel + filters)) return;
        fast_vectors = vectors;
        const bool over = f.only && f.only->map.over;
        if (vector + vectors == e.vectors && e.tail_mask != kAllLanes && !over) --fast_vectors;
    }
    LBS_INLINE const int32_t* dots_of(int p, int f) const { return dots + p * vector_pitch + f * filter_pitch; }
    LBS_INLINE const int32_t* sums_of(int p, int f) const {
        return sums + (own_sums ? p * vector_pitch + f * filter_pitch : int64_t{p} * Simd::L);
    }
    LBS_INLINE int64_t sum_pitch() const { return own_sums ? filter_pitch : 0; }
};

__attribute__((noinline)) void emit_rare(const FastEmit& fast, const Tile& tile, int p, int f) {
    finish4(*fast.acc, *fast.plan, *fast.run, tile.channel + f, tile.vector + p, tile.dots_of(p, f), tile.filter_pitch,
            tile.sums ? tile.sums_of(p, f) : nullptr, tile.sum_pitch());
}

// `base`: where the codes of these four channels begin.
LBS_INLINE void store_codes(const lbs::ConsumerPlan& c, unsigned char* base, int vector, Simd::I word) {
    prefetch_stores(base, c.map, vector);
    store_word(base, c.map, vector, kAllLanes, word);
}

// Steps 5 and 6 for fast.only. Bounds of codes are integers, so numbers may be rounded before they are clamped.
LBS_INLINE Simd::I bounded_codes(const lbs::ConsumerPlan& c, Simd::F scale, Simd::I lowest, Simd::I highest, Quad y) {
    Simd::I q[4];
    for (int j = 0; j < 4; ++j) q[j] = Simd::ifromf(Simd::fmul(y.v[j], scale));
    add_zero(c, q);
    return Simd::ipack4_clamped(q[0], q[1], q[2], q[3], lowest, highest);
}

// A constant, as a constructor that is not inlined would be one symbol for all instruction sets.
constexpr lbs::ConsumerPlan kNoConsumer;

// The usual epilogue of four channels, vector after vector: fast.only, and the dot product is the accumulator. What it
// needs is copied here, as the stores of codes may alias everything that has an address.
struct UsualEmit {
    const FastEmit& fast;
    const int channel;
    const bool usable;  // for whole vectors
    const lbs::ConsumerPlan consumer;
    unsigned char* const base;
    const Simd::I lowest, highest;
    const Simd::F scale;
    Simd::F gain[4], offset[4];

    LBS_INLINE UsualEmit(const FastEmit& fast_, int channel_)
        : fast(fast_),
          channel(channel_),
          usable(fast.only && channels_are_free(*fast.plan, channel + 4)),
          consumer(usable ? *fast.only : kNoConsumer),
          base(usable ? fast.codes(consumer, channel) : nullptr),
          lowest(fast.lowest),
          highest(fast.highest),
          scale(Simd::fset(consumer.scale)) {
        for (int j = 0; j < 4; ++j) {
            gain[j] = Simd::fset(fast.acc->multiplier[channel + j]);
            offset[j] = Simd::fset(fast.acc->bias[channel + j]);
        }
    }
    LBS_INLINE Simd::F value(Simd::I acc, int j) const { return Simd::ffma(Simd::fcvt(acc), gain[j], offset[j]); }
    // Whether it takes this one of `count` vectors: no lane is to be left out.
    LBS_INLINE bool takes(int vector, int count) const { return usable && (vector + 1 < count || consumer.map.over); }
    LBS_INLINE void emit(int vector, Simd::I a0, Simd::I a1, Simd::I a2, Simd::I a3) const {
        Quad y = {{value(a0, 0), value(a1, 1), value(a2, 2), value(a3, 3)}};
        if (fast.coded) y = add_coded(*fast.coded, *fast.run, channel, vector, y);
        // Asking for lines ahead would cost more than it saves.
        store_word(base, consumer.map, vector, kAllLanes, bounded_codes(consumer, scale, lowest, highest, y));
    }
};

LBS_INLINE void fast_consumer(const lbs::ConsumerPlan& c, const FastEmit& fast, int channel, int vector, Quad& y) {
    Quad u = y;
    const Simd::F scale = Simd::fset(c.scale), high = Simd::fset(c.high);
    if (c.gain) {
        const float* gain = c.gain + channel;
        const float* offset = c.offset + channel;
        u = each(u, [&](Simd::F x, int j) { return Simd::ffma(x, Simd::fset(gain[j]), Simd::fset(offset[j])); });
    }
    u = each(u, [&](Simd::F x, int) { return Simd::fmul(x, scale); });
    // Where zero is code 0, nothing lies below it, so this is the consumer's ReLU too.
    if (c.gain || !fast.positive) u = each(u, [&](Simd::F x, int) { return Simd::fmax(x, Simd::fset(c.least)); });
    u = each(u, [&](Simd::F x, int) { return Simd::fmin(x, high); });
    Simd::I q[4] = {Simd::ifromf(u.v[0]), Simd::ifromf(u.v[1]), Simd::ifromf(u.v[2]), Simd::ifromf(u.v[3])};
    if (c.step > 0.0f) y = stood_for(c, q);
    add_zero(c, q);
    store_codes(c, fast.codes(c, channel), vector, Simd::ipack4(q[0], q[1], q[2], q[3]));
}

// Steps 1 to 6 for filters f to f + 3 of vector p of a tile.
LBS_INLINE void emit_quad(const FastEmit& fast, const Tile& tile, int p, int f) {
    if (__builtin_expect(p >= tile.fast_vectors, 0)) return emit_rare(fast, tile, p, f);
    const int32_t* dots = tile.dots_of(p, f);
    const lbs::AccumulatorPlan& a = *fast.acc;
    const int channel = tile.channel + f;
    const int64_t pitch = tile.filter_pitch;
    Simd::I acc[4] = {Simd::iload(dots), Simd::iload(dots + pitch), Simd::iload(dots + 2 * pitch),
                      Simd::iload(dots + 3 * pitch)};
    if (!fast.plain) {
        if (a.shift)
            for (int j = 0; j < 4; ++j) acc[j] = Simd::ishl(acc[j], a.shift);
        if (tile.sums) {
            const int32_t* sums = tile.sums_of(p, f);
            const int64_t sum_pitch = tile.sum_pitch();
            for (int j = 0; j < 4; ++j)
                acc[j] = Simd::iadd(acc[j], Simd::ishl(Simd::iload(sums + j * sum_pitch), a.sum_shift));
        }
        if (a.constant)
            for (int j = 0; j < 4; ++j) acc[j] = Simd::iadd(acc[j], Simd::iset(a.constant[channel + j]));
    }
    const float* gain = a.multiplier + channel;
    const float* offset = a.bias + channel;
    Quad y;
    for (int j = 0; j < 4; ++j) y.v[j] = Simd::ffma(Simd::fcvt(acc[j]), Simd::fset(gain[j]), Simd::fset(offset[j]));
    if (fast.only) {
        if (fast.coded) y = add_coded(*fast.coded, *fast.run, channel, tile.vector + p, y);
        const lbs::ConsumerPlan& c = *fast.only;
        const Simd::I word = bounded_codes(c, Simd::fset(c.scale), fast.lowest, fast.highest, y);
        return store_codes(c, fast.codes(c, channel), tile.vector + p, word);
    }
    const int64_t pixels = fast.pixels, first = tile.first + f * pixels + p * Simd::L;
    const lbs::EmitPlan& e = *fast.plan;
    if (__builtin_expect(!e.is_plain, 0)) {
        const Quad z = combine4(e, *fast.run, channel, tile.vector + p, 4, kAllLanes, y);
        for (int j = 0; j < 4; ++j) y.v[j] = z.v[j];
    } else if (fast.coded) {
        y = add_coded(*fast.coded, *fast.run, channel, tile.vector + p, y);
    } else if (fast.residual) {
        const float* residual = fast.residual + first;
        y = each(y, [&](Simd::F x, int j) { return Simd::fadd(x, Simd::fload(residual + j * pixels)); });
    }
    if (e.has_low) y = each(y, [&](Simd::F x, int) { return Simd::fmax(x, Simd::fset(e.low)); });
    if (e.has_high) y = each(y, [&](Simd::F x, int) { return Simd::fmin(x, Simd::fset(e.high)); });
    if (fast.stream) {
        float* stream = fast.stream + first;
        for (int j = 0; j < 4; ++j) Simd::fstore(stream + j * pixels, y.v[j]);
    }
    const lbs::ConsumerPlan* c = e.consumers;
    for (const lbs::ConsumerPlan* end = c + e.consumer_count; c != end; ++c)
        fast_consumer(*c, fast, channel, tile.vector + p, y);
}

inline void emit_tile(const FastEmit& fast, const Tile& tile) {
    for (int p = 0; p * tile.filters < 4 * tile.quads; ++p)
        for (int f = 0; f < tile.filters; f += 4) emit_quad(fast, tile, p, f);
}

}  // namespace
