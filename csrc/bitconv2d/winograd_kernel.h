// Convolution by exact integer Winograd, F(2x2, 3x3): 16 products where the definition takes 36.
//
//     V = B^T d B            d: 4 x 4 codes of a channel. B holds 0, 1 and -1, so V fits a byte up to 6-bit codes
//     U = (2G) g (2G)^T      g: 3 x 3 weights, 2G of integers; made when the program is loaded
//     dot = A^T (sum over channels of U * V) A / 4
//
// Every step is exact in integers, the division too. A tile is 2 x 2 output pixels, a vector is L tiles, numbered
// through the rows of tiles of a chunk; see WinogradPlan.
//
// The 16 places of U and V are multiplied column by column, in each as two sums that go on over two places, of which
// A^T takes (M2 + M0) - (-M1) and the negative of M2 + (-M1 + M3). What follows the products of one block of filters, A
// and the epilogue, runs between those of the next ones, in their shadow (emit_tile.h).
#pragma once

#include "bitconv2d/bitconv2d_kernel.h"

namespace {

constexpr int kPlaces = 16;  // of a tile's 4 x 4

template <class T>
LBS_INLINE T smaller(T a, T b) {  // one for each instruction set, which std::min is not
    return b < a ? b : a;
}

// Tiles of one vector that lie in one row of tiles.
struct TileRun {
    const unsigned char* in;  // upper left code of the first tile, in group 0
    int32_t pixel;            // upper left output pixel of the first tile, from the chunk's first
    int32_t lane;             // of the first tile
    uint32_t lanes;           // of all
    uint64_t columns;         // which of the 2 L output columns exist
    bool two_rows;
};

// The working memory of a thread, as plan_winograd has measured it.
struct WinogradMemory {
    unsigned char* inputs;  // V: bytes [vector][place][group][L][4], places `place_pitch` apart
    // [place][vector][filter][L]: being made, and being transformed; or
    // [group of tiles][place][kV][kX] of a block, filters on the lanes
    int32_t* products[2] = {};
    int32_t* dots[2] = {};  // [filter][pixel of the chunk]: being made, and being emitted
    TileRun* runs;
    int32_t* first_run;  // of every vector, and the end

    WinogradMemory(const lbs::WinogradPlan& plan, unsigned char* base) {
        const auto take = [&base](int64_t bytes) {
            unsigned char* part = base;
            base += (bytes + 63) / 64 * 64;
            return part;
        };
        inputs = take(plan.chunk_vectors * kPlaces * plan.place_pitch);
        const int64_t made = int64_t{4} * kPlaces * plan.widest_block * Simd::L;
        if (plan.tiles) {
            products[0] = reinterpret_cast<int32_t*>(take(made));
        } else {
            for (int32_t*& part : products) part = reinterpret_cast<int32_t*>(take(made / 2));
            for (int32_t*& part : dots)
                part = reinterpret_cast<int32_t*>(take(int64_t{4} * plan.widest_filters * plan.dot_pitch));
        }
        runs = reinterpret_cast<TileRun*>(take(plan.chunk_runs * static_cast<int64_t>(sizeof(TileRun))));
        first_run = reinterpret_cast<int32_t*>(take(int64_t{4} * (plan.chunk_vectors + 1)));
    }
};

// Rows of tiles [first, last) that are computed together.
struct Chunk {
    int vectors = 0;        // of tiles
    int pixel_vector = 0;   // of the output map, the first
    int pixel_vectors = 0;  // all of them

    Chunk(const lbs::WinogradPlan& plan, const unsigned char* in, int first, int last, const WinogradMemory& memory) {
        const int64_t pixel = int64_t{2} * first * plan.width;
        const int64_t end = smaller(int64_t{2} * last * plan.width, int64_t{plan.height} * plan.width);
        pixel_vector = static_cast<int>(pixel / Simd::L);
        pixel_vectors = static_cast<int>((end - pixel + Simd::L - 1) / Simd::L);
        const int columns = (plan.width + 1) / 2, tiles = (last - first) * columns;
        TileRun* run = memory.runs;
        for (int tile = 0; tile < tiles; ++vectors) {
            memory.first_run[vectors] = static_cast<int32_t>(run - memory.runs);
            for (int lane = 0; lane < Simd::L && tile < tiles; ++run) {
                const int row = tile / columns, column = tile % columns;
                const int count = smaller(Simd::L - lane, columns - column);
                const int width = smaller(2 * count, plan.width - 2 * column);
                run->in = in + plan.first + (first + row) * 2 * plan.row_pitch + 8 * column;
                run->pixel = 2 * row * plan.width + 2 * column;
                run->lane = lane;
                run->lanes = static_cast<uint32_t>((uint64_t{1} << count) - 1) << lane;
                run->columns = ((uint64_t{1} << width) - 1) << (2 * lane);
                run->two_rows = 2 * (first + row) + 1 < plan.height;
                lane += count;
                tile += count;
            }
        }
        memory.first_run[vectors] = static_cast<int32_t>(run - memory.runs);
    }
};

// 2 * (lane - first), of every first lane.
struct EvenLanes {
    int32_t values[2 * Simd::L] = {};
    constexpr EvenLanes() {
        for (int i = 0; i < 2 * Simd::L; ++i) values[i] = 2 * (i - Simd::L + 1);
    }
    LBS_INLINE Simd::I from(int lane) const { return Simd::iload(values + Simd::L - 1 - lane); }
};
constexpr EvenLanes kEvenLanes;

struct InterleavedLanes {  // of two vectors: which lane of their concatenation comes where
    int32_t low[Simd::L] = {}, high[Simd::L] = {};
    constexpr InterleavedLanes() {
        for (int i = 0; i < Simd::L; ++i) {
            low[i] = i / 2 + i % 2 * Simd::L;
            high[i] = low[i] + Simd::L / 2;
        }
    }
};
constexpr InterleavedLanes kInterleavedLanes;

// V of one vector of tiles and one group of channels.
LBS_INLINE void transform_input(const lbs::WinogradPlan& plan, const TileRun* run, const TileRun* end, int64_t group,
                                Simd::I shift, unsigned char* out) {
    Simd::I d[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) d[r][c] = Simd::izero();
    for (; run != end; ++run) {
        const unsigned char* in = run->in + group;
        const Simd::I even = kEvenLanes.from(run->lane), odd = Simd::iadd(even, Simd::iset(1));
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r, in += plan.row_pitch) {
            // Slack: two vectors of columns, however many the run has.
            const Simd::I x0 = Simd::iload(in), x1 = Simd::iload(in + 4 * Simd::L);
            const Simd::I x2 = Simd::iload(in + 8), x3 = Simd::iload(in + 8 + 4 * Simd::L);
            d[r][0] = Simd::imerge(d[r][0], run->lanes, Simd::ipick(x0, x1, even));
            d[r][1] = Simd::imerge(d[r][1], run->lanes, Simd::ipick(x0, x1, odd));
            d[r][2] = Simd::imerge(d[r][2], run->lanes, Simd::ipick(x2, x3, even));
            d[r][3] = Simd::imerge(d[r][3], run->lanes, Simd::ipick(x2, x3, odd));
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const Simd::I d0 = d[0][c], d1 = d[1][c], d2 = d[2][c], d3 = d[3][c];
        d[0][c] = Simd::isub_bytes(d0, d2);
        d[1][c] = Simd::iadd_bytes(d1, d2);
        d[2][c] = Simd::isub_bytes(d2, d1);
        d[3][c] = Simd::isub_bytes(d1, d3);
    }
    const int64_t pitch = plan.place_pitch;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r, out += 4 * pitch) {
        const Simd::I* x = d[r];
        const Simd::I sum = Simd::iadd_bytes(x[1], x[2]);
        Simd::istore(out, Simd::iadd_bytes(Simd::isub_bytes(x[0], x[2]), shift));
        Simd::istore(out + pitch, r == 1 ? sum : Simd::iadd_bytes(sum, shift));
        Simd::istore(out + 2 * pitch, Simd::iadd_bytes(Simd::isub_bytes(x[2], x[1]), shift));
        Simd::istore(out + 3 * pitch, Simd::iadd_bytes(Simd::isub_bytes(x[1], x[3]), shift));
    }
}

// V of all vectors and channels of a chunk. A difference of codes may be negative: `plan.shift` is added everywhere but
// at place (1, 1), which holds sums alone, and taken off again where the products start.
void transform_inputs(const lbs::WinogradPlan& plan, const Chunk& chunk, const WinogradMemory& memory) {
    const Simd::I shift = Simd::iset_bytes(plan.shift);
    for (int vector = 0; vector < chunk.vectors; ++vector) {
        const TileRun* run = memory.runs + memory.first_run[vector];
        const TileRun* end = memory.runs + memory.first_run[vector + 1];
        unsigned char* out = memory.inputs + static_cast<int64_t>(vector) * kPlaces * plan.place_pitch;
        for (int group = 0; group < plan.groups; ++group)
            transform_input(plan, run, end, group * plan.group_pitch, shift, out + int64_t{4} * Simd::L * group);
    }
}

// Output pixels of even and odd columns, put together; `columns` are those that exist.
LBS_INLINE void store_row(int32_t* out, uint64_t columns, Simd::I even, Simd::I odd) {
    constexpr uint32_t kAll = static_cast<uint32_t>((uint64_t{1} << Simd::L) - 1);
    const Simd::I low = Simd::ipick(even, odd, Simd::iload(kInterleavedLanes.low));
    const Simd::I high = Simd::ipick(even, odd, Simd::iload(kInterleavedLanes.high));
    Simd::istore_mask(out, static_cast<uint32_t>(columns) & kAll, low);
    Simd::istore_mask(out + Simd::L, static_cast<uint32_t>(columns >> Simd::L), high);
}

// Four times the dots of 2 x 2 output pixels: A^T, of sums of both rows.
LBS_INLINE void two_by_two(const Simd::I (&upper)[4], const Simd::I (&lower)[4], Simd::I (&y)[4]) {
    const Simd::I even = Simd::iadd(Simd::iadd(lower[0], lower[1]), lower[2]);
    y[0] = Simd::iadd(Simd::iadd(upper[0], upper[1]), upper[2]);
    y[1] = Simd::isub(Simd::isub(upper[1], upper[2]), upper[3]);
    y[2] = Simd::isub(Simd::izero(), even);
    y[3] = Simd::isub(Simd::iadd(lower[2], lower[3]), lower[1]);
}

// Dots of a vector of tiles and a filter; `pitch` integers from one row of sums to the next.
LBS_INLINE void transform_output(const int32_t* products, int64_t pitch, const TileRun* run, const TileRun* end,
                                 int width, int32_t* dots) {
    Simd::I upper[4], lower[4];  // the negative of these
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c, products += 2 * pitch) {
        upper[c] = Simd::iload(products);
        lower[c] = Simd::iload(products + pitch);
    }
    Simd::I y[4];
    two_by_two(upper, lower, y);
    for (; run != end; ++run) {
        int32_t* out = dots + run->pixel - 2 * run->lane;
        store_row(out, run->columns, Simd::isar(y[0], 2), Simd::isar(y[1], 2));
        if (run->two_rows) store_row(out + width, run->columns, Simd::isar(y[2], 2), Simd::isar(y[3], 2));
    }
}

// What is left to do for products that are there: their dots, and for those of a whole block on a chunk the epilogue.
class Pending {
public:
    Pending(const lbs::WinogradPlan& plan, const FastEmit& fast, const WinogradMemory& memory)
        : plan_(plan), fast_(fast), memory_(memory) {}

    int32_t* products() const { return memory_.products[turn_]; }

    // The products of `count` vectors have been made; `block` is done with the last of a chunk.
    void take(const Chunk& chunk, const lbs::WinogradBlock& block, int vector, int count) {
        finish_dots();
        made_ = products();
        turn_ ^= 1;
        vector_ = vector;
        vectors_ = count;
        filters_ = block.width;
        left_ = count * block.width;
        p_ = f_ = 0;
        is_last_ = vector + count == chunk.vectors;
        next_ = Tile(fast_, block.first, block.width, chunk.pixel_vector, chunk.pixel_vectors, memory_.dots[side_]);
        next_.filter_pitch = plan_.dot_pitch;
        next_.vector_pitch = Simd::L;
    }
    // A part of it, small enough to run beside the products that surround it.
    LBS_INLINE void make_dots() {
        if (left_ > 0) transform();
    }
    LBS_INLINE void emit_some() { emit(plan_.quads_per_place); }
    void finish_dots() {
        while (left_ > 0) transform();
    }
    void finish() {
        finish_dots();
        emit(quads_);
    }

private:
    LBS_INLINE void transform() {
        const TileRun* run = memory_.runs + memory_.first_run[vector_ + p_];
        const TileRun* end = memory_.runs + memory_.first_run[vector_ + p_ + 1];
        transform_output(made_ + (p_ * filters_ + f_) * Simd::L, vectors_ * filters_ * Simd::L, run, end, plan_.width,
                         memory_.dots[side_] + f_ * plan_.dot_pitch);
        if (++f_ == filters_) {
            f_ = 0;
            ++p_;
        }
        if (--left_ == 0 && is_last_) {
            emit(quads_);
            tile_ = next_;
            quads_ = tile_.quads;
            tile_p_ = tile_f_ = 0;
            side_ ^= 1;
        }
    }
    LBS_INLINE void emit(int count) {
        for (; count > 0 && quads_ > 0; --count, --quads_) {
            emit_quad(fast_, tile_, tile_p_, tile_f_);
            tile_f_ += 4;
            if (tile_f_ == tile_.filters) {
                tile_f_ = 0;
                ++tile_p_;
            }
        }
    }

    const lbs::WinogradPlan& plan_;
    const FastEmit& fast_;
    const WinogradMemory& memory_;
    const int32_t* made_ = nullptr;
    int turn_ = 0, side_ = 0;  // of the products that are made next, of the dots
    int vector_ = 0, vectors_ = 0, filters_ = 0, left_ = 0, p_ = 0, f_ = 0;
    bool is_last_ = false;
    Tile next_, tile_;  // whose dots are being made, and that is being emitted
    int quads_ = 0, tile_p_ = 0, tile_f_ = 0;
};

// Adds steps [first, last) of one place to the sums of kP vectors and kF filters.
template <int kP, int kF>
LBS_INLINE void multiply_steps(const unsigned char* const (&x)[kP], const int8_t* weights, int64_t first, int64_t last,
                               Simd::I (&acc)[kP][kF]) {
    weights += first * kF;
    for (int64_t step = first; step < last; step += 4, weights += 4 * kF) {
        Simd::I codes[kP];
        __builtin_prefetch(weights + kWeightsAhead);
#pragma GCC unroll 8
        for (int p = 0; p < kP; ++p) codes[p] = Simd::iload(x[p] + step * Simd::L);
#pragma GCC unroll 16
        for (int f = 0; f < kF; ++f) {
            const Simd::I w = Simd::ibroadcast(weights + 4 * f);
#pragma GCC unroll 8
            for (int p = 0; p < kP; ++p) acc[p][f] = Simd::template dot<false>(acc[p][f], codes[p], w);
        }
    }
}

template <int kP, int kF, class Op>
LBS_INLINE void store_sums(int32_t* out, const Simd::I (&acc)[kP][kF], const Op& op) {
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p)
#pragma GCC unroll 16
        for (int f = 0; f < kF; ++f, out += Simd::L) Simd::istore(out, op(acc[p][f], out));
}

// Products of kP vectors and kF filters, two rows [p][f][L] of sums for each column.
template <int kP, int kF>
void multiply_places(const lbs::WinogradPlan& plan, const lbs::WinogradBlock& block, const unsigned char* inputs,
                     int32_t* products, Pending& pending) {
    const int64_t channels = int64_t{4} * plan.groups, half = (plan.groups + 1) / 2 * 4, row = 4 * plan.place_pitch;
    const int64_t place_weights = channels * kF;
    const int8_t* weights = block.weights;
    const int32_t* start = block.start;
    for (int column = 0; column < 4; ++column, inputs += plan.place_pitch, products += 2 * kP * kF * Simd::L) {
        int32_t* upper = products;
        int32_t* lower = products + kP * kF * Simd::L;
        Simd::I acc[kP][kF];
        const auto begin = [&] {
#pragma GCC unroll 16
            for (int f = 0; f < kF; ++f) {
                const Simd::I first = Simd::iset(start[f]);
#pragma GCC unroll 8
                for (int p = 0; p < kP; ++p) acc[p][f] = first;
            }
            start += kF;
        };
        const auto multiply = [&](int place_row) __attribute__((always_inline)) {
            const unsigned char* x[kP];
#pragma GCC unroll 8
            for (int p = 0; p < kP; ++p) x[p] = inputs + place_row * row + int64_t{p} * kPlaces * plan.place_pitch;
            multiply_steps<kP, kF>(x, weights, 0, half, acc);
            pending.make_dots();
            multiply_steps<kP, kF>(x, weights, half, channels, acc);
            weights += place_weights;
        };
        begin();
        multiply(1);
        store_sums<kP, kF>(upper, acc, [](Simd::I a, const int32_t*) { return a; });
        pending.emit_some();
        multiply(3);
        store_sums<kP, kF>(lower, acc, [](Simd::I a, const int32_t*) { return a; });
        pending.emit_some();
        begin();
        multiply(2);
        store_sums<kP, kF>(lower, acc, [](Simd::I a, const int32_t* m) { return Simd::iadd(a, Simd::iload(m)); });
        pending.emit_some();
        multiply(0);
        store_sums<kP, kF>(upper, acc, [](Simd::I a, const int32_t* m) { return Simd::isub(a, Simd::iload(m)); });
        pending.emit_some();
    }
}

template <int kP, int kF>
void multiply_vectors(const lbs::WinogradPlan& plan, const lbs::WinogradBlock& block, int vector, int count,
                      const WinogradMemory& memory, Pending& pending) {
    if constexpr (kP > 1) {
        if (count < kP) return multiply_vectors<kP - 1, kF>(plan, block, vector, count, memory, pending);
    }
    multiply_places<kP, kF>(plan, block, memory.inputs + static_cast<int64_t>(vector) * kPlaces * plan.place_pitch,
                            pending.products(), pending);
}

template <int kP, int kF>
void winograd_block(const lbs::WinogradPlan& plan, const lbs::WinogradBlock& block, const Chunk& chunk,
                    const WinogradMemory& memory, Pending& pending) {
    for (int vector = 0; vector < chunk.vectors; vector += kP) {
        const int count = smaller(kP, chunk.vectors - vector);
        multiply_vectors<kP, kF>(plan, block, vector, count, memory, pending);
        pending.take(chunk, block, vector, count);
    }
}

void winograd_kernel(const lbs::WinogradPlan& plan, const lbs::RunContext& run, int first_unit, int last_unit,
                     int first_block, int last_block) {
    const WinogradMemory memory(plan, run.scratch);
    const FastEmit fast(plan.acc, plan.emit, run);
    Pending pending(plan, fast, memory);
    const int rows = (plan.height + 1) / 2;
    for (int unit = first_unit; unit < last_unit; unit += plan.chunk_units) {
        const int last = smaller(smaller(unit + plan.chunk_units, last_unit) * plan.unit_rows, rows);
        pending.finish_dots();  // which look at the chunk before
        const Chunk chunk(plan, run.tensors[plan.input], unit * plan.unit_rows, last, memory);
        transform_inputs(plan, chunk, memory);
        for (int b = first_block; b < last_block; ++b) {
            const lbs::WinogradBlock& block = plan.blocks[b];
            switch (block.width) {
#define LBS_TILE(vectors, filters) \
    case filters: winograd_block<vectors, filters>(plan, block, chunk, memory, pending); break;
                LBS_WINOGRAD_TILES(LBS_TILE)
#undef LBS_TILE
                default: break;
            }
        }
    }
    pending.finish();
}

#define LBS_TILE(vectors, filters) {vectors, filters},
constexpr lbs::TileShape kWinogradShapes[] = {LBS_WINOGRAD_TILES(LBS_TILE){0, 0}};
#undef LBS_TILE

}  // namespace
