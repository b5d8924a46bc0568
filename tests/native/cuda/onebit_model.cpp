#include "block_model.h"
#include "onebit/products.h"
#include "onebit/task.h"

namespace lbs::onebit {
namespace {

class MmaModel : public BlockModel {
public:
    using BlockModel::BlockModel;
    static constexpr int kInFlight = 0;

    void publish() {}
    // Lane l gives the address of row l % 8 of matrix l / 8 and gets word l % 4 of row l / 4 of every matrix.
    void load_matrices(int byte, uint32_t (&r)[4]) {
        const Block::Letter* letters = exchange({{address(byte)}});
        for (int matrix = 0; matrix < 4; ++matrix) {
            const uint32_t row = letters[8 * matrix + lane() / 4].words[0];
            block_.at(row, 16, 16);
            r[matrix] = block_.word(row + lane() % 4 * 4);
        }
    }
    // m16n8k256. A: words k of row g are a0 (k < 4) and a2 of lanes 4 g + k % 4, those of row g + 8 are a1 and a3.
    // B: words k of column g are b0 and b1 of lanes 4 g + k % 4. D: d0, d1 are row g, columns 2 t and 2 t + 1; d2, d3
    // row g + 8.
    void mma(int* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        const Block::Letter* letters = exchange({{a[0], a[1], a[2], a[3], b0, b1}});
        for (int i = 0; i < 4; ++i) {
            const int row = lane() / 4, column = lane() % 4 * 2 + i % 2;
            for (int k = 0; k < 8; ++k) {
                const uint32_t a_word = letters[4 * row + k % 4].words[k / 4 * 2 + i / 2];
                const uint32_t b_word = letters[4 * column + k % 4].words[4 + k / 4];
                d[i] += popcount(a_word & b_word);
            }
        }
    }
    template <int kN>
    void multiply(int (&acc)[kMultiplyGroups][kN / 2], int a_byte, int b_byte, int step) {
        mma_step<kN>(*this, acc, a_byte, b_byte, step);
    }
    template <int kPending>
    void wait_products() {}
    template <int kRegisters>
    void finish_products(int (&)[kMultiplyGroups][kRegisters]) {
        check_waited();  // what follows is written
    }
};

int count_common(const uint64_t (&a)[4], const uint64_t (&b)[4]) {
    int count = 0;
    for (int k = 0; k < 4; ++k) count += __builtin_popcountll(a[k] & b[k]);
    return count;
}

class WgmmaModel : public WgmmaBlockModel<count_common> {
public:
    using WgmmaBlockModel::WgmmaBlockModel;
    static constexpr int kInFlight = 1;

    template <int kN>
    void multiply(int (&acc)[kMultiplyGroups][kN / 2], int a_byte, int b_byte, int step) {
        wgmma_step<kN>(*this, acc, a_byte, b_byte, step);
    }
};

}  // namespace

void run_model(const Task& task, const TileRow& row, const Order& order) {
    const Params params = make_params(task, row);
    const int64_t pixels = task.batch * task.height * task.width;
    const int64_t weight_rows = int64_t{task.w_bits / 2} * params.filter_blocks * params.chunks * row.filters;
    const Operands operands{
        {reinterpret_cast<uintptr_t>(task.x), static_cast<uintptr_t>(pixels * params.pixel_words * 4)},
        {reinterpret_cast<uintptr_t>(task.w), static_cast<uintptr_t>(weight_rows * kRowBytes)},
        {}};
    const int blocks = blocks_used(order, params.tiles);
#define LBS_MODEL_wgmma WgmmaModel
#define LBS_MODEL_mma MmaModel
#define LBS_RUN(machine, groups, filters, stages)                                                     \
    if (same_row(row, {#machine, groups, filters, stages, 0})) {                                      \
        using T = Tile<groups, filters, stages>;                                                      \
        return run_blocks<LBS_MODEL_##machine>(T::kThreads, T::kSharedBytes, blocks, operands, order, \
                                               [&](auto& model) { run_tiles<T>(model, params); });    \
    }
    LBS_ONEBIT_TILES(LBS_RUN)
#undef LBS_RUN
#undef LBS_MODEL_wgmma
#undef LBS_MODEL_mma
}

}  // namespace lbs::onebit
