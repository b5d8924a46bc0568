// lbs_kernels._cuda: functions over raw device pointers and a stream handle; nothing here waits for the GPU.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "common/cuda_check.cuh"
#include "onebit/onebit_cuda.cuh"
#include "onebit/task_python.h"
#include "common/python_errors.h"
#include "quantpack/quantpack_cuda.cuh"

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

void pack_planes(uintptr_t codes, uintptr_t planes, int64_t rows, int channels, int bits, int device,
                 uintptr_t stream) {
    lbs::pack_planes_cuda(pointer<const uint8_t>(codes), pointer<int32_t>(planes), rows, channels, bits, device,
                          reinterpret_cast<cudaStream_t>(stream));
}

void unpack_planes(uintptr_t planes, uintptr_t codes, int64_t rows, int channels, int bits, int device,
                   uintptr_t stream) {
    lbs::unpack_planes_cuda(pointer<const int32_t>(planes), pointer<uint8_t>(codes), rows, channels, bits, device,
                            reinterpret_cast<cudaStream_t>(stream));
}

void encode_image(uintptr_t x, uintptr_t codes, int64_t batch, int channels, int64_t pixels, int bits, float scale,
                  int zero, bool is_signed, int device, uintptr_t stream) {
    const lbs::EncodeImage task{
        pointer<const float>(x), pointer<uint8_t>(codes), batch, pixels, channels, bits, zero, is_signed, scale};
    lbs::encode_image_cuda(task, device, reinterpret_cast<cudaStream_t>(stream));
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
    module.def("pack_planes", &pack_planes, py::arg("codes_ptr"), py::arg("planes_ptr"), py::arg("rows"),
               py::arg("channels"), py::arg("bits"), py::arg("device"), py::arg("stream"),
               "uint8 [rows, channels] -> int32 [rows, bits, CW].");
    module.def("unpack_planes", &unpack_planes, py::arg("planes_ptr"), py::arg("codes_ptr"), py::arg("rows"),
               py::arg("channels"), py::arg("bits"), py::arg("device"), py::arg("stream"),
               "int32 [rows, bits, CW] -> uint8 [rows, channels].");
    module.def("encode_image", &encode_image, py::arg("x_ptr"), py::arg("codes_ptr"), py::arg("batch"),
               py::arg("channels"), py::arg("pixels"), py::arg("bits"), py::arg("scale"), py::arg("zero"),
               py::arg("signed"), py::arg("device"), py::arg("stream"),
               "float32 [batch, channels, pixels] -> uint8 [batch, pixels, channels].");

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
