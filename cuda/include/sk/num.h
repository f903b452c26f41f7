// Numbers: the functions that the formulas need, over a value type T: float, double, Lanes (one register of either) or a Pack of them.
// Freestanding: only stdint.h and stddef.h. exp2 and log2 are our own, the same lines in every build of one precision.
#pragma once
#include "lanes.h"

namespace sk {

template <class T> SK_FN T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }

// Nearest whole numbers below and above, for |x| < 2^22 (double: 2^51); beyond that, x itself.
template <class T> SK_FN T floor_of(T x) {
  const Scalar<T> magic = sizeof(Scalar<T>) == 4 ? (Scalar<T>)12582912.0 : (Scalar<T>)6755399441055744.0;
  T n = (x + magic) - magic;
  n = n - where(less(x, n), splat_of<T>(1), splat_of<T>(0));
  return where(less(abs(x), splat_of<T>(magic / 4)), n, x);
}
template <class T> SK_FN T ceil_of(T x) { return -floor_of(-x); }

// 2^x for exponent_min <= x <= 126 (double: 1022); anything else gives garbage that the caller masks. Float: 1e-7, double: 4e-16 relative.
template <class T> SK_FN T exp2_in_range(T x) {
  if (sizeof(Scalar<T>) == 4) {
    const Scalar<T> magic = (Scalar<T>)12582912.0;   // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    T n = x + magic;
    T f = x - (n - magic);
    T p = ((((f * (Scalar<T>)0.0013276472632 + (Scalar<T>)0.00967554134312) * f + (Scalar<T>)0.0555071327186) * f + (Scalar<T>)0.240221197237) * f
           + (Scalar<T>)0.693146967065) * f + (Scalar<T>)1.00000007165;
    return from_bits(added(to_bits(p), shifted(to_bits(n), 23)));
  } else {
    const Scalar<T> magic = (Scalar<T>)6755399441055744.0;   // 1.5 * 2^52
    T n = x + magic;
    T f = x - (n - magic);
    const double c[12] = {1.0, 0.69314718055994533046, 0.24022650695910156204, 0.055504108664819921605, 0.0096181291075883352443, 0.0013333558146789921722,
                          0.00015403530462514432062, 0.000015252733489988525649, 1.321543308967639918e-6, 1.0178198021671930844e-7, 7.0741056135081427963e-9, 4.4352827069572771511e-10};
    T p = splat_of<T>(c[11]);
    for (int i = 10; i >= 0; i--) p = p * f + (Scalar<T>)c[i];
    return from_bits(added(to_bits(p), shifted(to_bits(n), 52)));
  }
}

#if defined(__CUDA_ARCH__)
// The card's own: one instruction, 2e-7 relative.
template <> SK_FN float exp2_in_range<float>(float x) {
  float p;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(x));
  return p;
}
#endif

// 2^x for every x: 0 far below, about 2^127 (double: 2^1023) at most.
template <class T> SK_FN T exp2(T x) {
  const double low = exponent_min(Scalar<T>()), high = sizeof(Scalar<T>) == 4 ? 126.9 : 1022.9;
  return where(less(x, splat_of<T>(low)), splat_of<T>(0), exp2_in_range(clamp(x, splat_of<T>(low), splat_of<T>(high))));
}
template <class T> SK_FN T exp(T x) { return exp2(x * (Scalar<T>)LOG2E); }

// log2 of a positive normal number.
template <class T> SK_FN T log2(T x) {
  typedef typename Traits<T>::Int Int;
  const bool single = sizeof(Scalar<T>) == 4;
  const int shift = single ? 23 : 52;
  // Split x = m 2^k with m in [sqrt(1/2), sqrt(2)); the bits of sqrt(1/2) make the cut.
  Int one_half = to_bits(x) - (Int)(to_bits(splat_of<T>(0.70710678118654752440)));
  Int k = one_half >> shift;
  T m = from_bits((Int)(to_bits(x) - shifted(k, shift)));
  T s = (m - (Scalar<T>)1) / (m + (Scalar<T>)1), s2 = s * s;   // log m = 2 atanh s, |s| <= 0.1716
  const int terms = single ? 4 : 11;
  T p = splat_of<T>(1.0 / (2 * terms + 1));
  for (int i = terms - 1; i >= 0; i--) p = p * s2 + (Scalar<T>)(1.0 / (2 * i + 1));
  // k as a number: an integer added to the bits of the magic constant.
  const Scalar<T> magic = single ? (Scalar<T>)12582912.0 : (Scalar<T>)6755399441055744.0;
  T kf = from_bits(added(to_bits(splat_of<T>(magic)), k)) - magic;
  return kf + s * p * (Scalar<T>)(2 * LOG2E);
}

// log2(sigmoid(x)) without overflow: -log2(1 + 2^(-|x| log2 e)) + min(x, 0) log2 e.
template <class T> SK_FN T log2_sigmoid(T x) {
  const Scalar<T> one = 1;
  T e = exp2(-abs(x) * (Scalar<T>)LOG2E);
  return min(x, splat_of<T>(0)) * (Scalar<T>)LOG2E - log2(one + e);
}
template <class T> SK_FN T sigmoid(T x) {   // no overflow at either end
  T e = exp2(-abs(x) * (Scalar<T>)LOG2E);
  T small = e / ((Scalar<T>)1 + e);
  return where(less(x, splat_of<T>(0)), small, (Scalar<T>)1 - small);
}

}  // namespace sk
