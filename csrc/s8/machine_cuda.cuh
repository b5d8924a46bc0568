// What the GPU does for the s8 kernel: barriers in shared memory, bulk copies and the tensor-core instruction, as PTX.
#pragma once

#include "cuda/machine_cuda.cuh"

namespace lbs::s8 {

#if defined(LBS_HAS_WGMMA)

// What operands A and B are called behind so many others: two descriptors, or four registers and one.
#define LBS_MEMORY(a, b, c, d, e) "%" #a ", %" #b
#define LBS_REGISTERS(a, b, c, d, e) "{%" #a ", %" #b ", %" #c ", %" #d "}, %" #e
#define LBS_S8_PRODUCT(kN, d, names, ...)                                                                    \
    static_assert(kN == 8 || kN == 48 || kN == 64 || kN == 96 || kN == 128, "no such product is written here"); \
    if constexpr (kN == 8)                                                                                   \
        LBS_WGMMA_4("wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8", d, names(4, 5, 6, 7, 8), __VA_ARGS__); \
    else if constexpr (kN == 48)                                                                             \
        LBS_WGMMA_24("wgmma.mma_async.sync.aligned.m64n48k32.s32.s8.s8", d, names(24, 25, 26, 27, 28), __VA_ARGS__); \
    else if constexpr (kN == 96)                                                                             \
        LBS_WGMMA_48("wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8", d, names(48, 49, 50, 51, 52), __VA_ARGS__); \
    else if constexpr (kN == 128)                                                                            \
        LBS_WGMMA_64("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8", d, names(64, 65, 66, 67, 68), __VA_ARGS__); \
    else                                                                                                     \
        LBS_WGMMA_32("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8", d, names(32, 33, 34, 35, 36), __VA_ARGS__)

// sm_90a.
class WgmmaMachine : public gpu::WgmmaBlock {
public:
    using WgmmaBlock::WgmmaBlock;

    // Told to be the same in all threads of a warp, so that what follows from it is computed once for the warp.
    __device__ int warpgroup() const { return __shfl_sync(0xffffffffu, thread() / gpu::kWarpgroup, 0); }
    __device__ void make_barrier(int byte, int arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(byte)), "r"(arrivals) : "memory");
    }
    __device__ void arrive(int byte) const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(byte)) : "memory");
    }
    __device__ void expect(int byte, int bytes) const {
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(address(byte)), "r"(bytes)
                     : "memory");
    }
    __device__ void wait(int byte, int parity) const {
        int done;
        do {
            asm volatile(
                "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                "selp.b32 %0, 1, 0, done;\n}"
                : "=r"(done)
                : "r"(address(byte)), "r"(parity)
                : "memory");
        } while (!done);
    }
    __device__ void bulk_copy(int byte, const void* from, int bytes, int barrier) const {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         address(byte)),
                     "l"(from), "r"(bytes), "r"(address(barrier))
                     : "memory");
    }
    // Of all threads of the cluster; what they wrote before is visible behind it.
    __device__ void sync_cluster() const {
        asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
    }
    // Shared memory of block `rank` of the cluster.
    __device__ gpu::Ints4 load_from(int rank, int byte) const {
        uint32_t there;
        gpu::Ints4 four;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(byte)), "r"(rank));
        asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(four.v[0]), "=r"(four.v[1]), "=r"(four.v[2]), "=r"(four.v[3])
                     : "r"(there)
                     : "memory");
        return four;
    }
    // 65536 registers for three groups of 128 threads: the producer needs few, the consumers hold sums.
    __device__ void give_registers() const { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
    __device__ void take_registers() const { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }
    template <int kN>
    __device__ void wgmma(int (&d)[kN / 2], uint64_t a, uint64_t b) const {
        LBS_S8_PRODUCT(kN, d, LBS_MEMORY, "l"(a), "l"(b));
    }
    // Operand A from registers, which stay what they are until the product has been waited for.
    template <int kN>
    __device__ void wgmma(int (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) const {
        LBS_S8_PRODUCT(kN, d, LBS_REGISTERS, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
    __device__ uint32_t load_word(int byte) const { return *reinterpret_cast<const uint32_t*>(shared(byte)); }
};

#endif

}  // namespace lbs::s8
