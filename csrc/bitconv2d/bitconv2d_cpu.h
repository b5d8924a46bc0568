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

// What a code counts as in the accumulator.
inline int weight_units(const StepSpec& step, int code) {
    return step.w_odd ? 2 * code - ((1 << step.w_bits) - 1) : code - (1 << (step.w_bits - 1));
}

// 2 q - 255 is no byte, so on the odd grid of 8 bits sum (2 q - 255) x = 2 sum (q - 128) x + sum x.
inline bool needs_sum(const StepSpec& step) { return step.w_odd && step.w_bits == 8; }

// The byte that is multiplied.
inline int stored_weight(const StepSpec& step, int code) {
    return needs_sum(step) ? code - 128 : weight_units(step, code);
}

// Weight codes uint8 [filters][taps][channels] of planes int32 [bits][filters][taps][words].
std::vector<uint8_t> unpack_weight_codes(const int32_t* planes, int bits, int filters, int taps, int channels);

// How the dot product becomes the accumulator of the format; `weight_sums` is sum_k weight_units per filter.
AccumulatorPlan plan_accumulator(const ProgramSpec& program, const StepSpec& step, const TensorSpec& source,
                                 int filters, const std::vector<int64_t>& weight_sums, Store& store);

// sum_k weight_units of every filter of a convolution.
std::vector<int64_t> weight_sums(const StepSpec& step, int filters, const std::vector<uint8_t>& codes);

// `width` filters that are multiplied together.
struct FilterCut {
    int first, width;
};

// The cheapest cut of `filters` (rounded up to four) on that many vectors of pixels, each in `pieces`.
std::vector<FilterCut> cut_filters(int filters, int vectors, int pieces, int k_steps, const TileShape* shapes);

// Whether sums of so many steps are short, and emitted as they are made.
inline bool is_short(const StepSpec& step, const TensorSpec& source, int k_steps, const EmitPlan& emit) {
    // Where streams and residuals of floats are read and written, longer ones are faster as tiles.
    const int most = emit.is_usual ? kShortSteps : kShortSteps / 2;
    const bool few = emit.consumer_count == 1 || (emit.consumer_count == 2 && emit.is_usual);
    return k_steps <= most && emit.is_lean && few && !needs_sum(step) && !source.is_signed;
}

// Cycles of the direct kernel on one image of [height, width] output pixels, cut as cut_filters cuts it.
double direct_cycles(const StepSpec& step, const TensorSpec& source, const CodeLayout& layout, int filters, int height,
                     int width, const KernelTable& kernels, const EmitPlan& emit);

// Bytes of the filters [first, first + width) of an ungrouped convolution: int8 [k_steps][width][4], k as in
// window_offsets. `codes` are those of unpack_weight_codes.
void write_weights(const StepSpec& step, const std::vector<uint8_t>& codes, int filters, int channels, int first,
                   int width, int8_t* out);

// Whether a pair of products may exceed what the instruction set's dot takes.
bool needs_wide_dot(const KernelTable& kernels, const StepSpec& step, int a_bits);

}  // namespace lbs
