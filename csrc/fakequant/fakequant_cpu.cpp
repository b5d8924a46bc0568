#include <algorithm>
#include <atomic>
#include <vector>

#include "common/threads.h"
#include "fakequant/fakequant.h"
#include "isa/kernels.h"

namespace lbs {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements: 128 KB of float32, within L2 and enough to hide a thread's start
constexpr int64_t kWorthAThread = 1 << 16;  // elements below which waking a second thread costs more than it saves

// Calls part(chunk) for every chunk.
template <class Part>
void over_chunks(int64_t count, int threads, const Part& part) {
    const int64_t chunks = (count + kChunk - 1) / kChunk;
    if (count < kWorthAThread) threads = 1;
    std::atomic<int64_t> next{0};
    parallel(threads, [&](int, int) {
        for (int64_t chunk = next++; chunk < chunks; chunk = next++) part(chunk);
    });
}

// Sums of the chunks, added in order.
template <class Task>
QuantSums sum_chunks(QuantSums (*kernel)(const Task&, int64_t, int64_t), const Task& task, int64_t count,
                     int threads) {
    std::vector<QuantSums> parts(static_cast<size_t>((count + kChunk - 1) / kChunk));
    over_chunks(count, threads, [&](int64_t chunk) {
        parts[static_cast<size_t>(chunk)] = kernel(task, chunk * kChunk, std::min(count, (chunk + 1) * kChunk));
    });
    QuantSums total;
    for (const QuantSums& part : parts) {
        total.v += part.v;
        for (int j = 0; j < kMaxCoarse; ++j) total.by_width[j] += part.by_width[j];
    }
    return total;
}

}  // namespace

QuantSums fake_quant_forward(const FakeQuantForward& task, int64_t count, int threads, Isa isa) {
    return sum_chunks(kernels_for(isa).fake_quant_forward, task, count, threads);
}

QuantSums fake_quant_backward(const FakeQuantBackward& task, int64_t count, int threads, Isa isa) {
    return sum_chunks(kernels_for(isa).fake_quant_backward, task, count, threads);
}

}  // namespace lbs
