#include "common/threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/check.h"

namespace lbs {
namespace {

using Clock = std::chrono::steady_clock;

// Between two calls of a batch-1 loop in Python lie 40-60 us, and more with some work on the result; a thread that falls
// asleep there is missed for the whole next call (seen on Zen 4 with 60 us: 250 us a call instead of 147).
constexpr auto kSpin = std::chrono::microseconds(250);
constexpr int kMostSpin = 1000000;  // microseconds that LBS_SPIN_US may ask for
// A system that had no thread to give is asked again after this long: each question costs a call 4 us and more.
constexpr auto kAskAgain = std::chrono::seconds(1);
// What the first member of a team waits for threads that are awake: some ten times what an answer takes.
constexpr auto kJoin = std::chrono::microseconds(2);
constexpr int kPausesPerLook = 16;

void pause_processor() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// How long a thread without a call spins before it sleeps. Raises BackendError where LBS_SPIN_US is no such time.
std::chrono::microseconds idle_spin() {
    static const std::chrono::microseconds time = [] {
        const char* const word = std::getenv("LBS_SPIN_US");
        if (!word || !*word) return kSpin;
        int value = -1;
        const char* const end = word + std::strlen(word);
        const auto read = std::from_chars(word, end, value);
        if (read.ec != std::errc() || read.ptr != end || value < 0 || value > kMostSpin)
            throw BackendError(std::string("LBS_SPIN_US is '") + word +
                               "'; it is a whole number of microseconds from 0 to " + std::to_string(kMostSpin) +
                               ", or unset");
        return std::chrono::microseconds(value);
    }();
    return time;
}

// Spins until ready() or the time is over; true when ready. It yields after the first looks: a thread that was just
// woken may have been put on the caller's own processor, and would wait there for the caller's whole time slice
// (batch 1, two threads: 1.7 ms instead of 0.09 ms on that machine).
template <class Ready>
bool spin_until(const Ready& ready, std::chrono::microseconds time = kSpin) {
    for (int i = 0; i < 256 && time.count() > 0; ++i) {
        if (ready()) return true;
        pause_processor();
    }
    const auto end = Clock::now() + time;
    while (Clock::now() < end) {
        for (int i = 0; i < kPausesPerLook; ++i) {
            if (ready()) return true;
            pause_processor();
        }
        std::this_thread::yield();
    }
    return ready();
}

// Spins, then yields, then naps, so that it stays sane when there are more threads than processors.
template <class Ready>
void wait_until(const Ready& ready) {
    if (spin_until(ready)) return;
    while (!ready()) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

// The processor this thread runs on, -1 where the system does not tell.
int current_processor() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

// Moves this thread to another processor it may use, and leaves its affinity as it was. The kernel likes to wake a
// thread where its waker runs; there it would share the caller's processor until the next load balancing, with another
// one idle (batch 1, two threads: 0.32 ms instead of 0.09 ms on that machine).
void leave_processor(int taken) {
#if defined(__linux__)
    cpu_set_t allowed;
    if (taken < 0 || taken >= CPU_SETSIZE || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
    cpu_set_t others = allowed;
    CPU_CLR(taken, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return;
    sched_setaffinity(0, sizeof(allowed), &allowed);
#else
    (void)taken;
#endif
}

// The call on offer: its number in the upper half, ranks not yet taken in the lower. Whoever lowers it takes a rank.
uint32_t call_number(uint64_t offer) { return static_cast<uint32_t>(offer >> 32); }
uint32_t free_ranks(uint64_t offer) { return static_cast<uint32_t>(offer); }

class Pool {
public:
    void run(int threads, const std::function<void(int, int)>& job) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner.owns_lock()) {
            job(0, 0);
            return;
        }
        start_workers(threads - 1);
        job_ = &job;
        awake_ = std::min(spinning_.load(std::memory_order_relaxed), threads - 1);
        error_ = nullptr;
        caller_.store(current_processor(), std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint64_t number = call_number(offer_.load(std::memory_order_relaxed)) + uint64_t{1};
        // Sequentially consistent with the sleepers' count: a worker that goes to sleep sees the offer, or is seen here.
        offer_.store(number << 32 | static_cast<uint64_t>(threads - 1));
        if (sleepers_.load() > 0) wake(threads - 1 - awake_);
        attempt(0);
        const int left = static_cast<int>(free_ranks(offer_.exchange(number << 32)));
        const auto all_done = [&] { return done_.load(std::memory_order_acquire) == threads - 1 - left; };
        while (!spin_until(all_done)) std::this_thread::yield();
        if (error_) std::rethrow_exception(error_);
    }

private:
    // As many as there are to be had: where processes may start no more threads, a call is served by those it has.
    void start_workers(int count) {
        idle_spin();  // its error is the caller's
        if (workers_ >= count || Clock::now() < ask_again_) return;
        const uint32_t seen = call_number(offer_.load(std::memory_order_relaxed));
        try {
            // They live as long as the process; a pool is never destroyed.
            for (; workers_ < count; ++workers_) std::thread([this, seen] { work(seen); }).detach();
        } catch (const std::system_error&) {
            ask_again_ = Clock::now() + kAskAgain;
        }
    }

    void wake(int count) {
        { std::lock_guard<std::mutex> lock(sleep_); }  // a worker between its last look and its sleep holds it
        for (int i = 0; i < count; ++i) wake_.notify_one();
        // The kernel may have put it on this processor, where it would wait for the end of the call; now it can leave.
        std::this_thread::yield();
    }

    void attempt(int rank) {
        try {
            (*job_)(rank, awake_);
        } catch (...) {
            std::lock_guard<std::mutex> lock(sleep_);
            if (!error_) error_ = std::current_exception();
        }
    }

    // A rank of the call on offer, 0 when all are taken.
    int claim(uint32_t& seen) {
        uint64_t offer = offer_.load(std::memory_order_acquire);
        do {
            seen = call_number(offer);
            if (free_ranks(offer) == 0) return 0;
        } while (!offer_.compare_exchange_weak(offer, offer - 1, std::memory_order_acq_rel, std::memory_order_acquire));
        return static_cast<int>(free_ranks(offer));
    }

    void await_call(uint32_t seen) {
        const auto called = [&] { return call_number(offer_.load()) != seen; };
        spinning_.fetch_add(1, std::memory_order_relaxed);
        const bool came = spin_until(called, idle_spin());
        spinning_.fetch_sub(1, std::memory_order_relaxed);
        if (came) return;
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, called);
        sleepers_.fetch_sub(1);
    }

    // `seen`: the last call this thread knows of. One that wakes too late for its call spins for the next.
    void work(uint32_t seen) {
        while (true) {
            await_call(seen);
            const int caller = caller_.load(std::memory_order_relaxed);
            if (caller >= 0 && current_processor() == caller) leave_processor(caller);
            const int rank = claim(seen);
            if (rank == 0) continue;
            attempt(rank);
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    std::mutex owner_;
    int workers_ = 0;
    Clock::time_point ask_again_{};
    // Of the present call; read by those who took a rank of it.
    const std::function<void(int, int)>* job_ = nullptr;
    int awake_ = 0;
    std::exception_ptr error_;
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<int> caller_{-1};  // the processor the caller runs on
    alignas(64) std::atomic<uint64_t> offer_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    alignas(64) std::atomic<int> spinning_{0};
};

// Made before any thread could fork; it has no threads yet.
Pool* g_pool = new Pool;
std::atomic<unsigned> g_forks{0};

// The threads of a parent do not exist in its child: forget them (the old object is leaked on purpose).
[[maybe_unused]] const int g_watched = pthread_atfork(nullptr, nullptr, [] {
    g_pool = new Pool;
    g_forks.fetch_add(1, std::memory_order_release);
});

}  // namespace

int max_threads() { return 256; }

unsigned fork_count() { return g_forks.load(std::memory_order_acquire); }

void parallel(int threads, const std::function<void(int, int)>& job) {
    threads = std::min(threads, max_threads());
    if (threads <= 1) {
        job(0, 0);
        return;
    }
    g_pool->run(threads, job);
}

void Team::expect(int others) const {
    const auto here = [&] { return asking_.load(std::memory_order_relaxed) >= others; };
    const auto end = Clock::now() + kJoin;
    while (!here() && Clock::now() < end)
        for (int i = 0; i < kPausesPerLook && !here(); ++i) pause_processor();
}

bool Team::join(Member& self, Place& place) {
    self.rank = 1 + asking_.fetch_add(1, std::memory_order_relaxed);
    uint64_t state = 0;
    const auto members = [&] { return static_cast<int>(state & (kOver - 1)); };
    wait_until([&] {
        state = state_.load(std::memory_order_acquire);
        return members() > self.rank || (state & kOver) != 0;
    });
    // Let in at the last meeting, a member has its part to do even though the first one is through with its own.
    if (members() <= self.rank) return false;
    self.size = members();
    self.meetings = static_cast<unsigned>(state >> 32);
    place = place_;  // the next meeting, which overwrites it, waits for this thread
    return true;
}

void Team::meet(Member& self, const Place& place) {
    if (self.size == 1 && asking_.load(std::memory_order_relaxed) == 0) return;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == self.size) {
        arrived_.store(0, std::memory_order_relaxed);
        place_ = place;
        self.size = 1 + asking_.load(std::memory_order_relaxed);
        ++self.meetings;
        state_.store(uint64_t{self.meetings} << 32 | static_cast<uint64_t>(self.size), std::memory_order_release);
        return;
    }
    uint64_t state = 0;
    wait_until([&] {
        state = state_.load(std::memory_order_acquire);
        return static_cast<unsigned>(state >> 32) != self.meetings;
    });
    self.size = static_cast<int>(state & (kOver - 1));
    self.meetings = static_cast<unsigned>(state >> 32);
}

void Team::close() { state_.fetch_or(kOver, std::memory_order_release); }

}  // namespace lbs
