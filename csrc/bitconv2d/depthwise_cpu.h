// Lays the weights of a depthwise convolution out and fills in its plan.
#pragma once

#include "isa/kernels.h"
#include "program/layout.h"
#include "program/plan.h"
#include "program/program.h"

namespace lbs {

// Whether the kernel of depthwise convolutions computes this step on codes of this layout: one filter for every
// channel, columns kept apart as the step reads them, and nothing read past the slack behind them.
bool is_depthwise(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, const EmitPlan& emit,
                  int lanes);

// Everything of `plan` but its emit part.
void plan_depthwise(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout,
                    const KernelTable& kernels, Store& store, DepthwisePlan& plan);

// Integers that the kernel keeps per thread.
int64_t depthwise_scratch(const DepthwisePlan& plan);

// Taps in fours, for a depthwise kernel whose sums are short and whose epilogue is usual; leaves `plan` as it is where
// that does not hold.
void plan_taps(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, Store& store,
               ConvPlan& plan);

}  // namespace lbs
