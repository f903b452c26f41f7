// The gradient of blending over one tile: walks the forward once more, front to back, and keeps per pixel what is still behind.
#include "cpu_core.h"
#include "cpu_tile.h"

namespace sk {

namespace {

// masks[i]: the blocks of the tile that Gaussian i of the batch may touch.
SK_FN void masks_of_batch(const BlendArgs& a, int tile_x, int tile_y, int n, uint32_t alive, const TileScratch& s, uint32_t* masks) {
  for (int at = 0; at < n; at += W) {
    LaneMask touched[TILE_BLOCKS];
    touching(a, tile_x, tile_y, at, alive, s, touched);
#if defined(__AVX512F__)
    __m512i out = _mm512_setzero_si512();
    for (int b = 0; b < TILE_BLOCKS; b++)
      if (alive >> b & 1) out = _mm512_mask_or_epi32(out, touched[b], out, _mm512_set1_epi32(1 << b));
    _mm512_storeu_si512(masks + at, out);
#else
    for (int i = 0; i < W; i++) masks[at + i] = 0;
    for (uint32_t left = alive; left; left &= left - 1) {
      const int b = __builtin_ctz(left);
      const uint32_t m = bits(touched[b]);
      for (int i = 0; i < W; i++) masks[at + i] |= (m >> i & 1) << b;
    }
#endif
  }
}

// Per pixel: the gradients that come in, and the loss-weighted sum of everything that is blended (its own share is taken off as the
// walk passes each Gaussian).
SK_FN void start_vjp_tile(const BlendVjpArgs& a, int tile_x, int tile_y, VjpScratch& s, double* v_background) {
  const BlendArgs& f = a.forward;
  const Block zero = splat_of<Block>(0);
  Block v_bg[3] = {zero, zero, zero};
  for (int b = 0; b < TILE_BLOCKS; b++) {
    const BlockOfMap at(f, tile_x + BLOCK * (b & 3), tile_y + BLOCK * (b >> 2));
    Block behind = zero, v[3] = {zero, zero, zero}, v_z = zero;
    if (!at.empty()) {
      Block opaque[1], v_opaque[1] = {zero};
      read_block(at, f.alpha, opaque);
      const Block left = splat_of<Block>(1) - opaque[0];
      if (a.v_alpha) read_block(at, a.v_alpha, v_opaque);
      if (a.v_features_out) behind = dot_maps(f, at, a.v_features_out);
      if (a.v_color) {
        Block color[3];
        read_block(at, a.v_color, v);
        read_block(at, f.color, color);
        for (int k = 0; k < 3; k++) {
          behind += v[k] * color[k];
          v_bg[k] += left * v[k];
        }
      }
      if (a.v_expected_depth) {
        Block z[1], v_depth[1];
        read_block(at, f.expected_depth, z);
        read_block(at, a.v_expected_depth, v_depth);
        v_z = where(less(splat_of<Block>(1e-6), opaque[0]), v_depth[0] * reciprocal(opaque[0]), zero);
        v_opaque[0] = v_opaque[0] - v_z * z[0];
        behind += v_z * z[0] * opaque[0];
      }
      behind = behind - left * v_opaque[0];
    }
    store(s.v_r + b * BLOCK_PIXELS, v[0]);
    store(s.v_g + b * BLOCK_PIXELS, v[1]);
    store(s.v_b + b * BLOCK_PIXELS, v[2]);
    store(s.v_z + b * BLOCK_PIXELS, v_z);
    store(s.behind + b * BLOCK_PIXELS, behind);
  }
  if (a.v_features_out) __builtin_memcpy(s.second_running, s.t.running, sizeof s.second_running);
  if (v_background)
    for (int k = 0; k < 3; k++)
      for (int i = 0; i < W; i++) v_background[k] += sum_of(v_bg[k])[i];
}

// A few Gaussians with the blocks that each may touch: pairs in a row, their alphas worked out before the walk over the pixels' state.
constexpr int GROUP = 8, MOST = GROUP * TILE_BLOCKS;
struct Walk {
  int32_t at[MOST + 16], gaussian[MOST + 16];   // of each pair: the block's first pixel in the tile's arrays, the record in the batch
  int start[GROUP + 1];                         // each Gaussian's pairs
  alignas(64) real alpha[(MOST + 3) * BLOCK_PIXELS], dim[(MOST + 3) * BLOCK_PIXELS];
};

SK_FN void list_pairs(const uint32_t* masks, int first, int n, uint32_t alive, Walk& w) {
  int at = 0;
  for (int k = 0; k < n; k++) {
    uint32_t m = masks[first + k] & alive;
    const int32_t gaussian = (first + k) * SK_SPLAT;
    w.start[k] = at;
#if defined(__AVX512F__)
    const __m512i pixels = _mm512_mullo_epi32(_mm512_load_si512(COUNTING), _mm512_set1_epi32(BLOCK_PIXELS));
    _mm512_storeu_si512(w.at + at, _mm512_maskz_compress_epi32((__mmask16)m, pixels));
    _mm512_storeu_si512(w.gaussian + at, _mm512_set1_epi32(gaussian));
    at += __builtin_popcount(m);
#else
    for (; m; m &= m - 1) w.gaussian[at] = gaussian, w.at[at++] = BLOCK_PIXELS * __builtin_ctz(m);
#endif
  }
  w.start[n] = at;
  for (int k = 0; k < IN_STEP - 1; k++) w.at[at + k] = 0, w.gaussian[at + k] = BATCH * SK_SPLAT;   // touch nothing
}

SK_FN void alphas_of_pairs(const BlendArgs& f, int n, const TileScratch& s, Walk& w) {
  for (int i = 0; i < n; i += IN_STEP) {
    const real* p[IN_STEP];
    Block px[IN_STEP], py[IN_STEP];
    for (int k = 0; k < IN_STEP; k++) {
      p[k] = s.g + w.gaussian[i + k];
      px[k] = load_pack<R>(s.px + w.at[i + k]);
      py[k] = load_pack<R>(s.py + w.at[i + k]);
    }
    const AlphaAt<Several> e = alphas_at(f, p, px, py);
    store(w.alpha + i * BLOCK_PIXELS, e.alpha);
    store(w.dim + i * BLOCK_PIXELS, where(e.free, dimming(e.alpha), splat_of<Several>(-1)));   // -1: no gradient
  }
}

// One Gaussian over its pairs [first, last), whose alphas are ready.
template <bool EXTRA> SK_FN void walk_gaussian(const BlendArgs& f, const real* p, const Walk& walk, int first, int last, bool features, int* cursor, VjpScratch& s, real* record) {
  constexpr int SUMS = EXTRA ? MOMENTS_STATS : MOMENTS;
  const Block gx = splat_of<Block>(p[SK_X]), gy = splat_of<Block>(p[SK_Y]), transmittance_min = splat_of<Block>(f.transmittance_min), zero = splat_of<Block>(0);
  Lanes m[SUMS];
  for (int j = 0; j < SUMS; j++) m[j] = splat(0);
  real xx, xy, yy;
  conic_of(p[SK_A], p[SK_B], p[SK_C], xx, xy, yy);
  for (int i = first; i < last; i++) {
    const int at = walk.at[i];
    const Block dim = load_pack<R>(walk.dim + i * BLOCK_PIXELS), vr = load_pack<R>(s.v_r + at), vg = load_pack<R>(s.v_g + at), vb = load_pack<R>(s.v_b + at);
    const Step<Block> step = blend_step(load_pack<R>(s.t.running + at), load_pack<R>(walk.alpha + i * BLOCK_PIXELS), transmittance_min);
    const Block w = where(step.going, step.weight, zero);
    store(s.t.running + at, where(step.going, step.left, zero));
    Block dot = vr * p[SK_R] + vg * p[SK_G] + vb * p[SK_BLUE];
    if (EXTRA) {
      const Block v_z = load_pack<R>(s.v_z + at);
      dot += v_z * p[SK_Z];
      m[9] += sum_of(w * v_z);
      const int b = at / BLOCK_PIXELS;
      if (features) dot += load_pack<R>(s.feature_dot[b][cursor[b]++]);
    }
    const Block weighted = w * dot, behind = load_pack<R>(s.behind + at) - weighted;
    store(s.behind + at, behind);
    const Block h = where(both(at_least(dim, zero), step.going), exponent_vjp(weighted, dim, behind), zero);
    const Block dx = load_pack<R>(s.t.px + at) - gx, dy = load_pack<R>(s.t.py + at) - gy, hx = h * dx, hy = h * dy;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {   // register by register: each sum takes up its products by fused multiply-adds
      m[0] += h.v[r];
      m[1] += hx.v[r];
      m[2] += hy.v[r];
      m[3] += hx.v[r] * dx.v[r];
      m[4] += hx.v[r] * dy.v[r];
      m[5] += hy.v[r] * dy.v[r];
      m[6] += w.v[r] * vr.v[r];
      m[7] += w.v[r] * vg.v[r];
      m[8] += w.v[r] * vb.v[r];
    }
    if (EXTRA) {
      m[10] += sum_of(abs(hx * (2 * xx) + hy * xy));
      m[11] += sum_of(abs(hx * xy + hy * (2 * yy)));
      m[12] += sum_of(w);
    }
  }
  add_lanes<SUMS>(m, record);
}

// The blocks of which any pixel is still going.
SK_FN uint32_t still_going(uint32_t alive, const TileScratch& s) {
  for (uint32_t left = alive; left; left &= left - 1) {
    const int b = __builtin_ctz(left);
    if (!any(less(splat_of<Block>(0), load_pack<R>(s.running + b * BLOCK_PIXELS)))) alive &= ~(1u << b);
  }
  return alive;
}

template <bool EXTRA> void walk_vjp(const BlendVjpArgs& a, int tile, const int32_t* rows, int64_t n, VjpScratch& s, WeightList* weights, double* v_background) {
  const BlendArgs& f = a.forward;
  const bool features = a.v_features_out != nullptr;
  const int tile_at_x = tile % f.tiles_x, tile_at_y = tile / f.tiles_x, tile_x = tile_at_x * SK_TILE, tile_y = tile_at_y * SK_TILE;
  uint32_t alive = start_tile(f, tile_x, tile_y, s.t);
  start_vjp_tile(a, tile_x, tile_y, s, v_background);
  uint32_t masks[BATCH];
  Walk walk;
  for (int64_t first = 0; first < n && alive; first += BATCH) {
    const int batch = (int)(n - first < BATCH ? n - first : BATCH);
    load_batch(f, rows + first, n - first, batch, s.t);
    masks_of_batch(f, tile_x, tile_y, batch, alive, s.t, masks);
    if (EXTRA && features) features_of_batch(a, tile_x, tile_y, alive, masks, batch, s, weights);
    int cursor[TILE_BLOCKS] = {};
    for (int i = 0; i < batch && alive; i += GROUP) {
      const int group = batch - i < GROUP ? batch - i : GROUP;
      int64_t record[GROUP];
      for (int k = 0; k < group; k++) {
        const PairSlots& slots = a.slots[s.t.rows[i + k]];
        record[k] = slots.first + tile_at_y * slots.stride + tile_at_x;
        __builtin_prefetch(a.records + record[k] * PAIR_RECORD, 1);
        if (i + k + GROUP < batch) __builtin_prefetch(a.slots + s.t.rows[i + k + GROUP]);
      }
      list_pairs(masks, i, group, alive, walk);
      alphas_of_pairs(f, walk.start[group], s.t, walk);
      for (int k = 0; k < group; k++) {
        if (walk.start[k] == walk.start[k + 1]) continue;
        walk_gaussian<EXTRA>(f, s.t.g + (i + k) * SK_SPLAT, walk, walk.start[k], walk.start[k + 1], features, cursor, s, a.records + record[k] * PAIR_RECORD);
        a.written[record[k]] = 1;
      }
      alive = still_going(alive, s.t);   // until here, blocks that stopped only added zeros
    }
  }
}

}  // namespace

void blend_tile_vjp(const BlendVjpArgs& a, int tile, const int32_t* rows, int64_t n, VjpScratch& s, WeightList* weights, double* v_background) {
  if (a.v_features_out || a.v_expected_depth || a.stats)
    walk_vjp<true>(a, tile, rows, n, s, weights, v_background);
  else
    walk_vjp<false>(a, tile, rows, n, s, weights, v_background);
}

void reduce_pairs(const real* splat, const real* records, const uint8_t* written, int64_t n, bool full, real* v, real* weight_sum) {
  Lanes sum[PAIR_RECORD / W];
  for (int j = 0; j < PAIR_RECORD / W; j++) sum[j] = sk::splat(0);
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < PAIR_RECORD / W && written[i]; j++) sum[j] += load(records + i * PAIR_RECORD + j * W);
  real m[PAIR_RECORD];
  for (int j = 0; j < PAIR_RECORD / W; j++) store(m + j * W, sum[j]);
  // h is by the natural exponent; log2 alpha = exponent / ln 2, so coefficients of log2 alpha get h ln 2.
  const real ln2 = (real)LN2;
  real a, b, c;
  conic_of(splat[SK_A], splat[SK_B], splat[SK_C], a, b, c);
  v[SK_X] = -ln2 * (2 * a * m[1] + b * m[2]);
  v[SK_Y] = -ln2 * (b * m[1] + 2 * c * m[2]);
  v[SK_A] = ln2 * m[3];
  v[SK_B] = ln2 * m[4];
  v[SK_C] = ln2 * m[5];
  v[SK_LOGO] = ln2 * m[0];
  v[SK_R] = m[6];
  v[SK_G] = m[7];
  v[SK_BLUE] = m[8];
  v[SK_Z] = full ? m[9] : 0;
  v[SK_RX] = full ? ln2 * m[10] : 0;
  v[SK_RY] = full ? ln2 * m[11] : 0;
  if (weight_sum) *weight_sum = m[12];
}

}  // namespace sk
