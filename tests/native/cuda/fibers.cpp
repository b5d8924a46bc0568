#include "fibers.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "common/check.h"

namespace lbs::gpu {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
thread_local Fibers* running = nullptr;

}  // namespace

void Fibers::enter() {
    Fibers& self = *running;
    const int index = self.current_;
    try {
        (*self.body_)(index);
    } catch (...) {
        if (!self.error_) self.error_ = std::current_exception();
    }
    self.fibers_[index].done = true;
    self.moved_ = true;
    swapcontext(&self.fibers_[index].context, &self.home_);
}

void Fibers::run(int count, unsigned seed, const std::function<void(int)>& body) {
    Fibers self;
    self.body_ = &body;
    self.fibers_.resize(count);
    for (Fiber& fiber : self.fibers_) {
        fiber.stack.reset(new char[kStackBytes]);  // not zeroed: a cluster has thousands of threads
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Fibers::enter, 0);
    }
    running = &self;
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::minstd_rand random(seed);
    int left = count;
    while (left > 0 && !self.error_) {
        if (seed) std::shuffle(order.begin(), order.end(), random);
        self.moved_ = false;
        left = 0;
        for (int index : order) {
            self.current_ = index;
            Fiber& fiber = self.fibers_[self.current_];
            if (fiber.done) continue;
            swapcontext(&self.home_, &fiber.context);
            left += fiber.done ? 0 : 1;
        }
        if (!self.moved_ && !self.error_) {
            running = nullptr;
            throw FormatError("model: " + std::to_string(left) + " threads wait for one another");
        }
    }
    running = nullptr;
    if (self.error_) std::rethrow_exception(self.error_);
}

void Fibers::meet(Meeting& meeting) {
    Fibers& self = *running;
    const int before = meeting.times;
    if (++meeting.arrived == meeting.count) {
        meeting.arrived = 0;
        ++meeting.times;
        self.moved_ = true;
        return;
    }
    while (meeting.times == before) pause();
}

void Fibers::pause() { swapcontext(&running->fibers_[running->current_].context, &running->home_); }

void Fibers::moved() { running->moved_ = true; }

}  // namespace lbs::gpu
