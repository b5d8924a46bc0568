// Pooling in plain C++: means of streams as planes of floats, and codes whose padding could win.
#pragma once

#include "program/layout.h"
#include "program/program.h"

namespace lbs {

// y = (((x[0] + x[1]) + x[2]) + ...) * float32(1 / pixels) for each channel of [channels][pixels].
void mean_planes(const float* stream, int channels, int64_t pixels, float* out);

// Mean over each window of one plane, the sums in row-major order; padding counts as zeros.
void average_plane(const float* plane, int height, int width, const StepSpec& step, float* out);

// Maximum of codes, pixel by pixel, for any zero and sign; groups [first, last).
void max_codes(const unsigned char* in, const CodeLayout& in_layout, const StepSpec& step, unsigned char* out,
               const CodeLayout& out_layout, int first_group, int last_group);

}  // namespace lbs
