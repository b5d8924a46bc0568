// Where interpolated rows and columns come from.
#pragma once

#include "program/layout.h"

namespace lbs {

// p = clamp(i * scale + offset, 0, size - 1) in double precision, first = floor(p), weight = float(p - first), for every
// i of `count`. `unit` is what first and second are multiples of.
ResizeSide resize_side(Store& store, int size, int count, double scale, double offset, int unit);

}  // namespace lbs
