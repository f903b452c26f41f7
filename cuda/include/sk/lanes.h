// Lanes: one register of `real`; and Pack, a few registers in step. What num.h's formulas need of them, and their ways from and to memory.
#pragma once
#include "scalar.h"
#if !defined(__CUDACC__) && defined(__SSE4_1__)
#include <immintrin.h>
#endif
#if defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif
#if !defined(__CUDACC__)

namespace sk {

#ifndef SK_REAL
#define SK_REAL float
#endif
typedef SK_REAL real;
template <size_t size> struct IntOf;
template <> struct IntOf<4> { using type = int32_t; using bits = uint32_t; };
template <> struct IntOf<8> { using type = int64_t; using bits = uint64_t; };
typedef IntOf<sizeof(real)>::type ireal;
typedef IntOf<sizeof(real)>::bits ureal;
#if defined(__AVX512F__)
#define SK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SK_VECTOR_BYTES 32
#else
#define SK_VECTOR_BYTES 16
#endif
typedef real Lanes __attribute__((vector_size(SK_VECTOR_BYTES)));
typedef ireal IntLanes __attribute__((vector_size(SK_VECTOR_BYTES)));
typedef ureal BareLanes __attribute__((vector_size(SK_VECTOR_BYTES)));
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
#elif defined(__wasm_simd128__)
static_assert(is_float, "the wasm build is float");
typedef IntLanes LaneMask;
SK_FN LaneMask less(Lanes a, Lanes b) { return a < b; }
SK_FN LaneMask at_least(Lanes a, Lanes b) { return a >= b; }
SK_FN LaneMask both(LaneMask a, LaneMask b) { return a & b; }
SK_FN uint32_t bits(LaneMask m) { return wasm_i32x4_bitmask((v128_t)m); }
SK_FN bool any(LaneMask m) { return wasm_v128_any_true((v128_t)m); }
SK_FN Lanes where(LaneMask m, Lanes a, Lanes b) { return (Lanes)((m & (IntLanes)a) | (~m & (IntLanes)b)); }   // one bitselect, or one `and` where b is 0
SK_FN Lanes min(Lanes a, Lanes b) { return (Lanes)wasm_f32x4_pmin((v128_t)b, (v128_t)a); }   // a < b ? a : b; its first is what a NaN leaves
SK_FN Lanes max(Lanes a, Lanes b) { return (Lanes)wasm_f32x4_pmax((v128_t)b, (v128_t)a); }
SK_FN Lanes abs(Lanes a) { return (Lanes)wasm_f32x4_abs((v128_t)a); }
SK_FN Lanes sqrt(Lanes a) { return (Lanes)wasm_f32x4_sqrt((v128_t)a); }
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
template <> struct Traits<Lanes> { using Scalar = real; using Mask = LaneMask; using Int = IntLanes; };

template <> struct Splat<Lanes> { static SK_FN Lanes of(double x) { return (real)x - Lanes{}; } };
SK_FN Lanes splat(real x) { return x - Lanes{}; }

typedef double WideLanes __attribute__((vector_size(W * sizeof(double))));
template <> struct WideOf<Lanes> { using type = WideLanes; };
SK_FN WideLanes widened(Lanes a) { return __builtin_convertvector(a, WideLanes); }
SK_FN void narrow(WideLanes a, Lanes& out) { out = __builtin_convertvector(a, Lanes); }

SK_FN Lanes load(const real* p) { Lanes v; __builtin_memcpy(&v, p, sizeof v); return v; }
SK_FN void store(real* p, Lanes v) { __builtin_memcpy(p, &v, sizeof v); }
SK_FN IntLanes to_bits(Lanes a) { return (IntLanes)a; }
SK_FN Lanes from_bits(IntLanes i) { return (Lanes)i; }
SK_FN IntLanes shifted(IntLanes i, int bits) { return (IntLanes)((BareLanes)i << bits); }
SK_FN IntLanes added(IntLanes a, IntLanes b) { return (IntLanes)((BareLanes)a + (BareLanes)b); }

// Four neighbouring columns of W rows, row i being base + rows[i] * stride, to four registers (lane i = row i) and back. Only the first
// `columns` are read or written. Not by gather: with the microcode of 2023 against its leak, one costs 58 cycles on some processors.
#if defined(__SSE4_1__) || defined(__wasm_simd128__)
#define SK_HAS_QUADS
constexpr int QUADS = W < 4 ? 1 : W / 4;   // of 128 bits, a register
#if defined(__SSE4_1__)
typedef __m128 Quad;
SK_FN Quad load_quad(const float* p, int columns) {
  if (columns >= 4) return _mm_loadu_ps(p);
  if (columns == 1) return _mm_load_ss(p);
  double two;   // p need not be aligned for it
  __builtin_memcpy(&two, p, sizeof two);
  const __m128 pair = _mm_castpd_ps(_mm_set_sd(two));
  return columns == 3 ? _mm_insert_ps(pair, _mm_load_ss(p + 2), 0x20) : pair;
}
SK_FN void store_quad(float* p, int columns, Quad v) {
  if (columns >= 4) return _mm_storeu_ps(p, v);
  if (columns == 1) return _mm_store_ss(p, v);
  const double two = _mm_cvtsd_f64(_mm_castps_pd(v));
  __builtin_memcpy(p, &two, sizeof two);
  if (columns == 3) _mm_store_ss(p + 2, _mm_movehl_ps(v, v));
}
#else
typedef Lanes Quad;
SK_FN Quad load_quad(const float* p, int columns) {
  if (columns >= 4) return load(p);
  if (columns == 1) return (Quad)wasm_v128_load32_zero(p);
  const v128_t pair = wasm_v128_load64_zero(p);
  return (Quad)(columns == 3 ? wasm_v128_load32_lane(p + 2, pair, 2) : pair);
}
SK_FN void store_quad(float* p, int columns, Quad v) {
  if (columns >= 4) return store(p, v);
  if (columns == 1) return wasm_v128_store32_lane(p, (v128_t)v, 0);
  wasm_v128_store64_lane(p, (v128_t)v, 0);
  if (columns == 3) wasm_v128_store32_lane(p + 2, (v128_t)v, 2);
}
#endif
SK_FN void transpose_quads(Lanes& a, Lanes& b, Lanes& c, Lanes& d) {   // 4 x 4 within every 128 bits
#if defined(__AVX512F__)
  const __m512 ab0 = _mm512_unpacklo_ps(a, b), ab1 = _mm512_unpackhi_ps(a, b), cd0 = _mm512_unpacklo_ps(c, d), cd1 = _mm512_unpackhi_ps(c, d);
  a = _mm512_shuffle_ps(ab0, cd0, 0x44), b = _mm512_shuffle_ps(ab0, cd0, 0xEE), c = _mm512_shuffle_ps(ab1, cd1, 0x44), d = _mm512_shuffle_ps(ab1, cd1, 0xEE);
#elif defined(__AVX2__)
  const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b), cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(ab0, cd0, 0x44), b = _mm256_shuffle_ps(ab0, cd0, 0xEE), c = _mm256_shuffle_ps(ab1, cd1, 0x44), d = _mm256_shuffle_ps(ab1, cd1, 0xEE);
#elif defined(__SSE4_1__)
  __m128 x = (__m128)a, y = (__m128)b, z = (__m128)c, w = (__m128)d;
  _MM_TRANSPOSE4_PS(x, y, z, w);
  a = (Lanes)x, b = (Lanes)y, c = (Lanes)z, d = (Lanes)w;
#else
  const v128_t x = (v128_t)a, y = (v128_t)b, z = (v128_t)c, w = (v128_t)d;
  const v128_t xy0 = wasm_i32x4_shuffle(x, y, 0, 4, 1, 5), xy1 = wasm_i32x4_shuffle(x, y, 2, 6, 3, 7), zw0 = wasm_i32x4_shuffle(z, w, 0, 4, 1, 5), zw1 = wasm_i32x4_shuffle(z, w, 2, 6, 3, 7);
  a = (Lanes)wasm_i64x2_shuffle(xy0, zw0, 0, 2), b = (Lanes)wasm_i64x2_shuffle(xy0, zw0, 1, 3);
  c = (Lanes)wasm_i64x2_shuffle(xy1, zw1, 0, 2), d = (Lanes)wasm_i64x2_shuffle(xy1, zw1, 1, 3);
#endif
}
// A register out of its quads and back. By instructions: through memory the wide read would wait for the narrow writes.
#if defined(__AVX512F__)
SK_FN Lanes join_quads(const Quad* q) {
  const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(q[0]), q[1], 1);
  return _mm512_insertf32x4(_mm512_insertf32x4(low, q[2], 2), q[3], 3);
}
template <int j> SK_FN Quad quad_of(Lanes v) { return _mm512_extractf32x4_ps(v, j); }
#elif defined(__AVX2__)
SK_FN Lanes join_quads(const Quad* q) { return (Lanes)_mm256_insertf128_ps(_mm256_castps128_ps256(q[0]), q[1], 1); }
template <int j> SK_FN Quad quad_of(Lanes v) { return _mm256_extractf128_ps((__m256)v, j); }
#else
SK_FN Lanes join_quads(const Quad* q) { return (Lanes)q[0]; }
template <int j> SK_FN Quad quad_of(Lanes v) { return (Quad)v; }
#endif
SK_FN void load_columns_float(const float* base, const int32_t* rows, int stride, int columns, Lanes* out) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    Quad q[QUADS];
#pragma GCC unroll 4
    for (int j = 0; j < QUADS; j++) q[j] = load_quad(base + (int64_t)rows[4 * j + k] * stride, columns);
    out[k] = join_quads(q);
  }
  transpose_quads(out[0], out[1], out[2], out[3]);
}
SK_FN void store_row(float* p, int columns, Quad v, bool add) { store_quad(p, columns, add ? load_quad(p, columns) + v : v); }
template <int j> SK_FN void store_quads(float* base, const int32_t* rows, int used, int stride, int columns, const Lanes* t, bool add) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++)
    if (4 * j + k < used) store_row(base + (int64_t)rows[4 * j + k] * stride, columns, quad_of<j>(t[k]), add);
}
SK_FN void store_columns_float(float* base, const int32_t* rows, int used, int stride, int columns, const Lanes* in, bool add) {
  Lanes t[4] = {in[0], in[1], in[2], in[3]};
  transpose_quads(t[0], t[1], t[2], t[3]);
  store_quads<0>(base, rows, used, stride, columns, t, add);
  if (QUADS > 1) store_quads<1 % QUADS>(base, rows, used, stride, columns, t, add);
  if (QUADS > 2) store_quads<2 % QUADS>(base, rows, used, stride, columns, t, add);
  if (QUADS > 3) store_quads<3 % QUADS>(base, rows, used, stride, columns, t, add);
}
#endif
SK_FN void load_columns(const real* base, const int32_t* rows, int stride, int columns, Lanes* out) {
#if defined(SK_HAS_QUADS)
  if (is_float) return load_columns_float((const float*)base, rows, stride, columns, out);
#endif
  for (int j = 0; j < columns; j++)
    for (int i = 0; i < W; i++) out[j][i] = base[(int64_t)rows[i] * stride + j];
}
SK_FN void store_columns(real* base, const int32_t* rows, int used, int stride, int columns, const Lanes* in, bool add) {
#if defined(SK_HAS_QUADS)
  if (is_float) return store_columns_float((float*)base, rows, used, stride, columns, in, add);
#endif
  for (int i = 0; i < used; i++)
    for (int j = 0; j < columns; j++) {
      real* p = base + (int64_t)rows[i] * stride + j;
      *p = add ? *p + in[j][i] : in[j][i];
    }
}

// K registers that go through the arithmetic in step, so that their chains of dependent instructions fill each other's waits.
template <int K> struct Pack {
  Lanes v[K];
};
template <int K> struct PackMask {
  LaneMask v[K];
};
template <int K> struct PackInt {
  IntLanes v[K];
};
template <int K> struct Traits<Pack<K>> { using Scalar = real; using Mask = PackMask<K>; using Int = PackInt<K>; };
#define SK_EACH(Result, expression) Result o; _Pragma("GCC unroll 8") for (int k = 0; k < K; k++) o.v[k] = expression; return o
template <int K> struct Splat<Pack<K>> { static SK_FN Pack<K> of(double x) { SK_EACH(Pack<K>, splat((real)x)); } };
template <int K> SK_FN Pack<K> operator+(Pack<K> a, Pack<K> b) { SK_EACH(Pack<K>, a.v[k] + b.v[k]); }
template <int K> SK_FN Pack<K> operator-(Pack<K> a, Pack<K> b) { SK_EACH(Pack<K>, a.v[k] - b.v[k]); }
template <int K> SK_FN Pack<K> operator*(Pack<K> a, Pack<K> b) { SK_EACH(Pack<K>, a.v[k] * b.v[k]); }
template <int K> SK_FN Pack<K> operator+(Pack<K> a, real b) { SK_EACH(Pack<K>, a.v[k] + b); }
template <int K> SK_FN Pack<K> operator-(Pack<K> a, real b) { SK_EACH(Pack<K>, a.v[k] - b); }
template <int K> SK_FN Pack<K> operator*(Pack<K> a, real b) { SK_EACH(Pack<K>, a.v[k] * b); }
template <int K> SK_FN PackInt<K> added(PackInt<K> a, PackInt<K> b) { SK_EACH(PackInt<K>, added(a.v[k], b.v[k])); }
template <int K> SK_FN PackInt<K> shifted(PackInt<K> a, int n) { SK_EACH(PackInt<K>, shifted(a.v[k], n)); }
template <int K> SK_FN PackInt<K> to_bits(Pack<K> a) { SK_EACH(PackInt<K>, to_bits(a.v[k])); }
template <int K> SK_FN Pack<K> from_bits(PackInt<K> a) { SK_EACH(Pack<K>, from_bits(a.v[k])); }
template <int K> SK_FN PackMask<K> less(Pack<K> a, Pack<K> b) { SK_EACH(PackMask<K>, less(a.v[k], b.v[k])); }
template <int K> SK_FN PackMask<K> at_least(Pack<K> a, Pack<K> b) { SK_EACH(PackMask<K>, at_least(a.v[k], b.v[k])); }
template <int K> SK_FN PackMask<K> both(PackMask<K> a, PackMask<K> b) { SK_EACH(PackMask<K>, both(a.v[k], b.v[k])); }
template <int K> SK_FN Pack<K> where(PackMask<K> m, Pack<K> a, Pack<K> b) { SK_EACH(Pack<K>, where(m.v[k], a.v[k], b.v[k])); }
template <int K> SK_FN Pack<K> min(Pack<K> a, Pack<K> b) { SK_EACH(Pack<K>, min(a.v[k], b.v[k])); }
template <int K> SK_FN Pack<K> max(Pack<K> a, Pack<K> b) { SK_EACH(Pack<K>, max(a.v[k], b.v[k])); }
template <int K> SK_FN Pack<K> abs(Pack<K> a) { SK_EACH(Pack<K>, abs(a.v[k])); }
template <int K> SK_FN Pack<K> reciprocal(Pack<K> a) { SK_EACH(Pack<K>, reciprocal(a.v[k])); }
template <int K> SK_FN Pack<K> load_pack(const real* p) { SK_EACH(Pack<K>, load(p + k * W)); }
#undef SK_EACH
template <int K> SK_FN Pack<K>& operator+=(Pack<K>& a, Pack<K> b) { return a = a + b; }
template <int K> SK_FN bool any(PackMask<K> m) {
  bool out = any(m.v[0]);
  for (int k = 1; k < K; k++) out |= any(m.v[k]);
  return out;
}
template <int K> SK_FN void store(real* p, Pack<K> a) {
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) store(p + k * W, a.v[k]);
}
template <int K> SK_FN Lanes sum_of(Pack<K> a) {
  Lanes sum = a.v[0];
#pragma GCC unroll 8
  for (int k = 1; k < K; k++) sum += a.v[k];
  return sum;
}

}  // namespace sk
#endif
