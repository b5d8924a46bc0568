// A small pool of persistent threads: wakes in well under a microsecond while it is in use, sleeps when it is not.
#pragma once

#include <atomic>
#include <functional>

namespace lbs {

// Largest number of threads one call may use.
int max_threads();

// Runs job(rank, count) on `threads` threads at once, the caller being rank 0, and returns when all are done. `count`
// is 1 when another call holds the pool: the job must not depend on the number it asked for. The first exception of a
// rank is thrown again here. A child of fork() gets a fresh pool on its first call (no call may be under way in another
// thread at the moment of the fork).
void parallel(int threads, const std::function<void(int rank, int count)>& job);

// Waits of threads that run together. Spins for a moment, then yields, then naps, so that it stays sane
// when there are more threads than processors.
class SpinBarrier {
public:
    explicit SpinBarrier(int count) : count_(count) {}
    void wait();

private:
    const int count_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> generation_{0};
};

}  // namespace lbs
