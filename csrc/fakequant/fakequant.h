// Element-wise quantizer of training, forward and backward, one pass over memory each.
//
//   forward    q = clamp(rint(x * scale), low, n),  y = q * step
//   backward   gx = gy where 0 <= x <= v, else 0
//              grad v = sum gy * (q / n - x / v   inside,   1   above,   0   below),  q = rint(x * n / v)
//
// Values are float32 or bfloat16, arithmetic is float32. Not a number goes through the forward pass.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"

namespace lbs {

enum class FloatType : int { kFloat32 = 0, kBfloat16 = 1 };

struct FakeQuantForward {
    const void* x;
    void* y;
    float scale, step, n, low;
    FloatType type;
};

struct FakeQuantBackward {
    const void* x;
    const void* gy;
    void* gx;
    float v, n, scale;  // scale: the float32 nearest n / v
    FloatType type;
};

// One table per instruction set; elements [begin, end).
using FakeQuantForwardKernel = void (*)(const FakeQuantForward& task, int64_t begin, int64_t end);
using FakeQuantBackwardKernel = double (*)(const FakeQuantBackward& task, int64_t begin, int64_t end);

// Threads split the elements into fixed chunks whose sums are added in order: the result depends on neither the
// number of threads nor their timing (the sum does depend, in its last bits, on the instruction set).
void fake_quant_forward(const FakeQuantForward& task, int64_t count, int threads, Isa isa);
float fake_quant_backward(const FakeQuantBackward& task, int64_t count, int threads, Isa isa);

}  // namespace lbs
