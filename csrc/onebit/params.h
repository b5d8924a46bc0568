// Everything the one-bit kernel reads, as one plain structure that is a kernel argument.
#pragma once

#include "cuda/layer.h"

namespace lbs::onebit {

using namespace gpu;

constexpr int kMaxPasses = 4;

// Two planes of weights against two planes of activations, over the whole of K. Passes run from the most significant
// on; before a pass the sum so far is multiplied by 2^shift.
struct Pass {
    int w_pair, a_pair, shift;
    bool sums;  // counts these activation planes for the window's sum of codes
};

// Pieces of K are 32-channel words.
struct Params : Layer {
    const uint32_t* x;       // planes int32 [N][H][W][a_bits][CW]
    const uint32_t* w;       // in the order of weight_block()
    int words, pixel_words;  // of one plane, and of all planes of a pixel
    int copy_words;          // 4, 2 or 1: words in one copy, a divisor of `words`
    int steps;               // of one pass: 256 bits of K; a chunk has two
    int passes;
    Pass pass[kMaxPasses];
    // acc = dot_scale * sum 2^(p+r) popc(W_p & X_r) + sum_scale * sum of codes + offset[o]
    int sum_scale;
};

}  // namespace lbs::onebit
