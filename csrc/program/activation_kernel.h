// Activations of vectors: the formulas of lbs_kernels/program/activations.py, operation by operation.
#pragma once

#include "program/plan.h"

namespace {

// 2^k and p with exp(h + low) = 2^k (1 + p), for |h + low| <= 80.
struct Power {
    Simd::F s, p;
};

template <int kCount>
inline Simd::F polynomial(const float (&c)[kCount], Simd::F x) {
    Simd::F result = Simd::fset(c[kCount - 1]);
    for (int i = kCount - 2; i >= 0; --i) result = Simd::fadd(Simd::fmul(result, x), Simd::fset(c[i]));
    return result;
}

inline Power power_of(Simd::F h, Simd::F low) {
    constexpr float kExp[] = {0.5f, 0.166665435f, 0.0416662879f, 0.00836651865f, 0.00139463006f};
    const Simd::F k = Simd::fround(Simd::fmul(Simd::fadd(h, low), Simd::fset(1.44269504f)));
    const Simd::F high_part = Simd::fsub(h, Simd::fmul(k, Simd::fset(0.693359375f)));
    const Simd::F r = Simd::fadd(Simd::fsub(high_part, Simd::fmul(k, Simd::fset(-0.000212194442f))), low);
    const Simd::F p = Simd::fadd(Simd::fmul(Simd::fmul(r, r), polynomial(kExp, r)), r);
    return {Simd::fbits(Simd::ishl(Simd::iadd(Simd::ifromf(k), Simd::iset(127)), 23)), p};
}

inline Simd::F exp_of(Simd::F h, Simd::F low = Simd::fset(0.0f)) {
    const Power e = power_of(h, low);
    return Simd::fadd(Simd::fmul(e.s, e.p), e.s);
}

inline Simd::F expm1_of(Simd::F h) {
    const Power e = power_of(h, Simd::fset(0.0f));
    return Simd::fadd(Simd::fmul(e.s, e.p), Simd::fsub(e.s, Simd::fset(1.0f)));
}

// The bound second: not a number becomes the bound.
inline Simd::F at_least(Simd::F x, float low) { return Simd::fmax(x, Simd::fset(low)); }
inline Simd::F at_most(Simd::F x, float high) { return Simd::fmin(x, Simd::fset(high)); }
inline Simd::F plus(Simd::F x, float value) { return Simd::fadd(x, Simd::fset(value)); }
inline Simd::F times(Simd::F x, float value) { return Simd::fmul(x, Simd::fset(value)); }
inline Simd::F negative(Simd::F x) { return times(x, -1.0f); }

inline Simd::F elu(Simd::F x, float alpha) {
    return Simd::fadd(at_least(x, 0.0f), times(expm1_of(at_least(at_most(x, 0.0f), -20.0f)), alpha));
}

inline Simd::F gelu(Simd::F x) {
    constexpr float kTail[] = {0.0997532234f,   0.0993970037f, 0.0962540731f, 0.0687736273f,  0.0954482481f,
                               -0.00280956761f, 0.0462159291f, 0.0388888195f, -0.0575736649f, 0.0156523045f};
    const Simd::F a = at_most(Simd::fmax(x, negative(x)), 12.5f);
    const Simd::F c = times(Simd::fround(times(a, 16.0f)), 0.0625f);  // c^2 is exact, a^2 = c^2 + (a - c) (a + c)
    const Simd::F rest = Simd::fmul(Simd::fsub(a, c), Simd::fadd(a, c));
    const Simd::F tail = exp_of(times(Simd::fmul(c, c), -0.5f), times(rest, -0.5f));
    const Simd::F t = Simd::fdiv(Simd::fset(1.0f), plus(times(a, 0.25f), 1.0f));
    return Simd::fsub(at_least(x, 0.0f), Simd::fmul(a, Simd::fmul(tail, Simd::fmul(t, polynomial(kTail, t)))));
}

inline Simd::F gelu_tanh(Simd::F x) {
    x = at_least(x, -9.5f);
    const Simd::F c = at_most(x, 9.5f);
    const Simd::F u = Simd::fmul(c, plus(times(Simd::fmul(c, c), 0.0713548163f), 1.59576912f));
    return Simd::fdiv(x, plus(exp_of(negative(u)), 1.0f));
}

inline Simd::F hardsigmoid(Simd::F x) { return times(at_most(at_least(plus(x, 3.0f), 0.0f), 6.0f), 0.166666672f); }

inline Simd::F hardswish(Simd::F x) {
    x = at_least(x, -3.0f);
    return Simd::fmul(x, times(at_most(plus(x, 3.0f), 6.0f), 0.166666672f));
}

inline Simd::F leaky_relu(Simd::F x, float slope) {
    return Simd::fadd(at_least(x, 0.0f), times(at_least(at_most(x, 0.0f), -3.40282347e38f), slope));
}

inline Simd::F mish(Simd::F x) {
    x = at_least(x, -80.0f);
    const Simd::F e = exp_of(at_most(x, 20.0f));
    const Simd::F n = Simd::fmul(e, plus(e, 2.0f));
    return Simd::fmul(x, Simd::fdiv(n, plus(n, 2.0f)));
}

inline Simd::F sigmoid(Simd::F x) {
    return Simd::fdiv(Simd::fset(1.0f), plus(exp_of(negative(at_most(at_least(x, -80.0f), 80.0f))), 1.0f));
}

inline Simd::F silu(Simd::F x) {
    x = at_least(x, -80.0f);
    return Simd::fdiv(x, plus(exp_of(negative(at_most(x, 80.0f))), 1.0f));
}

inline Simd::F tanh_of(Simd::F x) {
    x = at_most(at_least(x, -10.0f), 10.0f);
    const Simd::F e = expm1_of(Simd::fadd(x, x));
    return Simd::fdiv(e, plus(e, 2.0f));
}

// Four vectors of the channels [channel, channel + 4), in place.
__attribute__((noinline)) void activate4(const lbs::ActivationPlan& plan, int channel, Simd::F* y) {
    using lbs::ActivationKind;
    const auto all = [y](const auto& formula) {
        for (int j = 0; j < 4; ++j) y[j] = formula(y[j]);
    };
    switch (plan.kind) {
        case ActivationKind::kNone: return;
        case ActivationKind::kElu: return all([&](Simd::F x) { return elu(x, plan.value); });
        case ActivationKind::kGelu: return all(gelu);
        case ActivationKind::kGeluTanh: return all(gelu_tanh);
        case ActivationKind::kHardsigmoid: return all(hardsigmoid);
        case ActivationKind::kHardswish: return all(hardswish);
        case ActivationKind::kLeakyRelu: return all([&](Simd::F x) { return leaky_relu(x, plan.value); });
        case ActivationKind::kMish: return all(mish);
        case ActivationKind::kPrelu:
            for (int j = 0; j < 4; ++j) y[j] = leaky_relu(y[j], plan.slope[channel + j]);
            return;
        case ActivationKind::kSigmoid: return all(sigmoid);
        case ActivationKind::kSilu: return all(silu);
        case ActivationKind::kTanh: return all(tanh_of);
    }
}

}  // namespace
