// Integer convolution with tile multiplies: sums [16 filters][16 pixels] += weights [16][64] x codes [16][16][4].
//
// The layout of codes is already the one the multiply wants: sixteen 32-bit lanes per group of four channels. For two
// vectors of pixels the rows of all K are gathered once into a pack that stays in the first-level cache, then two by
// two tiles run over it. Written against tiles.h, so that machines without AMX can run it on a model.
#pragma once

#include "bitconv2d/bitconv2d_kernel.h"
#include "bitconv2d/tiles.h"

namespace {

constexpr int kTileBytes = 1024;
constexpr int kTileSteps = 16;  // steps of K (four channels each) in one multiply

// pack[vector][chunk][step][pixel][4], and the window's sums where the layer needs them.
template <int kS>
void pack_tiles(const lbs::ConvPlan& plan, const lbs::RunContext& run, const unsigned char* in, int vector, int count) {
    const int chunks = (plan.k_steps + kTileSteps - 1) / kTileSteps;
    for (int p = 0; p < count; ++p) {
        const PixelLoader<kS> pixels(in, plan.map, vector + p);
        int8_t* rows = run.tile_pack + static_cast<int64_t>(p) * chunks * kTileBytes;
        Simd::I sum = Simd::izero();
        for (int k = 0; k < plan.k_steps; ++k) {
            const Simd::I x = pixels.load(plan.k_offsets[k]);
            Simd::istore(rows + static_cast<int64_t>(k) * 64, x);
            if (plan.shared_ones) sum = Simd::template dot<false>(sum, x, Simd::ibroadcast(plan.shared_ones + 4 * k));
        }
        // Rows past the last step meet weights of zero; any bytes would do.
        if (plan.shared_ones) Simd::istore(run.sums + static_cast<int64_t>(vector + p) * Simd::L, sum);
    }
}

// kG groups of 16 filters by kV vectors.
template <int kG, int kV>
void multiply_tiles(const lbs::ConvPlan& plan, const lbs::RunContext& run, int group) {
    const int chunks = (plan.k_steps + kTileSteps - 1) / kTileSteps;
    const int8_t* weights = plan.tiles + static_cast<int64_t>(group) * chunks * kTileBytes;
    const int8_t* next_weights = weights + static_cast<int64_t>(chunks) * kTileBytes;
    const int8_t* codes = run.tile_pack;
    const int8_t* next_codes = codes + static_cast<int64_t>(chunks) * kTileBytes;
    Tiles::zero<0>();
    if constexpr (kV > 1) Tiles::zero<1>();
    if constexpr (kG > 1) Tiles::zero<2>();
    if constexpr (kG > 1 && kV > 1) Tiles::zero<3>();
    for (int64_t at = 0; at < static_cast<int64_t>(chunks) * kTileBytes; at += kTileBytes) {
        Tiles::load<4>(weights + at, 64);
        Tiles::load<6>(codes + at, 64);
        Tiles::dot<0, 4, 6>();
        if constexpr (kV > 1) {
            Tiles::load<7>(next_codes + at, 64);
            Tiles::dot<1, 4, 7>();
        }
        if constexpr (kG > 1) {
            Tiles::load<5>(next_weights + at, 64);
            Tiles::dot<2, 5, 6>();
            if constexpr (kV > 1) Tiles::dot<3, 5, 7>();
        }
    }
    int32_t* dots = run.accumulators;  // [group][vector][16 filters][16 pixels]
    constexpr int kRows = 16 * 16;
    Tiles::store<0>(dots, 64);
    if constexpr (kV > 1) Tiles::store<1>(dots + kRows, 64);
    if constexpr (kG > 1) Tiles::store<2>(dots + kV * kRows, 64);
    if constexpr (kG > 1 && kV > 1) Tiles::store<3>(dots + (kV + 1) * kRows, 64);
}

template <int kV>
void tile_groups(const lbs::ConvPlan& plan, const lbs::RunContext& run, const FastEmit& fast, int vector,
                 int first_group, int last_group) {
    static_assert(64 <= lbs::kMaxTile, "the scratch holds two by two tiles");
    for (int group = first_group; group < last_group; group += 2) {
        const int groups = last_group - group > 1 ? 2 : 1;
        if (groups == 2) multiply_tiles<2, kV>(plan, run, group);
        else multiply_tiles<1, kV>(plan, run, group);
        for (int g = 0; g < groups; ++g) {
            const int channel = 16 * (group + g);
            const int live = (plan.emit.channels - channel + 3) / 4 * 4;
            Tile tile(fast, channel, live < 16 ? live : 16, vector, kV, run.accumulators + g * kV * 16 * Simd::L);
            tile.vector_pitch = 16 * Simd::L;
            if (plan.shared_ones) tile.sums = run.sums + static_cast<int64_t>(vector) * Simd::L;
            emit_tile(fast, tile);
        }
    }
}

// Here a block is a group of 16 filters.
void conv_amx_kernel(const lbs::ConvPlan& plan, const lbs::RunContext& run, int first_vector, int last_vector,
                     int first_block, int last_block) {
    if (!plan.tiles) return conv_kernel(plan, run, first_vector, last_vector, first_block, last_block);
    const FastEmit fast(plan.acc, plan.emit, run);
    const unsigned char* in = conv_input(plan, run, first_vector, last_vector);
    Tiles::configure();
    for (int vector = first_vector; vector < last_vector; vector += 2) {
        const int count = last_vector - vector > 1 ? 2 : 1;
        switch (plan.map.pieces) {
            case 1: pack_tiles<1>(plan, run, in, vector, count); break;
            case 2: pack_tiles<2>(plan, run, in, vector, count); break;
            case 4: pack_tiles<4>(plan, run, in, vector, count); break;
            default: pack_tiles<0>(plan, run, in, vector, count); break;
        }
        if (count == 2) tile_groups<2>(plan, run, fast, vector, first_block, last_block);
        else tile_groups<1>(plan, run, fast, vector, first_block, last_block);
    }
    Tiles::release();
}

// One multiply of known numbers against plain loops: whether the tiles do what this file expects of them.
bool tiles_self_check() {
    alignas(64) int8_t weights[kTileBytes];
    alignas(64) uint8_t codes[kTileBytes];
    alignas(64) int32_t sums[256];
    uint32_t random = 12345;
    for (int i = 0; i < kTileBytes; ++i) {
        random = random * 1664525u + 1013904223u;
        weights[i] = static_cast<int8_t>(random >> 24);
        codes[i] = static_cast<uint8_t>(random >> 16);
    }
    Tiles::configure();
    Tiles::zero<0>();
    Tiles::load<4>(weights, 64);
    Tiles::load<6>(codes, 64);
    Tiles::dot<0, 4, 6>();
    Tiles::store<0>(sums, 64);
    Tiles::release();
    for (int filter = 0; filter < 16; ++filter)
        for (int pixel = 0; pixel < 16; ++pixel) {
            int32_t sum = 0;
            for (int k = 0; k < 64; ++k) sum += weights[64 * filter + k] * codes[64 * (k / 4) + 4 * pixel + k % 4];
            if (sum != sums[16 * filter + pixel]) return false;
        }
    return true;
}

}  // namespace
