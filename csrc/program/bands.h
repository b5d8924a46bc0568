// A convolution whose floats nobody reads but a maximum, computed together with it: bands of rows, so that the stream
// between them, the largest tensor of most networks for large images, never leaves the cache.
#pragma once

#include "common/threads.h"
#include "isa/kernels.h"
#include "program/plan.h"

namespace lbs {

struct StepPlan;

struct BandPlan {
    int unit_rows = 0, unit_count = 0;  // rows of the result, the fewest that are whole vectors; no units: no bands
    int units = 0;                      // of a band
    ConvPlan conv;                      // the convolution, its channels as far apart as a band needs
};

// None where the stream is small, or bands would not be.
BandPlan plan_bands(const ConvPlan& conv, const PoolStreamPlan& max, int lanes);

// What a thread works in: its table of tensors, memory as large as the whole stream, and floats of a maximum.
struct BandMemory {
    unsigned char** tensors;
    unsigned char* stream;
    float* floats;
};

// One thread's part of a maximum and the convolution before it. Returns the seconds of the convolution where they are
// `timed`.
double run_bands(const StepPlan& max, const KernelTable& kernels, const RunContext& context, const BandMemory& memory,
                 const Team::Member& self, bool timed);

}  // namespace lbs
