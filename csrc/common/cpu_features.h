// What the processor and the operating system let a program execute, asked once.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace lbs {

enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kAmx, kAmxModel, kNeon, kNeonI8mm };

constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2,     Isa::kAvxVnni, Isa::kAvx512Vnni,
                         Isa::kAmx,      Isa::kAmxModel, Isa::kNeon,    Isa::kNeonI8mm};

// Isa for the name of one, or "auto": the one that LBS_ISA names, else the best one that can run.
// Raises BackendError for another name, and for an instruction set this machine or this build lacks.
Isa resolve_isa(const std::string& name);
const char* isa_name(Isa isa);

// Why `isa` cannot run here; empty when it can.
std::string isa_reason(Isa isa);

// Flags that decide the choice, in a fixed order, for `lbs doctor`.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace lbs
