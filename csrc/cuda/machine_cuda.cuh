// What the GPU does for every implicit GEMM here: asynchronous copies, barriers and the fences of wgmma, as PTX.
#pragma once

#include "cuda/index.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || (defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ == 900)
#define LBS_HAS_WGMMA 1
#endif

namespace lbs::gpu {

// Copies, barriers and shared memory; every machine is one of these.
class BlockMachine {
public:
    __device__ explicit BlockMachine(uint8_t* shared) {
        const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
        address_ = (start + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
        shared_ = shared + (address_ - start);
    }
    __device__ int thread() const { return static_cast<int>(threadIdx.x); }
    __device__ int block() const { return static_cast<int>(blockIdx.x); }
    __device__ int blocks() const { return static_cast<int>(gridDim.x); }
    __device__ uint8_t* shared(int byte) const { return shared_ + byte; }
    __device__ uint32_t address(int byte) const { return address_ + static_cast<uint32_t>(byte); }

    // 16 bytes go past the first-level cache; smaller copies have no such form. Not inside: zeros, nothing is read.
    template <int kBytes>
    __device__ void copy(int byte, const void* from, bool inside) const {
        const int count = inside ? kBytes : 0;
        if constexpr (kBytes == 16) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(byte)), "l"(from), "r"(count)
                         : "memory");
        } else {
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address(byte)), "l"(from), "n"(kBytes),
                         "r"(count)
                         : "memory");
        }
    }
    __device__ void commit_copies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
    template <int kPending>
    __device__ void wait_copies() const {
        asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
    }
    __device__ void sync() const { __syncthreads(); }
    __device__ void sync_warp() const { __syncwarp(); }

    // Programmatic dependent launch (docs/cuda.md): the next kernel may begin, which says nothing of what was written;
    // and wait until the kernels before have ended and what they wrote is visible. Below sm_90 they have.
    __device__ void launch_dependents() const {
#if __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    }
    __device__ void wait_for_kernels_before() const {
#if __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    }

private:
    uint8_t* shared_;
    uint32_t address_;
};

#if defined(LBS_HAS_WGMMA)

// d[0 .. 3], d[0 .. 31] or d[0 .. 63] += the product of `instruction` on what `operands` are called: two matrices in
// shared memory by their descriptors, or registers and one such matrix. Operands are counted from the last of d on.
#define LBS_R4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define LBS_R16(d, i) LBS_R4(d, i), LBS_R4(d, i + 4), LBS_R4(d, i + 8), LBS_R4(d, i + 12)
#define LBS_WGMMA_4(instruction, d, operands, ...)                          \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" instruction \
                 " {%0, %1, %2, %3}, " operands ", add;\n}"                 \
                 : LBS_R4(d, 0)                                             \
                 : __VA_ARGS__)
#define LBS_WGMMA_24(instruction, d, operands, ...)                                       \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" instruction               \
                 " {"                                                                     \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23"                                 \
                 "}, " operands ", add;\n}"                                               \
                 : LBS_R16(d, 0), LBS_R4(d, 16), LBS_R4(d, 20)                            \
                 : __VA_ARGS__)
#define LBS_WGMMA_32(instruction, d, operands, ...)                                               \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" instruction                       \
                 " {"                                                                             \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                 "}, " operands ", add;\n}"                                                       \
                 : LBS_R16(d, 0), LBS_R16(d, 16)                                                  \
                 : __VA_ARGS__)
#define LBS_WGMMA_48(instruction, d, operands, ...)                                                 \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" instruction                         \
                 " {"                                                                               \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"   \
                 "}, " operands ", add;\n}"                                                         \
                 : LBS_R16(d, 0), LBS_R16(d, 16), LBS_R16(d, 32)                                    \
                 : __VA_ARGS__)
#define LBS_WGMMA_64(instruction, d, operands, ...)                                                 \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" instruction                         \
                 " {"                                                                               \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"   \
                 "}, " operands ", add;\n}"                                                         \
                 : LBS_R16(d, 0), LBS_R16(d, 16), LBS_R16(d, 32), LBS_R16(d, 48)                    \
                 : __VA_ARGS__)

// sm_90a: products run on while the threads go on.
class WgmmaBlock : public BlockMachine {
public:
    using BlockMachine::BlockMachine;

    // Copies wrote through the ordinary view of shared memory, the tensor core reads through its own.
    __device__ void publish() const { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
    __device__ void open_products() const { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
    __device__ void close_products() const { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
    template <int kPending>
    __device__ void wait_products() const {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    }
    // The empty statements keep the compiler from reading a register before the wait.
    template <int kGroups, int kRegisters>
    __device__ void finish_products(int (&acc)[kGroups][kRegisters]) const {
        wait_products<0>();
        LBS_UNROLL for (int g = 0; g < kGroups; ++g) {
            LBS_UNROLL for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+r"(acc[g][i])::"memory");
        }
    }
};

#endif

}  // namespace lbs::gpu
