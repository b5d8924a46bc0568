#include "s8/s8_cuda.cuh"

#include "common/cuda_check.cuh"
#include "s8/machine_cuda.cuh"

namespace lbs::s8 {
namespace {

extern __shared__ uint8_t shared_memory[];

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) s8_wgmma(const __grid_constant__ Params p) {
#if defined(LBS_HAS_WGMMA)
    WgmmaMachine machine(shared_memory);
    run_tiles<T>(machine, p);
#else
    __trap();
#endif
}

Kernel kernel_of(const TileRow& row) {
#define LBS_KERNEL(machine, groups, filters, stages)                                          \
    if (same_row(row, {#machine, groups, filters, stages, 0}))                                \
        return {reinterpret_cast<const void*>(&s8_##machine<Tile<groups, filters, stages>>),  \
                Tile<groups, filters, stages>::kThreads, row.shared_bytes, 64};
    LBS_S8_TILES(LBS_KERNEL)
#undef LBS_KERNEL
    return {};  // find_row() knows the rows of the same table only
}

}  // namespace

Launch bind(const Task& task, const TileRow& row, int device) {
    const Params params = make_params(task, row);
    const DeviceGuard guard(device);
    check_capability("s8", false, device);
    return Launch(params, kernel_of(row), device);
}

}  // namespace lbs::s8
