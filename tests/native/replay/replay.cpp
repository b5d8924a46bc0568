// replay: the kernels of csrc without Python, for processors that are emulated and for ThreadSanitizer.
//
//     replay CASES                         every instruction set that can run here, against what the reference made
//     replay CASES --callers N --seconds S N threads call one program, some of them another one beside it
//
// CASES is written by tests/kernels/replay.py. One line for each instruction set goes to stdout; the first difference
// is told on stderr and ends the process with 1.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/cpu_features.h"
#include "fakequant/fakequant.h"
#include "program/runner.h"

namespace {

using Bytes = std::vector<unsigned char>;

struct Tensor {
    int index = 0;
    int element = 4;  // bytes of codes (1) or of floats
    Bytes bytes;      // of all images
};

struct Case {
    std::string name, text;
    std::vector<std::string> algorithms;  // of the steps, or none
    Bytes blob;
    int64_t batch = 0;
    std::vector<Bytes> inputs, outputs;
    std::vector<Tensor> tensors;
};

class Reader {
public:
    explicit Reader(const char* path) : file_(path, std::ios::binary) {}
    bool more() { return file_.peek() != std::ifstream::traits_type::eof(); }
    int64_t number() {
        int64_t value = 0;
        take(&value, sizeof value);
        return value;
    }
    Bytes bytes() {
        Bytes result(static_cast<size_t>(number()));
        take(result.data(), result.size());
        return result;
    }
    std::string text() {
        const Bytes found = bytes();
        return {found.begin(), found.end()};
    }
    template <class One>
    auto list(const One& one) {
        std::vector<decltype(one())> result(static_cast<size_t>(number()));
        for (auto& value : result) value = one();
        return result;
    }

private:
    void take(void* to, size_t count) {
        file_.read(static_cast<char*>(to), static_cast<std::streamsize>(count));
        if (!file_) throw std::runtime_error("the file of cases ends early; write it again");
    }
    std::ifstream file_;
};

std::vector<Case> read_cases(const char* path) {
    Reader in(path);
    std::vector<Case> cases;
    while (in.more()) {
        Case one;
        one.name = in.text();
        one.text = in.text();
        one.algorithms = in.list([&] { return in.text(); });
        one.blob = in.bytes();
        one.batch = in.number();
        one.inputs = in.list([&] { return in.bytes(); });
        one.outputs = in.list([&] { return in.bytes(); });
        one.tensors = in.list([&] {
            Tensor tensor;
            tensor.index = static_cast<int>(in.number());
            tensor.element = static_cast<int>(in.number());
            tensor.bytes = in.bytes();
            return tensor;
        });
        cases.push_back(std::move(one));
    }
    if (cases.empty()) throw std::runtime_error("the file of cases is empty");
    return cases;
}

bool is_nan(const unsigned char* p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return std::isnan(value);
}

// Whether all elements are equal; floats of any width have equal bits or are two zeros, float32 may be no numbers.
bool same_values(const Bytes& found, const Bytes& expected, size_t element) {
    for (size_t i = 0; i < found.size(); i += element) {
        const unsigned char *a = &found[i], *b = &expected[i];
        if (std::memcmp(a, b, element) == 0) continue;
        if (element == 1) return false;
        uint32_t either = 0, other = 0;
        std::memcpy(&either, a, element);
        std::memcpy(&other, b, element);
        const bool zeros = ((either | other) & ((1u << (8 * element - 1)) - 1u)) == 0;
        if (!zeros && !(element == 4 && is_nan(a) && is_nan(b))) return false;
    }
    return true;
}

// Runs the first `batch` images; what is wrong with them, or nothing.
std::string wrong(const Case& one, lbs::Runner& runner, int64_t batch, int threads, bool traced) {
    const auto part = [&](const Bytes& all) {
        return all.size() / static_cast<size_t>(one.batch) * static_cast<size_t>(batch);
    };
    std::vector<const void*> inputs;
    std::vector<float*> outputs;
    std::vector<Bytes> found, traces;
    std::map<int, void*> targets;
    for (const Bytes& input : one.inputs) inputs.push_back(input.data());
    for (const Bytes& output : one.outputs) found.emplace_back(part(output), 0xff);
    for (Bytes& output : found) outputs.push_back(reinterpret_cast<float*>(output.data()));
    for (const Tensor& tensor : one.tensors) traces.emplace_back(part(tensor.bytes), 0xc9);
    for (size_t i = 0; traced && i < traces.size(); ++i) targets[one.tensors[i].index] = traces[i].data();
    runner.run(inputs, {}, outputs, batch, threads, targets, nullptr);
    const std::string where = one.name + ", " + runner.isa() + ", " + std::to_string(batch) + " images, " +
                              std::to_string(threads) + " threads: ";
    for (size_t i = 0; i < found.size(); ++i)
        if (!same_values(found[i], one.outputs[i], 4))
            return where + "output " + std::to_string(i);
    for (size_t i = 0; traced && i < traces.size(); ++i) {
        const Tensor& tensor = one.tensors[i];
        if (!same_values(traces[i], tensor.bytes, static_cast<size_t>(tensor.element)))
            return where + "tensor " + std::to_string(tensor.index);
    }
    return "";
}

std::unique_ptr<lbs::Runner> make_runner(const Case& one, const std::string& isa) {
    const auto bytes = static_cast<int64_t>(one.blob.size());
    return std::make_unique<lbs::Runner>(one.text, one.blob.data(), bytes, isa, one.algorithms);
}

void require_right(const std::string& difference) {
    if (difference.empty()) return;
    std::fprintf(stderr, "differs from the reference: %s\n", difference.c_str());
    std::exit(1);
}

// Floats of a type, 4 or 2 bytes each: bfloat16 is the upper half of a float.
Bytes floats(int64_t count, int period, float unit, size_t element) {
    Bytes result;
    for (int64_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(i % period - period / 2) / unit;
        unsigned char raw[4];
        std::memcpy(raw, &value, 4);
        result.insert(result.end(), raw + 4 - element, raw + 4);
    }
    return result;
}

// The quantizers of training: elements as the portable kernels make them, which tests in Python judge.
void check_fake_quant(lbs::Isa isa, lbs::FloatType type, bool is_signed) {
    constexpr int64_t kCount = 2049;
    const size_t element = type == lbs::FloatType::kFloat32 ? 4 : 2;
    const Bytes x = floats(kCount, 401, 97.0f, element), gy = floats(kCount, 89, 31.0f, element);
    lbs::QuantWidths widths{};
    widths.coarse = 2;
    widths.v = 1.5f;
    widths.high = 1.0f;
    widths.low = is_signed ? 1.0f : 0.0f;
    widths.is_signed = is_signed;
    for (int j = 0; j < 3; ++j) {
        widths.n[j] = static_cast<float>((1 << (2 << j)) - 1);
        widths.step[j] = widths.v / widths.n[j];
        widths.scale[j] = widths.n[j] / (is_signed ? 2 * widths.v : widths.v);
    }
    const auto forward = [&](lbs::Isa which) {
        Bytes y(x.size());
        lbs::fake_quant_forward({x.data(), y.data(), widths, type}, kCount, 1, which);
        return y;
    };
    const auto backward = [&](lbs::Isa which) {
        Bytes gx(x.size());
        lbs::fake_quant_backward({x.data(), gy.data(), gx.data(), widths, type}, kCount, 1, which);
        return gx;
    };
    const std::string what = std::string(lbs::isa_name(isa)) + ", fake quantizer, ";
    if (!same_values(forward(isa), forward(lbs::Isa::kPortable), element)) require_right(what + "forward");
    if (!same_values(backward(isa), backward(lbs::Isa::kPortable), element)) require_right(what + "backward");
}

void check_isa(const std::vector<Case>& cases, lbs::Isa isa) {
    const std::string name = lbs::isa_name(isa);
    std::map<std::string, int> steps;
    int programs = 0;
    for (const Case& one : cases) {
        if (name.rfind("amx", 0) == 0 && !one.algorithms.empty()) continue;  // tiles have one algorithm
        const auto runner = make_runner(one, name);
        for (const std::string& algorithm : runner->algorithms()) ++steps[algorithm];
        for (const int threads : {1, 3})
            for (const bool traced : {true, false}) require_right(wrong(one, *runner, one.batch, threads, traced));
        ++programs;
    }
    for (const lbs::FloatType type : {lbs::FloatType::kFloat32, lbs::FloatType::kBfloat16})
        for (const bool is_signed : {false, true}) check_fake_quant(isa, type, is_signed);
    std::printf("%s: %d programs, %d direct, %d lanes, %d winograd\n", name.c_str(), programs, steps["direct"],
                steps["lanes"], steps["winograd"]);
}

int check_all(const std::vector<Case>& cases) {
    for (const lbs::Isa isa : lbs::kIsas) {
        const std::string reason = lbs::isa_reason(isa);
        if (reason.empty()) check_isa(cases, isa);
        else std::printf("%s: cannot run: %s\n", lbs::isa_name(isa), reason.c_str());
    }
    return 0;
}

// Every program gets an equal part of the time. One caller of four calls the next program instead: the pool is then
// somebody else's, and its threads are taken from one call to another.
int call_at_once(const std::vector<Case>& cases, int callers, double seconds) {
    std::vector<std::unique_ptr<lbs::Runner>> runners;
    for (const Case& one : cases) runners.push_back(make_runner(one, "auto"));
    std::atomic<int64_t> calls{0};
    for (size_t i = 0; i < cases.size(); ++i) {
        const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds / cases.size());
        std::vector<std::thread> threads;
        for (int caller = 0; caller < callers; ++caller)
            threads.emplace_back([&, caller] {
                const size_t mine = caller % 4 == 3 ? (i + 1) % cases.size() : i;
                for (int turn = caller; std::chrono::steady_clock::now() < end; ++turn) {
                    const int64_t batch = 1 + turn % cases[mine].batch;
                    require_right(wrong(cases[mine], *runners[mine], batch, 1 + turn % 4, turn % 5 == 0));
                    calls.fetch_add(1, std::memory_order_relaxed);
                }
            });
        for (std::thread& thread : threads) thread.join();
    }
    const auto total = static_cast<long long>(calls.load());
    std::printf("%lld calls of %zu programs by %d threads\n", total, cases.size(), callers);
    return calls.load() > 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
    try {
        if (count == 2) return check_all(read_cases(words[1]));
        if (count == 6 && !std::strcmp(words[2], "--callers") && !std::strcmp(words[4], "--seconds"))
            return call_at_once(read_cases(words[1]), std::atoi(words[3]), std::atof(words[5]));
        std::fprintf(stderr, "usage: replay CASES [--callers N --seconds S]\n");
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
    }
    return 2;
}
