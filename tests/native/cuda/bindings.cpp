// cuda_model: the source of the CUDA kernels on a model of the GPU. Built for tests, part of no installation.
#include <pybind11/pybind11.h>

#include "common/python_errors.h"
#include "cuda/task_python.h"
#include "model.h"
#include "onebit/tiles.h"
#include "s8/tiles.h"

namespace py = pybind11;
using namespace lbs;

namespace {

constexpr const char* kRunDoc =
    "Runs one launch; task: see csrc/cuda/task_python.h. late: asynchronous operations happen where they are waited "
    "for, "
    "else where they are issued; seed: of the order of the threads, 0 for that of their numbers.";

template <size_t kRows, class Run>
void define(py::module_& module, const char* tiles, const char* run_name, const gpu::TileRow (&rows)[kRows], Run run) {
    module.def(
        tiles, [&rows] { return gpu::tile_rows(rows); },
        "[(machine, groups, filters, stages, shared bytes)] as built.");
    module.def(
        run_name,
        [&rows, run](const py::dict& task, const std::string& machine, int groups, int filters, int stages, int blocks,
                     bool late, unsigned seed) {
            const gpu::Task read = gpu::read_task(task);
            const gpu::TileRow& row = gpu::find_row(rows, machine, groups, filters, stages);
            py::gil_scoped_release release;
            run(read, row, {blocks, late ? gpu::Timing::kLate : gpu::Timing::kEarly, seed});
        },
        py::arg("task"), py::arg("machine"), py::arg("groups"), py::arg("filters"), py::arg("stages"),
        py::arg("blocks") = 1, py::arg("late") = true, py::arg("seed") = 0, kRunDoc);
}

}  // namespace

PYBIND11_MODULE(cuda_model, module) {
    module.doc() = "The source of the CUDA kernels on a model of the GPU, and the arithmetic it is made of.";
    register_errors();
    define(module, "onebit_tiles", "run_onebit", onebit::kTileRows, &onebit::run_model);
    define(module, "s8_tiles", "run_s8", s8::kTileRows, &s8::run_model);
    module.def("matrix_descriptor", &gpu::matrix_descriptor, py::arg("address"), "Of a matrix in shared memory.");
    module.def(
        "quotient", [](int n, int d) { return gpu::quotient(n, gpu::fast_divisor(d)); }, py::arg("n"), py::arg("d"),
        "n / d as the kernels divide.");
    module.def("half", &gpu::to_float16, py::arg("value"), "Bits of the nearest float16.");
    module.def("from_half", &gpu::from_float16, py::arg("bits"), "float32 of the bits of a float16.");
    module.def("brain", &gpu::to_bfloat16, py::arg("value"), "Bits of the nearest bfloat16.");
}
