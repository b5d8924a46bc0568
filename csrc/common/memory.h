// Memory that kernels work in: aligned to cache lines unless guarded, zero at first, with bytes behind it that may be read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace lbs {

// What LBS_GUARD makes of memory that kernels work in, so that one that leaves it ends the process, by whatever
// instruction. kNone unless set; else a page lies at an end of every buffer, without a byte between.
enum class Guard {
    kNone,
    kReads,   // that behind it and its slack cannot be touched
    kWrites,  // that behind it can be read only: the slack
    kStart    // that in front of it cannot be touched
};

// Raises BackendError where LBS_GUARD is none of "reads", "writes" and "start".
Guard guard();

class Buffer {
public:
    Buffer() = default;
    // `slack`: bytes behind that may be read. Raises std::bad_alloc, BackendError.
    Buffer(int64_t bytes, int64_t slack);

    unsigned char* get() const { return data_; }

private:
    struct Release {
        size_t mapped;  // bytes; 0: from the heap
        void operator()(unsigned char* base) const;
    };
    std::unique_ptr<unsigned char, Release> base_;
    unsigned char* data_ = nullptr;
};

}  // namespace lbs
