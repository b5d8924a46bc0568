#include "common/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "common/check.h"

namespace lbs {
namespace {

constexpr size_t kLine = 64;

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

Guard guard() {
    const char* const word = std::getenv("LBS_GUARD");
    if (!word || !*word) return Guard::kNone;
    const std::string name = word;
    if (name == "reads") return Guard::kReads;
    if (name == "writes") return Guard::kWrites;
    if (name == "start") return Guard::kStart;
    throw BackendError("LBS_GUARD is '" + name + "'; it is one of reads, writes, start, or unset");
}

void Buffer::Release::operator()(unsigned char* base) const {
    if (mapped) munmap(base, mapped);
    else std::free(base);
}

Buffer::Buffer(int64_t bytes, int64_t slack) {
    const Guard kind = guard();
    const auto own = static_cast<size_t>(bytes), all = own + static_cast<size_t>(slack);
    if (kind == Guard::kNone) {
        const size_t size = rounded(all, kLine);
        data_ = static_cast<unsigned char*>(std::aligned_alloc(kLine, size));
        if (!data_) throw std::bad_alloc();
        base_.reset(data_);
        std::memset(data_, 0, size);
        return;
    }
    const size_t page = page_bytes(), inner = rounded(kind == Guard::kWrites ? own : all, page);
    const size_t total = inner + 2 * page;  // the slack is shorter than a page
    void* const base = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = {static_cast<unsigned char*>(base), Release{total}};
    unsigned char *const first = base_.get() + page, *const behind = first + inner;
    const bool opened = inner == 0 || mprotect(first, inner, PROT_READ | PROT_WRITE) == 0;
    if (!opened || (kind == Guard::kWrites && mprotect(behind, page, PROT_READ) != 0)) throw std::bad_alloc();
    data_ = kind == Guard::kStart ? first : behind - (kind == Guard::kWrites ? own : all);
}

}  // namespace lbs
