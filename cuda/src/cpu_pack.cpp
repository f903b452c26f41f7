// The core planes of a viewer's chunks: two passes over the rows of each, one for the ranges, one for the records. The formulas are in cpu_pack.h.
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu_entry.h"
#include "cpu_pack.h"
#include "cpu_threads.h"

namespace sk {
namespace {

// The wire is float32: the double library works on one rounded row at a time.
typedef std::conditional<is_float, Lanes, float>::type Rows;
constexpr int ROWS = is_float ? W : 1;

struct Fields {
  const real *means, *quats, *log_scales, *logits, *sh;
  int sh_stride;
};

SK_FN void load_rows(const real* base, const int32_t* rows, int stride, int columns, Lanes* out) { load_columns(base, rows, stride, columns, out); }
SK_FN void load_rows(const real* base, const int32_t* rows, int stride, int columns, float* out) {
  for (int k = 0; k < columns; k++) out[k] = (float)base[(int64_t)rows[0] * stride + k];
}

// Rows from `first` on, one a lane; the lanes behind the last row repeat it.
SK_FN Unpacked<Rows> load_group(const Fields& f, int64_t first, const int32_t* rows) {
  Rows m[4], q[4], s[4], o[4], c[4];
  load_rows(f.means + 3 * first, rows, 3, 3, m);
  load_rows(f.quats + 4 * first, rows, 4, 4, q);
  load_rows(f.log_scales + 3 * first, rows, 3, 3, s);
  load_rows(f.logits + first, rows, 1, 1, o);
  load_rows(f.sh + f.sh_stride * first, rows, f.sh_stride, 3, c);
  return {{m[0], m[1], m[2]}, {s[0], s[1], s[2]}, {c[0], c[1], c[2]}, {q[0], q[1], q[2], q[3]}, o[0]};
}

template <class F> SK_FN void by_group(const Fields& f, int64_t first, int64_t n, F&& use) {
  int32_t rows[ROWS];
  for (int k = 0; k < ROWS; k++) rows[k] = k;
  int64_t i = 0;
  for (; i + ROWS <= n; i += ROWS) use(load_group(f, first + i, rows), i, ROWS);
  if (i == n) return;
  for (int k = 0; k < ROWS; k++) rows[k] = k < n - i ? k : (int32_t)(n - i - 1);
  use(load_group(f, first + i, rows), i, (int)(n - i));
}

SK_FN float lane(const Lanes& x, int k) { return (float)x[k]; }
SK_FN float lane(float x, int) { return x; }
SK_FN uint32_t lane_bits(const IntLanes& x, int k) { return (uint32_t)x[k]; }
SK_FN uint32_t lane_bits(int32_t x, int) { return (uint32_t)x; }

constexpr int RANGED = 10;   // means, log scales, band 0, logit: the order of the header

SK_FN Lanes load_next(const real* p, Lanes) { return load(p); }
SK_FN float load_next(const real* p, float) { return (float)*p; }

// Widens low[C] and high[C] by the columns of n rows that lie next to each other; what it returns is 0 where all are finite.
template <int C> SK_FN float widen(const real* base, int64_t n, float* low, float* high) {
  Rows lo[C], hi[C], sum[C];   // lane i of register k: number k ROWS + i of every ROWS rows, so of column (k ROWS + i) % C
  for (int k = 0; k < C; k++) lo[k] = splat_of<Rows>(3e38), hi[k] = splat_of<Rows>(-3e38), sum[k] = splat_of<Rows>(0);
  int64_t row = 0;
  for (; row + ROWS <= n; row += ROWS)
    for (int k = 0; k < C; k++) {
      const Rows x = load_next(base + C * row + k * ROWS, Rows());
      lo[k] = min(lo[k], x), hi[k] = max(hi[k], x), sum[k] += x * 0.0f;
    }
  float total = 0;
  for (int k = 0; k < C; k++)
    for (int i = 0; i < ROWS; i++) {
      const int c = (k * ROWS + i) % C;
      low[c] = min(low[c], lane(lo[k], i)), high[c] = max(high[c], lane(hi[k], i)), total += lane(sum[k], i);
    }
  for (; row < n; row++)
    for (int c = 0; c < C; c++) {
      const float x = (float)base[C * row + c];
      low[c] = min(low[c], x), high[c] = max(high[c], x), total += x * 0.0f;
    }
  return total;
}

// The lowest and highest values of n rows; false where one is not finite or beyond PACKED_MAX.
bool ranges(const Fields& f, int64_t first, int64_t n, float* low, float* high) {
  float quat[8];
  for (int k = 0; k < RANGED; k++) low[k] = 3e38f, high[k] = -3e38f;
  for (int k = 0; k < 4; k++) quat[k] = 0, quat[4 + k] = 0;
  float sum = widen<3>(f.means + 3 * first, n, low, high) + widen<3>(f.log_scales + 3 * first, n, low + 3, high + 3);
  sum += widen<1>(f.logits + first, n, low + 9, high + 9) + widen<4>(f.quats + 4 * first, n, quat, quat + 4);
  constexpr int SOME = 256;
  real band0[3 * SOME];   // of as many rows, next to each other
  for (int64_t row = 0; row < n; row += SOME) {
    const int some = (int)(n - row < SOME ? n - row : SOME);
    const real* from = f.sh + f.sh_stride * (first + row);
    for (int i = 0; i < some && f.sh_stride != 3; i++) __builtin_memcpy(band0 + 3 * i, from + (int64_t)f.sh_stride * i, sizeof(real) * 3);
    sum += widen<3>(f.sh_stride == 3 ? from : band0, some, low + 6, high + 6);
  }
  bool fit = sum == 0;
  for (int k = 0; k < RANGED; k++) {
    if (k >= 3 && k < 6) low[k] = clamp(low[k], -PACKED_LOG_SCALE_MAX, PACKED_LOG_SCALE_MAX), high[k] = clamp(high[k], -PACKED_LOG_SCALE_MAX, PACKED_LOG_SCALE_MAX);
    fit &= low[k] >= -PACKED_MAX && high[k] <= PACKED_MAX;
  }
  for (int k = 0; k < 4; k++) fit &= quat[k] >= -PACKED_MAX && quat[4 + k] <= PACKED_MAX;
  return fit;
}

// The records of the rows one after the other, 17 bytes each.
template <class T> SK_FN void store_records(const PackedWords<T>& p, int used, uint8_t* record) {
  for (int r = 0; r < used; r++, record += PACKED_BYTES) {
    const uint32_t words[4] = {lane_bits(p.word[0], r), lane_bits(p.word[1], r), lane_bits(p.word[2], r), lane_bits(p.word[3], r)};
    __builtin_memcpy(record, words, 16);
    record[16] = (uint8_t)lane_bits(p.last, r);
  }
}
#if defined(SK_HAS_QUADS)
template <int j> SK_FN void store_quarter(const Lanes* t, int used, uint8_t* record) {   // rows 4 j to 4 j + 3
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++)
    if (4 * j + k < used) store_quad((float*)(record + PACKED_BYTES * (4 * j + k)), 4, quad_of<j>(t[k]));
}
SK_FN void store_records(const PackedWords<Lanes>& p, int used, uint8_t* record) {
  Lanes t[4] = {from_bits(p.word[0]), from_bits(p.word[1]), from_bits(p.word[2]), from_bits(p.word[3])};
  transpose_quads(t[0], t[1], t[2], t[3]);
  store_quarter<0>(t, used, record);
  if (QUADS > 1) store_quarter<1 % QUADS>(t, used, record);
  if (QUADS > 2) store_quarter<2 % QUADS>(t, used, record);
  if (QUADS > 3) store_quarter<3 % QUADS>(t, used, record);
  for (int r = 0; r < used; r++) record[PACKED_BYTES * r + 16] = (uint8_t)lane_bits(p.last, r);
}
#endif

// Writes the plane of n rows, or nothing and returns false.
bool pack_chunk(const Fields& f, int64_t first, int64_t n, uint8_t* out) {
  float low[RANGED], high[RANGED];
  if (!ranges(f, first, n, low, high)) return false;
  const uint32_t rows = (uint32_t)n;
  __builtin_memcpy(out, "SKC1", 4);
  __builtin_memcpy(out + 4, &rows, 4);
  float header[2 * RANGED], *to = header;
  for (int k = 0; k < RANGED; k += 3) {
    const int columns = RANGED - k < 3 ? RANGED - k : 3;
    for (int j = 0; j < columns; j++) *to++ = low[k + j];
    for (int j = 0; j < columns; j++) *to++ = high[k + j];
  }
  __builtin_memcpy(out + 8, header, sizeof header);
  PackSteps steps;
  for (int k = 0; k < 3; k++) {
    steps.mean[k] = steps_of(low[k], high[k], 65535);
    steps.log_scale[k] = steps_of(low[3 + k], high[3 + k], 255);
    steps.sh0[k] = steps_of(low[6 + k], high[6 + k], 255);
  }
  by_group(f, first, n, [&](const Unpacked<Rows>& g, int64_t i, int used) {
    store_records(packed(g, steps), used, out + PACKED_HEADER + PACKED_BYTES * i);
  });
  return true;
}

}  // namespace
}  // namespace sk

extern "C" int32_t sk_pack_core(int64_t n, int32_t sh_bands, const real* means, const real* quats, const real* log_scales, const real* logit_opacities, const real* sh, int64_t chunk_rows, int64_t words_per_chunk, int32_t* planes, int32_t* unfit, void*) {
  using namespace sk;
  return guarded("sk_pack_core", [&] {
    if (n <= 0) return (int32_t)SK_OK;
    const int64_t rows = n < chunk_rows ? n : chunk_rows;
    if (chunk_rows < 1 || chunk_rows > 1 << 24 || sh_bands < 1 || 4 * words_per_chunk < PACKED_HEADER + PACKED_BYTES * rows)
      throw std::invalid_argument("chunks of " + std::to_string(chunk_rows) + " rows with " + std::to_string(sh_bands) + " bands do not fit into " + std::to_string(words_per_chunk) + " words each");
    const Fields f = {means, quats, log_scales, logit_opacities, sh, 3 * sh_bands};
    parallel((n + chunk_rows - 1) / chunk_rows, [&](int64_t chunk, int) {
      const int64_t first = chunk * chunk_rows, left = n - first;
      unfit[chunk] = !pack_chunk(f, first, left < chunk_rows ? left : chunk_rows, (uint8_t*)(planes + chunk * words_per_chunk));
    });
    return (int32_t)SK_OK;
  });
}
