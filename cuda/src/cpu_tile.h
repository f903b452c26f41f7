// What the forward and the backward walk over a tile share.
#pragma once
#include "cpu_core.h"

namespace sk {

// Pixel centres; clears the sums; pixels outside the picture start stopped. Returns the blocks that hold a pixel of the picture.
SK_FN uint32_t start_tile(const BlendArgs& a, int tile_x, int tile_y, TileScratch& s) {
  for (int b = 0; b < TILE_BLOCKS; b++)
    for (int p = 0; p < BLOCK_PIXELS; p++) {
      s.px[b * BLOCK_PIXELS + p] = from_centre<real>(tile_x + BLOCK * (b & 3) + (p & 3), a.width);
      s.py[b * BLOCK_PIXELS + p] = from_centre<real>(tile_y + BLOCK * (b >> 2) + (p >> 2), a.height);
    }
  for (int i = 0; i < 256; i += W) {
    store(s.running + i, splat(1));
    store(s.left + i, splat(1));
    store(s.r + i, splat(0));
    store(s.gr + i, splat(0));
    store(s.b + i, splat(0));
    store(s.depth + i, splat(0));
    store(s.median + i, splat(0));
  }
  for (int j = 0; j < SK_SPLAT; j++) s.g[BATCH * SK_SPLAT + j] = 0;
  s.g[BATCH * SK_SPLAT + SK_LOGO] = (real)-1e30;
  if (tile_x + SK_TILE <= a.width && tile_y + SK_TILE <= a.height) return 0xFFFF;
  uint32_t alive = 0;
  for (int i = 0; i < 256; i++) {
    const int b = i / BLOCK_PIXELS, p = i % BLOCK_PIXELS;
    if (tile_x + BLOCK * (b & 3) + (p & 3) < a.width && tile_y + BLOCK * (b >> 2) + (p >> 2) < a.height)
      alive |= 1u << b;
    else
      s.running[i] = 0;
  }
  return alive;
}

// Copies the projected records of the batch next to each other.
SK_FN void load_batch(const BlendArgs& a, const int32_t* rows, int64_t following, int n, TileScratch& s) {
  for (int i = 0; i < n; i++) {
    if (i + 16 < following) {   // a record may straddle two cache lines
      const real* ahead = a.splats + (int64_t)rows[i + 16] * SK_SPLAT;
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + SK_SPLAT - 1);
    }
    s.rows[i] = rows[i];
    __builtin_memcpy(s.g + i * SK_SPLAT, a.splats + (int64_t)rows[i] * SK_SPLAT, sizeof(real) * SK_SPLAT);
  }
  const int whole = (n + W - 1) / W * W;   // the block test reads full registers: repeat the last record
  for (int i = n; i < whole; i++) __builtin_memcpy(s.g + i * SK_SPLAT, s.g + (n - 1) * SK_SPLAT, sizeof(real) * SK_SPLAT);
}

// A block's pixels out of a map [H,W,C] to out[channel], and back; pixels outside the picture read 0 and are not written.
alignas(64) constexpr int32_t COUNTING[BLOCK_PIXELS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
struct BlockOfMap {
  int64_t corner;                // its first pixel in a map [H,W]
  int32_t pixel[BLOCK_PIXELS];   // all of them, counted from there
  int columns, rows;             // inside the picture
  SK_FN BlockOfMap(const BlendArgs& a, int x, int y) : corner((int64_t)y * a.width + x), columns(a.width - x), rows(a.height - y) {
    for (int p = 0; p < BLOCK_PIXELS; p++) pixel[p] = (p >> 2) * a.width + (p & 3);
  }
  SK_FN bool empty() const { return columns <= 0 || rows <= 0; }
  SK_FN bool whole() const { return columns >= BLOCK && rows >= BLOCK; }
  SK_FN bool holds(int p) const { return (p & 3) < columns && (p >> 2) < rows; }
};
template <int C> SK_FN void read_block(const BlockOfMap& at, const real* map, Block (&out)[C]) {
  map += at.corner * C;
  real copy[BLOCK_PIXELS * C] = {};
  for (int p = 0; p < BLOCK_PIXELS && !at.whole(); p++)
    for (int c = 0; c < C && at.holds(p); c++) copy[p * C + c] = map[(int64_t)at.pixel[p] * C + c];
  for (int r = 0; r < R; r++) {
    Lanes v[4];
    load_columns(at.whole() ? map : copy, (at.whole() ? at.pixel : COUNTING) + r * W, C, C, v);
    for (int c = 0; c < C; c++) out[c].v[r] = v[c];
  }
}
template <int C> SK_FN void write_block(const BlockOfMap& at, const Block (&in)[C], real* map) {
  map += at.corner * C;
  real copy[BLOCK_PIXELS * C];
  for (int r = 0; r < R; r++) {
    Lanes v[4];
    for (int c = 0; c < 4; c++) v[c] = in[c < C ? c : C - 1].v[r];
    store_columns(at.whole() ? map : copy, (at.whole() ? at.pixel : COUNTING) + r * W, W, C, C, v, false);
  }
  for (int p = 0; p < BLOCK_PIXELS && !at.whole(); p++)
    for (int c = 0; c < C && at.holds(p); c++) map[(int64_t)at.pixel[p] * C + c] = copy[p * C + c];
}

// Alphas of IN_STEP Gaussians, record p[k] at the pixels px[k], py[k]; several in step, because one by one each is a long chain of
// dependent instructions. Four registers go in step too, by twos: a fifth less time in the browser, though they do not all fit.
constexpr int IN_STEP = R < 4 ? 4 / R : R == 4 ? 2 : 1;
typedef Pack<IN_STEP * R> Several;
SK_FN AlphaAt<Several> alphas_at(const BlendArgs& a, const real* const (&p)[IN_STEP], const Block (&px)[IN_STEP], const Block (&py)[IN_STEP]) {
  Several dx, dy;
  Gaussian2D<Several> g;
#pragma GCC unroll 4
  for (int k = 0; k < IN_STEP; k++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const int j = k * R + r;
      dx.v[j] = px[k].v[r] - p[k][SK_X];
      dy.v[j] = py[k].v[r] - p[k][SK_Y];
      g.a.v[j] = splat(p[k][SK_A]);
      g.b.v[j] = splat(p[k][SK_B]);
      g.c.v[j] = splat(p[k][SK_C]);
      g.logo.v[j] = splat(p[k][SK_LOGO]);
    }
  return alpha_at(g, dx, dy, splat_of<Several>(a.cut), splat_of<Several>(a.alpha_max));
}
SK_FN Block part(const Several& a, int k) {
  Block out;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) out.v[r] = a.v[k * R + r];
  return out;
}

// Adds the lanes of `count` registers: out[j] = sum of v[j]. Pairs of registers are halved together, so 16 cost 15 steps, not 64.
template <int count> SK_FN void add_lanes(const Lanes* v, real* out) {
#if defined(__AVX512F__)
  static_assert(count <= 16, "one register of sums");
  const __m512 zero = _mm512_setzero_ps();
  __m512 a[16];
  for (int i = 0; i < 16; i++) a[i] = i < count ? (__m512)v[i] : zero;
  auto halves = [](__m512 x, __m512 y) { return _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, x, y), _mm512_shuffle_f32x4(x, y, 0x4E)); };
  auto quarters = [](__m512 x, __m512 y) {
    const __m512 swapped = _mm512_shuffle_f32x4(x, x, 0xB1), other = _mm512_shuffle_f32x4(y, y, 0xB1);
    return _mm512_mask_blend_ps(0xF0F0, _mm512_add_ps(x, swapped), _mm512_add_ps(y, other));
  };
  auto pairs = [](__m512 x, __m512 y) { return _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, x, y), _mm512_shuffle_ps(x, y, 0x4E)); };
  auto singles = [](__m512 x, __m512 y) { return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xDD)); };
  __m512 b[8], c[4], d[2];
  for (int i = 0; i < 8; i++) b[i] = 2 * i < count ? halves(a[2 * i], a[2 * i + 1]) : zero;       // lanes 0-7 of a[2i], 8-15 of a[2i+1]
  for (int i = 0; i < 4; i++) c[i] = 4 * i < count ? quarters(b[2 * i], b[2 * i + 1]) : zero;     // 128-bit groups: a[4i], a[4i+2], a[4i+1], a[4i+3]
  for (int i = 0; i < 2; i++) d[i] = 8 * i < count ? pairs(c[2 * i], c[2 * i + 1]) : zero;        // in each group two lanes of c[2i], two of c[2i+1]
  const __m512 e = singles(d[0], d[1]);                                                           // in each group: c0, c1, c2, c3
  const __m512i order = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, e));
#elif defined(__AVX2__)
  __m128 q[(count + 3) / 4 * 4];
  for (int i = 0; i < (count + 3) / 4 * 4; i++)
    q[i] = i < count ? _mm_add_ps(_mm256_castps256_ps128((__m256)v[i]), _mm256_extractf128_ps((__m256)v[i], 1)) : _mm_setzero_ps();
  for (int i = 0; i < count; i += 4) {
    const __m128 ab = _mm_hadd_ps(q[i], q[i + 1]), cd = _mm_hadd_ps(q[i + 2], q[i + 3]);
    _mm_storeu_ps(out + i, _mm_hadd_ps(ab, cd));
  }
#else
  for (int j = 0; j < count; j++) {
    real sum = 0;
    for (int i = 0; i < W; i++) sum += v[j][i];
    out[j] = sum;
  }
#endif
}

// For the W Gaussians of the batch from `at` on: out[b] has the bits of those that may touch block b, for the blocks that are alive.
// Beyond the batch's end stand copies of its last one.
SK_FN void touching(const BlendArgs& a, int tile_x, int tile_y, int at, uint32_t alive, const TileScratch& s, LaneMask (&out)[TILE_BLOCKS]) {
  int32_t row[W];
  for (int i = 0; i < W; i++) row[i] = at + i;
  Lanes p[8];
  load_columns(s.g + SK_X, row, SK_SPLAT, 4, p);
  load_columns(s.g + SK_C, row, SK_SPLAT, 4, p + 4);
  static_assert(SK_X == 0 && SK_B == 3 && SK_C == 4 && SK_LOGO == 5, "columns in this order");
  const Gaussian2D<Lanes> g = {p[0], p[1], p[2], p[3], p[4], p[5]};
  const Lanes cut = splat(a.cut - (real)CULL_SLACK), y_per_x = y_per_x_of(g);
  Column<Lanes> column[4];
  for (int k = 0; k < 4; k++) {
    const Lanes lx = from_centre<real>(tile_x + BLOCK * k, a.width) - g.x;
    column[k] = column_of(g, y_per_x, lx, lx + (real)(BLOCK - 1));
  }
  for (int j = 0; j < 4; j++) {
    if (!(alive >> (4 * j) & 15)) continue;
    const Lanes ly = from_centre<real>(tile_y + BLOCK * j, a.height) - g.y;
    const Row<Lanes> r = row_of(g, ly, ly + (real)(BLOCK - 1));
    for (int k = 0; k < 4; k++) out[4 * j + k] = at_least(peak_in(g, column[k], r), cut);
  }
}

// ---- feature channels (cpu_features.cpp) ----
// features_out at the block's pixels += (first: =) sum over its list of weight * feature.
void add_features(const BlendArgs& a, int b, int x, int y, bool first, const TileScratch& s);

// v_features_out . features_out at every pixel of the block.
Block dot_maps(const BlendArgs& f, const BlockOfMap& at, const real* v_features_out);

// Before the walk over a batch: per block, the weights (kept for the feature gradient) and the dot products of features and v_features_out.
void features_of_batch(const BlendVjpArgs& a, int tile_x, int tile_y, uint32_t alive, const uint32_t* masks, int n, VjpScratch& s, WeightList* weights);

// Appends the block's weights of this batch to the tile's list.
void keep_weights(int b, const TileScratch& s, WeightList& list);

}  // namespace sk
