// Hands the native errors to Python as the classes of lbs_kernels.errors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>

#include "common/check.h"

namespace lbs {

inline pybind11::object error_class(const char* name) {
    return pybind11::module_::import("lbs_kernels.errors").attr(name);
}

// `name`: a class of lbs_kernels.errors; `more` are its further arguments.
template <class... More>
void set_error(const char* name, const std::exception& error, const More&... more) {
    // A message may quote a name of the program, and a name may be half of a surrogate pair.
    const auto message = pybind11::reinterpret_steal<pybind11::object>(
        PyUnicode_DecodeUTF8(error.what(), static_cast<Py_ssize_t>(std::strlen(error.what())), "replace"));
    const pybind11::object type = error_class(name);
    PyErr_SetObject(type.ptr(), type(message, more...).ptr());
}

inline void register_errors() {
    pybind11::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const FormatError& e) {
            set_error("FormatError", e, e.rule);
        } catch (const BackendError& e) {
            set_error("BackendError", e);
        }
    });
}

}  // namespace lbs
