// lbs_kernels._cuda: functions over raw device pointers and a stream handle; nothing here waits for the GPU.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "common/cuda_check.cuh"
#include "common/python_errors.h"
#include "onebit/onebit_cuda.cuh"
#include "onebit/task_python.h"

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

std::unique_ptr<lbs::onebit::Launch> onebit_launch(const py::dict& task, const std::string& machine, int groups,
                                                   int filters, int stages, int device) {
    return std::make_unique<lbs::onebit::Launch>(lbs::onebit::read_task(task),
                                                 lbs::onebit::find_row(machine, groups, filters, stages), device);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Packed kernels for NVIDIA GPUs. Pointers are addresses of contiguous device memory.";
    lbs::register_errors();
    module.attr("CUDART_VERSION") = CUDART_VERSION;
    module.def("device_count", &device_count, "Number of GPUs. Raises BackendError where there is no driver.");
    module.def("onebit_tiles", &lbs::onebit::tile_rows, "[(machine, groups, filters, stages, shared bytes)] as built.");
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
    py::class_<lbs::onebit::Launch>(module, "OneBitLaunch", "A convolution on the one-bit tensor cores, bound once.")
        .def(py::init(&onebit_launch), py::arg("task"), py::arg("machine"), py::arg("groups"), py::arg("filters"),
             py::arg("stages"), py::arg("device"),
             "task: see csrc/onebit/task_python.h; the rest names a row of onebit_tiles(). Raises FormatError, "
             "BackendError.")
        .def(
            "enqueue",
            [](const lbs::onebit::Launch& launch, uintptr_t stream) {
                launch.enqueue(reinterpret_cast<cudaStream_t>(stream));
            },
            py::arg("stream"), "Launches on a stream; neither allocates nor waits, and can be captured.");
}
