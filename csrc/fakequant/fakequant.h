// Element-wise quantizer of training, one pass over memory each way, for a fixed or a searched width.
//
//   unsigned   q = clamp(rint(x * scale), -zero, n - zero),  y = q * step,            range [-low v, high v]
//   signed     q = clamp(rint(x * scale + n / 2), 0, n),     y = (2 q - n) * step,    range [-v, v]
//
//   forward    y at the last of the widths;  by_width[j] = sum |clip(x) - y_j| for each width j before it
//   backward   gx = gy inside the range, else 0;  by_width[j] = sum gy * (y - y_j)
//              grad v = sum gy * ((y - x) / v inside,   high above,   -low below);   signed: low = high = 1
//
// The widths before the last are those that gates compare with; a fixed width has none. Values are float32 or bfloat16,
// arithmetic is float32. Not a number goes through the forward pass.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"

namespace lbs {

enum class FloatType : int { kFloat32 = 0, kBfloat16 = 1 };

constexpr int kMaxCoarse = 3;  // the longest chain of widths up to 8 is 1, 2, 4, 8

struct QuantWidths {
    int coarse;  // widths before the last
    float scale[kMaxCoarse + 1], step[kMaxCoarse + 1], n[kMaxCoarse + 1], zero[kMaxCoarse + 1];
    float v, low, high;  // the range is [-low v, high v]
    bool is_signed;
};

struct FakeQuantForward {
    const void* x;
    void* y;
    QuantWidths widths;
    FloatType type;
};

struct FakeQuantBackward {
    const void* x;
    const void* gy;
    void* gx;
    QuantWidths widths;
    FloatType type;
};

struct QuantSums {
    double v = 0.0;  // backward: the gradient of v
    double by_width[kMaxCoarse] = {};
};

// One table per instruction set; elements [begin, end).
using FakeQuantForwardKernel = QuantSums (*)(const FakeQuantForward& task, int64_t begin, int64_t end);
using FakeQuantBackwardKernel = QuantSums (*)(const FakeQuantBackward& task, int64_t begin, int64_t end);

// Threads split the elements into fixed chunks whose sums are added in order: the result depends on neither the
// number of threads nor their timing (the sums do depend, in their last bits, on the instruction set).
QuantSums fake_quant_forward(const FakeQuantForward& task, int64_t count, int threads, Isa isa);
QuantSums fake_quant_backward(const FakeQuantBackward& task, int64_t count, int threads, Isa isa);

}  // namespace lbs
