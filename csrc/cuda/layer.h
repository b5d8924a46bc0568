// What every implicit GEMM of this module reads: where its windows lie, and what becomes of its sums.
#pragma once

#include "cuda/host_device.h"

namespace lbs::gpu {

constexpr int kMaxConsumers = 8;

enum class StreamType : int { kFloat32, kFloat16, kBfloat16 };

// How codes lie in memory (gpu/layout.py): planes int32 [M][bits][CW], biased bytes int8 [M][pitch], or nibbles, the
// codes of eight channels in a word: int32 [M][pitch].
enum class Kept : int { kPlanes, kBytes, kNibbles };
constexpr int kNibbleBits = 4;  // at most

// One code tensor that is written (step 6). `levels` is 2^bits - 1. Arrays hold a float for every filter slot.
struct ConsumerTarget {
    void* codes;
    const float* pre_scale;
    const float* pre_bias;
    float scale;
    int bits, pitch, zero;  // pitch: bytes or words of one pixel
    Kept kept;              // codes of 8 bits always as bytes
    bool is_signed, relu;
    bool stands;  // (q - zero) * step is y for the consumers behind this one
    float step;
};

// A residual of codes: (q - zero) * step.
struct Coded {
    const int8_t* codes;  // biased bytes [M][pitch], or null
    int pitch, zero;
    float step;
};

// A part of a kernel argument. K is flattened over (tap, piece): the pieces of one pixel are words or units of 16
// bytes, as the kernel copies them.
struct Layer {
    const int* offset;  // int32 [filter slots]
    int* accumulators;  // int32 [M][O]: written instead of everything else, for tests
    const float* multiplier;
    const float* bias;  // float32 [filter slots]

    int rows, filters, height, width;
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int k_pieces;  // of the whole window
    FastDivisor pixels, out_width, tap_pieces, kernel_width;

    // Order of the work: chunks of K are what one stage of shared memory holds.
    int tiles, filter_blocks, chunks;
    FastDivisor filter_block_divisor;

    int dot_scale;  // of the sum of products, before the offset is added

    // Steps 3 to 6, or thresholds [filter block][level][slot] with one bit per slot that says "less or equal".
    const int* thresholds;
    const uint32_t* flips;
    const void* residual;  // a stream; or codes, not both
    Coded coded;
    void* stream;
    StreamType stream_type;
    bool has_low, has_high;
    float low, high;
    int consumers;
    ConsumerTarget consumer[kMaxConsumers];
};

}  // namespace lbs::gpu
