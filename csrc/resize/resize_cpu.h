// Where interpolated rows and columns come from.
#pragma once

#include "program/layout.h"

namespace lbs {

// p = clamp(i * scale + offset, 0, size - 1) in double precision, first = floor(p), weight = float(p - first), for
// every i of `count`.
ResizeSide resize_side(Store& store, int size, int count, double scale, double offset);

// The same for columns that are computed in vectors of `lanes`.
ResizeSide resize_columns(Store& store, int size, int count, double scale, double offset, int lanes);

}  // namespace lbs
