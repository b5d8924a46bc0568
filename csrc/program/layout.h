// Where the codes of a tensor lie (see plan.h), and how vectors of output pixels meet them.
#pragma once

#include <cstdint>
#include <vector>

#include "common/memory.h"
#include "program/plan.h"
#include "program/program.h"

namespace lbs {

// Arrays that live as long as a program; addresses stay valid.
class Store {
public:
    template <class T>
    T* make(size_t count) {
        blocks_.emplace_back(static_cast<int64_t>(count * sizeof(T)), kSlack);
        return reinterpret_cast<T*>(blocks_.back().get());
    }
    // `values` continued with zeros to a multiple of kChannelPadding.
    const float* padded(const float* values, int count);
    const int32_t* keep(const std::vector<int32_t>& values);

private:
    std::vector<Buffer> blocks_;
};

struct CodeLayout {
    int height = 0, width = 0, groups = 0;  // groups of four channels
    int top = 0, bottom = 0, left = 0, right = 0;
    int phases = 1;       // columns are kept apart by their remainder
    int zero = 0;         // the code that padding holds
    bool is_row = false;  // all pixels in one row of whole vectors, whose padding nobody reads

    int phase_width() const { return (left + width + right + phases - 1) / phases; }
    int64_t group_pitch() const { return int64_t{4} * phases * phase_width(); }
    int64_t row_pitch() const { return groups * group_pitch(); }
    // Where a row begins, with its padding.
    int64_t row(int y) const { return (top + y) * row_pitch(); }
    bool has_rows_of(const CodeLayout& other) const {
        return width == other.width && left == other.left && right == other.right && phases == other.phases &&
               height == other.height;
    }
    int64_t bytes() const { return (top + height + bottom) * row_pitch(); }
    // Byte of channel 0 of pixel (y, x); negative coordinates reach into the padding.
    int64_t offset(int y, int x) const {
        const int column = x + left;
        return (y + top) * row_pitch() + 4 * (static_cast<int64_t>(column % phases) * phase_width() + column / phases);
    }
    int64_t offset(int y, int x, int channel) const { return offset(y, x) + channel / 4 * group_pitch() + channel % 4; }
    bool operator==(const CodeLayout& other) const {
        return height == other.height && width == other.width && groups == other.groups && top == other.top &&
               bottom == other.bottom && left == other.left && right == other.right && phases == other.phases &&
               zero == other.zero && is_row == other.is_row;
    }
};

// The layouts of all code tensors, each wide enough for every step that reads it.
std::vector<CodeLayout> choose_layouts(const ProgramSpec& program);

// Bytes from the place a vector map points at to each tap of a window, in (row, group, column) order over `groups`
// groups starting at the map's.
std::vector<int32_t> window_offsets(const CodeLayout& layout, const StepSpec& step, int groups);

// Vectors of output pixels [height, width] as read by a step of this stride, and as written to the tensor itself.
PixelMap load_map(Store& store, const CodeLayout& layout, int height, int width, Pair stride, int lanes);
// Vectors of pixels that follow each other.
PixelMap line_map(Store& store, int vectors, int lanes);
// Of an image whose pixels are repeated by whole factors to [height, width]; offsets from pixel (0, 0) of the codes, or
// of a plane of floats.
PixelMap repeat_map(Store& store, const CodeLayout& layout, int height, int width, int lanes);
PixelMap repeat_map(Store& store, const TensorSpec& stream, int height, int width, int lanes);
PixelMap store_map(Store& store, const CodeLayout& layout, int lanes);

// Vectors that end where a row of the output does: one piece each, where rows do not fill whole vectors.
struct RowMaps {
    PixelMap load, store;
    int vectors = 0;  // 0: there are none
};
RowMaps row_maps(Store& store, const CodeLayout& from, const CodeLayout& to, const TensorSpec& target, Pair stride,
                 int lanes);

inline int vector_count(int64_t pixels, int lanes) { return static_cast<int>((pixels + lanes - 1) / lanes); }
uint32_t tail_mask(int64_t pixels, int lanes);

}  // namespace lbs
