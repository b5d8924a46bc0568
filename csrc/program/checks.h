// The rules a program must keep, in the order of lbs_kernels/program/checks.py, which says them in full.
#pragma once

#include "program/program.h"

namespace lbs {

// Raises FormatError with the name of the first rule that is broken.
void check_program(const ProgramSpec& program, int64_t blob_bytes);

// Whether a character of a name may be shown as it is (docs/format.md, "Limits").
bool is_printable(uint32_t code);

// The steps: mirrors lbs_kernels/program/walk.py.
void walk_program(const ProgramSpec& program);

}  // namespace lbs
