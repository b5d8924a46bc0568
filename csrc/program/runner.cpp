#include "program/runner.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "common/check.h"
#include "common/memory.h"
#include "common/threads.h"
#include "pool/pool_cpu.h"
#include "program/trace.h"

namespace lbs {
namespace {

using Clock = std::chrono::steady_clock;

// Memory of at least this many threads is kept for further calls, and as much as there are processors.
constexpr size_t kKept = 8;

struct Share {
    int first, last;
};

// This thread's part of [0, count).
Share share(int count, const Team::Member& self) {
    const auto bound = [&](int rank) { return static_cast<int>(static_cast<int64_t>(count) * rank / self.size); };
    return {bound(self.rank), bound(self.rank + 1)};
}

std::vector<Algorithm> parsed(const std::vector<std::string>& names) {
    static const std::map<std::string, Algorithm> kNames = {{"", Algorithm::kAuto},
                                                            {"direct", Algorithm::kDirect},
                                                            {"lanes", Algorithm::kLanes},
                                                            {"lanes-or-direct", Algorithm::kLanesOrDirect},
                                                            {"winograd", Algorithm::kWinograd},
                                                            {"winograd-or-direct", Algorithm::kWinogradOrDirect}};
    std::vector<Algorithm> all;
    for (const std::string& name : names) {
        const auto found = kNames.find(name);
        if (found == kNames.end())
            throw BackendError(
                "algorithm '" + name +
                "' is unknown; use 'direct', 'lanes', 'winograd', 'lanes-or-direct', 'winograd-or-direct', or '' for "
                "the fastest one");
        all.push_back(found->second);
    }
    return all;
}

// What the longest of `size` shares of `count` is beyond an even one.
double idle(int count, int size) { return static_cast<double>((count + size - 1) / size * size) / count; }

// Releases those who wait to be let in, whatever ends the work of the first member.
struct Closing {
    Team* team;
    ~Closing() {
        if (team) team->close();
    }
};

// Seconds of every step, of all threads together, scaled so that they add up to those of the call.
std::vector<double> shared_out(const std::vector<std::vector<double>>& clocks, double call) {
    std::vector<double> steps(clocks.front().size(), 0.0);
    double total = 0;
    for (const std::vector<double>& clock : clocks)
        for (size_t i = 0; i < clock.size(); ++i) {
            steps[i] += clock[i];
            total += clock[i];
        }
    for (double& step : steps) step *= total > 0 ? call / total : 0;
    return steps;
}

}  // namespace

struct Runner::Memory {
    Buffer arena, accumulators, sums, floats, tiles, rows, scratch;
    std::vector<Buffer> apart;          // guarded slots, which are no part of the arena
    std::vector<unsigned char*> slots;  // where each lies
    std::vector<unsigned char*> tensors;
    int64_t bytes = 0;

    explicit Memory(const ProgramPlan& plan) {
        const auto make = [this](int64_t count) {
            bytes += count;
            return Buffer(count, kSlack);
        };
        const bool is_guarded = guard() != Guard::kNone;
        if (!is_guarded) arena = make(plan.arena_bytes);
        for (const Slot& slot : plan.slots) {
            if (is_guarded) apart.push_back(make(slot.bytes));
            slots.push_back(is_guarded ? apart.back().get() : arena.get() + slot.offset);
            if (slot.is_codes) std::memset(slots.back(), slot.layout.zero, static_cast<size_t>(slot.bytes));
        }
        accumulators = make(int64_t{4} * kMaxTile * kMaxLanes);
        sums = make(4 * plan.sum_lanes);
        floats = make(4 * plan.float_count);
        tiles = make(plan.kernels.uses_tiles ? plan.tile_bytes : 0);
        scratch = make(plan.scratch_bytes);
        rows = make(4 * plan.row_count);
        tensors.assign(plan.spec.tensors.size(), nullptr);
    }

    // Tensors lie in the slots of `owner`, which may be another thread's.
    void point_at(const Memory& owner, const ProgramPlan& plan) {
        for (size_t i = 0; i < tensors.size(); ++i)
            if (plan.slot_of[i] >= 0) tensors[i] = owner.slots[static_cast<size_t>(plan.slot_of[i])];
    }
};

// Memory that no call works in. Calls share nothing else that is written to, and so need not wait for each other.
struct Runner::Shelf {
    const unsigned forks = fork_count();
    std::mutex lock;
    std::vector<std::unique_ptr<Memory>> free;  // used last, and so in the caches, at the end
    const size_t kept = std::max<size_t>(kKept, std::thread::hardware_concurrency());

    Shelf() { free.reserve(kept); }
};

// What a thread of a call works in, made where none is free, and put back at the end of its scope.
class Runner::Loan {
public:
    Loan(Shelf& shelf, const ProgramPlan& plan) : shelf_(shelf) {
        {
            std::lock_guard<std::mutex> lock(shelf.lock);
            if (!shelf.free.empty()) {
                memory_ = std::move(shelf.free.back());
                shelf.free.pop_back();
            }
        }
        if (!memory_) memory_ = std::make_unique<Memory>(plan);
    }
    ~Loan() {
        std::lock_guard<std::mutex> lock(shelf_.lock);
        if (shelf_.free.size() < shelf_.kept) shelf_.free.push_back(std::move(memory_));
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;

    Memory& memory() const { return *memory_; }

private:
    Shelf& shelf_;
    std::unique_ptr<Memory> memory_;
};

// A thread of a call: its own memory, and where its tensors lie.
struct Runner::Worker {
    Memory& own;
    const Memory& shared;
    std::vector<double>* seconds;
    Team* team = nullptr;  // that it shares images with
    Team::Member self{};
    bool just_met = false;  // it was let in at the step it begins with
};

struct Runner::Call {
    const std::vector<const void*>& inputs;
    const std::vector<bool>& channels_last;
    const std::vector<float*>& outputs;
    const std::map<int, void*>& traces;
};

Runner::Runner(const std::string& text, const unsigned char* blob, int64_t blob_bytes, const std::string& isa,
               const std::vector<std::string>& algorithms)
    : isa_(resolve_isa(isa)),
      plan_(std::make_unique<ProgramPlan>(text, blob, blob_bytes, kernels_for(isa_), parsed(algorithms))),
      shelf_(new Shelf) {}

std::vector<std::string> Runner::algorithms() const {
    std::vector<std::string> names;
    for (size_t i = 0; i < plan_->steps.size(); ++i) names.emplace_back(plan_->algorithm(i));
    return names;
}

Runner::~Runner() { delete &shelf(); }

// A thread of the parent may have held the lock when this process was forked, and left the list half changed.
Runner::Shelf& Runner::shelf() const {
    Shelf* found = shelf_.load(std::memory_order_acquire);
    if (found->forks == fork_count()) return *found;
    auto fresh = std::make_unique<Shelf>();
    if (shelf_.compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
    return *found;
}

int64_t Runner::held_bytes() const {
    Shelf& all = shelf();
    std::lock_guard<std::mutex> lock(all.lock);
    int64_t total = 0;
    for (const auto& memory : all.free) total += memory->bytes;
    return total;
}

void Runner::run(const std::vector<const void*>& inputs, const std::vector<bool>& channels_last,
                 const std::vector<float*>& outputs, int64_t batch, int threads, const std::map<int, void*>& traces,
                 std::vector<double>* seconds) {
    require(inputs.size() == plan_->spec.inputs.size() && outputs.size() == plan_->spec.outputs.size(),
            "the program has " + std::to_string(plan_->spec.inputs.size()) + " inputs and " +
                std::to_string(plan_->spec.outputs.size()) + " outputs; " + std::to_string(inputs.size()) + " and " +
                std::to_string(outputs.size()) + " were given");
    require(channels_last.empty() || channels_last.size() == inputs.size(),
            "channels_last has " + std::to_string(channels_last.size()) + " entries for " +
                std::to_string(inputs.size()) + " inputs; give one for each, or none");
    require(batch >= 0 && threads >= 1, "batch is " + std::to_string(batch) + " with " + std::to_string(threads) +
                                            " threads; a batch is not negative and needs a thread");
    Shelf& memories = shelf();
    threads = std::min(threads, max_threads());
    const Loan first(memories, *plan_);
    std::vector<std::vector<double>> clocks(seconds ? static_cast<size_t>(threads) : 0,
                                            std::vector<double>(plan_->steps.size(), 0.0));
    const Call call{inputs, channels_last, outputs, traces};
    const Clock::time_point start = Clock::now();

    // Whole images while there is one for every thread; threads share each of the rest, which keeps all of them busy to
    // the end. A traced image belongs to one thread.
    const int64_t alone = traces.empty() ? batch - batch % threads : batch;
    std::atomic<int64_t> next{0};
    Team team;
    parallel(batch == 0 ? 1 : threads, [&](int rank, int awake) {
        std::vector<double>* clock = seconds ? &clocks[static_cast<size_t>(rank)] : nullptr;
        const Closing closing{rank == 0 ? &team : nullptr};
        std::optional<Loan> other;  // a thread that the system does not run needs none
        if (rank > 0) other.emplace(memories, *plan_);
        Memory& own = other ? other->memory() : first.memory();
        Worker single{own, own, clock};
        for (int64_t image = next++; image < alone; image = next++) run_image(call, {image, 0}, single);
        if (alone == batch) return;

        Worker member{own, first.memory(), clock, &team};
        Team::Place place{alone, 0};
        if (rank > 0) {
            if (!team.join(member.self, place)) return;
            member.just_met = true;
        } else if (alone == 0) {
            team.expect(awake);
        }
        for (; place.image < batch; ++place.image, place.step = 0) run_image(call, place, member);
    });
    if (seconds) *seconds = shared_out(clocks, std::chrono::duration<double>(Clock::now() - start).count());
}

void Runner::run_image(const Call& call, Team::Place from, Worker& worker) {
    const int64_t image = from.image;
    Memory& own = worker.own;
    std::vector<unsigned char*>& tensors = own.tensors;
    const ProgramSpec& spec = plan_->spec;
    own.point_at(worker.shared, *plan_);
    for (size_t i = 0; i < spec.inputs.size(); ++i) {
        const TensorSpec& tensor = spec.tensors[static_cast<size_t>(spec.inputs[i])];
        const int64_t bytes = tensor.pixels() * tensor.channels * (tensor.is_bytes ? 1 : 4);
        // Inputs are only ever read; one table serves both directions.
        tensors[static_cast<size_t>(spec.inputs[i])] =
            static_cast<unsigned char*>(const_cast<void*>(call.inputs[i])) + image * bytes;
    }
    for (size_t i = 0; i < spec.outputs.size(); ++i) {
        const TensorSpec& tensor = spec.tensors[static_cast<size_t>(spec.outputs[i])];
        float* y = call.outputs[i] + image * tensor.pixels() * tensor.channels;
        tensors[static_cast<size_t>(spec.outputs[i])] = reinterpret_cast<unsigned char*>(y);
    }
    RunContext context;
    context.tensors = tensors.data();
    context.accumulators = reinterpret_cast<int32_t*>(own.accumulators.get());
    context.sums = reinterpret_cast<int32_t*>(own.sums.get());
    context.tile_pack = reinterpret_cast<int8_t*>(own.tiles.get());
    context.scratch = own.scratch.get();
    context.rows = reinterpret_cast<int32_t*>(own.rows.get());
    float* floats = reinterpret_cast<float*>(own.floats.get());

    const bool traced = !call.traces.empty();
    Clock::time_point start;
    if (worker.seconds) start = Clock::now();
    for (size_t i = static_cast<size_t>(from.step); i < plan_->steps.size(); ++i) {
        const StepPlan& step = plan_->steps[i];
        if (worker.team && (i == 0 || step.meet_before)) {
            if (!worker.just_met) worker.team->meet(worker.self, {image, static_cast<int>(i)});
            worker.just_met = false;
        }
        if (step.in_bands && !traced) continue;
        if (step.bands.unit_count > 0 && !traced) {
            unsigned char* const stream = own.slots[static_cast<size_t>(plan_->slot_of[spec.steps[i].input])];
            const BandMemory memory{tensors.data(), stream, floats};
            const double before =
                run_bands(step, plan_->kernels, context, memory, worker.self, worker.seconds != nullptr);
            if (worker.seconds) {
                (*worker.seconds)[i - 1] += before;
                (*worker.seconds)[i] -= before;
            }
        } else {
            run_step(call, step, spec.steps[i], worker.self, context, floats);
        }
        if (traced) export_tensors(*plan_, step.writes, call.traces, image, tensors.data());
        if (worker.seconds) {
            const Clock::time_point end = Clock::now();
            (*worker.seconds)[i] += std::chrono::duration<double>(end - start).count();
            start = end;
        }
    }
}

void Runner::run_step(const Call& call, const StepPlan& step, const StepSpec& spec, const Team::Member& self,
                      const RunContext& context, float* floats) const {
    const KernelTable& kernels = plan_->kernels;
    const unsigned char* in = context.tensors[spec.input];
    const TensorSpec& source = plan_->spec.tensors[static_cast<size_t>(spec.input)];
    switch (step.run) {
        case StepPlan::Run::kQuantPack: {
            const Share part = share(step.emit.vectors, self);
            const bool last =
                step.place >= 0 && !call.channels_last.empty() && call.channels_last[static_cast<size_t>(step.place)];
            kernels.quantpack(step.read, step.emit, context, in, last, part.first, part.last);
            return;
        }
        case StepPlan::Run::kConv: {
            // Pixels are shared where every thread gets some, otherwise filters (late layers of small images).
            const bool by_pixels = step.conv.emit.vectors >= self.size;
            const Share vectors = by_pixels ? share(step.conv.emit.vectors, self) : Share{0, step.conv.emit.vectors};
            const Share blocks = by_pixels ? Share{0, step.conv.block_count} : share(step.conv.block_count, self);
            kernels.conv(step.conv, context, vectors.first, vectors.last, blocks.first, blocks.last);
            return;
        }
        case StepPlan::Run::kWinograd: {
            const WinogradPlan& plan = step.winograd;
            const bool by_rows = idle(plan.unit_count, self.size) <= idle(plan.block_count, self.size);
            const Share units = by_rows ? share(plan.unit_count, self) : Share{0, plan.unit_count};
            const Share blocks = by_rows ? Share{0, plan.block_count} : share(plan.block_count, self);
            kernels.winograd(plan, context, units.first, units.last, blocks.first, blocks.last);
            return;
        }
        case StepPlan::Run::kDepthwise: {
            const DepthwisePlan& plan = step.depthwise;
            const int64_t vectors = int64_t{plan.groups} * plan.emit.vectors;
            kernels.depthwise(plan, context, vectors * self.rank / self.size, vectors * (self.rank + 1) / self.size);
            return;
        }
        case StepPlan::Run::kLanes: {
            const Share blocks = share(step.lanes.block_count, self);
            kernels.conv_lanes(step.lanes, context, blocks.first, blocks.last);
            return;
        }
        case StepPlan::Run::kLinear: {
            const Share groups = share(vector_count(step.linear.outputs, kernels.lanes), self);
            kernels.linear(step.linear, context, groups.first, groups.last);
            return;
        }
        case StepPlan::Run::kMaxStream:
        case StepPlan::Run::kAverageStream: {
            const Share groups = share((source.channels + 3) / 4, self);
            float* rows = floats + pool_rows_at(step.emit);
            for (int group = groups.first; group < groups.last; ++group) {
                for (int channel = 4 * group; channel < std::min(4 * group + 4, source.channels); ++channel) {
                    const float* plane = reinterpret_cast<const float*>(in) + channel * source.pixels();
                    float* out = floats + channel % 4 * step.emit.pixels;
                    if (step.run == StepPlan::Run::kMaxStream) kernels.max_plane(step.max, plane, rows, out);
                    else average_plane(plane, source.height, source.width, spec, out);
                }
                kernels.emit_planes(step.emit, context, floats, 4 * group, group, group + 1, 0, step.emit.vectors);
            }
            return;
        }
        case StepPlan::Run::kMeanStream: {
            const Share groups = share((source.channels + 3) / 4, self);
            const int first = 4 * groups.first, last = std::min(4 * groups.last, source.channels);
            mean_planes(reinterpret_cast<const float*>(in) + first * source.pixels(), last - first, source.pixels(),
                        floats);
            kernels.emit_planes(step.emit, context, floats, first, groups.first, groups.last, 0, 1);
            return;
        }
        case StepPlan::Run::kMaxCodes: {
            const Share groups = share(step.pool.groups, self);
            kernels.pool_codes(step.pool, context, groups.first, groups.last);
            return;
        }
        case StepPlan::Run::kSelect: {
            const Share groups = share(step.select.groups, self);
            const auto select = source.form == Form::kCodes ? kernels.select_codes : kernels.select_streams;
            select(step.select, step.emit, context, groups.first, groups.last);
            return;
        }
        case StepPlan::Run::kResize: {
            const Share vectors = share(step.emit.vectors, self);
            kernels.resize(step.resize, step.emit, context, floats, vectors.first, vectors.last);
            return;
        }
        case StepPlan::Run::kMaxCodesAnyZero: {
            const Share groups = share(step.pool.groups, self);
            const size_t output = static_cast<size_t>(step.pool.output);
            max_codes(in, plan_->layouts[static_cast<size_t>(spec.input)], spec, context.tensors[output],
                      plan_->layouts[output], groups.first, groups.last);
            return;
        }
    }
}

}  // namespace lbs
