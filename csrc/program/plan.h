// What the kernels of an instruction set are told: plain structures, laid out once per program by plan_builder.
//
// Layouts, per image:
//   codes    bytes [row][group][column][4]: four channels of one pixel lie together as one 32-bit lane, the groups of a
//            row follow each other, padding included. Sixteen pixels of a row are one vector; a step of the
//            convolution multiplies them with four weights of one filter, broadcast, and so any multiple of four kept
//            filters runs without an idle lane. (kernel row, group) pairs lie a constant distance apart.
//            A tensor read with a stride s keeps columns apart by their remainder: [row][group][column % s][column /
//            s][4].
//   streams  float32 [channel][pixel], values already rounded to the stream type.
//
// A vector is L consecutive output pixels in row-major order, so it may span rows: then it lies in several pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lbs {

constexpr int kMaxLanes = 16;
constexpr int kMaxTile = 64;         // vectors of accumulators in the scratch of one thread
constexpr int kSlack = 128;          // bytes readable past the end of every buffer
constexpr int kChannelPadding = 16;  // arrays per channel are padded to a multiple of this

// A run of lanes of one vector that lies contiguous: lane i of `mask` at offset + 4 * i (loads and plain stores), or,
// in a compressing map, the lanes of `mask` one after the other from `offset` on.
struct Piece {
    int32_t offset;
    uint32_t mask;
};

struct PixelMap {
    int pieces = 1;  // 1: every vector whole and contiguous; 2, 4, 8: masked pieces; 0: one offset per lane
    bool compress = false;
    const Piece* table = nullptr;    // [vectors][pieces]
    const int32_t* lanes = nullptr;  // [vectors][kMaxLanes] where pieces == 0
};

enum class StreamType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

struct ConsumerPlan {
    int tensor = 0;
    float scale = 1.0f;
    float low = 0.0f, high = 0.0f;  // -zero and n - zero
    float least = 0.0f;             // low, or 0 where negative values of a ReLU in front of a zero end
    float half = 0.0f;              // n / 2, added where `shifted` (signed codes)
    bool shifted = false, relu = false;
    int zero = 0;
    const float* gain = nullptr;  // pre-activation norm, or none
    const float* offset = nullptr;
    PixelMap map;
    int32_t group_pitch = 0;  // bytes from one group of four channels to the next
};

enum class ActivationKind : int {
    kNone,
    kElu,
    kGelu,
    kGeluTanh,
    kHardsigmoid,
    kHardswish,
    kLeakyRelu,
    kMish,
    kPrelu,
    kSigmoid,
    kSilu,
    kTanh
};

struct ActivationPlan {
    ActivationKind kind = ActivationKind::kNone;
    float value = 0.0f;            // alpha of elu, slope of leaky_relu
    const float* slope = nullptr;  // of prelu, per channel
};

struct EmitPlan {
    int channels = 0;
    int64_t pixels = 0;      // of the output map
    int vectors = 0;         // ceil(pixels / L)
    uint32_t tail_mask = 0;  // valid lanes of the last vector
    int gate = -1, residual = -1, stream = -1;
    StreamType stream_type = StreamType::kFloat32;
    ActivationPlan before, behind;  // of gate and residual; at most one is there
    bool is_plain = true;           // neither activation nor gate
    bool has_low = false, has_high = false;
    float low = 0.0f, high = 0.0f;
    int consumer_count = 0;
    const ConsumerPlan* consumers = nullptr;
};

// What a quantpack step reads: float32 or bytes, then y = fma(x, gain[c], offset[c]) where there are any.
struct ReadPlan {
    bool bytes = false;
    const float* gain = nullptr;
    const float* offset = nullptr;
};

// acc = (dot << shift) + (sum of the window's codes << sum_shift, where needed) + constant[filter]
struct AccumulatorPlan {
    int shift = 0;
    bool needs_sum = false;
    int sum_shift = 0;
    const int32_t* constant = nullptr;
    const float* multiplier = nullptr;
    const float* bias = nullptr;
};

// `width` filters that share an input range; weights int8 [k_steps][width][4], `ones` the same with 1 where a channel
// counts.
struct FilterBlock {
    int first = 0, width = 0;
    int32_t in_offset = 0;
    const int8_t* weights = nullptr;
    const int8_t* ones = nullptr;  // grouped layers of 8-bit weights only
};

struct ConvPlan {
    int input = 0;
    int k_steps = 0;
    const int32_t* k_offsets = nullptr;  // bytes, [k_steps]
    PixelMap map;
    int block_count = 0;
    const FilterBlock* blocks = nullptr;
    const int8_t* shared_ones = nullptr;  // [k_steps][1][4]: the window's sum, the same for all filters
    const int8_t* tiles = nullptr;        // AMX: [ceil(filters / 16)][ceil(k_steps / 16)][16][64]
    bool wide = false;                    // products of a pair may exceed 16 bits
    AccumulatorPlan acc;
    EmitPlan emit;
};

struct LinearPlan {
    int input = 0;
    int outputs = 0;
    int64_t in_offset = 0, in_pitch = 4;  // bytes to the pixel, and from one group of channels to the next
    int k_steps = 0;
    const int8_t* weights = nullptr;  // [ceil(outputs / L)][k_steps][L][4]
    const int8_t* ones = nullptr;     // [k_steps][4]
    bool wide = false;
    AccumulatorPlan acc;
    EmitPlan emit;
};

struct PoolCodesPlan {  // maximum of codes whose padding (code 0) never wins
    int input = 0, output = 0;
    int window = 0;
    const int32_t* window_offsets = nullptr;  // bytes
    int groups = 0;
    int32_t in_pitch = 0, out_pitch = 0;  // bytes between groups
    int vectors = 0;
    uint32_t tail_mask = 0;
    PixelMap in_map, out_map;
};

// One input of a selection: pixel (0, 0) of its channel 0 or group 0, and how output pixels meet it.
struct SelectSource {
    int tensor = 0;
    int32_t first = 0;      // bytes, of codes
    int64_t pitch = 0;      // bytes from one group (codes) or channel (streams) to the next
    bool is_alike = false;  // output pixels of a row, or of a stream, lie as in the input, padding included
    int64_t row = 0, row_pitch = 0;  // of codes: bytes to the first row, with its padding, and from row to row
    PixelMap map;                    // of codes, and of streams that are not alike
    // Where pixels are moved: bytes to the row and the column that are read for each of the result, of places of a
    // block that read this input.
    const int64_t* rows = nullptr;
    const int64_t* columns = nullptr;
    bool is_dense = false;  // of codes: columns that are read for one place of a block after the other lie side by side
};

struct SelectPlace {
    int source = 0, channel = 0;
};

struct SelectPlan {
    const SelectSource* sources = nullptr;
    // Of every channel that is written, continued with the last to whole groups; one place of a block after the other.
    const SelectPlace* places = nullptr;
    int groups = 0;
    int block_rows = 1, block_columns = 1;
    int height = 0, width = 0;  // of the result where pixels are moved, else 0
    const int64_t* out_rows = nullptr;  // of codes, as in SelectSource
    const int64_t* out_columns = nullptr;
    int output = 0;  // of codes, from here on
    int rows = 0;
    int64_t out_row = 0, out_row_pitch = 0;
    int32_t out_pitch = 0;
    PixelMap out_map;
};

// Where the tensors of one image are, and working memory of one thread.
struct RunContext {
    unsigned char* const* tensors;
    int32_t* accumulators;  // [kMaxTile][kMaxLanes]
    int32_t* sums;          // as many lanes as the largest output map has, rounded up
    int8_t* tile_pack;      // AMX: [2][ceil(k_steps / 16)][16][64]
};

}  // namespace lbs
