// lbs_kernels._cpu: functions over raw pointers; shapes, dtypes and lifetimes are checked by the calling Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "common/cpu_features.h"
#include "common/format.h"
#include "common/python_errors.h"
#include "common/threads.h"
#include "fakequant/fakequant.h"
#include "file/network.h"
#include "program/program.h"
#include "program/runner.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

lbs::FloatType float_type(int code) {
    lbs::require(code == 0 || code == 1,
                 "dtype code " + std::to_string(code) + " is unknown: 0 is float32, 1 is bfloat16");
    return static_cast<lbs::FloatType>(code);
}

void check_count(int64_t count) {
    lbs::require(count >= 0, "count is " + std::to_string(count) + "; it cannot be negative");
}

lbs::QuantWidths quant_widths(float v, const std::vector<float>& scales, const std::vector<float>& steps,
                              const std::vector<float>& levels, const std::vector<float>& zeros,
                              std::pair<float, float> shares, bool is_signed) {
    lbs::require(!levels.empty() && levels.size() <= lbs::kMaxCoarse + 1 && scales.size() == levels.size() &&
                     steps.size() == levels.size() && zeros.size() == levels.size(),
                 "fake quantizer: " + std::to_string(levels.size()) + " widths; give 1 to " +
                     std::to_string(lbs::kMaxCoarse + 1) + ", with a scale, a step and a zero each");
    lbs::QuantWidths widths{};
    widths.coarse = static_cast<int>(levels.size()) - 1;
    for (size_t j = 0; j < levels.size(); ++j) {
        widths.scale[j] = scales[j];
        widths.step[j] = steps[j];
        widths.n[j] = levels[j];
        widths.zero[j] = zeros[j];
    }
    widths.v = v;
    widths.low = shares.first;
    widths.high = shares.second;
    widths.is_signed = is_signed;
    return widths;
}

std::vector<double> by_width(const lbs::QuantSums& sums, int coarse) {
    return std::vector<double>(sums.by_width, sums.by_width + coarse);
}

std::vector<double> fake_quant_forward(uintptr_t x, uintptr_t y, int64_t count, float v, const std::vector<float>& scales,
                                  const std::vector<float>& steps, const std::vector<float>& levels,
                                  const std::vector<float>& zeros, std::pair<float, float> shares, bool is_signed,
                                  int threads, int dtype, const std::string& isa) {
    check_count(count);
    const lbs::FakeQuantForward task{pointer<const void>(x), pointer<void>(y),
                                 quant_widths(v, scales, steps, levels, zeros, shares, is_signed), float_type(dtype)};
    const lbs::Isa resolved = lbs::resolve_isa(isa);
    py::gil_scoped_release release;
    return by_width(lbs::fake_quant_forward(task, count, threads, resolved), task.widths.coarse);
}

std::pair<double, std::vector<double>> fake_quant_backward(uintptr_t x, uintptr_t gy, uintptr_t gx, int64_t count, float v,
                                                      const std::vector<float>& scales,
                                                      const std::vector<float>& steps,
                                                      const std::vector<float>& levels,
                                                      const std::vector<float>& zeros, std::pair<float, float> shares,
                                                      bool is_signed, int threads,
                                                      int dtype, const std::string& isa) {
    check_count(count);
    lbs::require(v > 0.0f && std::isfinite(v),
                 "fake_quant_backward: v is " + std::to_string(v) + "; it must be positive and finite");
    const lbs::FakeQuantBackward task{pointer<const void>(x), pointer<const void>(gy), pointer<void>(gx),
                                  quant_widths(v, scales, steps, levels, zeros, shares, is_signed), float_type(dtype)};
    const lbs::Isa resolved = lbs::resolve_isa(isa);
    py::gil_scoped_release release;
    const lbs::QuantSums sums = lbs::fake_quant_backward(task, count, threads, resolved);
    return {sums.v, by_width(sums, task.widths.coarse)};
}

py::dict isa_reasons() {
    py::dict reasons;
    for (lbs::Isa isa : lbs::kIsas)
        reasons[lbs::isa_name(isa)] = lbs::isa_reason(isa);
    return reasons;
}

using Pointers = std::vector<uintptr_t>;

template <class T>
std::vector<T*> pointers(const Pointers& addresses) {
    std::vector<T*> result;
    for (uintptr_t address : addresses) result.push_back(pointer<T>(address));
    return result;
}

std::unique_ptr<lbs::Runner> make_runner(const std::string& text, uintptr_t blob, int64_t blob_bytes,
                                         const std::string& isa, const std::vector<std::string>& algorithms) {
    lbs::require(blob_bytes >= 0, "blob_bytes is " + std::to_string(blob_bytes) + "; it cannot be negative");
    py::gil_scoped_release release;
    return std::make_unique<lbs::Runner>(text, pointer<const unsigned char>(blob), blob_bytes, isa, algorithms);
}

void check_program(const std::string& text, uintptr_t blob, int64_t blob_bytes) {
    lbs::require(blob_bytes >= 0, "blob_bytes is " + std::to_string(blob_bytes) + "; it cannot be negative");
    py::gil_scoped_release release;
    lbs::ProgramSpec(text, pointer<const unsigned char>(blob), blob_bytes);
}

void run(lbs::Runner& runner, const Pointers& inputs, const Pointers& outputs, int64_t batch, int threads,
         const std::vector<bool>& channels_last) {
    const auto in = pointers<const void>(inputs);
    const auto out = pointers<float>(outputs);
    py::gil_scoped_release release;
    runner.run(in, channels_last, out, batch, threads, {}, nullptr);
}

void run_traced(lbs::Runner& runner, const Pointers& inputs, const Pointers& outputs, int64_t batch, int threads,
                const std::map<int, uintptr_t>& traces, const std::vector<bool>& channels_last) {
    const auto in = pointers<const void>(inputs);
    const auto out = pointers<float>(outputs);
    std::map<int, void*> targets;
    for (const auto& [tensor, address] : traces) targets[tensor] = pointer<void>(address);
    py::gil_scoped_release release;
    runner.run(in, channels_last, out, batch, threads, targets, nullptr);
}

std::vector<int64_t> sizes_of(const lbs::Network::Shape& shape) {
    if (shape.rank == 1) return {shape.channels};
    return {shape.channels, shape.height, shape.width};
}

void run_network(const lbs::Network& network, uintptr_t images, uintptr_t output, int64_t count, int threads,
                 bool channels_last) {
    py::gil_scoped_release release;
    network.run(pointer<const void>(images), channels_last, count, threads, pointer<float>(output));
}

void register_file_errors() {
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const lbs::FileError& e) {
            lbs::set_error("CheckpointError", e);
        } catch (const lbs::Unsupported& e) {
            lbs::set_error("BackendError", e);
        }
    });
}

std::vector<double> step_times(lbs::Runner& runner, const Pointers& inputs, const Pointers& outputs, int64_t batch,
                               int threads, const std::vector<bool>& channels_last) {
    const auto in = pointers<const void>(inputs);
    const auto out = pointers<float>(outputs);
    std::vector<double> seconds;
    py::gil_scoped_release release;
    runner.run(in, channels_last, out, batch, threads, {}, &seconds);
    return seconds;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Packed kernels for the processor. Pointers are addresses of contiguous memory.";
    lbs::register_errors();
    register_file_errors();

    module.attr("WORD") = lbs::kWord;
    module.attr("FORMAT_VERSION") = lbs::kFormatVersion;
    module.attr("PROGRAM_VERSION") = lbs::kProgramVersion;
    module.attr("BLOB_ALIGNMENT") = lbs::kBlobAlignment;
    module.attr("MAX_BITS") = lbs::kMaxBits;

    module.def(
        "cpu_features",
        [] {
            py::dict features;
            for (const auto& [name, present] : lbs::cpu_features()) features[name.c_str()] = present;
            return features;
        },
        "What the processor and the operating system allow: dict of name -> bool.");
    module.def("isa_reasons", &isa_reasons, "dict of instruction set -> why it cannot run here ('' where it can).");
    module.def(
        "resolve_isa", [](const std::string& name) { return std::string(lbs::isa_name(lbs::resolve_isa(name))); },
        py::arg("name") = "auto", "The instruction set `name` stands for. Raises BackendError.");

    module.def("fake_quant_forward", &fake_quant_forward, py::arg("x_ptr"), py::arg("y_ptr"), py::arg("count"), py::arg("v"),
               py::arg("scales"), py::arg("steps"), py::arg("levels"), py::arg("zeros"),
               py::arg("shares"), py::arg("is_signed") = false,
               py::arg("threads") = 1, py::arg("dtype") = 0, py::arg("isa") = "auto",
               "y at the last of the widths; returns sum |clip(x) - y_j| for each width j before it. dtype: 0 float32, 1 "
               "bfloat16 (arithmetic is float32).");
    module.def("fake_quant_backward", &fake_quant_backward, py::arg("x_ptr"), py::arg("gy_ptr"), py::arg("gx_ptr"),
               py::arg("count"), py::arg("v"), py::arg("scales"), py::arg("steps"), py::arg("levels"),
               py::arg("zeros"), py::arg("shares"), py::arg("is_signed") = false, py::arg("threads") = 1, py::arg("dtype") = 0, py::arg("isa") = "auto",
               "gx = gy inside the range, else 0; returns the gradient of v, and sum gy * (y - y_j) for each width j "
               "before the last, which is y's.");

    module.def("check_program", &check_program, py::arg("text"), py::arg("blob_ptr"), py::arg("blob_bytes"),
               "Reads a program as Program does and lays out nothing. Raises FormatError with the `rule` it breaks.");

    py::class_<lbs::Runner>(module, "Program", "A packed program laid out for this processor.")
        .def(py::init(&make_runner), py::arg("text"), py::arg("blob_ptr"), py::arg("blob_bytes"),
             py::arg("isa") = "auto", py::arg("algorithms") = std::vector<std::string>(),
             "Reads the JSON text and copies what it needs of the blob. algorithms: for every step, or none: "
             "\"direct\", \"lanes\", \"winograd\", \"lanes-or-direct\", \"winograd-or-direct\" (where the former cannot serve) or \"\" (the one expected to be "
             "faster). Raises FormatError, BackendError.")
        .def("run", &run, py::arg("input_ptrs"), py::arg("output_ptrs"), py::arg("batch"), py::arg("threads") = 1,
             py::arg("channels_last") = std::vector<bool>(),
             "Inputs: addresses of images [batch, C, H, W], float32 or uint8, in memory [batch, H, W, C] where "
             "channels_last says so; outputs: of contiguous float32 [batch, C, H, W]. Releases the interpreter lock.")
        .def("run_traced", &run_traced, py::arg("input_ptrs"), py::arg("output_ptrs"), py::arg("batch"),
             py::arg("threads"), py::arg("trace_ptrs"), py::arg("channels_last") = std::vector<bool>(),
             "As run; trace_ptrs is tensor -> address of [batch, H, W, C], uint8 for codes, the stream type for "
             "streams.")
        .def("step_times", &step_times, py::arg("input_ptrs"), py::arg("output_ptrs"), py::arg("batch"),
             py::arg("threads") = 1, py::arg("channels_last") = std::vector<bool>(),
             "As run; returns the seconds spent in every step, the mean over the threads.")
        .def_property_readonly("isa", &lbs::Runner::isa, "The instruction set in use.")
        .def_property_readonly("algorithms", &lbs::Runner::algorithms,
                               "How each step is computed; empty where there is one way.")
        .def_property_readonly("image_bytes", &lbs::Runner::image_bytes, "Bytes of all tensors of one image.")
        .def_property_readonly("held_bytes", &lbs::Runner::held_bytes,
                               "Bytes of working memory held for further calls.");

    py::class_<lbs::Network>(module, "Network", "A packed file of one program, laid out for this processor.")
        .def(py::init([](const std::string& path, double budget) {
                 py::gil_scoped_release release;
                 return std::make_unique<lbs::Network>(path, budget);
             }),
             py::arg("path"), py::arg("budget") = 1.0, "Raises CheckpointError, BackendError.")
        .def("run", &run_network, py::arg("images_ptr"), py::arg("output_ptr"), py::arg("count"), py::arg("threads") = 1,
             py::arg("channels_last") = false, "As Program.run, of one input and one output.")
        .def_property_readonly("takes_bytes", &lbs::Network::takes_bytes, "Whether images are uint8, not float32.")
        .def_property_readonly("input_shape", [](const lbs::Network& self) { return sizes_of(self.input()); })
        .def_property_readonly("output_shape", [](const lbs::Network& self) { return sizes_of(self.output()); });
}
