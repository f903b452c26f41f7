// What the formulas need of a scalar value type: float or double. CUDA uses these alone.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define SK_FN __host__ __device__ __forceinline__
#else
#define SK_FN inline __attribute__((always_inline))
#endif

namespace sk {

template <class T> struct Traits;   // Scalar, Mask, Int
template <> struct Traits<float> { using Scalar = float; using Mask = bool; using Int = int32_t; };
template <> struct Traits<double> { using Scalar = double; using Mask = bool; using Int = int64_t; };
template <class T> using Scalar = typename Traits<T>::Scalar;
template <class T> using Mask = typename Traits<T>::Mask;

constexpr double LN2 = 0.69314718055994530942, LOG2E = 1.44269504088896340736;

// Smallest exponent that exp2 of this scalar is asked for: below it alpha counts as 0.
SK_FN constexpr double exponent_min(float) { return -125.0; }
SK_FN constexpr double exponent_min(double) { return -1000.0; }

// p + n, null where p is.
template <class T> SK_FN T* offset(T* p, int64_t n) { return p ? p + n : nullptr; }

// ---- scalars ----
SK_FN bool less(float a, float b) { return a < b; }
SK_FN bool less(double a, double b) { return a < b; }
SK_FN bool at_least(float a, float b) { return a >= b; }
SK_FN bool at_least(double a, double b) { return a >= b; }
SK_FN bool both(bool a, bool b) { return a && b; }
SK_FN bool any(bool a) { return a; }
SK_FN uint32_t bits(bool a) { return a; }
SK_FN float where(bool m, float a, float b) { return m ? a : b; }
SK_FN double where(bool m, double a, double b) { return m ? a : b; }
#if defined(__CUDA_ARCH__)   // one instruction
SK_FN float min(float a, float b) { return fminf(a, b); }
SK_FN float max(float a, float b) { return fmaxf(a, b); }
#else
SK_FN float min(float a, float b) { return a < b ? a : b; }
SK_FN float max(float a, float b) { return a > b ? a : b; }
#endif
SK_FN double min(double a, double b) { return a < b ? a : b; }
SK_FN double max(double a, double b) { return a > b ? a : b; }
SK_FN float abs(float a) { return __builtin_fabsf(a); }
SK_FN double abs(double a) { return __builtin_fabs(a); }
SK_FN float sqrt(float a) { return __builtin_sqrtf(a); }
SK_FN double sqrt(double a) { return __builtin_sqrt(a); }
SK_FN float reciprocal(float a) {   // about 1 ulp
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));   // a division takes ten instructions more
  return r;
#else
  return 1.0f / a;
#endif
}
SK_FN double reciprocal(double a) { return 1.0 / a; }
SK_FN float quick_sqrt(float a) {   // about 1 ulp
#if defined(__CUDA_ARCH__)
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
#else
  return sqrt(a);
#endif
}
SK_FN double quick_sqrt(double a) { return sqrt(a); }
SK_FN int32_t to_bits(float a) { int32_t i; __builtin_memcpy(&i, &a, 4); return i; }
SK_FN int64_t to_bits(double a) { int64_t i; __builtin_memcpy(&i, &a, 8); return i; }
SK_FN float from_bits(int32_t i) { float a; __builtin_memcpy(&a, &i, 4); return a; }
SK_FN double from_bits(int64_t i) { double a; __builtin_memcpy(&a, &i, 8); return a; }
// << and + of bits: what leaves at the top is lost, which the operators of signed numbers may not do.
SK_FN int32_t shifted(int32_t i, int bits) { return (int32_t)((uint32_t)i << bits); }
SK_FN int64_t shifted(int64_t i, int bits) { return (int64_t)((uint64_t)i << bits); }
SK_FN int32_t added(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
SK_FN int64_t added(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }

// The value itself, rounded: keeps a compiler from fusing the product inside with a sum outside.
SK_FN float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  float p = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(p));
#elif defined(__aarch64__)
  asm("" : "+w"(p));
#endif
  return p;   // wasm32 has no fused multiply-add
#endif
}
SK_FN float rounded_sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

SK_FN double rounded_product(double a, double b) { return a * b; }
SK_FN double rounded_sum(double a, double b) { return a + b; }

// The type with twice the digits, where there is one, for the few places where a difference of large numbers counts.
template <class T> struct WideOf { using type = double; };
template <class T> using Wide = typename WideOf<T>::type;
SK_FN double widened(float a) { return a; }
SK_FN double widened(double a) { return a; }
SK_FN void narrow(double a, float& out) { out = (float)a; }
SK_FN void narrow(double a, double& out) { out = a; }

// A constant or scalar in every lane.
template <class T> struct Splat { static SK_FN T of(double x) { return (T)x; } };
template <class T> SK_FN T splat_of(double x) { return Splat<T>::of(x); }

}  // namespace sk
