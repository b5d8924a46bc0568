// The JSON of a program against its schema, as lbs_kernels/program/text.py reads it.
#pragma once

#include "common/json.h"
#include "program/record.h"

namespace lbs {

// Raises FormatError where `body` is not an object of `record`: keys that are unknown or missing, values of another
// type. Afterwards it has every key of every record: those that were left out have their defaults.
void conform(Json& body, const schema::Record& record);

}  // namespace lbs
