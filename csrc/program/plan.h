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
constexpr int kSlack = 128;          // bytes readable past the end of every buffer; who reads there says "Slack:"
constexpr int kPrefetched = 4;       // vectors whose lines are asked for before they are stored
constexpr int kShortSteps = 32;      // of four products, of sums that are short
constexpr int kShortTaps = 16;       // of a depthwise kernel that is computed so
constexpr int kMaxQuads = 128;       // of four taps, of a depthwise kernel: 22 x 22
constexpr int kChannelPadding = 16;  // arrays per channel are padded to a multiple of this

// A run of lanes of one vector that lies contiguous: lane i of `mask` at offset + 4 * i (loads and plain stores), or,
// in a compressing map, the lanes of `mask` one after the other from `offset` on.
struct Piece {
    int32_t offset;
    uint32_t mask;
};

struct PixelMap {
    int pieces = 1;  // 1: every vector contiguous, and whole if neither `masked` nor `over`; 2, 4, 8: pieces; 0: one
                     // offset per lane
    bool compress = false;
    bool over = false;  // the last vector may be stored whole
    bool masked = false;
    const Piece* table = nullptr;    // [vectors][pieces], continued with kPrefetched times the last
    const int32_t* lanes = nullptr;  // [vectors][kMaxLanes] where pieces == 0
};

enum class StreamType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// Codes made of another reader's: ((q, from least to most, - least) * factor + offset) >> shift, which fits 16 bits.
struct CodeScale {
    bool holds = false;
    int least = 0, most = 0, factor = 0, offset = 0, shift = 0;
};

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
    float step = 0.0f;   // of codes that stand for the value from here on; 0: they do not
    CodeScale of_first;  // where the first reader's codes stand for the value
    PixelMap map;
    int32_t group_pitch = 0;  // bytes from one group of four channels to the next
};

// A residual of codes: float(q - zero) * step.
struct CodedPlan {
    int tensor = -1;
    float zero = 0.0f, step = 0.0f;
    PixelMap map;
    int64_t first = 0;        // bytes to pixel (0, 0)
    int32_t group_pitch = 0;  // as above
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
    int64_t pixels = 0;                         // of the output map
    int vectors = 0;                            // ceil(pixels / L)
    uint32_t tail_mask = 0;                     // valid lanes of the last vector
    int gate = -1, residual = -1, stream = -1;  // residual: of floats
    CodedPlan coded;
    StreamType stream_type = StreamType::kFloat32;
    ActivationPlan before, behind;  // of gate and residual; at most one is there
    bool is_plain = true;           // neither activation nor gate
    // Neither, a stream of float32, and readers of unsigned codes without a norm: the first, and others whose codes are
    // made of its codes or, where no codes stand for the stream, likewise of floats.
    bool is_lean = false;
    // All others follow the first; no float residual, stream or upper bound, and numbers that are 32-bit integers once
    // they are rounded, and a zero is added, though they are not clamped yet.
    bool is_usual = false;
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
    float largest = 0.0f;  // magnitude of what any 32-bit accumulator becomes
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
    // Where 1x1 windows read a strided part of pixels that lie side by side: that part is copied first, all pixels of a
    // group of channels together, and stands for the input.
    bool is_thinned = false;
    PixelMap thinned_from;
    int groups = 0;                              // of four channels
    int64_t thinned_pitch = 0;                   // bytes from one to the next
    int64_t thinned_first = 0, group_pitch = 0;  // of the input
    int k_steps = 0;
    const int32_t* k_offsets = nullptr;  // bytes, [k_steps]
    PixelMap map;
    int block_count = 0;
    const FilterBlock* blocks = nullptr;
    const int8_t* shared_ones = nullptr;  // [k_steps][1][4]: the window's sum, the same for all filters
    const int8_t* tiles = nullptr;        // AMX: [ceil(filters / 16)][ceil(k_steps / 16)][16][64]
    bool wide = false;                    // products of a pair may exceed 16 bits
    bool is_short = false;                // few products in a sum, and a lean epilogue
    // Of a depthwise kernel whose epilogue is usual: int8 [groups][tap_quads][4 channels][4 taps], and bytes from an
    // output pixel's place to each tap. The last quad may hold one tap alone.
    const int8_t* tap_weights = nullptr;
    const int32_t* tap_offsets = nullptr;
    int tap_quads = 0;
    bool last_alone = false;
    AccumulatorPlan acc;
    EmitPlan emit;
};

// Where the pixels of a map lie in a tensor of codes, from the first of four channels on.
struct PixelOffsets {
    const int32_t* offsets = nullptr;  // bytes, [pixels]
    bool is_joined = false;            // those of a row lie side by side
    const uint8_t* is_run = nullptr;   // of each four of a group that is multiplied together: side by side
};

// What is made of sums whose filters are on the lanes, where it is made as they lie.
struct PixelPlan {
    bool is_placed = false;
    int pixels = 0;
    const PixelOffsets* outputs = nullptr;  // of every reader
    PixelOffsets residual;                  // of codes
};

// Places of the 4 x 4 in the order in which they are multiplied: rows 1, 3, 2, 0 of each column. Sums that start at a
// row 1 or 2 go on with the next; weights of row 1 are stored negative.
constexpr int kPlaceOrder[16] = {4, 12, 8, 0, 5, 13, 9, 1, 6, 14, 10, 2, 7, 15, 11, 3};

// `width` filters, whole vectors where they lie on the lanes; weights int8 [place in order][groups][width][4], start
// int32 [sum][width]: it takes off what the shift of the inputs adds.
struct WinogradBlock {
    int first = 0, width = 0;
    const int8_t* weights = nullptr;
    const int32_t* start = nullptr;
};

// A 3 x 3 convolution of stride 1 in tiles of 2 x 2 output pixels (winograd_kernel.h). A unit is the fewest rows of
// tiles whose output pixels are whole vectors, or one where filters lie on the lanes; a chunk is what is computed
// together.
struct WinogradPlan {
    int input = 0;
    int height = 0, width = 0;  // of the output map
    int groups = 0;
    int64_t first = 0, row_pitch = 0, group_pitch = 0;  // of the codes, from the first tile's upper left
    int shift = 0;                                      // added to transformed codes, as they may be negative
    int unit_rows = 1, unit_count = 0, chunk_units = 1;
    int chunk_vectors = 0, chunk_runs = 0;     // at most
    int64_t input_bytes = 0, place_pitch = 0;  // of one vector and place of transformed codes
    int64_t dot_pitch = 0;                     // integers from one filter's dots to the next's
    // Of the blocks: filters, and filters times vectors of tiles, or vectors of filters times tiles
    int widest_filters = 0, widest_block = 0;
    int quads_per_place = 0;  // emitted after every place, of a block before
    int tiles = 0;            // multiplied together, where filters lie on the lanes; else 0
    PixelPlan made;
    int block_count = 0;
    const WinogradBlock* blocks = nullptr;
    AccumulatorPlan acc;
    EmitPlan emit;
};

// A convolution of every channel for itself. Rows of four channels are spread first: the codes that four taps of a row
// meet lie side by side, [quad][vector][channel][pixel][tap], so that a dot multiplies nothing but them.
struct DepthwisePlan {
    int input = 0;
    int groups = 0;                  // of four channels
    int width = 0;                   // pixels of an output row
    int kernel_rows = 0, quads = 0;  // of four taps, in a row of the kernel
    int stride = 1, dilation = 1;    // from row to row
    const int32_t* taps = nullptr;   // [quads][4]: bytes from an output pixel's first tap to the others of its row
    int spread = 0;                  // pixels of a spread row, whole vectors
    int ring = 0;                    // spread rows that are kept
    int kept = 0;                    // dots that are kept of each channel
    int64_t first = 0, row_pitch = 0, group_pitch = 0;  // bytes: to the first tap of the first pixel, between rows
    const int8_t* weights = nullptr;                    // [groups][kernel rows][quads][4 channels][4 taps]
    const int8_t* ones = nullptr;                       // of one group, 1 for every tap, where sums are needed
    bool wide = false;                                  // products of a pair may exceed 16 bits
    AccumulatorPlan acc;
    EmitPlan emit;
};

// Filters [first, first + vectors * L); weights int8 [k_steps][vectors][L][4].
struct LanesBlock {
    int first = 0, vectors = 0;
    const int8_t* weights = nullptr;
};

// A convolution of few pixels with filters on the lanes (lanes_kernel.h).
struct LanesPlan {
    int input = 0;
    PixelPlan made;  // of sums that are not turned first
    int k_steps = 0;
    const int32_t* k_offsets = nullptr;      // bytes, [k_steps]
    int padded_pixels = 0;                   // whole groups of pixels that are multiplied together
    const int32_t* pixel_offsets = nullptr;  // bytes, [padded_pixels], the last pixel again past the end
    int block_count = 0;
    const LanesBlock* blocks = nullptr;
    bool wide = false;  // products of a pair may exceed 16 bits
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

constexpr int kPoolRows = 4;  // of a maximum, in working memory

struct PoolStreamPlan {  // maximum of a stream
    int height = 0, width = 0, rows = 0, columns = 0;
    int kernel_rows = 1, kernel_columns = 1, row_stride = 1, column_stride = 1, top = 0, left = 0;
    int64_t row_floats = 0;  // of one row with its padding, as far as vectors reach
    bool numbers = false;    // a bound has left nothing else
};

// One input of a selection: pixel (0, 0) of its channel 0 or group 0, and how output pixels meet it.
struct SelectSource {
    int tensor = 0;
    int32_t first = 0;               // bytes, of codes
    int64_t pitch = 0;               // bytes from one group (codes) or channel (streams) to the next
    bool is_alike = false;           // output pixels of a row, or of a stream, lie as in the input, padding included
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
    int height = 0, width = 0;          // of the result where pixels are moved, else 0
    const int64_t* out_rows = nullptr;  // of codes, as in SelectSource
    const int64_t* out_columns = nullptr;
    int output = 0;  // of codes, from here on
    int rows = 0;
    int64_t out_row = 0, out_row_pitch = 0;
    int32_t out_pitch = 0;
    PixelMap out_map;
};

// Where the pixels of one side come from: y[i] = x[first[i]] * (1 - weights[i]) + x[second[i]] * weights[i].
struct ResizeSide {
    const int32_t* first = nullptr;  // of rows numbers; of columns bytes from the first, or lanes of `spans`
    const int32_t* second = nullptr;
    const float* weights = nullptr;
    const float* others = nullptr;  // 1 - weights
    const Piece* spans = nullptr;   // of columns, where all that a vector is made of fits one: offset in bytes
};

struct ResizePlan {
    int input = 0;
    int width = 0;       // of the input
    int64_t pixels = 0;  // of the input
    int columns = 0;     // that are written
    ResizeSide down, across;
    int64_t pitch = 0;  // floats of a row in the scratch, which has kResizeRows
};

// Two rows of four channels, and four rows of what is written with the pixels left over from those before.
constexpr int64_t kResizeRows = 12;

// Where the tensors of one image are, and working memory of one thread.
struct RunContext {
    unsigned char* const* tensors;
    int32_t* accumulators;   // [kMaxTile][kMaxLanes]
    int32_t* sums;           // as many lanes as the largest output map has, rounded up
    int8_t* tile_pack;       // AMX: [2][ceil(k_steps / 16)][16][64]
    unsigned char* scratch;  // of the step at hand: WinogradMemory, a thinned input
    int32_t* rows;           // depthwise: [ring][quads][4 spread], then dots and sums, [4][kept] each
};

}  // namespace lbs
