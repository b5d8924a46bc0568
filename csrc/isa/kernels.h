// The kernels of one instruction set, and the table that finds them.
#pragma once

#include "common/cpu_features.h"
#include "fakequant/fakequant.h"

namespace lbs {

struct KernelTable {
    int lanes;  // pixels in one vector
    FakeQuantForwardKernel fake_quant_forward;
    FakeQuantBackwardKernel fake_quant_backward;
};

extern const KernelTable kPortableKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512VnniKernels;
extern const KernelTable kAmxKernels;
extern const KernelTable kAmxModelKernels;

// The table of an instruction set that resolve_isa has allowed.
const KernelTable& kernels_for(Isa isa);

}  // namespace lbs
