#include "file/work.h"

#include <algorithm>
#include <cstdio>
#include <string>

#include "common/check.h"

namespace lbs {
namespace {

using Count = unsigned __int128;  // all products of the largest program fit

// Of one image, as in work.py.
constexpr double kMaxElements = 134217728.0;      // 2^27, written by all operations together
constexpr double kMaxProducts = 68719476736.0;    // 2^36
constexpr double kMaxOperations = 8192.0;

struct Work {
    double budget;
    Count elements = 0, products = 0, operations = 0;

    void add(Count written, Count multiplied, Count count) {
        elements += written;
        products += multiplied;
        operations += count;
        check("elements", elements, kMaxElements);
        check("products", products, kMaxProducts);
        check("operations", operations, kMaxOperations);
    }

    void check(const char* name, Count count, double most) const {
        if (static_cast<long double>(count) <= static_cast<long double>(budget * most)) return;
        char words[160];
        std::snprintf(words, sizeof words, "one image takes more than %.0f %s", budget * most, name);
        throw FormatError(std::string(words) + "; a file that asks for more is not run on its own word: if you trust it, "
                                               "give a larger budget");
    }
};

Count elements_of(const TensorSpec& tensor) { return static_cast<Count>(tensor.pixels()) * static_cast<Count>(tensor.channels); }

Count area(Pair pair) { return static_cast<Count>(pair.y) * static_cast<Count>(pair.x); }

// Elements of the input with its padding, which kernels may copy.
Count padded(const TensorSpec& source, Pair padding) {
    if (!padding.y && !padding.x) return 0;
    return static_cast<Count>(source.channels) * static_cast<Count>(source.height + 2 * padding.y) *
           static_cast<Count>(source.width + 2 * padding.x);
}

void add_step(Work& work, const ProgramSpec& program, const StepSpec& step) {
    const auto tensor = [&](int index) -> const TensorSpec& { return program.tensors[static_cast<size_t>(index)]; };
    const int target = step.emit.stream != kNoTensor ? step.emit.stream : step.emit.consumers.front().tensor;
    const TensorSpec& source = tensor(step.input);
    Count made = elements_of(tensor(target)), copied = 0;
    switch (step.kind) {
        case StepKind::kConv:
            made *= area(step.kernel) * static_cast<Count>(source.channels) / static_cast<Count>(step.groups);
            copied = padded(source, step.padding);
            break;
        case StepKind::kLinear: made *= static_cast<Count>(source.channels); break;
        case StepKind::kMaxPool:
        case StepKind::kMeanPool:
        case StepKind::kAveragePool:
            made = std::max(made * area(step.kernel), elements_of(source));
            copied = padded(source, step.padding);
            break;
        case StepKind::kQuantPack:
        case StepKind::kSelect:
        case StepKind::kResize: break;
    }
    work.add(copied, made, 1);
}

}  // namespace

void check_work(const ProgramSpec& program, double budget) {
    Work work{budget};
    for (const TensorSpec& tensor : program.tensors) work.add(elements_of(tensor), 0, 0);
    for (const StepSpec& step : program.steps) add_step(work, program, step);
    // The image that is given and the tensors that are returned.
    const auto given = [&](int index) {
        const Count count = elements_of(program.tensors[static_cast<size_t>(index)]);
        work.add(count, count, 1);
    };
    for (const int index : program.inputs) given(index);
    for (const int index : program.outputs) given(index);
}

}  // namespace lbs
