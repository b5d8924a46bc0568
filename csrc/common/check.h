// Errors of the native side. They become lbs_kernels.errors.FormatError and BackendError in Python.
#pragma once

#include <stdexcept>
#include <string>

namespace lbs {

// A program, blob or argument that breaks a rule of the format.
struct FormatError : std::runtime_error {
    explicit FormatError(const std::string& message, const char* broken = "")
        : std::runtime_error(message), rule(broken) {}
    const char* rule;  // of a program: its name in program/schema.h; else empty
};

// An instruction set or device that was named and is not there, or a program that it cannot hold.
struct BackendError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool ok, const std::string& message) {
    if (!ok) throw FormatError(message);
}

[[noreturn]] inline void refuse(const char* rule, const std::string& message) { throw FormatError(message, rule); }

}  // namespace lbs
