// The kernels of one instruction set, and the table that finds them.
#pragma once

#include "common/cpu_features.h"
#include "fakequant/fakequant.h"
#include "program/plan.h"

namespace lbs {

// A tile of the convolution: up to `vectors` vectors of pixels by exactly `filters` filters. {0, 0} ends a list.
struct TileShape {
    int vectors, filters;
};

// How a convolution is computed; kAuto: as is expected to be fastest. kWinograd and kLanes are refused where they
// cannot serve, there kWinogradOrDirect and kLanesOrDirect take another.
enum class Algorithm { kAuto, kDirect, kWinograd, kWinogradOrDirect, kLanes, kLanesOrDirect };
inline bool names_winograd(Algorithm a) { return a == Algorithm::kWinograd || a == Algorithm::kWinogradOrDirect; }
inline bool names_lanes(Algorithm a) { return a == Algorithm::kLanes || a == Algorithm::kLanesOrDirect; }

struct KernelTable {
    int lanes;          // pixels in one vector
    int dot_bits;       // largest |weight| * 2 * activation a dot instruction takes exactly; 0: all
    double dot_cycles;  // of a dot of vectors, where nothing else limits
    bool uses_tiles;    // convolutions read ConvPlan::tiles
    const TileShape* shapes;
    const TileShape* winograd_shapes;
    const int* winograd_tiles;        // that are multiplied together, where filters lie on the lanes; 0 ends the list
    int lanes_vectors, lanes_pixels;  // vectors of filters by pixels, where filters lie on the lanes

    // Vectors [first_vector, last_vector) of the blocks [first_block, last_block).
    void (*conv)(const ConvPlan& plan, const RunContext& run, int first_vector, int last_vector, int first_block,
                 int last_block);
    // Units [first_unit, last_unit) of the blocks [first_block, last_block).
    void (*winograd)(const WinogradPlan& plan, const RunContext& run, int first_unit, int last_unit, int first_block,
                     int last_block);
    // Vectors [first, last) of all channel groups in a row.
    void (*depthwise)(const DepthwisePlan& plan, const RunContext& run, int64_t first, int64_t last);
    // Blocks [first_block, last_block) on all pixels.
    void (*conv_lanes)(const LanesPlan& plan, const RunContext& run, int first_block, int last_block);
    // Groups of L outputs [first, last).
    void (*linear)(const LinearPlan& plan, const RunContext& run, int first, int last);
    // Channel groups and vectors of float planes; plane 0 of `values` is channel `base_channel`.
    void (*emit_planes)(const EmitPlan& plan, const RunContext& run, const float* values, int base_channel,
                        int first_group, int last_group, int first_vector, int last_vector);
    // Vectors [first_vector, last_vector) of a stream or an image, all channels.
    void (*quantpack)(const ReadPlan& read, const EmitPlan& plan, const RunContext& run, const void* values,
                      bool channels_last, int first_vector, int last_vector);
    // One plane of a stream; `rows`: kPoolRows * plan.row_floats of working memory; `out` may be overrun by a vector.
    void (*max_plane)(const PoolStreamPlan& plan, const float* plane, float* rows, float* out);
    void (*pool_codes)(const PoolCodesPlan& plan, const RunContext& run, int first_group, int last_group);
    // Channel groups [first_group, last_group) of what is written.
    void (*select_codes)(const SelectPlan& plan, const EmitPlan& emit, const RunContext& run, int first_group,
                         int last_group);
    void (*select_streams)(const SelectPlan& plan, const EmitPlan& emit, const RunContext& run, int first_group,
                           int last_group);

    // Vectors [first_vector, last_vector) of what is written, all channels; `floats`: kResizeRows rows.
    void (*resize)(const ResizePlan& plan, const EmitPlan& emit, const RunContext& run, float* floats, int first_vector,
                   int last_vector);

    FakeQuantForwardKernel fake_quant_forward;
    FakeQuantBackwardKernel fake_quant_backward;
};

extern const KernelTable kPortableKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvxVnniKernels;
extern const KernelTable kAvx512VnniKernels;
extern const KernelTable kAmxKernels;
extern const KernelTable kAmxModelKernels;
extern const KernelTable kNeonKernels;
extern const KernelTable kNeonI8mmKernels;

// Whether tile multiplies give what plain loops give; only to be called where they can be executed.
bool amx_self_check();
bool amx_model_self_check();

// The table of an instruction set that resolve_isa has allowed.
const KernelTable& kernels_for(Isa isa);

}  // namespace lbs
