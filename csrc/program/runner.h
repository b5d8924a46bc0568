// Runs a program: whole images per thread for a batch, threads together on one image for the rest.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/threads.h"
#include "program/plan_builder.h"

namespace lbs {

class Runner {
public:
    // Copies what it needs of the blob. algorithms: "", "direct", "lanes", "winograd", "lanes-or-direct" or
    // "winograd-or-direct" for every step, or nothing. Raises FormatError or BackendError.
    Runner(const std::string& text, const unsigned char* blob, int64_t blob_bytes, const std::string& isa,
           const std::vector<std::string>& algorithms);
    ~Runner();

    const char* isa() const { return isa_name(isa_); }
    std::vector<std::string> algorithms() const;
    const std::vector<StepSpec>& step_specs() const { return plan_->spec.steps; }

    // inputs[i]: [batch, C, H, W] of the i-th input, float32 or uint8 as its tensor says, in memory [batch, H, W, C]
    // where channels_last[i] (empty: nowhere); outputs[i]: float32 [batch, C, H, W], written. Calls from several
    // threads run at once. traces: tensor -> [batch, H, W, C], uint8 for codes, the stream type for streams. seconds:
    // where given, gets the time spent in every step by all threads, scaled to add up to the time of the call.
    void run(const std::vector<const void*>& inputs, const std::vector<bool>& channels_last,
             const std::vector<float*>& outputs, int64_t batch, int threads, const std::map<int, void*>& traces,
             std::vector<double>* seconds);

    // Bytes of working memory held for further calls, and that of one image.
    int64_t held_bytes() const;
    int64_t image_bytes() const { return plan_->arena_bytes; }

private:
    struct Memory;  // of one thread
    struct Shelf;
    class Loan;
    struct Call;
    struct Worker;
    Shelf& shelf() const;
    void run_image(const Call& call, Team::Place from, Worker& worker);
    void run_step(const Call& call, const StepPlan& step, const StepSpec& spec, const Team::Member& self,
                  const RunContext& context, float* floats) const;

    const Isa isa_;
    std::unique_ptr<ProgramPlan> plan_;
    mutable std::atomic<Shelf*> shelf_;  // of this process; that of its parent before it was forked is left behind
};

}  // namespace lbs
