#include "block_model.h"
#include "s8/task.h"

namespace lbs::s8 {
namespace {

int dot_bytes(const uint64_t (&a)[4], const uint64_t (&b)[4]) {
    int sum = 0;
    for (int i = 0; i < kStepBytes; ++i) {
        sum += static_cast<int8_t>(a[i / 8] >> 8 * (i % 8)) * static_cast<int8_t>(b[i / 8] >> 8 * (i % 8));
    }
    return sum;
}

class WgmmaModel : public WgmmaBlockModel<dot_bytes> {
public:
    using WgmmaBlockModel::WgmmaBlockModel;

    int warpgroup() const { return thread_ / kWarpgroup; }
    void make_barrier(int byte, int arrivals) {
        require(arrivals > 0 && barrier(byte).count == 0, "model: a barrier is made twice, or for nobody");
        barrier(byte).count = arrivals;
    }
    void arrive(int byte) {
        check_published();
        Barrier& to = used(byte);
        require(++to.arrived <= to.count, "model: more arrivals than a barrier was made for");
        conclude(to);
    }
    void expect(int byte, int bytes) { used(byte).bytes += bytes; }
    // Bytes arrive where they are issued, or when somebody waits and nothing else is missing.
    void bulk_copy(int byte, const void* from, int bytes, int on) {
        require(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "model: an unaligned bulk copy");
        require(block_.operands.holds(reinterpret_cast<uintptr_t>(from), bytes), "model: a copy from elsewhere");
        check_order(reinterpret_cast<uintptr_t>(from), bytes);
        Copy copy{block_.at(address(byte), bytes, 16), from, bytes};
        std::memset(copy.to, kPoison, bytes);
        Barrier& to = used(on);
        to.copies.push_back(copy);
        if (block_.timing == Timing::kEarly) receive(to);
    }
    void wait(int byte, int parity) {
        Barrier& of = used(byte);
        while (of.phase % 2 == parity) {
            if (of.arrived == of.count && !of.copies.empty()) receive(of);
            else Fibers::pause();
        }
    }
    void give_registers() {}
    void take_registers() {}

private:
    Barrier& barrier(int byte) {
        block_.at(address(byte), 8, 8);
        return block_.barriers[address(byte)];
    }
    Barrier& used(int byte) {
        require(barrier(byte).count > 0, "model: a barrier is used that was not made");
        return barrier(byte);
    }
    void receive(Barrier& to) {
        for (const Copy& copy : to.copies) {
            gpu::finish(copy);
            to.bytes -= copy.bytes;
        }
        to.copies.clear();
        conclude(to);
    }
    void conclude(Barrier& to) {
        Fibers::moved();
        if (to.arrived < to.count || to.bytes != 0) return;
        to.arrived = 0;
        ++to.phase;
    }
};

template <class T>
void run(const Params& params, int blocks, const Operands& operands, const Order& order) {
    run_blocks<WgmmaModel>(T::kThreads, T::kSharedBytes, blocks, operands, order,
                           [&](auto& model) { run_tiles<T>(model, params); });
}

template <class T>
void run_clusters(const Params& params, const Operands& operands, const Order& order) {
    const int split = 1 << params.split_log;
    run_blocks<WgmmaModel>(T::kThreads, T::kSharedBytes, params.tiles * split, operands, order,
                           [&](auto& model) { run_split_tile<T>(model, params); }, split);
}

template <Reads kReads>
void run_row(const TileRow& row, const Params& params, int blocks, const Operands& operands, const Order& order) {
#define LBS_RUN(machine, groups, filters, stages)              \
    if (same_row(row, {#machine, groups, filters, stages, 0})) \
        return run<Tile<groups, filters, stages, kReads>>(params, blocks, operands, order);
    LBS_S8_TILES(LBS_RUN)
#undef LBS_RUN
#define LBS_RUN(machine, groups, filters, stages)              \
    if (same_row(row, {#machine, groups, filters, stages, 0})) \
        return run_clusters<ClusterTile<filters, stages, kReads>>(params, operands, order);
    LBS_S8_CLUSTER_TILES(LBS_RUN)
#undef LBS_RUN
}

}  // namespace

void run_model(const Task& task, const TileRow& row, const Order& order) {
    const Params params = make_params(task, row);
    const int64_t pixels = task.batch * task.height * task.width;
    const int64_t weight_rows =
        int64_t{params.filter_blocks} * params.chunks * (row.filters + (needs_sums(task) ? kSumColumns : 0));
    const Operands operands{{reinterpret_cast<uintptr_t>(task.x), static_cast<uintptr_t>(pixels * params.pitch)},
                            {reinterpret_cast<uintptr_t>(task.w), static_cast<uintptr_t>(weight_rows * kRowBytes)},
                            {reinterpret_cast<uintptr_t>(task.border), static_cast<uintptr_t>(params.pitch)}};
    const int blocks = blocks_used(order, params.tiles);
    switch (reads(task)) {
        case Reads::kBytes: return run_row<Reads::kBytes>(row, params, blocks, operands, order);
        case Reads::kSummed: return run_row<Reads::kSummed>(row, params, blocks, operands, order);
        case Reads::kNibbles: return run_row<Reads::kNibbles>(row, params, blocks, operands, order);
    }
}

}  // namespace lbs::s8
