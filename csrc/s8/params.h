// Everything the s8 kernel reads, as one plain structure that is a kernel argument.
#pragma once

#include "cuda/index.h"

namespace lbs::s8 {

using namespace gpu;

// Pieces of K are what is copied at once: 16 channels, or 32 of nibbles where a pixel is made of those. Activations are
// q - 128, or codes of at most 4 bits as they are, two in a byte; weights what they count as, signed bytes, but on the
// odd grid 8 bits count as 2 w + 1.
//
//     acc = dot_scale * sum of w x + sum_scale * sum of x + offset[o]
struct Params : Layer {
    const int8_t* x;       // [N][H][W][pitch]
    const int8_t* w;       // in the order of weight_block(); 0 where a filter or a channel does not exist
    const int8_t* border;  // [pitch]: a pixel of the code of 0
    int pitch, piece;  // bytes: from pixel to pixel, and of a piece
    int sum_scale;
    int last_steps;  // multiplications of the last chunk of K; the others have kChunkSteps
    int split_log;   // 2^split_log thread blocks of a cluster share the chunks of a tile
};

}  // namespace lbs::s8
