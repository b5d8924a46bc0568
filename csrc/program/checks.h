// The rules a program must keep, in the order of lbs_kernels/program/checks.py, which says them in full.
#pragma once

#include "program/program.h"

namespace lbs {

// Raises FormatError with the name of the first rule that is broken.
void check_program(const ProgramSpec& program, int64_t blob_bytes);

// The steps: mirrors lbs_kernels/program/walk.py.
void walk_program(const ProgramSpec& program);

}  // namespace lbs
