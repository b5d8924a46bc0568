// What one image costs in a packed network, by shapes alone: mirrors lbs/packing/work.py.
#pragma once

#include "program/program.h"

namespace lbs {

// Raises FormatError where one image of a program takes more than `budget` times what a file may cost by itself: before
// anything of it is laid out.
void check_work(const ProgramSpec& program, double budget);

}  // namespace lbs
