// Tensors in their logical form, for verification.
#pragma once

#include <map>
#include <vector>

#include "program/plan_builder.h"

namespace lbs {

// Writes image `image` of every tensor of `written` that `traces` asks for: [batch, H, W, C], uint8 for codes, the
// stream type for streams.
void export_tensors(const ProgramPlan& plan, const std::vector<int>& written, const std::map<int, void*>& traces,
                    int64_t image, unsigned char* const* tensors);

}  // namespace lbs
