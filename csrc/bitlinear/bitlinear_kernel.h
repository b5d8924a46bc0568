// Integer matrix-vector product: lanes are outputs, four input codes are broadcast per step.
#pragma once

#include "program/emit_kernel.h"
#include "program/plan.h"

namespace {

// dots of kBlocks groups of L outputs from the first on
template <int kBlocks, bool kWide>
void linear_dots(const lbs::LinearPlan& plan, const unsigned char* in, int first, int32_t* dots) {
    Simd::I acc[kBlocks];
    for (int b = 0; b < kBlocks; ++b) acc[b] = Simd::izero();
    const int64_t block_bytes = int64_t{4} * Simd::L * plan.k_steps;
    const int8_t* weights = plan.weights + first * block_bytes;
    for (int k = 0; k < plan.k_steps; ++k) {
        const Simd::I x = Simd::ibroadcast(in + k * plan.in_pitch);
        for (int b = 0; b < kBlocks; ++b)
            acc[b] =
                Simd::template dot<kWide>(acc[b], x, Simd::iload(weights + b * block_bytes + int64_t{4} * Simd::L * k));
    }
    for (int b = 0; b < kBlocks; ++b) Simd::istore(dots + b * Simd::L, acc[b]);
}

template <bool kWide>
void linear_groups(const lbs::LinearPlan& plan, const lbs::RunContext& run, int first, int last) {
    constexpr int kBlocks = 4;
    const unsigned char* in = run.tensors[plan.input] + plan.in_offset;
    int32_t sum[lbs::kMaxLanes] = {};
    if (plan.acc.needs_sum)
        for (int k = 0; k < plan.k_steps; ++k)
            for (int j = 0; j < 4; ++j) sum[0] += in[k * plan.in_pitch + j] * plan.ones[4 * k + j];
    // One pixel per vector: rows of dots are one integer apart, and the lanes behind the first are never used.
    static_assert((kBlocks + 1) * Simd::L <= lbs::kMaxTile * lbs::kMaxLanes, "dots and the lanes read past them");
    for (int group = first; group < last; group += kBlocks) {
        const int count = last - group < kBlocks ? last - group : kBlocks;
        switch (count) {
            case 1: linear_dots<1, kWide>(plan, in, group, run.accumulators); break;
            case 2: linear_dots<2, kWide>(plan, in, group, run.accumulators); break;
            case 3: linear_dots<3, kWide>(plan, in, group, run.accumulators); break;
            default: linear_dots<4, kWide>(plan, in, group, run.accumulators); break;
        }
        const int base = group * Simd::L;
        const int end = base + count * Simd::L < plan.outputs ? base + count * Simd::L : plan.outputs;
        for (int channel = base; channel < end; channel += 4)
            finish4(plan.acc, plan.emit, run, channel, 0, run.accumulators + channel - base, 1,
                    plan.acc.needs_sum ? sum : nullptr, 0, plan.acc.constant);
    }
}

void linear_kernel(const lbs::LinearPlan& plan, const lbs::RunContext& run, int first, int last) {
    if constexpr (Simd::kNarrowDot) {
        if (plan.wide) return linear_groups<true>(plan, run, first, last);
    }
    linear_groups<false>(plan, run, first, last);
}

}  // namespace
