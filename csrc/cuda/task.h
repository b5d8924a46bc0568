// What the host asks for, and the part of a kernel's parameters that follows from it alike for all kernels.
#pragma once

#include <string>
#include <vector>

#include "common/check.h"
#include "common/format.h"
#include "cuda/index.h"

namespace lbs::gpu {

// One convolution with its epilogue; a matrix product is one of 1 x 1 pixels. Pointers as in Layer and the parameters
// of the kernel; a filter slot is a place in a block of filters, `filters` rounded up to whole blocks. Null where there
// is no such thing.
struct Task {
    const void* x = nullptr;
    const void* w = nullptr;
    const void* border = nullptr;  // a pixel of what padding holds
    const int* offset = nullptr;
    int* accumulators = nullptr;
    const float* multiplier = nullptr;
    const float* bias = nullptr;
    const int* thresholds = nullptr;
    const uint32_t* flips = nullptr;
    const void* residual = nullptr;
    Coded coded{};
    void* stream = nullptr;
    int64_t batch = 0, height = 0, width = 0, channels = 0, filters = 0;
    int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
    int w_bits = 0, a_bits = 0;
    int split = 1;  // thread blocks that share K of a tile
    bool w_odd = true;  // a weight code counts as 2 q - n, else as q - 2^(w_bits - 1)
    bool is_signed = false;
    StreamType stream_type = StreamType::kFloat32;
    bool has_low = false, has_high = false;
    float low = 0.0f, high = 0.0f;
    std::vector<ConsumerTarget> consumers;
};

constexpr int64_t kMost = (1ll << 31) - 1;

inline void check_range(int64_t value, int64_t low, int64_t high, const char* name) {
    require(value >= low && value <= high, std::string("CUDA kernel: ") + name + " is " + std::to_string(value) +
                                               "; it takes " + std::to_string(low) + " to " + std::to_string(high));
}

inline void check_task(const Task& t) {
    check_range(t.batch, 0, kMost, "batch");
    for (int64_t size : {t.height, t.width, t.channels, t.filters}) check_range(size, 1, 1 << 24, "a size");
    for (int64_t size : {t.kernel_h, t.kernel_w, t.stride_h, t.stride_w, t.dilation_h, t.dilation_w})
        check_range(size, 1, 1 << 16, "a size of the window");
    for (int64_t size : {t.pad_h, t.pad_w}) check_range(size, 0, 1 << 16, "the padding");
    check_range(static_cast<int64_t>(t.consumers.size()), 0, kMaxConsumers, "the number of consumers");
    for (const ConsumerTarget& k : t.consumers) {
        check_range(k.bits, 1, kMaxBits, "the bits of a consumer");
        require(k.kept == Kept::kBytes || k.bits < kMaxBits, "CUDA kernel: codes of 8 bits are bytes");
        require(k.kept != Kept::kNibbles || k.bits <= kNibbleBits, "CUDA kernel: nibbles are codes of at most 4 bits");
    }
    const bool residual = t.residual || t.coded.codes;
    require(!t.thresholds || (t.consumers.size() == 1 && !t.stream && !residual && t.consumers[0].bits <= 4 &&
                                t.consumers[0].kept == Kept::kPlanes),
            "CUDA kernel: thresholds serve planes of at most 4 bits of one consumer, without stream or residual");
    require(!t.residual || !t.coded.codes, "CUDA kernel: a residual is a stream or codes, not both");
    require(!t.is_signed || (t.pad_h == 0 && t.pad_w == 0), "CUDA kernel: signed codes cannot be padded");
}

// How a kernel cuts the work: a tile, and K into pieces of a pixel and chunks of pieces.
struct Cut {
    int64_t rows, filters, pieces, chunk_pieces;
};

// Fills `p` for the task. Raises FormatError for what no kernel serves.
inline void fill_layer(const Task& t, const Cut& cut, Layer& p) {
    check_task(t);
    p.offset = t.offset, p.accumulators = t.accumulators;
    p.multiplier = t.multiplier, p.bias = t.bias, p.thresholds = t.thresholds, p.flips = t.flips;
    p.residual = t.residual, p.coded = t.coded, p.stream = t.stream, p.stream_type = t.stream_type;
    p.has_low = t.has_low, p.has_high = t.has_high, p.low = t.low, p.high = t.high;
    p.consumers = static_cast<int>(t.consumers.size());
    for (int k = 0; k < p.consumers; ++k) p.consumer[k] = t.consumers[k];

    const int64_t out_height = (t.height + 2 * t.pad_h - int64_t{t.dilation_h} * (t.kernel_h - 1) - 1) / t.stride_h + 1;
    const int64_t out_width = (t.width + 2 * t.pad_w - int64_t{t.dilation_w} * (t.kernel_w - 1) - 1) / t.stride_w + 1;
    const int64_t k_pieces = cut.pieces * t.kernel_h * t.kernel_w;
    // Factor by factor, so that no product overflows before it is looked at.
    check_range(out_height, 1, 1 << 24, "the output's height");
    check_range(out_width, 1, 1 << 24, "the output's width");
    check_range(out_height * out_width, 1, kMost, "the number of output pixels of an image");
    const int64_t rows = t.batch * out_height * out_width;
    check_range(rows, 0, kMost - cut.rows, "the number of output pixels");
    check_range(t.height * t.width, 1, kMost, "the number of pixels of an image");
    check_range(t.batch * t.height * t.width, 0, kMost, "the number of input pixels");
    check_range((t.pad_h + 1) * t.width, 0, 1 << 30, "the padding times the width");
    check_range(k_pieces, 1, 1 << 24, "the number of pieces in a window");
    p.rows = static_cast<int>(rows), p.filters = static_cast<int>(t.filters);
    p.height = static_cast<int>(t.height), p.width = static_cast<int>(t.width);
    p.stride_h = t.stride_h, p.stride_w = t.stride_w, p.pad_h = t.pad_h, p.pad_w = t.pad_w;
    p.dilation_h = t.dilation_h, p.dilation_w = t.dilation_w;
    p.k_pieces = static_cast<int>(k_pieces);
    p.pixels = fast_divisor(static_cast<int>(out_height * out_width));
    p.out_width = fast_divisor(static_cast<int>(out_width));
    p.tap_pieces = fast_divisor(static_cast<int>(cut.pieces)), p.kernel_width = fast_divisor(t.kernel_w);

    const int64_t row_blocks = (rows + cut.rows - 1) / cut.rows;
    p.filter_blocks = static_cast<int>((t.filters + cut.filters - 1) / cut.filters);
    check_range(row_blocks * p.filter_blocks, 0, 1 << 30, "the number of tiles");
    p.tiles = static_cast<int>(row_blocks * p.filter_blocks);
    p.filter_block_divisor = fast_divisor(p.filter_blocks);
    p.chunks = static_cast<int>((k_pieces + cut.chunk_pieces - 1) / cut.chunk_pieces);
}

}  // namespace lbs::gpu
