// A packed file of one program, ready to run: mirrors lbs/packing/serial.py for networks that are packed whole.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "program/runner.h"

namespace lbs {

// A file that is missing, damaged, foreign, newer, claims what it does not hold, or asks for more work than its budget.
struct FileError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A network of several programs, or with parts in float: lbs runs it, this reader does not.
struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Network {
public:
    // budget: how many times what a file may cost by itself one image may; infinity allows anything. The rules are those of
    // docs/format.md; of a file's `plan`, which is information only, nothing is read. Raises FileError, Unsupported,
    // BackendError.
    Network(const std::string& path, double budget);

    // Of one image; rank 1 is [channels], 3 [channels, height, width].
    struct Shape {
        int rank;
        int64_t channels, height, width;
        int64_t elements() const { return channels * height * width; }
    };
    const Shape& input() const { return input_; }
    const Shape& output() const { return output_; }
    bool takes_bytes() const { return takes_bytes_; }

    // images: `count` of them, float32 or bytes, channels first or last; output: float32 [count, output()], channels first.
    // Calls from several threads run at once. Raises FormatError for a negative count, one whose images have more bytes
    // than an int64 counts, or no thread.
    void run(const void* images, bool channels_last, int64_t count, int threads, float* output) const;

private:
    void read(const std::string& path, double budget);

    Shape input_{}, output_{};
    bool takes_bytes_ = false;
    size_t place_ = 0;                     // of what the network returns, among the program's outputs
    std::vector<int64_t> other_elements_;  // of its outputs that nobody reads, per image; 0 for the one that is returned
    std::unique_ptr<Runner> runner_;
};

}  // namespace lbs
