// Index arithmetic of the s8 kernel. A chunk is 128 channels of K, 4 multiplications. Weights are bytes; activations
// are bytes, or nibbles (layout.py) that threads expand in registers.
#pragma once

#include "s8/params.h"

namespace lbs::s8 {

constexpr int kChunkSteps = kRowBytes / kStepBytes;
constexpr int kConsumers = 2;  // groups of 128 threads that multiply
constexpr int kProducerWarps = kWarpgroup / 32;
constexpr int kNeighbours = 4;  // rows of a warp that follow one another
constexpr int kTurns = 4;       // of copies, whose windows are read before the first of them is copied

constexpr int kMostBlocks = 8;  // of a cluster: what every GPU with clusters takes

constexpr int kSumColumns = 8;  // of ones where a channel exists, behind the filters: the fewest that are multiplied

// Bytes of the weight operand before a block: [filter block][chunk][column][8 units, swizzled].
template <int kColumns>
LBS_HD int64_t weight_block(const Params& p, int filter_block, int chunk) {
    return (static_cast<int64_t>(filter_block) * p.chunks + chunk) * (kColumns * kRowBytes);
}

// Row i of those that warp `warp` of the producer copies. A lane's rows are 16 or 32 apart, so that they differ by
// nothing but their number: all have the same place in the swizzle.
LBS_HD int copied_row(int warp, int i) {
    return i / kNeighbours * (kProducerWarps * kNeighbours) + warp * kNeighbours + i % kNeighbours;
}

// How a chunk of the activations of a pixel lies in shared memory. Nibbles are read by threads, a word of each of eight
// rows and four threads at once: with a unit of nothing behind every row no two of the 32 words are in one bank, and
// steps lie at constants.
template <bool kNibbles_>
struct PixelRow {
    static constexpr bool kNibbles = kNibbles_;
    static constexpr int kBytes = kNibbles ? kRowBytes / 2 : kRowBytes;
    static constexpr int kPitch = kNibbles ? kBytes + kUnitBytes : kRowBytes;

    // Byte of a row's byte `at`, at the start of a word.
    LBS_HD static int byte(int row, int at) { return kNibbles ? row * kPitch + at : swizzled_byte(row, at / 4); }
};

// Eight nibbles, channels c to c + 7, as the bytes of channels c to c + 3 and of c + 4 to c + 7.
LBS_HD uint32_t low_nibbles(uint32_t eight) { return eight & 0x0f0f0f0fu; }
LBS_HD uint32_t high_nibbles(uint32_t eight) { return eight >> 4 & 0x0f0f0f0fu; }

// Chunks of K that follow one another.
struct Share {
    int first, chunks;
    int last_steps;  // multiplications of the last of them
};

LBS_HD Share whole(const Params& p) { return {0, p.chunks, p.last_steps}; }

// What block `rank` of a cluster multiplies: as even as whole chunks are, and there are as many as blocks at least.
LBS_HD Share share_of(const Params& p, int rank) {
    const int first = rank * p.chunks >> p.split_log, end = (rank + 1) * p.chunks >> p.split_log;
    return {first, end - first, end == p.chunks ? p.last_steps : kChunkSteps};
}

// The window of an output pixel with its place in bytes, and the place of a piece of a tap relative to a window.
// Windows may begin before the first pixel: then places wrap around, and back where a tap enters the image.
LBS_HD Window byte_window(const Params& p, int row) {
    Window window = window_of(p, row);
    window.pixel = static_cast<int>(static_cast<unsigned>(window.pixel) * static_cast<unsigned>(p.pitch));
    return window;
}
template <int kPiece>
LBS_HD unsigned tap_byte(const Params& p, const Tap& tap) {
    return static_cast<unsigned>(tap.pixel) * static_cast<unsigned>(p.pitch) +
           static_cast<unsigned>(tap.piece * kPiece);
}

}  // namespace lbs::s8
