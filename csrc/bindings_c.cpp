// liblbs: csrc/include/lbs.h. No exception leaves a function.
#include <algorithm>
#include <cstring>
#include <new>

#include "common/check.h"
#include "common/utf8.h"
#include "file/network.h"
#include "include/lbs.h"
#include "program/checks.h"

struct lbs_network {
    lbs::Network network;
};

namespace {

thread_local char t_error[1024] = "";

// A code point as it may be shown, or the bytes of it spelled out. Text that is no UTF-8 is spelled out byte by byte.
std::string shown(const std::string& text, size_t& at, bool is_utf8) {
    const size_t first = at;
    if (is_utf8 && lbs::is_printable(lbs::next_code_point(text, at))) return text.substr(first, at - first);
    if (!is_utf8) ++at;
    std::string spelled;
    for (size_t i = first; i < at; ++i) {
        const auto byte = static_cast<unsigned char>(text[i]);
        if (byte >= 0x20 && byte < 0x7f) spelled += text[i];
        else (spelled += "\\x") += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
    }
    return spelled;
}

lbs_status fail(lbs_status status, const char* message) noexcept {
    t_error[0] = '\0';
    try {
        const std::string text = message;
        const bool is_utf8 = lbs::read_utf8(text) >= 0;
        std::string all;
        for (size_t at = 0; at < text.size();) {
            const std::string next = shown(text, at, is_utf8);
            if (all.size() + next.size() >= sizeof t_error) break;
            all += next;
        }
        std::memcpy(t_error, all.c_str(), all.size() + 1);
    } catch (...) {  // no memory for words: the status alone tells
    }
    return status;
}

// Runs `job`; what it throws becomes a status.
template <class Job>
lbs_status guarded(const Job& job) noexcept {
    try {
        job();
        return LBS_OK;
    } catch (const lbs::FileError& error) {
        return fail(LBS_FILE, error.what());
    } catch (const lbs::Unsupported& error) {
        return fail(LBS_UNSUPPORTED, error.what());
    } catch (const lbs::FormatError& error) {
        return fail(LBS_ARGUMENT, error.what());
    } catch (const lbs::BackendError& error) {
        return fail(LBS_BACKEND, error.what());
    } catch (const std::bad_alloc&) {
        return fail(LBS_MEMORY, "there is not enough memory");
    } catch (const std::exception& error) {
        return fail(LBS_INTERNAL, error.what());
    } catch (...) {
        return fail(LBS_INTERNAL, "an unknown fault");
    }
}

template <class... Pointers>
void need(const Pointers*... pointers) {
    lbs::require((... && (pointers != nullptr)), "a pointer is null; give the address of what the function reads or writes");
}

lbs_shape shape_of(const lbs::Network::Shape& shape, bool is_bytes) {
    return {is_bytes ? LBS_UINT8 : LBS_FLOAT32, shape.rank, {shape.channels, shape.height, shape.width}};
}

}  // namespace

lbs_status lbs_open(const char* path, double budget, lbs_network** network) {
    return guarded([&] {
        need(network);
        *network = nullptr;
        need(path);
        lbs::require(budget > 0, "budget is no positive number; give how many times what a file may cost, 1 as a rule");
        *network = new lbs_network{lbs::Network(path, budget)};
    });
}

void lbs_close(lbs_network* network) { delete network; }

lbs_status lbs_input(const lbs_network* network, lbs_shape* shape) {
    return guarded([&] {
        need(network, shape);
        *shape = shape_of(network->network.input(), network->network.takes_bytes());
    });
}

lbs_status lbs_output(const lbs_network* network, lbs_shape* shape) {
    return guarded([&] {
        need(network, shape);
        *shape = shape_of(network->network.output(), false);
    });
}

lbs_status lbs_run(const lbs_network* network, const void* images, int layout, int64_t count, int threads, float* output) {
    return guarded([&] {
        need(network);
        if (count > 0) need(images, output);
        lbs::require(layout == LBS_CHANNELS_FIRST || layout == LBS_CHANNELS_LAST,
                     "layout is neither LBS_CHANNELS_FIRST nor LBS_CHANNELS_LAST");
        network->network.run(images, layout == LBS_CHANNELS_LAST, count, threads, output);
    });
}

const char* lbs_error(void) { return t_error; }
