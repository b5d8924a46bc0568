// A small pool of persistent threads: they spin for a moment after a call, then sleep. A call never waits for a thread
// that is still asleep: waking one takes 20-60 us on a processor of one's own and 100-300 us on a busy or virtual one.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace lbs {

// Largest number of threads one call may use.
int max_threads();

// Runs job(rank, awake) on the caller as rank 0 and on at most `threads` - 1 threads of the pool, each with a rank of
// its own below `threads`, from when each arrives: about `awake` of them at once, those asleep late or, when job(0, ...)
// returned before, not at all. Returns when all that came are done. A job therefore shares out its work as it goes and
// is complete with rank 0 alone, which is all it gets when another call holds the pool, or the system has no thread to
// give. The first exception of a rank is thrown again here. A child of fork() has a fresh pool, whatever other threads
// of its parent were doing. LBS_SPIN_US: microseconds that threads spin after a call; BackendError where it is none.
void parallel(int threads, const std::function<void(int rank, int awake)>& job);

// How many forks lie between this process and the one that loaded the library. What was locked, or half written, by other
// threads at the time of a fork stays so in the child: whoever holds such things makes them anew when this has changed.
unsigned fork_count();

// Threads that work together step by step, and meet in between. All members follow the same steps; a thread that comes
// late is let in at the next meeting and begins at the place the others have reached.
class Team {
public:
    struct Place {
        int64_t image;
        int step;
    };
    struct Member {
        int rank = 0, size = 1;
        unsigned meetings = 0;  // that were published up to now
    };

    // Waits a moment for `others` threads to ask to be let in. For the first member, before the first meeting.
    void expect(int others) const;

    // Waits to be let in; false when the work is over.
    bool join(Member& self, Place& place);

    // Waits for all members, which pass the same place.
    void meet(Member& self, const Place& place);

    // By the first member when all steps are done: those who still wait to be let in go away.
    void close();

private:
    // Meetings so far in the upper half, members in the lower, and whether the work is over.
    static constexpr uint64_t kOver = uint64_t{1} << 31;
    Place place_{};
    alignas(64) std::atomic<int> asking_{0};   // all that ever asked
    alignas(64) std::atomic<int> arrived_{0};  // at the present meeting
    alignas(64) std::atomic<uint64_t> state_{1};
};

}  // namespace lbs
