// Index arithmetic that the implicit GEMMs share: pure functions, the same on the GPU and on the processor.
//
// A chunk of K takes 128 bytes of shared memory of every row (an output pixel, or a filter), 8 units of 16 bytes, and
// unit u of row r lies at place u ^ (r % 8): the 128-byte swizzle of the tensor core. Eight rows are 1024 bytes, and
// every tile starts at a multiple of that.
#pragma once

#include "cuda/layer.h"

namespace lbs::gpu {

constexpr int kRowBytes = 128;       // of a chunk
constexpr int kUnitBytes = 16;       // of a copy, and of the swizzle
constexpr int kStepBytes = 32;       // of a row in one multiplication of the tensor core
constexpr int kSwizzleBytes = 1024;  // after which the swizzle repeats
constexpr int kWarpgroup = 128;      // threads
constexpr int kWarpgroupRows = 64;   // rows of one multiplication

// Byte at which word `word` (0..31) of a row lies, row included.
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
// What is added to a descriptor whose matrix begins `byte` bytes further, inside a swizzled row as well.
LBS_HD constexpr uint64_t descriptor_step(int byte) { return static_cast<uint64_t>(byte) >> 4; }

// The accumulator fragment: register i of lane `lane` of warp `warp` holds this row and column of a 64 x N product.
LBS_HD int fragment_row(int warp, int lane, int i) { return 16 * warp + lane / 4 + 8 * (i / 2 % 2); }
LBS_HD int fragment_column(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

// The register that holds channel c of the run of consecutive channels of a thread (column_channel), `half` 0 for its
// first row and 1 for the one eight rows below: column pair j of the fragment holds channels 2 j and 2 j + 1.
LBS_HD int fragment_register(int c, int half) { return c / 2 * 4 + 2 * half + c % 2; }

// Channels of a thread that follow one another: those written at once. A thread has N / 4 of them, and writes no more
// than 32, a word of every plane.
constexpr int run_of(int n) { return n % 128 == 0 ? 32 : n % 64 == 0 ? 16 : n % 32 == 0 ? 8 : 4; }
constexpr int kLeastOfPlanes = 8;  // channels in a run that planes can be written of

// Filters are laid into columns such that lane % 4 = t holds the N / 4 consecutive channels from t * N / 4 on: for
// N = 128 exactly one word of every plane.
template <int kN>
LBS_HD int column_channel(int column) {
    return column / 2 % 4 * (kN / 4) + column / 8 * 2 + column % 2;
}

// Which rows of pixels and which filters a tile is: the filter blocks of one row of pixels follow one another, so that
// the blocks at work share its activations, and all weights, in the second-level cache.
struct TilePlace {
    int row_block, filter_block;
};

LBS_HD TilePlace place_of(const Layer& p, int tile) {
    const int row_block = quotient(tile, p.filter_block_divisor);
    return {row_block, remainder(tile, row_block, p.filter_block_divisor)};
}

// Where the window of one output pixel begins: its first tap may lie outside the image.
struct alignas(16) Window {
    int pixel;  // of all images
    int y, x, unused;
};

// Rows beyond the last pixel begin so far above the image that no tap enters it.
LBS_HD Window window_of(const Layer& p, int row) {
    if (row >= p.rows) return {0, -(1 << 30), 0, 0};
    const int image = quotient(row, p.pixels), pixel = remainder(row, image, p.pixels);
    const int out_y = quotient(pixel, p.out_width), out_x = remainder(pixel, out_y, p.out_width);
    const int y = out_y * p.stride_h - p.pad_h, x = out_x * p.stride_w - p.pad_w;
    return {(image * p.height + y) * p.width + x, y, x, 0};
}

// What lies at one place of K. Behind its end taps lie so far above any window that they enter no image.
struct Tap {
    int dy, dx, pixel;  // in input pixels
    int piece;          // of the pixel
};

// At place k = tap * pieces of a pixel + piece.
LBS_HD Tap tap_of(const Layer& p, int k) {
    const int tap = quotient(k, p.tap_pieces), tap_row = quotient(tap, p.kernel_width);
    const int dy = tap_row * p.dilation_h, dx = remainder(tap, tap_row, p.kernel_width) * p.dilation_w;
    return {k < p.k_pieces ? dy : -(1 << 30), dx, dy * p.width + dx, remainder(k, tap, p.tap_pieces)};
}

// Whether the tap of a window lies in the image and in K.
LBS_HD bool enters(const Layer& p, const Window& window, const Tap& tap) {
    return static_cast<unsigned>(window.y + tap.dy) < static_cast<unsigned>(p.height) &&
           static_cast<unsigned>(window.x + tap.dx) < static_cast<unsigned>(p.width);
}

}  // namespace lbs::gpu
