// A kernel that is built, by the name that Python knows it by.
#pragma once

#include <string>

#include "common/check.h"
#include "cuda/index.h"

namespace lbs::gpu {

struct TileRow {
    const char* machine;
    int groups, filters, stages, shared_bytes;  // groups of 64 pixels
    bool clusters = false;                      // thread blocks may share K of a tile
};

inline bool same_row(const TileRow& a, const TileRow& b) {
    return std::string(a.machine) == b.machine && a.groups == b.groups && a.filters == b.filters &&
           a.stages == b.stages;
}

// The row of a name and sizes. Raises FormatError.
template <size_t kRows>
const TileRow& find_row(const TileRow (&rows)[kRows], const std::string& machine, int groups, int filters, int stages) {
    for (const TileRow& row : rows) {
        if (same_row(row, {machine.c_str(), groups, filters, stages, 0})) return row;
    }
    throw FormatError("no kernel " + machine + " of " + std::to_string(kWarpgroupRows * groups) + " x " +
                      std::to_string(filters) + " tiles with " + std::to_string(stages) +
                      " stages is built; take a row of its tiles.h");
}

}  // namespace lbs::gpu
