// What the host asks for, and the parameters of a kernel that follow from it.
#pragma once

#include <string>
#include <vector>

#include "common/check.h"
#include "common/format.h"
#include "onebit/tiles.h"

namespace lbs::onebit {

// One convolution with its epilogue; a matrix product is one of 1 x 1 pixels. Pointers as in Params; a filter slot is a
// place in a block of filters, `filters` rounded up to whole blocks. Null where there is no such thing.
struct Task {
    const uint32_t* x = nullptr;
    const uint32_t* w = nullptr;
    const int* offset = nullptr;
    int* accumulators = nullptr;
    const float* multiplier = nullptr;
    const float* bias = nullptr;
    const int* thresholds = nullptr;
    const uint32_t* flips = nullptr;
    const void* residual = nullptr;
    void* stream = nullptr;
    int64_t batch = 0, height = 0, width = 0, channels = 0, filters = 0;
    int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
    int w_bits = 0, a_bits = 0;
    bool w_odd = true;  // a weight code counts as 2 q - n, else as q - 2^(w_bits - 1)
    bool is_signed = false;
    StreamType stream_type = StreamType::kFloat32;
    bool has_low = false, has_high = false;
    float low = 0.0f, high = 0.0f;
    std::vector<ConsumerTarget> consumers;
};

inline void check_range(int64_t value, int64_t low, int64_t high, const char* name) {
    require(value >= low && value <= high, std::string("one-bit kernel: ") + name + " is " + std::to_string(value) +
                                               "; it takes " + std::to_string(low) + " to " + std::to_string(high));
}

inline void check_task(const Task& t) {
    constexpr int64_t kMost = (1ll << 31) - 1;
    for (int bits : {t.w_bits, t.a_bits})
        require(bits == 2 || bits == 4, "one-bit kernel: codes of " + std::to_string(bits) + " bits; it takes 2 or 4");
    check_range(t.batch, 0, kMost, "batch");
    for (int64_t size : {t.height, t.width, t.channels, t.filters}) check_range(size, 1, 1 << 24, "a size");
    for (int64_t size : {t.kernel_h, t.kernel_w, t.stride_h, t.stride_w, t.dilation_h, t.dilation_w})
        check_range(size, 1, 1 << 16, "a size of the window");
    for (int64_t size : {t.pad_h, t.pad_w}) check_range(size, 0, 1 << 16, "the padding");
    check_range(static_cast<int64_t>(t.consumers.size()), 0, kMaxConsumers, "the number of consumers");
    for (const ConsumerTarget& k : t.consumers) check_range(k.bits, 1, kMaxBits, "the bits of a consumer");
    require(!t.thresholds || (t.consumers.size() == 1 && !t.stream && !t.residual && t.consumers[0].bits <= 4),
            "one-bit kernel: thresholds serve one consumer of at most 4 bits, without stream or residual");
    require(!t.is_signed || (t.pad_h == 0 && t.pad_w == 0), "one-bit kernel: signed codes cannot be padded");
}

// Pairs of planes, the most significant first; a step down by one pair multiplies what is there by 2^2.
inline void plan_passes(int w_pairs, int a_pairs, Params& p) {
    p.passes = 0;
    for (int sum = w_pairs + a_pairs - 2; sum >= 0; --sum) {
        bool down = p.passes > 0;
        for (int w = 0; w < w_pairs; ++w) {
            const int a = sum - w;
            if (a < 0 || a >= a_pairs) continue;
            p.pass[p.passes++] = {w, a, down ? 2 : 0, w == 0};
            down = false;
        }
    }
}

// Parameters of `row` for the task. Raises FormatError for what no kernel serves.
inline Params make_params(const Task& t, const TileRow& row) {
    check_task(t);
    Params p{};
    p.x = t.x, p.w = t.w, p.offset = t.offset, p.accumulators = t.accumulators;
    p.multiplier = t.multiplier, p.bias = t.bias, p.thresholds = t.thresholds, p.flips = t.flips;
    p.residual = t.residual, p.stream = t.stream, p.stream_type = t.stream_type;
    p.has_low = t.has_low, p.has_high = t.has_high, p.low = t.low, p.high = t.high;
    p.consumers = static_cast<int>(t.consumers.size());
    for (int k = 0; k < p.consumers; ++k) p.consumer[k] = t.consumers[k];

    const int64_t out_height = (t.height + 2 * t.pad_h - int64_t{t.dilation_h} * (t.kernel_h - 1) - 1) / t.stride_h + 1;
    const int64_t out_width = (t.width + 2 * t.pad_w - int64_t{t.dilation_w} * (t.kernel_w - 1) - 1) / t.stride_w + 1;
    const int64_t words = (t.channels + kWord - 1) / kWord, k_words = words * t.kernel_h * t.kernel_w;
    const int block_rows = row.groups * kWarpgroupRows;
    constexpr int64_t kMost = (1ll << 31) - 1;  // factor by factor, so that no product overflows before it is looked at
    check_range(out_height, 1, 1 << 24, "the output's height");
    check_range(out_width, 1, 1 << 24, "the output's width");
    check_range(out_height * out_width, 1, kMost, "the number of output pixels of an image");
    const int64_t rows = t.batch * out_height * out_width;
    check_range(rows, 0, kMost - block_rows, "the number of output pixels");
    check_range(t.height * t.width, 1, kMost, "the number of pixels of an image");
    check_range(t.batch * t.height * t.width, 0, kMost, "the number of input pixels");
    check_range(t.batch * t.height * t.width * words * t.a_bits, 0, kMost, "the number of input words");
    check_range((t.pad_h + 1) * t.width, 0, 1 << 30, "the padding times the width");
    check_range(k_words, 1, 1 << 24, "the number of words in a window");
    p.rows = static_cast<int>(rows), p.filters = static_cast<int>(t.filters);
    p.height = static_cast<int>(t.height), p.width = static_cast<int>(t.width);
    p.words = static_cast<int>(words), p.k_words = static_cast<int>(k_words);
    p.pixel_words = t.a_bits * p.words;
    p.stride_h = t.stride_h, p.stride_w = t.stride_w, p.pad_h = t.pad_h, p.pad_w = t.pad_w;
    p.dilation_h = t.dilation_h, p.dilation_w = t.dilation_w;
    p.copy_words = words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1;
    p.pixels = fast_divisor(static_cast<int>(out_height * out_width));
    p.out_width = fast_divisor(static_cast<int>(out_width));
    p.tap_words = fast_divisor(p.words), p.kernel_width = fast_divisor(t.kernel_w);

    const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
    p.filter_blocks = static_cast<int>((t.filters + row.filters - 1) / row.filters);
    check_range(row_blocks * p.filter_blocks, 0, 1 << 30, "the number of tiles");
    p.tiles = static_cast<int>(row_blocks * p.filter_blocks);
    p.filter_block_divisor = fast_divisor(p.filter_blocks);
    p.chunks = (p.k_words + kChunkWords - 1) / kChunkWords;
    p.steps = (p.k_words + kStepWords - 1) / kStepWords;
    plan_passes(t.w_bits / 2, t.a_bits / 2, p);
    const int x_scale = t.is_signed ? 2 : 1;
    p.dot_scale = (t.w_odd ? 2 : 1) * x_scale;
    p.sum_scale = -(t.w_odd ? (1 << t.w_bits) - 1 : 1 << (t.w_bits - 1)) * x_scale;
    return p;
}

// The row of a name and sizes. Raises FormatError.
inline const TileRow& find_row(const std::string& machine, int groups, int filters, int stages) {
    for (const TileRow& row : kTileRows) {
        if (same_row(row, {machine.c_str(), groups, filters, stages, 0})) return row;
    }
    throw FormatError("no one-bit kernel " + machine + " of " + std::to_string(kWarpgroupRows * groups) + " x " +
                      std::to_string(filters) + " tiles with " + std::to_string(stages) +
                      " stages is built; take a row of LBS_ONEBIT_TILES");
}

}  // namespace lbs::onebit
