// Errors of the native side. They become lbs_kernels.errors.FormatError and BackendError in Python.
#pragma once

#include <stdexcept>
#include <string>

namespace lbs {

// A program, blob or argument that breaks a rule of the format.
struct FormatError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An instruction set or device that was named and is not there.
struct BackendError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool ok, const std::string& message) {
    if (!ok) throw FormatError(message);
}

}  // namespace lbs
