// Constants of the plane and program format; lbs_kernels/program/planes.py and steps.py state the same ones and a test
// compares them.
#pragma once

namespace lbs {

constexpr int kWord = 32;           // channels in one plane word
constexpr int kFormatVersion = 1;   // planes
constexpr int kProgramVersion = 2;  // program text
constexpr int kBlobAlignment = 64;  // bytes
constexpr int kMaxBits = 8;         // of a code

}  // namespace lbs
