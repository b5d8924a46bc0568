// Index arithmetic of the one-bit kernel. A chunk is 512 bits of K of a pair of planes: a row is [plane][4 units].
#pragma once

#include "cuda/index.h"
#include "onebit/params.h"

namespace lbs::onebit {

constexpr int kChunkWords = 16;     // words of K in a chunk, of one plane
constexpr int kStepWords = 8;       // words of K in one multiplication of the tensor core, 256 bits
constexpr int kPlaneBytes = 64;     // of one plane in a row
constexpr int kMultiplyGroups = 3;  // accumulators of p + r = 0, 1, 2

// Where step `step` of plane `plane` starts, relative to the tile.
LBS_HD uint32_t operand_byte(int plane, int step) { return plane * kPlaneBytes + step * kStepBytes; }

// Addresses that lane `lane` hands to a load of four 8 x 16-byte matrices, relative to the operand's tile.
// A: rows of warp `warp`, matrices (rows 0-7, low), (8-15, low), (0-7, high), (8-15, high) halves of a step.
// B: sixteen columns from 16 * pair on, matrices (columns 0-7, low), (0-7, high), (8-15, low), (8-15, high).
LBS_HD int a_matrix_byte(int warp, int lane, int plane, int step) {
    const int row = 16 * warp + lane / 8 % 2 * 8 + lane % 8;
    return swizzled_byte(row, plane * kChunkWords + step * kStepWords + lane / 16 * 4);
}
LBS_HD int b_matrix_byte(int pair, int lane, int plane, int step) {
    const int column = 16 * pair + lane / 16 * 8 + lane % 8;
    return swizzled_byte(column, plane * kChunkWords + step * kStepWords + lane / 8 % 2 * 4);
}

// Words of the weight operand before a block: [w_pair][filter block][chunk][column][32 words, swizzled].
template <int kN>
LBS_HD int64_t weight_block(const Params& p, int w_pair, int filter_block, int chunk) {
    return ((static_cast<int64_t>(w_pair) * p.filter_blocks + filter_block) * p.chunks + chunk) * (kN * kRowBytes / 4);
}

// Word of x that a window has under a tap, of one plane.
LBS_HD int word_of(const Params& p, const Window& window, const Tap& tap, int plane) {
    return (window.pixel + tap.pixel) * p.pixel_words + plane * p.words + tap.piece;
}

// A warp copies the same 16 rows in every chunk, `copy_words` of them at once.
constexpr int kWarpRows = 16;
template <int kThreads>
LBS_HD int copied_row(int copy_words, int warp, int i) {
    return warp * copy_words + i % copy_words + i / copy_words * (kThreads / 32 * copy_words);
}

}  // namespace lbs::onebit
