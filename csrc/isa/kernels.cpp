#include "isa/kernels.h"

#include "common/check.h"

namespace lbs {

const KernelTable& kernels_for(Isa isa) {
    switch (isa) {
        case Isa::kPortable: return kPortableKernels;
#if defined(LBS_BUILD_AVX2)
        case Isa::kAvx2: return kAvx2Kernels;
#endif
#if defined(LBS_BUILD_AVXVNNI)
        case Isa::kAvxVnni: return kAvxVnniKernels;
#endif
#if defined(LBS_BUILD_AVX512VNNI)
        case Isa::kAvx512Vnni: return kAvx512VnniKernels;
        case Isa::kAmxModel: return kAmxModelKernels;
#endif
#if defined(LBS_BUILD_AMX)
        case Isa::kAmx: return kAmxKernels;
#endif
#if defined(LBS_BUILD_NEON)
        case Isa::kNeon: return kNeonKernels;
#endif
#if defined(LBS_BUILD_NEON_I8MM)
        case Isa::kNeonI8mm: return kNeonI8mmKernels;
#endif
        default: throw BackendError(std::string("isa '") + isa_name(isa) + "' is not in this build; use isa='auto'");
    }
}

}  // namespace lbs
