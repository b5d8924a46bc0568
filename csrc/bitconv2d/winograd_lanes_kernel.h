// The Winograd convolution with filters on the lanes: the same transforms and products (winograd_kernel.h), but a step
// loads kV vectors of weights and broadcasts four transformed codes of each of kX tiles.
//
// Vectors of tiles would be part empty where maps are small (49 of 64 lanes at 14 x 14), and one vector of them, at
// 7 x 7, meets every weight once: a broadcast for each dot. Outputs need not be put together of even and odd columns.
#pragma once

#include "bitconv2d/winograd_kernel.h"
#include "program/emit_pixels.h"

namespace {

// As kWeightsAhead, of weights that a few tiles meet, one after the other: 512 filters at 7 x 7 take 221 us with 4 KB,
// 193 with this.
constexpr int kLanesAhead = 16384;

// Sums [kV][kX] of one place and kX tiles. They start with `start`, [kV] for all tiles or, where kGoesOn, sums of a
// place before. One group of tiles after the other meets the weights of a place, which stay in the first cache.
template <int kV, int kX, bool kGoesOn>
void multiply_place(const unsigned char* const (&x)[kX], int groups, const int8_t* weights, const int32_t* start,
                    int32_t* sums) {
    Simd::I acc[kV][kX];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
#pragma GCC unroll 16
        for (int i = 0; i < kX; ++i) acc[v][i] = Simd::iload(start + (kGoesOn ? v * kX + i : v) * Simd::L);
    for (int64_t at = 0, end = int64_t{4} * Simd::L * groups; at < end; at += 4 * Simd::L) {
        Simd::I w[kV];
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) {
            __builtin_prefetch(weights + kLanesAhead);
            w[v] = Simd::iload(weights);
            weights += 4 * Simd::L;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kX; ++i) {
            const Simd::I codes = Simd::ibroadcast(x[i] + at);
#pragma GCC unroll 4
            for (int v = 0; v < kV; ++v) acc[v][i] = Simd::template dot<false>(acc[v][i], codes, w[v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
#pragma GCC unroll 16
        for (int i = 0; i < kX; ++i) Simd::istore(sums + (v * kX + i) * Simd::L, acc[v][i]);
}

// A place of all tiles of a chunk; sums [group of tiles][place in order][kV][kX].
template <int kV, int kX, bool kGoesOn>
void multiply_tiles(const lbs::WinogradPlan& plan, const int8_t* weights, const int32_t* start,
                    const unsigned char* inputs, int tiles, int32_t* sums) {
    constexpr int64_t kPitch = int64_t{kV} * kX * Simd::L;
    const unsigned char* x[kX];
    for (int tile = 0; tile < tiles; tile += kX, sums += kPlaces * kPitch) {
#pragma GCC unroll 16
        for (int i = 0; i < kX; ++i) {
            const auto at = static_cast<unsigned>(smaller(tile + i, tiles - 1));
            x[i] = inputs + static_cast<int64_t>(at / Simd::L) * kPlaces * plan.place_pitch + 4 * (at % Simd::L);
        }
        multiply_place<kV, kX, kGoesOn>(x, plan.groups, weights, kGoesOn ? sums - kPitch : start, sums);
    }
}

// Accumulators of a tile's 2 x 2 output pixels; `pitch` integers from one place's sums to the next.
LBS_INLINE void tile_outputs(const int32_t* sums, int64_t pitch, Simd::I constant, Simd::I (&y)[4]) {
    Simd::I upper[4], lower[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c, sums += 4 * pitch) {  // rows 1, 3 beyond it, 2, 0 beyond that
        upper[c] = Simd::isub(Simd::iload(sums + 3 * pitch), Simd::iload(sums));
        lower[c] = Simd::iadd(Simd::iload(sums + 2 * pitch), Simd::iload(sums + pitch));
    }
    two_by_two(upper, lower, y);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[i] = Simd::iadd(Simd::isar(y[i], 2), constant);
}

template <int kV, int kX>
void emit_tiles(const lbs::WinogradPlan& plan, const PixelEmit& emit, int row, int column, int count,
                const int32_t* sums) {
    constexpr int64_t kPitch = int64_t{kV} * kX * Simd::L;
    const int columns = (plan.width + 1) / 2;
    for (int v = 0; v < kV; ++v, sums += kX * Simd::L) {
        const int filter = emit.channel + v * Simd::L;
        if (filter >= plan.emit.channels) return;
        const Simd::I constant = plan.acc.constant ? Simd::iload(plan.acc.constant + filter) : Simd::izero();
        for (int i = 0, r = row, c = column; i < count;) {
            const bool is_pair = i + 1 < count && c + 1 < columns;
            Simd::I a[4], b[4];
            tile_outputs(sums + i * Simd::L, kPitch, constant, a);
            if (is_pair) tile_outputs(sums + (i + 1) * Simd::L, kPitch, constant, b);
            else b[0] = b[1] = b[2] = b[3] = a[0];
            const int pixel = 2 * r * plan.width + 2 * c, live = smaller(is_pair ? 4 : 2, plan.width - 2 * c);
            emit.emit_row(v * Simd::L, pixel, live, a[0], a[1], b[0], b[1]);
            if (2 * r + 1 < plan.height) emit.emit_row(v * Simd::L, pixel + plan.width, live, a[2], a[3], b[2], b[3]);
            i += is_pair ? 2 : 1;
            c += is_pair ? 2 : 1;
            if (c == columns) c = 0, ++r;
        }
    }
}

template <int kV, int kX>
LBS_INLINE void winograd_lanes_block(const lbs::WinogradPlan& plan, const lbs::WinogradBlock& block, int first_row,
                                     int last_row, const WinogradMemory& memory, const FastEmit& fast) {
    if constexpr (kV > 1) {
        if (block.width < kV * Simd::L)
            return winograd_lanes_block<kV - 1, kX>(plan, block, first_row, last_row, memory, fast);
    }
    constexpr int64_t kPitch = int64_t{kV} * kX * Simd::L;
    const PixelEmit emit{plan.made, fast, block.first};
    const int columns = (plan.width + 1) / 2, tiles = (last_row - first_row) * columns;
    const int8_t* weights = block.weights;
    const int32_t* start = block.start;
    int32_t* sums = memory.products[0];
    for (int place = 0; place < kPlaces; ++place, sums += kPitch) {
        const unsigned char* inputs = memory.inputs + lbs::kPlaceOrder[place] * plan.place_pitch;
        const auto multiply = place % 2 ? multiply_tiles<kV, kX, true> : multiply_tiles<kV, kX, false>;
        multiply(plan, weights, start, inputs, tiles, sums);
        weights += int64_t{4} * Simd::L * kV * plan.groups;
        start += place % 2 ? kV * Simd::L : 0;
    }
    sums = memory.products[0];
    for (int tile = 0; tile < tiles; tile += kX, sums += kPlaces * kPitch)
        emit_tiles<kV, kX>(plan, emit, first_row + tile / columns, tile % columns, smaller(kX, tiles - tile), sums);
}

void winograd_lanes(const lbs::WinogradPlan& plan, const lbs::RunContext& run, int first_unit, int last_unit,
                    int first_block, int last_block) {
    const WinogradMemory memory(plan, run.scratch);
    const FastEmit fast(plan.acc, plan.emit, run);
    const int rows = (plan.height + 1) / 2;
    for (int unit = first_unit; unit < last_unit; unit += plan.chunk_units) {
        const int first = unit * plan.unit_rows;
        const int last = smaller(smaller(unit + plan.chunk_units, last_unit) * plan.unit_rows, rows);
        transform_inputs(plan, Chunk(plan, run.tensors[plan.input], first, last, memory), memory);
        for (int b = first_block; b < last_block; ++b) switch (plan.tiles) {
#define LBS_TILE(tiles) \
    case tiles: winograd_lanes_block<LBS_LANES_VECTORS, tiles>(plan, plan.blocks[b], first, last, memory, fast); break;
                LBS_WINOGRAD_LANES(LBS_TILE)
#undef LBS_TILE
                default: break;
            }
    }
}

void any_winograd_kernel(const lbs::WinogradPlan& plan, const lbs::RunContext& run, int first_unit, int last_unit,
                         int first_block, int last_block) {
    if (plan.tiles) winograd_lanes(plan, run, first_unit, last_unit, first_block, last_block);
    else winograd_kernel(plan, run, first_unit, last_unit, first_block, last_block);
}

#define LBS_TILE(tiles) tiles,
constexpr int kWinogradTiles[] = {LBS_WINOGRAD_LANES(LBS_TILE) 0};
#undef LBS_TILE

}  // namespace
