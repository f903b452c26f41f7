// Blending of one tile, forward: Gaussians are culled against 4 x 4 blocks of pixels, then each block walks its own list with its
// pixels in registers.
#include "cpu_core.h"
#include "cpu_tile.h"

namespace sk {

namespace {

// Lists, per block, the Gaussians of the batch that may touch it (in order).
SK_FN void list_blocks(const BlendArgs& a, int tile_x, int tile_y, int n, uint32_t alive, TileScratch& s) {
  for (int b = 0; b < TILE_BLOCKS; b++) s.count[b] = 0;
  const Lanes cut = splat(a.cut - CULL_SLACK);
  for (int at = 0; at < n; at += W) {
    int32_t row[W];   // rows behind the last repeat it; their bits are dropped below
    for (int i = 0; i < W; i++) row[i] = at + i;
    Lanes p[8];
    load_columns(s.g + SK_X, row, SK_SPLAT, 4, p);
    load_columns(s.g + SK_C, row, SK_SPLAT, 4, p + 4);
    static_assert(SK_X == 0 && SK_B == 3 && SK_C == 4 && SK_LOGO == 5, "columns in this order");
    const Gaussian2D<Lanes> g = {p[0], p[1], p[2], p[3], p[4], p[5]};
    const Ridges<Lanes> ridge = ridges(g);
    const uint32_t used = n - at >= W ? ~0u : (1u << (n - at)) - 1;
    for (uint32_t left = alive; left; left &= left - 1) {
      const int b = __builtin_ctz(left);
      const real x0 = (real)(tile_x + BLOCK * (b & 3)) + (real)0.5, y0 = (real)(tile_y + BLOCK * (b >> 2)) + (real)0.5;
      const Lanes peak = peak_in_block(g, ridge, splat(x0), splat(x0 + (BLOCK - 1)), splat(y0), splat(y0 + (BLOCK - 1)));
      uint32_t m = bits(at_least(peak, cut)) & used;
      uint16_t* list = s.list[b] + s.count[b];
#if defined(__AVX512F__)
      const __m512i packed = _mm512_maskz_compress_epi32((__mmask16)m, _mm512_loadu_si512(row));
      _mm256_storeu_si256((__m256i*)list, _mm512_cvtepi32_epi16(packed));
      s.count[b] += __builtin_popcount(m);
#else
      int k = 0;
      for (; m; m &= m - 1) list[k++] = (uint16_t)(at + __builtin_ctz(m));
      s.count[b] += k;
#endif
    }
  }
}

// One block over its list. Returns whether any of its pixels is still going.
template <bool DEPTH, bool WEIGHTS> SK_FN bool blend_block(const BlendArgs& a, int b, real x0, real y0, TileScratch& s) {
  constexpr int R = BLOCK_PIXELS / W;
  const int base = b * BLOCK_PIXELS;
  Lanes px[R], py[R], red[R], green[R], blue[R], depth[R], median[R];
  Ray<Lanes> ray[R];
  for (int r = 0; r < R; r++) {
    const int at = base + r * W;
    block_pixels(r, x0, y0, px[r], py[r]);
    ray[r].running = load(s.running + at);
    ray[r].left = load(s.left + at);
    red[r] = load(s.r + at);
    green[r] = load(s.gr + at);
    blue[r] = load(s.b + at);
    if (DEPTH) {
      depth[r] = load(s.depth + at);
      median[r] = load(s.median + at);
    }
  }
  const Lanes cut = splat(a.cut), alpha_max = splat(a.alpha_max), transmittance_min = splat(a.transmittance_min);
  const uint16_t* list = s.list[b];
  bool going = true;
  for (int i = 0; i < s.count[b]; i++) {
    const real* p = s.g + list[i] * SK_SPLAT;
    const Gaussian2D<Lanes> g = {splat(p[SK_X]), splat(p[SK_Y]), splat(p[SK_A]), splat(p[SK_B]), splat(p[SK_C]), splat(p[SK_LOGO])};
    going = false;
    for (int r = 0; r < R; r++) {
      LaneMask lanes_going;
      const Lanes before = ray[r].left;
      const AlphaAt<Lanes> at = alpha_at(g, px[r] - g.x, py[r] - g.y, cut, alpha_max);
      const Lanes w = blend_step(ray[r], at.alpha, transmittance_min, lanes_going);
      going |= any(lanes_going);
      red[r] += w * p[SK_R];
      green[r] += w * p[SK_G];
      blue[r] += w * p[SK_BLUE];
      if (DEPTH) {
        depth[r] += w * p[SK_Z];
        const LaneMask crosses = both(less(splat((real)0.5), before), at_least(splat((real)0.5), ray[r].left));
        median[r] = where(crosses, splat(p[SK_Z]), median[r]);
      }
      if (WEIGHTS) store(s.weights + i * BLOCK_PIXELS + r * W, w);
    }
    if (!going) {
      s.count[b] = i + 1;   // what the feature sums read
      break;
    }
  }
  for (int r = 0; r < R; r++) {
    const int at = base + r * W;
    store(s.running + at, ray[r].running);
    store(s.left + at, ray[r].left);
    store(s.r + at, red[r]);
    store(s.gr + at, green[r]);
    store(s.b + at, blue[r]);
    if (DEPTH) {
      store(s.depth + at, depth[r]);
      store(s.median + at, median[r]);
    }
  }
  return going;
}

// Sums of V registers of channels at P pixels, from channel c and pixel p0 on: P x V sums stay in registers over the whole list.
template <int P, int V> SK_FN void add_feature_columns(const BlendArgs& a, const uint16_t* list, int n, const TileScratch& s, int c, int p0, real* const* out) {
  Lanes sum[P][V];
  for (int p = 0; p < P; p++)
    for (int v = 0; v < V; v++) sum[p][v] = load(out[p0 + p] + c + v * W);
  for (int i = 0; i < n; i++) {
    const real *f = a.features + (int64_t)s.rows[list[i]] * a.channels + c, *w = s.weights + i * BLOCK_PIXELS + p0;
    if (i + 4 < n)
      for (int v = 0; v < V; v++) __builtin_prefetch(a.features + (int64_t)s.rows[list[i + 4]] * a.channels + c + v * W);
    Lanes column[V];
    for (int v = 0; v < V; v++) column[v] = load(f + v * W);
    for (int p = 0; p < P; p++) {
      const Lanes weight = splat(w[p]);
      for (int v = 0; v < V; v++) sum[p][v] += column[v] * weight;
    }
  }
  for (int p = 0; p < P; p++)
    for (int v = 0; v < V; v++) store(out[p0 + p] + c + v * W, sum[p][v]);
}

// out[pixel][channel] += sum over the block's list of weight * feature: a small matrix product, channels in the lanes.
void add_features(const BlendArgs& a, int b, const TileScratch& s, real* const* out) {
  const uint16_t* list = s.list[b];
  const int n = s.count[b];
  constexpr int P = W >= 16 ? 8 : 4, V = 3;   // 24 or 12 sums, as many as the registers hold
  int c = 0;
  for (; c + V * W <= a.channels; c += V * W)
    for (int p0 = 0; p0 < BLOCK_PIXELS; p0 += P) add_feature_columns<P, V>(a, list, n, s, c, p0, out);
  for (; c + W <= a.channels; c += W)
    for (int p0 = 0; p0 < BLOCK_PIXELS; p0 += 8) add_feature_columns<8, 1>(a, list, n, s, c, p0, out);
  for (int i = 0; i < n && c < a.channels; i++) {
    const real *f = a.features + (int64_t)s.rows[list[i]] * a.channels, *w = s.weights + i * BLOCK_PIXELS;
    for (int p = 0; p < BLOCK_PIXELS; p++)
      for (int k = c; k < a.channels; k++) out[p][k] += f[k] * w[p];
  }
}

template <bool DEPTH, bool WEIGHTS> void walk_tile(const BlendArgs& a, int tile, const int32_t* rows, int64_t n, TileScratch& s, WeightList* weights) {
  const int tile_x = tile % a.tiles_x * SK_TILE, tile_y = tile / a.tiles_x * SK_TILE;
  uint32_t alive = start_tile(a, tile_x, tile_y, s);
  for (int64_t first = 0; first < n && alive; first += BATCH) {
    const int batch = (int)(n - first < BATCH ? n - first : BATCH);
    load_batch(a, rows + first, n - first, batch, s);
    list_blocks(a, tile_x, tile_y, batch, alive, s);
    for (uint32_t left = alive; left; left &= left - 1) {
      const int b = __builtin_ctz(left);
      if (s.count[b] == 0) continue;
      const int x = tile_x + BLOCK * (b & 3), y = tile_y + BLOCK * (b >> 2);
      const bool going = blend_block<DEPTH, WEIGHTS>(a, b, (real)x, (real)y, s);
      if (!going) alive &= ~(1u << b);
      if (WEIGHTS && weights) {
        keep_weights(b, s, *weights);
      } else if (WEIGHTS) {
        real* out[BLOCK_PIXELS];
        block_rows(a, x, y, a.features_out, a.channels, s.spare, out);
        add_features(a, b, s, out);
      }
    }
  }
}

}  // namespace

void blend_tile(const BlendArgs& a, int tile, const int32_t* rows, int64_t n, TileScratch& s) {
  const bool depth = a.expected_depth || a.median_depth;
  const int tile_x = tile % a.tiles_x * SK_TILE, tile_y = tile / a.tiles_x * SK_TILE;
  if (a.features_out)
    for (int y = tile_y; y < tile_y + SK_TILE && y < a.height; y++) {
      const int x1 = tile_x + SK_TILE < a.width ? tile_x + SK_TILE : a.width;
      __builtin_memset(a.features_out + ((int64_t)y * a.width + tile_x) * a.channels, 0, sizeof(real) * (x1 - tile_x) * (size_t)a.channels);
    }
  if (a.features_out)
    walk_tile<true, true>(a, tile, rows, n, s, nullptr);
  else if (depth)
    walk_tile<true, false>(a, tile, rows, n, s, nullptr);
  else
    walk_tile<false, false>(a, tile, rows, n, s, nullptr);
  for (int b = 0; b < TILE_BLOCKS; b++)
    for (int p = 0; p < BLOCK_PIXELS; p++) {
      const int x = tile_x + BLOCK * (b & 3) + (p & 3), y = tile_y + BLOCK * (b >> 2) + (p >> 2);
      if (x >= a.width || y >= a.height) continue;
      const int64_t at = (int64_t)y * a.width + x;
      const int i = b * BLOCK_PIXELS + p;
      const real left = s.left[i], alpha = 1 - left;
      a.alpha[at] = alpha;
      if (a.color) {
        const real *bg = a.background;
        a.color[3 * at] = s.r[i] + (bg ? left * bg[0] : 0);
        a.color[3 * at + 1] = s.gr[i] + (bg ? left * bg[1] : 0);
        a.color[3 * at + 2] = s.b[i] + (bg ? left * bg[2] : 0);
      }
      if (a.expected_depth) a.expected_depth[at] = alpha > (real)1e-6 ? s.depth[i] / alpha : 0;
      if (a.median_depth) a.median_depth[at] = s.median[i];
    }
}

void tile_weights(const BlendArgs& a, int tile, const int32_t* rows, int64_t n, TileScratch& s, WeightList& weights) {
  walk_tile<false, true>(a, tile, rows, n, s, &weights);
}

}  // namespace sk
