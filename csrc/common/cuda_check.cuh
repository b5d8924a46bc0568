// Status checks and the device guard of the CUDA modules: every call is looked at, every failure says what was being
// done.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "common/check.h"

namespace lbs {

inline void cuda_check(cudaError_t status, const std::string& doing) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // forget it, so that the next call does not report it again
    throw BackendError(doing + " failed: " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// Makes `device` current until the end of the scope.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        cuda_check(cudaGetDevice(&before_), "asking for the current GPU");
        if (device != before_) cuda_check(cudaSetDevice(device), "choosing GPU " + std::to_string(device));
        changed_ = device != before_;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);  // it was current before; a destructor could not report a failure
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace lbs
