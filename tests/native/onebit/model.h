// A model of what the GPU does for the one-bit kernel, so that its source runs on a processor.
#pragma once

#include <string>

#include "onebit/task.h"

namespace lbs::onebit {

// When an asynchronous operation takes place. kEarly: where it is issued. kLate: where it is waited for; until then the
// target of a copy holds garbage and a product has not read its operands. A kernel that waits where it must gives the
// same results either way.
enum class Timing { kEarly, kLate };

// Runs the kernel of `row` for a task whose pointers are addresses of this process, as `blocks` blocks, the threads of
// a block in the order that `seed` gives (0: of their numbers). Raises FormatError for a task no kernel serves, and for
// what the hardware would not forgive: an address out of bounds or not aligned, a descriptor of another layout, a copy
// from beyond the operands, a missing fence, threads that wait for one another.
void run_model(const Task& task, const TileRow& row, int blocks, Timing timing, unsigned seed);

}  // namespace lbs::onebit
