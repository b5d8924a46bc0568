// onebit_model: the source of the one-bit CUDA kernels on a model of the GPU. Built for tests, part of no installation.
#include <pybind11/pybind11.h>

#include "common/python_errors.h"
#include "model.h"
#include "onebit/task_python.h"

namespace py = pybind11;

namespace {

void run(const py::dict& task, const std::string& machine, int groups, int filters, int stages, int blocks, bool late,
         unsigned seed) {
    const lbs::onebit::Task read = lbs::onebit::read_task(task);
    const lbs::onebit::TileRow& row = lbs::onebit::find_row(machine, groups, filters, stages);
    py::gil_scoped_release release;
    lbs::onebit::run_model(read, row, blocks, late ? lbs::onebit::Timing::kLate : lbs::onebit::Timing::kEarly, seed);
}

}  // namespace

PYBIND11_MODULE(onebit_model, module) {
    module.doc() = "The source of the one-bit CUDA kernels on a model of the GPU, and the arithmetic it is made of.";
    lbs::register_errors();
    module.def("tiles", &lbs::onebit::tile_rows, "[(machine, groups, filters, stages, shared bytes)] as built.");
    module.def("run", &run, py::arg("task"), py::arg("machine"), py::arg("groups"), py::arg("filters"),
               py::arg("stages"), py::arg("blocks") = 1, py::arg("late") = true, py::arg("seed") = 0,
               "Runs one launch; task: see csrc/onebit/task_python.h. late: asynchronous operations happen where they "
               "are waited for, else where they are issued; seed: of the order of the threads, 0 for that of their "
               "numbers.");
    module.def(
        "quotient", [](int n, int d) { return lbs::onebit::quotient(n, lbs::onebit::fast_divisor(d)); }, py::arg("n"),
        py::arg("d"), "n / d as the kernel divides.");
    module.def("half", &lbs::onebit::to_float16, py::arg("value"), "Bits of the nearest float16.");
    module.def("from_half", &lbs::onebit::from_float16, py::arg("bits"), "float32 of the bits of a float16.");
    module.def("brain", &lbs::onebit::to_bfloat16, py::arg("value"), "Bits of the nearest bfloat16.");
}
