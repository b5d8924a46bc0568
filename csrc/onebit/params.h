// Everything the one-bit kernel reads, as one plain structure that is a kernel argument.
#pragma once

#include "onebit/host_device.h"

namespace lbs::onebit {

constexpr int kMaxPasses = 4;
constexpr int kMaxConsumers = 8;

enum class StreamType : int { kFloat32, kFloat16, kBfloat16 };

// Two planes of weights against two planes of activations, over the whole of K. Passes run from the most significant
// on; before a pass the sum so far is multiplied by 2^shift.
struct Pass {
    int w_pair, a_pair, shift;
    bool sums;  // counts these activation planes for the window's sum of codes
};

// One code tensor that is written (step 6). `levels` is 2^bits - 1. Arrays hold a float for every filter slot.
struct ConsumerTarget {
    void* codes;  // planes int32 [M][bits][CW], or biased bytes int8 [M][pitch] for 8 bits
    const float* pre_scale;
    const float* pre_bias;
    float scale;
    int bits, pitch, zero;  // pitch: bytes or words of one pixel
    bool is_signed, relu;
};

struct Params {
    const uint32_t* x;   // planes int32 [N][H][W][a_bits][CW]
    const uint32_t* w;   // in the order of weight_block()
    const int* offset;   // int32 [filter slots]
    int* accumulators;   // int32 [M][O]: written instead of everything else, for tests
    const float* multiplier;
    const float* bias;   // float32 [filter slots]

    // Geometry. Units of K are 32-channel words, taps outside.
    int rows, filters, height, width, k_words;
    int words, pixel_words;  // of one plane, and of all planes of a pixel
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int copy_words;  // 4, 2 or 1: words in one copy, a divisor of `words`
    FastDivisor pixels, out_width, tap_words, kernel_width;

    // Order of the work.
    int tiles, filter_blocks;
    int chunks, steps;  // of one pass: 512 bits of K, and 256
    FastDivisor filter_block_divisor;
    int passes;
    Pass pass[kMaxPasses];

    // acc = dot_scale * sum 2^(p+r) popc(W_p & X_r) + sum_scale * sum of codes + offset[o]
    int dot_scale, sum_scale;

    // Steps 3 to 6, or thresholds [filter block][level][slot] with one bit per slot that says "less or equal".
    const int* thresholds;
    const uint32_t* flips;
    const void* residual;
    void* stream;
    StreamType stream_type;
    bool has_low, has_high;
    float low, high;
    int consumers;
    ConsumerTarget consumer[kMaxConsumers];
};

}  // namespace lbs::onebit
