// Threads of one block, run one after the other on one processor: each goes on until it waits for the others.
#pragma once

#include <ucontext.h>

#include <exception>
#include <functional>
#include <memory>
#include <vector>

namespace lbs::gpu {

// A place where `count` fibers meet.
struct Meeting {
    int count = 0, arrived = 0, times = 0;
};

class Fibers {
public:
    // Runs body(0) .. body(count - 1) to their ends, in every round in the order of their numbers, or shuffled from
    // `seed` on where that is not 0. Rethrows what one of them throws; raises FormatError where all that are left wait
    // for one another.
    static void run(int count, unsigned seed, const std::function<void(int)>& body);
    // Called by a fiber: returns when `meeting.count` of them have called it.
    static void meet(Meeting& meeting);
    // Called by a fiber that waits for something else: lets the others go on, and says whether it moved itself
    // meanwhile.
    static void pause();
    static void moved();

private:
    struct Fiber {
        ucontext_t context;
        std::unique_ptr<char[]> stack;
        bool done = false;
    };
    static void enter();

    ucontext_t home_;
    std::vector<Fiber> fibers_;
    const std::function<void(int)>* body_ = nullptr;
    std::exception_ptr error_;
    int current_ = 0;
    bool moved_ = false;
};

}  // namespace lbs::gpu
