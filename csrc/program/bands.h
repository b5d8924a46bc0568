// A convolution whose floats nobody reads but a maximum, computed together with it: bands of rows, so that the stream
// between them, the largest tensor of most networks for large images, never leaves the cache.
#pragma once

#include "common/threads.h"
#include "isa/kernels.h"
#include "program/plan.h"

namespace lbs {

struct BandPlan {
    int unit_rows = 0, unit_count = 0;  // rows of the result, the fewest that are whole vectors; no units: no bands
    int units = 0;                      // of a band
    ConvPlan conv;                      // the convolution, its channels as far apart as a band needs
};

// None where the stream is small, or bands would not be.
BandPlan plan_bands(const ConvPlan& conv, const PoolStreamPlan& max, int lanes);

// One thread's part of both. `tensors` are those of `context`, where the convolution's stream is given `memory`, which
// holds as much as the whole. Returns the seconds of the convolution where they are `timed`.
double run_bands(const BandPlan& plan, const PoolStreamPlan& max, const EmitPlan& emit, const KernelTable& kernels,
                 const RunContext& context, unsigned char** tensors, unsigned char* memory, float* floats,
                 const Team::Member& self, bool timed);

}  // namespace lbs
