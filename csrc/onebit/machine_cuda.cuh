// What the GPU does for the one-bit kernel: the tensor-core instructions, as PTX.
#pragma once

#include "cuda/machine_cuda.cuh"
#include "onebit/products.h"

namespace lbs::onebit {

// sm_80 and later.
class MmaMachine : public BlockMachine {
public:
    using BlockMachine::BlockMachine;
    static constexpr int kInFlight = 0;  // chunks whose products may run on when the next begins

    __device__ void publish() const {}
    __device__ void load_matrices(int byte, uint32_t (&r)[4]) const {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address(byte))
                     : "memory");
    }
    __device__ void mma(int* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
        asm volatile(
            "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
    template <int kN>
    __device__ void multiply(int (&acc)[kMultiplyGroups][kN / 2], int a_byte, int b_byte, int step) {
        mma_step<kN>(*this, acc, a_byte, b_byte, step);
    }
    template <int kPending>
    __device__ void wait_products() const {}
    template <int kRegisters>
    __device__ void finish_products(int (&)[kMultiplyGroups][kRegisters]) const {}
};

#if defined(LBS_HAS_WGMMA)

// sm_90a.
class WgmmaMachine : public WgmmaBlock {
public:
    using WgmmaBlock::WgmmaBlock;
    static constexpr int kInFlight = 1;

    template <int kN>
    __device__ void wgmma(int (&d)[kN / 2], uint64_t a, uint64_t b) const {
        if constexpr (kN == 128) LBS_WGMMA_64("wgmma.mma_async.sync.aligned.m64n128k256.s32.b1.b1.and.popc", d, "%64, %65", "l"(a), "l"(b));
        else LBS_WGMMA_32("wgmma.mma_async.sync.aligned.m64n64k256.s32.b1.b1.and.popc", d, "%32, %33", "l"(a), "l"(b));
    }
    template <int kN>
    __device__ void multiply(int (&acc)[kMultiplyGroups][kN / 2], int a_byte, int b_byte, int step) {
        wgmma_step<kN>(*this, acc, a_byte, b_byte, step);
    }
};

#endif

}  // namespace lbs::onebit
