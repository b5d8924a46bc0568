// The epilogue of a tile, written to run in the shadow of the next tile's dot products, and of planes of floats.
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
constexpr int kStreamAhead = 8 * Simd::L;  // floats of a stream whose lines are asked for before they are used

// What the epilogue of one step needs, gathered before its loops.
struct FastEmit {
    const lbs::AccumulatorPlan* acc;
    const lbs::EmitPlan* plan;
    const lbs::RunContext* run;
    bool usable;  // nothing rarer than an activation, a gate, a residual, bounds, a float32 stream, no signed codes
    bool plain;   // the dot product, and the constant, are the accumulator
    bool positive;
    const int32_t* constant;  // of all channels, or none: also where dots begin with it
    // The first reader where plan.is_usual, and the bounds of its codes, what ReLU and the like leave.
    const lbs::ConsumerPlan* only;
    Simd::I lowest, highest;
    int64_t pixels;
    const float* residual;
    const lbs::CodedPlan* coded;  // the residual, where it is of codes
    float* stream;

    LBS_INLINE FastEmit(const lbs::AccumulatorPlan& a, const lbs::EmitPlan& e, const lbs::RunContext& context,
                        bool begun = false)
        : acc(&a),
          plan(&e),
          run(&context),
          usable(e.stream_type == lbs::StreamType::kFloat32),
          plain(!a.shift && !a.needs_sum),
          positive(e.has_low && e.low >= 0.0f),
          constant(begun ? nullptr : a.constant),
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
    LBS_INLINE bool is_usual(int readers = 1) const { return only && plan->consumer_count == readers; }
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
        const bool over = f.is_usual() && f.only->map.over;
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
            tile.sums ? tile.sums_of(p, f) : nullptr, tile.sum_pitch(), fast.constant);
}

// The accumulators of filters f to f + 3.
LBS_INLINE void accumulators(const FastEmit& fast, const Tile& tile, int p, int f, Simd::I (&acc)[4]) {
    const int32_t* dots = tile.dots_of(p, f);
    const int64_t pitch = tile.filter_pitch;
    for (int j = 0; j < 4; ++j) acc[j] = Simd::iload(dots + j * pitch);
    if (!fast.plain) {
        for (int j = 0; j < 4; ++j) acc[j] = Simd::ishl(acc[j], fast.acc->shift);
        if (tile.sums) {
            const int32_t* sums = tile.sums_of(p, f);
            const int64_t sum_pitch = tile.sum_pitch();
            for (int j = 0; j < 4; ++j)
                acc[j] = Simd::iadd(acc[j], Simd::ishl(Simd::iload(sums + j * sum_pitch), fast.acc->sum_shift));
        }
    }
    if (fast.constant)
        for (int j = 0; j < 4; ++j) acc[j] = Simd::iadd(acc[j], Simd::iset(fast.constant[tile.channel + f + j]));
}

LBS_INLINE Quad values(const lbs::AccumulatorPlan& a, int channel, const Simd::I (&acc)[4]) {
    const float* gain = a.multiplier + channel;
    const float* offset = a.bias + channel;
    Quad y;
    for (int j = 0; j < 4; ++j) y.v[j] = Simd::ffma(Simd::fcvt(acc[j]), Simd::fset(gain[j]), Simd::fset(offset[j]));
    return y;
}

// `base`: where the codes of these four channels begin.
LBS_INLINE void store_codes(const lbs::ConsumerPlan& c, unsigned char* base, int vector, Simd::I word) {
    prefetch_stores(base, c.map, vector);
    store_word(base, c.map, vector, kAllLanes, word);
}

LBS_INLINE Simd::I scaled(const lbs::CodeScale& of, Simd::I codes) {
    return Simd::iscale_bytes(codes, of.least, of.most, of.factor, of.offset, of.shift);
}

// Step 5 for fast.only, but for its bounds: those of codes are integers, so numbers may be rounded before they are
// clamped.
LBS_INLINE void unbounded_codes(int zero, Simd::F scale, Quad y, Simd::I (&q)[4]) {
    for (int j = 0; j < 4; ++j) q[j] = Simd::ifromf(Simd::fmul(y.v[j], scale));
    add_zero(zero, q);
}

LBS_INLINE Simd::I bounded_codes(int zero, Simd::F scale, Simd::I lowest, Simd::I highest, Quad y) {
    Simd::I q[4];
    unbounded_codes(zero, scale, y, q);
    return Simd::ipack4_clamped(q[0], q[1], q[2], q[3], lowest, highest);
}

// Asks for the lines that the next four channels of a vector are stored in.
LBS_INLINE void prefetch_next(const lbs::ConsumerPlan& c, const unsigned char* base, int vector) {
    if (c.map.pieces != 0) __builtin_prefetch(base + c.group_pitch + c.map.table[vector * c.map.pieces].offset, 1);
}

// A constant, as a constructor that is not inlined would be one symbol for all instruction sets.
constexpr lbs::CodedPlan kNoCodes;

// The codes of four channels of whole vectors for a reader where fast.is_usual(readers). What they need is copied here,
// and never has an address, as the stores of codes may alias everything that has one: read from memory again for every
// vector an epilogue takes 20 to 25 cycles of four channels instead of 15 (16 -> 96 channels, Zen 5).
struct UsualCodes {
    const bool usable;  // masks of pieces leave out the lanes that are not there
    const bool is_whole, is_apart;
    const int pieces;  // of a vector as it is stored
    const lbs::Piece* const table;
    unsigned char* const base;
    const int64_t group_pitch;
    const int zero;
    const Simd::I lowest, highest;
    const Simd::F scale;

    LBS_INLINE UsualCodes(const FastEmit& fast, int channel, bool is_coded, int readers = 1, int reader = 0)
        : UsualCodes(fast, channel, reader_of(fast, channel, is_coded, readers, reader)) {}
    LBS_INLINE void store(int vector, Simd::I word) const {
        const lbs::Piece* const piece = table + int64_t{vector} * pieces;
        if (is_whole || piece->mask == kAllLanes) return Simd::istore(base + piece->offset, word);
        store_cut(base, piece, pieces, is_apart, word);
    }
    // For the lines that the next four channels of a vector are stored in.
    LBS_INLINE void ask_next(int vector) const {
        __builtin_prefetch(base + group_pitch + table[int64_t{vector} * pieces].offset, 1);
    }

private:
    LBS_INLINE UsualCodes(const FastEmit& fast, int channel, const lbs::ConsumerPlan* c)
        : usable(c != nullptr),
          is_whole(c && c->map.pieces == 1 && !c->map.masked),
          is_apart(c && c->map.compress),
          pieces(c ? c->map.pieces : 0),
          table(c ? c->map.table : nullptr),
          base(c ? fast.codes(*c, channel) : nullptr),
          group_pitch(c ? c->group_pitch : 0),
          zero(c ? c->zero : 0),
          lowest(fast.lowest),
          highest(fast.highest),
          scale(Simd::fset(c ? c->scale : 0.0f)) {}
    // None where this does not serve.
    static LBS_INLINE const lbs::ConsumerPlan* reader_of(const FastEmit& fast, int channel, bool is_coded, int readers,
                                                         int reader) {
        const bool usable =
            fast.is_usual(readers) && is_coded == (fast.coded != nullptr) && channels_are_free(*fast.plan, channel + 4);
        return usable && fast.only[reader].map.pieces > 0 ? fast.only + reader : nullptr;
    }
};

// The usual epilogue of four channels, vector after vector: fast.is_usual(kReaders), and the dot product is the
// accumulator. kCoded: with a residual of codes.
template <int kReaders, bool kCoded>
struct UsualEmit {
    static_assert(kReaders == 1 || kReaders == 2, "a reader, and one whose codes are made of its codes");
    const UsualCodes codes, others;
    const lbs::CodeScale of_first;
    Simd::F gain[4], offset[4];
    const lbs::CodedPlan coded;
    const unsigned char* const residual;

    LBS_INLINE UsualEmit(const FastEmit& fast, int channel)
        : codes(fast, channel, kCoded, kReaders),
          others(fast, channel, kCoded, kReaders, kReaders - 1),
          of_first(fast.only ? fast.only[kReaders - 1].of_first : lbs::CodeScale{}),
          coded(kCoded ? *fast.coded : kNoCodes),
          residual(kCoded ? coded_base(coded, *fast.run, channel) : nullptr) {
        for (int j = 0; j < 4; ++j) {
            gain[j] = Simd::fset(fast.acc->multiplier[channel + j]);
            offset[j] = Simd::fset(fast.acc->bias[channel + j]);
        }
    }
    LBS_INLINE bool takes(int, int) const { return codes.usable && others.usable; }
    LBS_INLINE void ask_next(int vector) const {
        codes.ask_next(vector);
        if constexpr (kReaders == 2) others.ask_next(vector);
    }
    LBS_INLINE void emit(int vector, Simd::I a0, Simd::I a1, Simd::I a2, Simd::I a3) const {
        Quad y = {{value(a0, 0), value(a1, 1), value(a2, 2), value(a3, 3)}};
        if constexpr (kCoded) {
            const Simd::I word = coded_pieces(coded.map, residual, vector);
            y = each(y, [&](Simd::F x, int j) { return Simd::fadd(x, coded_value(coded, Simd::ibyte(word, j))); });
        }
        const Simd::I word = bounded_codes(codes.zero, codes.scale, codes.lowest, codes.highest, y);
        codes.store(vector, word);
        if constexpr (kReaders == 2) others.store(vector, scaled(of_first, word));
    }

private:
    LBS_INLINE Simd::F value(Simd::I acc, int j) const { return Simd::ffma(Simd::fcvt(acc), gain[j], offset[j]); }
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
    add_zero(c.zero, q);
    store_codes(c, fast.codes(c, channel), vector, Simd::ipack4(q[0], q[1], q[2], q[3]));
}

// Codes of the first reader, and of those whose codes are made of them.
LBS_INLINE void store_all(const FastEmit& fast, int channel, int vector, Simd::I word) {
    const lbs::ConsumerPlan* c = fast.plan->consumers;
    store_codes(*c, fast.codes(*c, channel), vector, word);
    for (int k = 1; __builtin_expect(k < fast.plan->consumer_count, 0); ++k)
        store_codes(c[k], fast.codes(c[k], channel), vector, scaled(c[k].of_first, word));
}

// Steps 3 to 6 for fast.only.
LBS_INLINE void emit_only(const FastEmit& fast, int channel, int vector, Quad y) {
    if (fast.coded) y = add_coded(*fast.coded, *fast.run, channel, vector, y);
    const lbs::ConsumerPlan& c = *fast.only;
    store_all(fast, channel, vector, bounded_codes(c.zero, Simd::fset(c.scale), fast.lowest, fast.highest, y));
}

// Bounds, and the stream, which has these channels from `first` on.
LBS_INLINE Quad store_stream(const FastEmit& fast, int64_t first, Quad y) {
    const lbs::EmitPlan& e = *fast.plan;
    if (e.has_low) y = each(y, [&](Simd::F x, int) { return Simd::fmax(x, Simd::fset(e.low)); });
    if (e.has_high) y = each(y, [&](Simd::F x, int) { return Simd::fmin(x, Simd::fset(e.high)); });
    if (fast.stream) {
        float* stream = fast.stream + first;
        for (int j = 0; j < 4; ++j) Simd::fstore(stream + j * fast.pixels, y.v[j]);
    }
    return y;
}

// Step 5 for a reader where plan.is_lean, from what the step gives out.
LBS_INLINE void bounded_integers(const FastEmit& fast, const lbs::ConsumerPlan& c, Quad y, Simd::I (&q)[4]) {
    y = each(y, [&](Simd::F x, int) { return Simd::fmul(x, Simd::fset(c.scale)); });
    if (!fast.positive) y = each(y, [&](Simd::F x, int) { return Simd::fmax(x, Simd::fset(c.least)); });
    y = each(y, [&](Simd::F x, int) { return Simd::fmin(x, Simd::fset(c.high)); });
    for (int j = 0; j < 4; ++j) q[j] = Simd::ifromf(y.v[j]);
    add_zero(c.zero, q);
}

// Codes of all readers but the first, whose codes are `word`. Apart, as it takes registers of the rest.
__attribute__((noinline)) void store_others(const FastEmit& fast, int channel, int vector, Simd::I word, Quad y) {
    const lbs::EmitPlan& e = *fast.plan;
    for (const lbs::ConsumerPlan* c = e.consumers + 1; c != e.consumers + e.consumer_count; ++c) {
        Simd::I q[4];
        if (!c->of_first.holds) bounded_integers(fast, *c, y, q);
        store_codes(*c, fast.codes(*c, channel), vector,
                    c->of_first.holds ? scaled(c->of_first, word) : Simd::ipack4(q[0], q[1], q[2], q[3]));
    }
}

// Steps 3 to 6 where plan.is_lean; `first` is where the stream has them.
LBS_INLINE void emit_values(const FastEmit& fast, int channel, int vector, int64_t first, Quad y) {
    if (fast.only) return emit_only(fast, channel, vector, y);
    const lbs::EmitPlan& e = *fast.plan;
    const int64_t pixels = fast.pixels;
    if (fast.coded) {
        y = add_coded(*fast.coded, *fast.run, channel, vector, y);
    } else if (fast.residual) {
        const float* residual = fast.residual + first;
        for (int j = 0; j < 4; ++j) __builtin_prefetch(residual + j * pixels + kStreamAhead, 1);
        y = each(y, [&](Simd::F x, int j) { return Simd::fadd(x, Simd::fload(residual + j * pixels)); });
    }
    y = store_stream(fast, first, y);
    if (e.consumer_count == 0) return;
    const lbs::ConsumerPlan& c = *e.consumers;
    Simd::I q[4];
    bounded_integers(fast, c, y, q);
    const Simd::I word = Simd::ipack4(q[0], q[1], q[2], q[3]);
    store_codes(c, fast.codes(c, channel), vector, word);
    if (__builtin_expect(e.consumer_count > 1, 0)) store_others(fast, channel, vector, word, y);
}

// As UsualEmit where plan.is_lean is all that is known.
struct LeanEmit {
    const FastEmit& fast;
    const int channel;
    const bool usable;

    LBS_INLINE LeanEmit(const FastEmit& fast_, int channel_)
        : fast(fast_), channel(channel_), usable(channels_are_free(*fast.plan, channel + 4)) {}
    LBS_INLINE bool takes(int vector, int count) const {
        return usable && (vector + 1 < count || fast.plan->tail_mask == kAllLanes);
    }
    LBS_INLINE void emit(int vector, Simd::I a0, Simd::I a1, Simd::I a2, Simd::I a3) const {
        const Simd::I acc[4] = {a0, a1, a2, a3};
        emit_values(fast, channel, vector, channel * fast.pixels + int64_t{vector} * Simd::L,
                    values(*fast.acc, channel, acc));
    }
    LBS_INLINE void ask_next(int vector) const {
        const lbs::ConsumerPlan* c = fast.plan->consumers;
        for (int k = 0; k < fast.plan->consumer_count; ++k) prefetch_next(c[k], fast.codes(c[k], channel), vector);
    }
};

// Steps 1 to 6 for filters f to f + 3 of vector p of a tile, where the epilogue is not lean.
__attribute__((noinline)) void emit_other(const FastEmit& fast, const Tile& tile, int p, int f) {
    const lbs::EmitPlan& e = *fast.plan;
    const int channel = tile.channel + f;
    const int64_t pixels = fast.pixels, first = tile.first + f * pixels + p * Simd::L;
    Simd::I acc[4];
    accumulators(fast, tile, p, f, acc);
    Quad y = values(*fast.acc, channel, acc);
    if (!e.is_plain) {
        y = combine4(e, *fast.run, channel, tile.vector + p, 4, kAllLanes, y);
    } else if (fast.coded) {
        y = add_coded(*fast.coded, *fast.run, channel, tile.vector + p, y);
    } else if (fast.residual) {
        const float* residual = fast.residual + first;
        y = each(y, [&](Simd::F x, int j) { return Simd::fadd(x, Simd::fload(residual + j * pixels)); });
    }
    y = store_stream(fast, first, y);
    const lbs::ConsumerPlan* c = e.consumers;
    for (const lbs::ConsumerPlan* end = c + e.consumer_count; c != end; ++c)
        fast_consumer(*c, fast, channel, tile.vector + p, y);
}

// Steps 1 to 6 for filters f to f + 3 of vector p of a tile.
LBS_INLINE void emit_quad(const FastEmit& fast, const Tile& tile, int p, int f) {
    if (__builtin_expect(p >= tile.fast_vectors, 0)) return emit_rare(fast, tile, p, f);
    if (__builtin_expect(!fast.plan->is_lean, 0)) return emit_other(fast, tile, p, f);
    const int channel = tile.channel + f;
    Simd::I acc[4];
    accumulators(fast, tile, p, f, acc);
    emit_values(fast, channel, tile.vector + p, tile.first + f * fast.pixels + p * Simd::L,
                values(*fast.acc, channel, acc));
}

inline void emit_tile(const FastEmit& fast, const Tile& tile) {
    for (int p = 0; p * tile.filters < 4 * tile.quads; ++p)
        for (int f = 0; f < tile.filters; f += 4) emit_quad(fast, tile, p, f);
}

// Floats of an image that are asked for ahead, two rows of 224 or so: it comes from a cache or memory that the
// program's weights and maps share.
constexpr int kImageAhead = 512;

// A constant for the same reason as kNoCodes.
constexpr lbs::AccumulatorPlan kNoSums;

// Emits channel groups [first, last) of float planes [channel][pixels]; plane 0 of `values` is channel `base_channel`.
void emit_planes_kernel(const lbs::EmitPlan& e, const lbs::RunContext& run, const float* values, int base_channel,
                        int first_group, int last_group, int first_vector, int last_vector) {
    const FastEmit fast(kNoSums, e, run);
    for (int group = first_group; group < last_group; ++group) {
        const int channel = 4 * group;
        const int live = e.channels - channel < 4 ? e.channels - channel : 4;
        const float* plane = values + (channel - base_channel) * e.pixels;
        const bool is_lean = e.is_lean && live == 4;
        for (int vector = first_vector; vector < last_vector; ++vector) {
            const int64_t first = static_cast<int64_t>(vector) * Simd::L;
            const uint32_t valid = vector + 1 < e.vectors ? kAllLanes : e.tail_mask;
            Quad y;
            if (is_lean && valid == kAllLanes) {
                for (int j = 0; j < 4; ++j) y.v[j] = Simd::fload(plane + j * e.pixels + first);
                emit_values(fast, channel, vector, channel * e.pixels + first, y);
                continue;
            }
            for (int j = 0; j < live; ++j) __builtin_prefetch(plane + j * e.pixels + first + kImageAhead);
            for (int j = 0; j < 4; ++j) y.v[j] = Simd::fload_mask(plane + j * e.pixels + first, j < live ? valid : 0);
            emit4_any(e, run, channel, vector, y);
        }
    }
}

}  // namespace
