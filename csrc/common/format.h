// Written by `python -m lbs_kernels.program.schema`; change what it reads and run it again.
#pragma once

#include <cstdint>

namespace lbs {

constexpr int kWord = 32;  // channels in one plane word
constexpr int kFormatVersion = 1;  // planes
constexpr int kProgramVersion = 5;  // program text
constexpr int kBlobAlignment = 64;  // bytes
constexpr int kMaxBits = 8;  // of a code
constexpr int64_t kMaxText = 67108864;  // characters of a program text
constexpr int kMaxDepth = 64;  // lists and objects inside one another
constexpr int kMaxDigits = 4300;  // of a whole number
constexpr int64_t kMaxCount = 65536;  // tensors, steps, arrays
constexpr int64_t kMaxSize = 16777216;  // one dimension
constexpr int64_t kMaxElements = 268435456;  // one tensor of one image, padding included
constexpr int64_t kMaxName = 256;  // characters

}  // namespace lbs
