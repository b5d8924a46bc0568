// Which convolutions put filters on the lanes, and how their weights are laid out for it.
#pragma once

#include "bitconv2d/bitconv2d_cpu.h"
#include "isa/kernels.h"
#include "program/layout.h"
#include "program/plan.h"
#include "program/program.h"

namespace lbs {

// Fills in everything of `plan` but where its results lie, or answers false where pixels on the lanes have to serve or
// are expected to be faster.
bool plan_lanes(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, const KernelTable& kernels,
                Algorithm algorithm, const EmitPlan& emit, Store& store, LanesPlan& plan);

// Blocks of whole vectors of filters, no two of which differ by more than a vector: one vector alone waits for its
// dots.
std::vector<FilterCut> cut_vectors(int filters, const KernelTable& kernels);

// Whether what is made of sums whose filters are on the lanes can be made as they lie.
bool is_made_in_place(const TensorSpec& source, const KernelTable& kernels, const EmitPlan& emit);

// Where it is then stored: in maps of `width` and `pixels`, multiplied in groups of `per_group`, or 0: stored row by
// row.
PixelPlan place_pixels(const std::vector<CodeLayout>& layouts, const EmitPlan& emit, int width, int pixels,
                       int per_group, Store& store);

// Cycles on one image of [height, width] output pixels, comparable with direct_cycles; infinite where it cannot serve.
double lanes_cycles(const StepSpec& step, const TensorSpec& source, const CodeLayout& layout, int filters, int height,
                    int width, const KernelTable& kernels, const EmitPlan& emit);

// Working memory that a thread needs for it.
int64_t lanes_bytes(const LanesPlan& plan, const KernelTable& kernels);

}  // namespace lbs
