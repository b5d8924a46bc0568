// Hands the native errors to Python as the classes of lbs_kernels.errors.
#pragma once

#include <pybind11/pybind11.h>

#include "common/check.h"

namespace lbs {

inline void set_python_error(const char* name, const char* message) {
    const pybind11::object type = pybind11::module_::import("lbs_kernels.errors").attr(name);
    PyErr_SetString(type.ptr(), message);
}

inline void register_errors() {
    pybind11::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const FormatError& e) {
            set_python_error("FormatError", e.what());
        } catch (const BackendError& e) {
            set_python_error("BackendError", e.what());
        }
    });
}

}  // namespace lbs
