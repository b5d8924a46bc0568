// Index arithmetic of the s8 kernel. A chunk is 128 bytes of K: 8 units, 4 multiplications.
#pragma once

#include "s8/params.h"

namespace lbs::s8 {

constexpr int kChunkUnits = kRowBytes / kUnitBytes;
constexpr int kChunkSteps = kRowBytes / kStepBytes;
constexpr int kConsumers = 2;  // groups of 128 threads that multiply
constexpr int kProducerWarps = kWarpgroup / 32;
constexpr int kTurnRows = 32 / kChunkUnits;  // rows that a warp copies at once: neighbouring threads fetch whole rows

// Bytes of the weight operand before a block: [filter block][chunk][column][8 units, swizzled].
template <int kN>
LBS_HD int64_t weight_block(const Params& p, int filter_block, int chunk) {
    return (static_cast<int64_t>(filter_block) * p.chunks + chunk) * (kN * kRowBytes);
}

// Row i of those that warp `warp` of the producer copies. A lane's rows are 16 apart, so that they differ by nothing but
// their number: all have the same place in the swizzle.
LBS_HD int copied_row(int warp, int i) { return i / kTurnRows * (kProducerWarps * kTurnRows) + warp * kTurnRows + i % kTurnRows; }

// Where 16 channels of a window under a tap are read. Outside the image that is a pixel of the code of 0, and behind the
// end of K any bytes: the weights there are 0.
LBS_HD const int8_t* unit_of(const Params& p, const Window& window, const Tap& tap) {
    if (enters(p, window, tap)) return p.x + (window.pixel + tap.pixel) * p.pitch + tap.piece * kUnitBytes;
    return p.padding + tap.piece * kUnitBytes;
}

}  // namespace lbs::s8
