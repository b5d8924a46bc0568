// lbs_kernels._cuda: functions over raw device pointers and a stream handle; nothing here waits for the GPU.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "common/cuda_check.cuh"
#include "common/python_errors.h"
#include "cuda/task_python.h"
#include "onebit/onebit_cuda.cuh"
#include "s8/s8_cuda.cuh"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

int device_count() {
    int count = 0;
    lbs::cuda_check(cudaGetDeviceCount(&count), "counting GPUs");
    return count;
}

// `tiles` lists the rows of a kernel, `launch` binds a task to one of them.
template <size_t kRows>
void define(py::module_& module, const char* tiles, const char* launch, const lbs::gpu::TileRow (&rows)[kRows],
            lbs::gpu::Launch (*bind)(const lbs::gpu::Task&, const lbs::gpu::TileRow&, int)) {
    module.def(
        tiles, [&rows] { return lbs::gpu::tile_rows(rows); },
        "[(machine, groups, filters, stages, shared bytes)] as built.");
    module.def(
        launch,
        [&rows, bind](const py::dict& task, const std::string& machine, int groups, int filters, int stages,
                      int device) {
            return bind(lbs::gpu::read_task(task), lbs::gpu::find_row(rows, machine, groups, filters, stages), device);
        },
        py::arg("task"), py::arg("machine"), py::arg("groups"), py::arg("filters"), py::arg("stages"),
        py::arg("device"),
        "task: see csrc/cuda/task_python.h; the rest names a row of the tiles. Raises FormatError, BackendError.");
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Packed kernels for NVIDIA GPUs. Pointers are addresses of contiguous device memory.";
    lbs::register_errors();
    module.attr("CUDART_VERSION") = CUDART_VERSION;
    module.def("device_count", &device_count, "Number of GPUs. Raises BackendError where there is no driver.");
    py::class_<lbs::gpu::Launch>(module, "Launch", "A convolution, bound once.")
        .def(
            "enqueue",
            [](const lbs::gpu::Launch& launch, uintptr_t stream, bool overlaps) {
                launch.enqueue(reinterpret_cast<cudaStream_t>(stream), overlaps);
            },
            py::arg("stream"), py::arg("overlaps") = false,
            "Launches on a stream; neither allocates nor waits, and can be captured. overlaps: it may begin before the "
            "kernel in front of it has ended, and waits by itself (compute capability 9.0).");
    define(module, "onebit_tiles", "onebit_launch", lbs::onebit::kTileRows, &lbs::onebit::bind);
    define(module, "s8_tiles", "s8_launch", lbs::s8::kTileRows, &lbs::s8::bind);
    module.def(
        "onebit_peak",
        [](const std::string& machine, int repeats, uintptr_t out, int device, uintptr_t stream) {
            return lbs::onebit::enqueue_peak(machine, repeats, pointer<int>(out), device,
                                             reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("machine"), py::arg("repeats"), py::arg("out_ptr"), py::arg("device"), py::arg("stream"),
        "Enqueues products on operands in shared memory and returns how many one-bit multiplications they are: the "
        "roof. out: int32 [onebit_peak_threads(device)].");
    module.def("onebit_peak_threads", &lbs::onebit::peak_threads, py::arg("device"), "Elements of out of onebit_peak.");
    module.def(
        "s8_peak",
        [](int repeats, uintptr_t out, int device, uintptr_t stream) {
            return lbs::s8::enqueue_peak(repeats, pointer<int>(out), device, reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("repeats"), py::arg("out_ptr"), py::arg("device"), py::arg("stream"),
        "Enqueues products on operands in shared memory and returns how many multiplications of bytes they are: the "
        "roof. out: int32 [s8_peak_threads(device)].");
    module.def("s8_peak_threads", &lbs::s8::peak_threads, py::arg("device"), "Elements of out of s8_peak.");
}
