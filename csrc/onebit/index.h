// Index arithmetic of the one-bit kernel: pure functions, the same on the GPU and on the processor.
//
// A chunk is 512 bits of K. Of one row (an output pixel, or a filter) and one pair of planes it takes 128 bytes of
// shared memory, [plane][4 units of 16 bytes], and unit u of row r lies at place u ^ (r % 8): the 128-byte swizzle of
// the tensor core. Eight rows are 1024 bytes, and every tile starts at a multiple of that.
#pragma once

#include "onebit/params.h"

namespace lbs::onebit {

constexpr int kChunkWords = 16;       // words of K in a chunk, of one plane
constexpr int kStepWords = 8;         // words of K in one multiplication of the tensor core, 256 bits
constexpr int kRowBytes = 128;        // of a chunk: two planes
constexpr int kUnitBytes = 16;        // of a copy, and of the swizzle
constexpr int kPlaneBytes = 64;       // of one plane in a row
constexpr int kSwizzleBytes = 1024;   // after which the swizzle repeats
constexpr int kWarpgroup = 128;       // threads
constexpr int kWarpgroupRows = 64;    // rows of one multiplication
constexpr int kMultiplyGroups = 3;    // accumulators of p + r = 0, 1, 2

// Byte of a row at which plane-and-word `word` (0..31: 16 words of plane 0, then of plane 1) lies, row included.
LBS_HD int swizzled_byte(int row, int word) {
    const int unit = word / 4;
    return row * kRowBytes + ((unit ^ (row & 7)) * kUnitBytes) + word % 4 * 4;
}

// Descriptor of a matrix in shared memory, rows along K, 128-byte swizzle: bits 0-13 address / 16, 16-29 the distance
// of core matrices along K (not used with this swizzle, 1 by custom), 32-45 that of groups of eight rows / 16, 62-63
// the swizzle.
LBS_HD uint64_t matrix_descriptor(uint32_t address) {
    return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | 1ull << 16 |
           static_cast<uint64_t>(kSwizzleBytes >> 4) << 32 | 1ull << 62;
}

// Where step `step` of plane `plane` starts, relative to the tile. Inside a swizzled row an offset is simply added.
LBS_HD uint32_t operand_byte(int plane, int step) { return plane * kPlaneBytes + step * kStepWords * 4; }

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

// The accumulator fragment: register i of lane `lane` of warp `warp` holds this row and column of a 64 x N product.
LBS_HD int fragment_row(int warp, int lane, int i) { return 16 * warp + lane / 4 + 8 * (i / 2 % 2); }
LBS_HD int fragment_column(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

// Filters are laid into columns such that lane % 4 = t holds the N / 4 consecutive channels from t * N / 4 on: for
// N = 128 exactly one word of every plane.
template <int kN>
LBS_HD int column_channel(int column) {
    return column / 2 % 4 * (kN / 4) + column / 8 * 2 + column % 2;
}

// Words of the weight operand before a block: [w_pair][filter block][chunk][column][32 words, swizzled].
template <int kN>
LBS_HD int64_t weight_block(const Params& p, int w_pair, int filter_block, int chunk) {
    return ((static_cast<int64_t>(w_pair) * p.filter_blocks + filter_block) * p.chunks + chunk) * (kN * kRowBytes / 4);
}

// Where the window of one output pixel begins: its first tap may lie outside the image.
struct alignas(16) Window {
    int pixel;  // of all images
    int y, x, unused;
};

// Rows beyond the last pixel begin so far above the image that no tap enters it.
LBS_HD Window window_of(const Params& p, int row) {
    if (row >= p.rows) return {0, -(1 << 30), 0, 0};
    const int image = quotient(row, p.pixels), pixel = remainder(row, image, p.pixels);
    const int out_y = quotient(pixel, p.out_width), out_x = remainder(pixel, out_y, p.out_width);
    const int y = out_y * p.stride_h - p.pad_h, x = out_x * p.stride_w - p.pad_w;
    return {(image * p.height + y) * p.width + x, y, x, 0};
}

// One piece of K: `copy_words` consecutive words of one plane under one tap.
struct TapWord {
    int dy, dx, pixel;  // of the tap, in input pixels
    int word;           // of all planes of the pixel
    bool inside;        // K goes this far
};

// The piece of plane `plane` at flattened word `k` of K, k = tap * CW + word.
LBS_HD TapWord tap_word(const Params& p, int k, int plane) {
    const int tap = quotient(k, p.tap_words), tap_row = quotient(tap, p.kernel_width);
    const int dy = tap_row * p.dilation_h, dx = remainder(tap, tap_row, p.kernel_width) * p.dilation_w;
    return {dy, dx, dy * p.width + dx, plane * p.words + remainder(k, tap, p.tap_words), k < p.k_words};
}

struct Piece {
    int word;     // of x
    bool inside;  // else the copy writes zeros: padding, rows beyond the last pixel, the end of K
};

LBS_HD Piece gather(const Params& p, const Window& window, const TapWord& tap) {
    const int y = window.y + tap.dy, x = window.x + tap.dx;
    const bool inside = tap.inside && y >= 0 && y < p.height && x >= 0 && x < p.width;
    return {inside ? (window.pixel + tap.pixel) * p.pixel_words + tap.word : 0, inside};
}

// A warp copies the same 16 rows in every chunk, `copy_words` of them at once.
constexpr int kWarpRows = 16;
template <int kThreads>
LBS_HD int copied_row(int copy_words, int warp, int i) {
    return warp * copy_words + i % copy_words + i / copy_words * (kThreads / 32 * copy_words);
}

}  // namespace lbs::onebit
