// A model of what the GPU does for the kernels, so that their source runs on a processor.
#pragma once

#include "cuda/task.h"
#include "cuda/tile_row.h"

namespace lbs::gpu {

// When an asynchronous operation takes place. kEarly: where it is issued. kLate: where it is waited for; until then the
// target of a copy holds garbage and a product has not read its operands. A kernel that waits where it must gives the
// same results either way.
enum class Timing { kEarly, kLate };

// `blocks` blocks, the threads of each in the order that `seed` gives (0: of their numbers).
struct Order {
    int blocks;
    Timing timing;
    unsigned seed;
};

}  // namespace lbs::gpu

// Each runs the kernel of `row` for a task whose pointers are addresses of this process. Raises FormatError for a task
// no kernel serves, and for what the hardware would not forgive: an address out of bounds or not aligned, a descriptor
// of another layout, a copy from beyond the operands, a missing fence, threads that wait for one another.
namespace lbs::onebit {
void run_model(const gpu::Task& task, const gpu::TileRow& row, const gpu::Order& order);
}
namespace lbs::s8 {
void run_model(const gpu::Task& task, const gpu::TileRow& row, const gpu::Order& order);
}
