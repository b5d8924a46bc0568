// Lays the weights of a linear layer out for an instruction set and fills in its plan.
#pragma once

#include "isa/kernels.h"
#include "program/layout.h"
#include "program/plan.h"
#include "program/program.h"

namespace lbs {

// Everything of `plan` but its emit part. Also serves convolutions of one tap on one pixel.
void plan_linear(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, const KernelTable& kernels,
                 Store& store, LinearPlan& plan);

}  // namespace lbs
