// What program/schema.h is made of: the records of a program's JSON as tables. lbs_kernels/program/schema.py says what
// they mean.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lbs {
namespace schema {

enum class Kind { kInt, kNumber, kBool, kText, kChoice, kRecord, kStep };
enum class Count { kOne, kPair, kList, kMap };

struct Record;

struct Field {
    const char* name;
    Kind kind;
    Count count;
    bool nullable;
    const char* fallback;        // JSON text; null where the key is required
    const char* const* choices;  // ends with null
    const Record* record;
};

struct Record {
    const char* name;
    const Field* fields;
    size_t count;
};

struct StepRecord {
    const char* op;
    const Record* record;
};

struct CodePoints {
    uint32_t first, last;
};

}  // namespace schema
}  // namespace lbs
