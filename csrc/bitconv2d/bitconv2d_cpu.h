// Lays the weights of a convolution out for an instruction set and fills in its plan.
#pragma once

#include "isa/kernels.h"
#include "program/layout.h"
#include "program/plan.h"
#include "program/program.h"

namespace lbs {

// Everything of `plan` but its emit part. `layout` is that of the input's codes.
void plan_conv(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, const KernelTable& kernels,
               Store& store, ConvPlan& plan);

// The stored weight of a code: 2q - n where it fits a signed byte, q - 128 for 8 bits (see AccumulatorPlan).
inline int stored_weight(int code, int bits) { return bits < 8 ? 2 * code - ((1 << bits) - 1) : code - 128; }

// Weight codes uint8 [filters][taps][channels] of planes int32 [bits][filters][taps][words].
std::vector<uint8_t> unpack_weight_codes(const int32_t* planes, int bits, int filters, int taps, int channels);

// How the dot product becomes the accumulator of the format; `weight_sums` is sum_k (2q - n) per filter.
AccumulatorPlan plan_accumulator(const ProgramSpec& program, const StepSpec& step, const TensorSpec& source,
                                 int filters, const std::vector<int64_t>& weight_sums, Store& store);

// Whether a pair of products may exceed what the instruction set's dot takes.
bool needs_wide_dot(const KernelTable& kernels, int w_bits, int a_bits);

}  // namespace lbs
