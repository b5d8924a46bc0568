#include "bitlinear/bitlinear_cpu.h"

#include "bitconv2d/bitconv2d_cpu.h"

namespace lbs {

void plan_linear(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, const KernelTable& kernels,
                 Store& store, LinearPlan& plan) {
    const TensorSpec& source = program.tensors[static_cast<size_t>(step.input)];
    const ArraySpec& planes = program.array(step.planes);
    const int outputs = static_cast<int>(planes.shape[1]), channels = source.channels;
    const std::vector<uint8_t> codes =
        unpack_weight_codes(program.integers(step.planes), step.w_bits, outputs, 1, channels);

    plan.input = step.input;
    plan.outputs = outputs;
    plan.in_offset = layout.offset(0, 0);
    plan.in_pitch = layout.group_pitch();
    plan.k_steps = layout.groups;
    plan.wide = needs_wide_dot(kernels, step, source.bits);
    const size_t lanes = static_cast<size_t>(kernels.lanes), steps = static_cast<size_t>(plan.k_steps);
    const size_t blocks = (static_cast<size_t>(outputs) + lanes - 1) / lanes;
    int8_t* weights = store.make<int8_t>(blocks * steps * lanes * 4);
    std::vector<int64_t> sums(static_cast<size_t>(outputs), 0);
    for (size_t o = 0; o < static_cast<size_t>(outputs); ++o)
        for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
            const int code = codes[o * static_cast<size_t>(channels) + c];
            weights[((o / lanes * steps + c / 4) * lanes + o % lanes) * 4 + c % 4] =
                static_cast<int8_t>(stored_weight(step, code));
            sums[o] += weight_units(step, code);
        }
    plan.weights = weights;
    int8_t* ones = store.make<int8_t>(steps * 4);
    for (int c = 0; c < channels; ++c) ones[c] = 1;
    plan.ones = ones;
    plan.acc = plan_accumulator(program, step, source, outputs, sums, store);
}

}  // namespace lbs
