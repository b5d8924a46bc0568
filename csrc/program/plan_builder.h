// From a program to what the kernels are told: layouts, weights, buffers, and where threads must meet.
#pragma once

#include <string>
#include <vector>

#include "isa/kernels.h"
#include "program/bands.h"
#include "program/layout.h"
#include "program/program.h"

namespace lbs {

struct StepPlan {
    enum class Run {
        kQuantPack,
        kConv,
        kWinograd,
        kDepthwise,
        kLanes,
        kLinear,
        kMaxStream,
        kAverageStream,
        kMeanStream,
        kMaxCodes,
        kMaxCodesAnyZero,
        kSelect,
        kResize
    };

    Run run = Run::kQuantPack;
    ConvPlan conv;
    WinogradPlan winograd;
    DepthwisePlan depthwise;
    LanesPlan lanes;
    LinearPlan linear;
    PoolCodesPlan pool;
    PoolStreamPlan max;
    BandPlan bands;  // of a maximum and the convolution before it
    SelectPlan select;
    ResizePlan resize;
    EmitPlan emit;             // of the steps that emit planes of floats
    ReadPlan read;             // of a quantpack step
    int place = -1;            // of the image it reads among the program's inputs; -1: a stream
    std::vector<int> writes;   // tensors
    bool meet_before = false;  // threads that share an image wait here for each other
    bool in_bands = false;     // computed with the next step, unless tensors are traced
};

// Where the rows of a maximum lie among a thread's floats, behind four planes and what is written past their end.
inline int64_t pool_rows_at(const EmitPlan& emit) { return 4 * emit.pixels + kMaxLanes; }

// A piece of one image's memory. Tensors that never live at the same time may share it.
struct Slot {
    int64_t offset = 0, bytes = 0;
    bool is_codes = false;
    CodeLayout layout;  // of codes: padding is written once, so only equal layouts share a slot
};

// All of it is read-only once built.
struct ProgramPlan {
    // `algorithms`: of every step, or none.
    ProgramPlan(const std::string& text, const unsigned char* blob, int64_t blob_bytes, const KernelTable& table,
                const std::vector<Algorithm>& algorithms);

    // "direct", "winograd" or "lanes"; empty where a step knows one way only.
    const char* algorithm(size_t step) const;

    ProgramSpec spec;
    const KernelTable& kernels;
    Store store;
    std::vector<CodeLayout> layouts;
    std::vector<StepPlan> steps;
    std::vector<Slot> slots;
    std::vector<int> slot_of;  // tensor -> slot, -1 for images and outputs, which the caller owns
    int64_t arena_bytes = 0;
    int64_t sum_lanes = 0;  // scratch sizes of one thread
    int64_t float_count = 0;
    int64_t tile_bytes = 0;
    int64_t scratch_bytes = 0;
    int64_t row_count = 0;

private:
    void plan_steps(const std::vector<Algorithm>& algorithms);
    void cut_rows_apart(const StepSpec& step, const CodeLayout& layout, ConvPlan& plan);
    EmitPlan plan_emit(const StepSpec& step, const TensorSpec& target);
    CodedPlan plan_coded(const EmitSpec& emit);
    void plan_quantpack(const StepSpec& step, StepPlan& plan);
    void plan_pool(const StepSpec& step, StepPlan& plan);
    void plan_select(const StepSpec& step, StepPlan& plan);
    void plan_resize(const StepSpec& step, StepPlan& plan);
    void join_bands();
    std::vector<int> reads_of(size_t step) const;
    void assign_slots();
    void place_meetings();
};

}  // namespace lbs
