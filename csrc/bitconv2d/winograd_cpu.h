// Which convolutions take the Winograd kernel, and how their weights are laid out for it.
#pragma once

#include "isa/kernels.h"
#include "program/layout.h"
#include "program/plan.h"
#include "program/program.h"

namespace lbs {

// Whether the shape and the widths of a convolution allow it. What the input's codes hold below the last row must then
// be readable for one row more where the output has an odd number of rows.
bool suits_winograd(const StepSpec& step, const TensorSpec& source);

// Fills in everything of `plan` but its emit part, or answers false: where the direct kernel has to serve (transformed
// weights that are no bytes, products of pairs beyond the instruction set's dot), where it is asked for, and left the
// choice where it is faster.
bool plan_winograd(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout,
                   const KernelTable& kernels, Algorithm algorithm, const EmitPlan& emit, Store& store,
                   WinogradPlan& plan);

// Working memory that a thread needs for it.
int64_t winograd_bytes(const WinogradPlan& plan, int lanes);

}  // namespace lbs
