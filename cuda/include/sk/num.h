// Numbers: what the formulas need of their value type T. T is float, double, or Lanes (one register of either); CUDA uses the scalars.
// Freestanding: only stdint.h and stddef.h. exp2 and log2 are our own, the same lines in every build of one precision.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if !defined(__CUDACC__) && defined(__SSE4_1__)
#include <immintrin.h>
#endif

#if defined(__CUDACC__)
#define SK_FN __host__ __device__ __forceinline__
#else
#define SK_FN inline __attribute__((always_inline))
#endif

namespace sk {

template <class T> struct Traits;   // Scalar, Mask, lanes
template <> struct Traits<float> { using Scalar = float; using Mask = bool; using Int = int32_t; static constexpr int lanes = 1; };
template <> struct Traits<double> { using Scalar = double; using Mask = bool; using Int = int64_t; static constexpr int lanes = 1; };
template <class T> using Scalar = typename Traits<T>::Scalar;
template <class T> using Mask = typename Traits<T>::Mask;

constexpr double LN2 = 0.69314718055994530942, LOG2E = 1.44269504088896340736;

// Smallest exponent that exp2 of this scalar is asked for: below it alpha counts as 0.
SK_FN constexpr double exponent_min(float) { return -125.0; }
SK_FN constexpr double exponent_min(double) { return -1000.0; }

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
SK_FN float min(float a, float b) { return a < b ? a : b; }
SK_FN double min(double a, double b) { return a < b ? a : b; }
SK_FN float max(float a, float b) { return a > b ? a : b; }
SK_FN double max(double a, double b) { return a > b ? a : b; }
SK_FN float abs(float a) { return __builtin_fabsf(a); }
SK_FN double abs(double a) { return __builtin_fabs(a); }
SK_FN float sqrt(float a) { return __builtin_sqrtf(a); }
SK_FN double sqrt(double a) { return __builtin_sqrt(a); }
SK_FN float reciprocal(float a) { return 1.0f / a; }
SK_FN double reciprocal(double a) { return 1.0 / a; }
SK_FN int32_t to_bits(float a) { int32_t i; __builtin_memcpy(&i, &a, 4); return i; }
SK_FN int64_t to_bits(double a) { int64_t i; __builtin_memcpy(&i, &a, 8); return i; }
SK_FN float from_bits(int32_t i) { float a; __builtin_memcpy(&a, &i, 4); return a; }
SK_FN double from_bits(int64_t i) { double a; __builtin_memcpy(&a, &i, 8); return a; }

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

#if !defined(__CUDACC__)
// ---- lanes: one register of `real` ----
#ifndef SK_REAL
#define SK_REAL float
#endif
typedef SK_REAL real;
template <size_t size> struct IntOf;
template <> struct IntOf<4> { using type = int32_t; };
template <> struct IntOf<8> { using type = int64_t; };
typedef IntOf<sizeof(real)>::type ireal;
#if defined(__AVX512F__)
#define SK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SK_VECTOR_BYTES 32
#else
#define SK_VECTOR_BYTES 16
#endif
typedef real Lanes __attribute__((vector_size(SK_VECTOR_BYTES)));
typedef ireal IntLanes __attribute__((vector_size(SK_VECTOR_BYTES)));
constexpr int W = SK_VECTOR_BYTES / sizeof(real);
constexpr bool is_float = sizeof(real) == 4;

#if defined(__AVX512F__)
static_assert(is_float, "the AVX-512 build is float");
typedef __mmask16 LaneMask;   // g++ turns compares of vector_size types into slower code: intrinsics (0.45 -> 0.20 ns per pixel and Gaussian)
SK_FN LaneMask less(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
SK_FN LaneMask at_least(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
SK_FN LaneMask both(LaneMask a, LaneMask b) { return a & b; }
SK_FN bool any(LaneMask m) { return m != 0; }
SK_FN uint32_t bits(LaneMask m) { return m; }
SK_FN Lanes where(LaneMask m, Lanes a, Lanes b) { return _mm512_mask_blend_ps(m, b, a); }
SK_FN Lanes min(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
SK_FN Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
SK_FN Lanes abs(Lanes a) { return _mm512_abs_ps(a); }
SK_FN Lanes sqrt(Lanes a) { return _mm512_sqrt_ps(a); }
SK_FN Lanes reciprocal(Lanes a) { Lanes r = _mm512_rcp14_ps(a); return r + r * (1.0f - a * r); }   // about 1 ulp; a division costs 16 cycles
#elif defined(__AVX2__)
static_assert(is_float, "the AVX2 build is float");
typedef IntLanes LaneMask;
SK_FN LaneMask less(Lanes a, Lanes b) { return (LaneMask)_mm256_cmp_ps(a, b, _CMP_LT_OQ); }
SK_FN LaneMask at_least(Lanes a, Lanes b) { return (LaneMask)_mm256_cmp_ps(a, b, _CMP_GE_OQ); }
SK_FN LaneMask both(LaneMask a, LaneMask b) { return a & b; }
SK_FN uint32_t bits(LaneMask m) { return (uint32_t)_mm256_movemask_ps((__m256)m); }
SK_FN bool any(LaneMask m) { return !_mm256_testz_ps((__m256)m, (__m256)m); }
SK_FN Lanes where(LaneMask m, Lanes a, Lanes b) { return _mm256_blendv_ps(b, a, (__m256)m); }
SK_FN Lanes min(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }
SK_FN Lanes max(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
SK_FN Lanes abs(Lanes a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
SK_FN Lanes sqrt(Lanes a) { return _mm256_sqrt_ps(a); }
SK_FN Lanes reciprocal(Lanes a) { return 1.0f / a; }
#else
typedef IntLanes LaneMask;
SK_FN LaneMask less(Lanes a, Lanes b) { return a < b; }
SK_FN LaneMask at_least(Lanes a, Lanes b) { return a >= b; }
SK_FN LaneMask both(LaneMask a, LaneMask b) { return a & b; }
SK_FN uint32_t bits(LaneMask m) {
  uint32_t out = 0;
  for (int i = 0; i < W; i++) out |= (uint32_t)(m[i] != 0) << i;
  return out;
}
SK_FN bool any(LaneMask m) {
  ireal out = 0;
  for (int i = 0; i < W; i++) out |= m[i];
  return out != 0;
}
SK_FN Lanes where(LaneMask m, Lanes a, Lanes b) { return (Lanes)((m & (IntLanes)a) | (~m & (IntLanes)b)); }
SK_FN Lanes min(Lanes a, Lanes b) { return where(a < b, a, b); }
SK_FN Lanes max(Lanes a, Lanes b) { return where(a > b, a, b); }
SK_FN Lanes abs(Lanes a) { return where(a < a - a, -a, a); }
SK_FN Lanes sqrt(Lanes a) {
  for (int i = 0; i < W; i++) a[i] = sqrt((real)a[i]);
  return a;
}
SK_FN Lanes reciprocal(Lanes a) { return (real)1 / a; }
#endif
template <> struct Traits<Lanes> { using Scalar = real; using Mask = LaneMask; using Int = IntLanes; static constexpr int lanes = W; };

SK_FN Lanes load(const real* p) { Lanes v; __builtin_memcpy(&v, p, sizeof v); return v; }
SK_FN void store(real* p, Lanes v) { __builtin_memcpy(p, &v, sizeof v); }
SK_FN IntLanes to_bits(Lanes a) { return (IntLanes)a; }
SK_FN Lanes from_bits(IntLanes i) { return (Lanes)i; }
#if defined(__x86_64__)
SK_FN Lanes rounded_product(Lanes a, Lanes b) { Lanes p = a * b; asm("" : "+v"(p)); return p; }
#elif defined(__aarch64__)
SK_FN Lanes rounded_product(Lanes a, Lanes b) { Lanes p = a * b; asm("" : "+w"(p)); return p; }
#else
SK_FN Lanes rounded_product(Lanes a, Lanes b) { return a * b; }
#endif
SK_FN Lanes rounded_sum(Lanes a, Lanes b) { return a + b; }

// Four neighbouring columns of W rows, row i being base + rows[i] * stride, to four registers (lane i = row i) and back. Only the first
// `columns` are read or written. Not by gather: with the microcode of 2023 against its leak, one costs 58 cycles on some processors.
#if defined(__SSE4_1__)
SK_FN __m128 load_quad(const float* p, int columns) {
  if (columns >= 4) return _mm_loadu_ps(p);
  if (columns == 3) return _mm_insert_ps(_mm_castpd_ps(_mm_load_sd((const double*)p)), _mm_load_ss(p + 2), 0x20);
  return columns == 2 ? _mm_castpd_ps(_mm_load_sd((const double*)p)) : _mm_load_ss(p);
}
SK_FN void store_quad(float* p, int columns, __m128 v) {
  if (columns >= 4) return _mm_storeu_ps(p, v);
  if (columns == 1) return _mm_store_ss(p, v);
  _mm_store_sd((double*)p, _mm_castps_pd(v));
  if (columns == 3) _mm_store_ss(p + 2, _mm_movehl_ps(v, v));
}
SK_FN void transpose_quads(Lanes& a, Lanes& b, Lanes& c, Lanes& d) {   // 4 x 4 within every 128 bits
#if defined(__AVX512F__)
  const __m512 ab0 = _mm512_unpacklo_ps(a, b), ab1 = _mm512_unpackhi_ps(a, b), cd0 = _mm512_unpacklo_ps(c, d), cd1 = _mm512_unpackhi_ps(c, d);
  a = _mm512_shuffle_ps(ab0, cd0, 0x44), b = _mm512_shuffle_ps(ab0, cd0, 0xEE), c = _mm512_shuffle_ps(ab1, cd1, 0x44), d = _mm512_shuffle_ps(ab1, cd1, 0xEE);
#elif defined(__AVX2__)
  const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b), cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(ab0, cd0, 0x44), b = _mm256_shuffle_ps(ab0, cd0, 0xEE), c = _mm256_shuffle_ps(ab1, cd1, 0x44), d = _mm256_shuffle_ps(ab1, cd1, 0xEE);
#else
  __m128 x = (__m128)a, y = (__m128)b, z = (__m128)c, w = (__m128)d;
  _MM_TRANSPOSE4_PS(x, y, z, w);
  a = (Lanes)x, b = (Lanes)y, c = (Lanes)z, d = (Lanes)w;
#endif
}
SK_FN void load_columns_float(const float* base, const int32_t* rows, int stride, int columns, Lanes* out) {
  for (int k = 0; k < 4; k++) {
    __m128 q[W / 4 > 0 ? W / 4 : 1];
    for (int j = 0; j < W / 4; j++) q[j] = load_quad(base + (int64_t)rows[4 * j + k] * stride, columns);
    __builtin_memcpy(&out[k], q, sizeof(Lanes));
  }
  transpose_quads(out[0], out[1], out[2], out[3]);
}
SK_FN void store_columns_float(float* base, const int32_t* rows, int used, int stride, int columns, const Lanes* in, bool add) {
  Lanes t[4] = {in[0], in[1], in[2], in[3]};
  transpose_quads(t[0], t[1], t[2], t[3]);
  __m128 q[4][W / 4 > 0 ? W / 4 : 1];
  for (int k = 0; k < 4; k++) __builtin_memcpy(q[k], &t[k], sizeof(Lanes));
  for (int i = 0; i < used; i++) {
    float* p = base + (int64_t)rows[i] * stride;
    store_quad(p, columns, add ? _mm_add_ps(load_quad(p, columns), q[i & 3][i >> 2]) : q[i & 3][i >> 2]);
  }
}
#endif
SK_FN void load_columns(const real* base, const int32_t* rows, int stride, int columns, Lanes* out) {
#if defined(__SSE4_1__)
  if (is_float) return load_columns_float((const float*)base, rows, stride, columns, out);
#endif
  for (int j = 0; j < columns; j++)
    for (int i = 0; i < W; i++) out[j][i] = base[(int64_t)rows[i] * stride + j];
}
SK_FN void store_columns(real* base, const int32_t* rows, int used, int stride, int columns, const Lanes* in, bool add) {
#if defined(__SSE4_1__)
  if (is_float) return store_columns_float((float*)base, rows, used, stride, columns, in, add);
#endif
  for (int i = 0; i < used; i++)
    for (int j = 0; j < columns; j++) {
      real* p = base + (int64_t)rows[i] * stride + j;
      *p = add ? *p + in[j][i] : in[j][i];
    }
}
#endif   // lanes

// A constant or scalar in every lane.
template <class T> struct Splat { static SK_FN T of(double x) { return (T)x; } };
#if !defined(__CUDACC__)
template <> struct Splat<Lanes> { static SK_FN Lanes of(double x) { return (real)x - Lanes{}; } };
SK_FN Lanes splat(real x) { return x - Lanes{}; }
#endif
template <class T> SK_FN T splat_of(double x) { return Splat<T>::of(x); }

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
  typedef typename Traits<T>::Int Int;
  if (sizeof(Scalar<T>) == 4) {
    const Scalar<T> magic = (Scalar<T>)12582912.0;   // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    T n = x + magic;
    T f = x - (n - magic);
    T p = ((((f * (Scalar<T>)0.0013276472632 + (Scalar<T>)0.00967554134312) * f + (Scalar<T>)0.0555071327186) * f + (Scalar<T>)0.240221197237) * f
           + (Scalar<T>)0.693146967065) * f + (Scalar<T>)1.00000007165;
    return from_bits((Int)(to_bits(p) + (to_bits(n) << 23)));
  } else {
    const Scalar<T> magic = (Scalar<T>)6755399441055744.0;   // 1.5 * 2^52
    T n = x + magic;
    T f = x - (n - magic);
    const double c[12] = {1.0, 0.69314718055994533046, 0.24022650695910156204, 0.055504108664819921605, 0.0096181291075883352443, 0.0013333558146789921722,
                          0.00015403530462514432062, 0.000015252733489988525649, 1.321543308967639918e-6, 1.0178198021671930844e-7, 7.0741056135081427963e-9, 4.4352827069572771511e-10};
    T p = splat_of<T>(c[11]);
    for (int i = 10; i >= 0; i--) p = p * f + (Scalar<T>)c[i];
    return from_bits((Int)(to_bits(p) + (to_bits(n) << (sizeof(Scalar<T>) == 4 ? 23 : 52))));
  }
}

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
  T m = from_bits((Int)(to_bits(x) - (k << shift)));
  T s = (m - (Scalar<T>)1) / (m + (Scalar<T>)1), s2 = s * s;   // log m = 2 atanh s, |s| <= 0.1716
  const int terms = single ? 4 : 11;
  T p = splat_of<T>(1.0 / (2 * terms + 1));
  for (int i = terms - 1; i >= 0; i--) p = p * s2 + (Scalar<T>)(1.0 / (2 * i + 1));
  // k as a number: an integer added to the bits of the magic constant.
  const Scalar<T> magic = single ? (Scalar<T>)12582912.0 : (Scalar<T>)6755399441055744.0;
  T kf = from_bits((Int)(to_bits(splat_of<T>(magic)) + k)) - magic;
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
