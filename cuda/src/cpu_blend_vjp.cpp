// The gradient of blending over one tile: walks the forward once more, front to back, and keeps per pixel what is still behind.
#include "cpu_core.h"
#include "cpu_tile.h"

namespace sk {

namespace {

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

// Which blocks of the tile the Gaussian may touch: lanes are blocks.
SK_FN uint32_t blocks_touched(const real* p, real cut, const Lanes (&x0)[TILE_BLOCKS / (W < 16 ? W : 16)], const Lanes (&y0)[TILE_BLOCKS / (W < 16 ? W : 16)]) {
  const Gaussian2D<Lanes> g = {splat(p[SK_X]), splat(p[SK_Y]), splat(p[SK_A]), splat(p[SK_B]), splat(p[SK_C]), splat(p[SK_LOGO])};
  const Ridges<real> one = ridges(Gaussian2D<real>{p[SK_X], p[SK_Y], p[SK_A], p[SK_B], p[SK_C], p[SK_LOGO]});
  const Ridges<Lanes> ridge = {splat(one.x_per_y), splat(one.y_per_x)};
  uint32_t out = 0;
  for (int k = 0; k < TILE_BLOCKS / W; k++) {
    const Lanes peak = peak_in_block(g, ridge, x0[k], x0[k] + (real)(BLOCK - 1), y0[k], y0[k] + (real)(BLOCK - 1));
    out |= bits(at_least(peak, splat(cut))) << (k * W);
  }
  return out;
}

// Per pixel: the gradients that come in, and the loss-weighted sum of everything that is blended (its own share is taken off as the
// walk passes each Gaussian).
SK_FN void start_vjp_tile(const BlendVjpArgs& a, int tile_x, int tile_y, VjpScratch& s, double* v_background) {
  const BlendArgs& f = a.forward;
  for (int b = 0; b < TILE_BLOCKS; b++)
    for (int p = 0; p < BLOCK_PIXELS; p++) {
      const int x = tile_x + BLOCK * (b & 3) + (p & 3), y = tile_y + BLOCK * (b >> 2) + (p >> 2), i = b * BLOCK_PIXELS + p;
      s.behind[i] = s.v_r[i] = s.v_g[i] = s.v_b[i] = s.v_z[i] = 0;
      s.second_running[i] = s.t.running[i];
      if (x >= f.width || y >= f.height) continue;
      const int64_t at = (int64_t)y * f.width + x;
      const real alpha = f.alpha[at], left = 1 - alpha;
      real v_alpha = a.v_alpha ? a.v_alpha[at] : 0, behind = 0;
      if (a.v_color) {
        const real* v = a.v_color + 3 * at;
        s.v_r[i] = v[0];
        s.v_g[i] = v[1];
        s.v_b[i] = v[2];
        behind += v[0] * f.color[3 * at] + v[1] * f.color[3 * at + 1] + v[2] * f.color[3 * at + 2];
        if (v_background)
          for (int c = 0; c < 3; c++) v_background[c] += (double)left * v[c];
      }
      if (a.v_expected_depth && alpha > (real)1e-6) {
        s.v_z[i] = a.v_expected_depth[at] / alpha;
        v_alpha -= s.v_z[i] * f.expected_depth[at];
        behind += s.v_z[i] * f.expected_depth[at] * alpha;
      }
      if (a.v_features_out) {
        const real *v = a.v_features_out + at * f.channels, *out = f.features_out + at * f.channels;
        Lanes sum = splat(0);
        int c = 0;
        for (; c + W <= f.channels; c += W) sum += load(v + c) * load(out + c);
        real lanes[W];
        store(lanes, sum);
        for (; c < f.channels; c++) behind += v[c] * out[c];
        for (int k = 0; k < W; k++) behind += lanes[k];
      }
      s.behind[i] = behind - left * v_alpha;
    }
}

// feature_dot[b][i][pixel] = feature of the i-th listed Gaussian . v_features at the pixel: G Gaussians by P pixels at a time, channels
// in the lanes.
void dot_features(const BlendArgs& a, int b, const real* const* v, VjpScratch& s) {
  constexpr int G = 4, P = W >= 16 ? 4 : 2;
  const int n = s.t.count[b], whole = a.channels / W * W;
  for (int i0 = 0; i0 < n; i0 += G) {
    const real* f[G];
    for (int g = 0; g < G; g++) f[g] = a.features + (int64_t)s.t.rows[s.t.list[b][i0 + g < n ? i0 + g : n - 1]] * a.channels;
    for (int p0 = 0; p0 < BLOCK_PIXELS; p0 += P) {
      Lanes sum[G * P];
      for (int k = 0; k < G * P; k++) sum[k] = splat(0);
      for (int c = 0; c < whole; c += W) {
        Lanes column[P];
        for (int p = 0; p < P; p++) column[p] = load(v[p0 + p] + c);
        for (int g = 0; g < G; g++) {
          const Lanes feature = load(f[g] + c);
          for (int p = 0; p < P; p++) sum[g * P + p] += feature * column[p];
        }
      }
      real dots[16];
      add_lanes<G * P>(sum, dots);
      for (int g = 0; g < G && i0 + g < n; g++)
        for (int p = 0; p < P; p++) {
          real dot = dots[g * P + p];
          for (int c = whole; c < a.channels; c++) dot += f[g][c] * v[p0 + p][c];
          s.feature_dot[b][i0 + g][p0 + p] = dot;
        }
    }
  }
}

// Before the geometry walk of a batch: per block, the weights (kept for the feature gradient) and the feature dot products.
void features_of_batch(const BlendVjpArgs& a, int tile_x, int tile_y, uint32_t alive, const uint32_t* masks, int n, VjpScratch& s, WeightList* weights) {
  const BlendArgs& f = a.forward;
  for (int b = 0; b < TILE_BLOCKS; b++) s.t.count[b] = 0;
  for (int i = 0; i < n; i++)
    for (uint32_t m = masks[i] & alive; m; m &= m - 1) {
      const int b = __builtin_ctz(m);
      s.t.list[b][s.t.count[b]++] = (uint16_t)i;
    }
  for (uint32_t left = alive; left; left &= left - 1) {
    const int b = __builtin_ctz(left), x = tile_x + BLOCK * (b & 3), y = tile_y + BLOCK * (b >> 2);
    const Lanes cut = splat(f.cut), alpha_max = splat(f.alpha_max), transmittance_min = splat(f.transmittance_min);
    for (int i = 0; i < s.t.count[b]; i++) {
      const real* p = s.t.g + s.t.list[b][i] * SK_SPLAT;
      const Gaussian2D<Lanes> g = {splat(p[SK_X]), splat(p[SK_Y]), splat(p[SK_A]), splat(p[SK_B]), splat(p[SK_C]), splat(p[SK_LOGO])};
      bool going = false;
      for (int r = 0; r < BLOCK_PIXELS / W; r++) {
        real* running = s.second_running + b * BLOCK_PIXELS + r * W;
        Lanes px, py;
        block_pixels(r, (real)x, (real)y, px, py);
        Ray<Lanes> ray = {load(running), splat(0)};
        LaneMask lanes_going;
        const Lanes w = blend_step(ray, alpha_at(g, px - g.x, py - g.y, cut, alpha_max).alpha, transmittance_min, lanes_going);
        going |= any(lanes_going);
        store(running, ray.running);
        store(s.t.weights + i * BLOCK_PIXELS + r * W, w);
      }
      if (!going) s.t.count[b] = i + 1;
    }
    if (s.t.count[b] == 0) continue;
    if (weights) keep_weights(b, s.t, *weights);
    real* v[BLOCK_PIXELS];
    block_rows(f, x, y, const_cast<real*>(a.v_features_out), f.channels, s.t.spare, v);
    dot_features(f, b, v, s);
  }
}

// One Gaussian over the blocks that it may touch; returns those that have stopped. Two loops, because one would be a single long chain
// of dependent instructions: alpha first, which needs no pixel's state, then what does (97 -> 40 cycles a block).
template <bool EXTRA> SK_FN uint32_t walk_gaussian(const BlendArgs& f, const real* p, uint32_t blocks, real x0, real y0, bool features, int* cursor, VjpScratch& s, real* record) {
  constexpr int R = BLOCK_PIXELS / W;
  const Lanes cut = splat(f.cut), alpha_max = splat(f.alpha_max), transmittance_min = splat(f.transmittance_min), zero = splat(0);
  const Gaussian2D<Lanes> g = {splat(p[SK_X]), splat(p[SK_Y]), splat(p[SK_A]), splat(p[SK_B]), splat(p[SK_C]), splat(p[SK_LOGO])};
  Lanes dx[4][R], dy[4][R], alpha[TILE_BLOCKS][R], dim[TILE_BLOCKS][R];
  for (int k = 0; k < 4; k++)
    for (int r = 0; r < R; r++) {
      Lanes px, py;
      block_pixels(r, x0 + (real)(BLOCK * k), y0 + (real)(BLOCK * k), px, py);
      dx[k][r] = px - g.x;
      dy[k][r] = py - g.y;
    }
  int n = 0;
  for (uint32_t left = blocks; left; left &= left - 1, n++) {
    const int b = __builtin_ctz(left);
    for (int r = 0; r < R; r++) {
      const AlphaAt<Lanes> e = alpha_at(g, dx[b & 3][r], dy[b >> 2][r], cut, alpha_max);
      alpha[n][r] = e.alpha;
      dim[n][r] = where(e.free, dimming(e.alpha), splat(-1));   // -1: no gradient
    }
  }
  Lanes m[EXTRA ? MOMENTS_STATS : MOMENTS];
  for (int j = 0; j < (EXTRA ? MOMENTS_STATS : MOMENTS); j++) m[j] = zero;
  Lanes xx, xy, yy;
  conic_of(g.a, g.b, g.c, xx, xy, yy);
  uint32_t stopped = 0;
  n = 0;
  for (uint32_t left = blocks; left; left &= left - 1, n++) {
    const int b = __builtin_ctz(left);
    bool going = false;
    for (int r = 0; r < R; r++) {
      const int at = b * BLOCK_PIXELS + r * W;
      Ray<Lanes> ray = {load(s.t.running + at), zero};
      LaneMask lanes_going;
      const Lanes w = blend_step(ray, alpha[n][r], transmittance_min, lanes_going);
      going |= any(lanes_going);
      store(s.t.running + at, ray.running);
      const Lanes vr = load(s.v_r + at), vg = load(s.v_g + at), vb = load(s.v_b + at);
      Lanes dot = vr * p[SK_R] + vg * p[SK_G] + vb * p[SK_BLUE];
      if (EXTRA) {
        const Lanes vz = load(s.v_z + at);
        dot += vz * p[SK_Z];
        m[9] += w * vz;
        if (features) dot += load(&s.feature_dot[b][cursor[b]][r * W]);
      }
      const Lanes weighted = w * dot, behind = load(s.behind + at) - weighted;
      store(s.behind + at, behind);
      const Lanes d = dim[n][r];
      const Lanes h = where(both(at_least(d, zero), lanes_going), exponent_vjp(weighted, d, behind), zero);
      const Lanes x = dx[b & 3][r], y = dy[b >> 2][r], hx = h * x, hy = h * y;
      m[0] += h;
      m[1] += hx;
      m[2] += hy;
      m[3] += hx * x;
      m[4] += hx * y;
      m[5] += hy * y;
      m[6] += w * vr;
      m[7] += w * vg;
      m[8] += w * vb;
      if (EXTRA) {
        m[10] += abs((xx + xx) * hx + xy * hy);
        m[11] += abs(xy * hx + (yy + yy) * hy);
        m[12] += w;
      }
    }
    if (EXTRA) cursor[b]++;
    if (!going) stopped |= 1u << b;
  }
  add_lanes<EXTRA ? MOMENTS_STATS : MOMENTS>(m, record);
  return stopped;
}

template <bool EXTRA> void walk_vjp(const BlendVjpArgs& a, int tile, const int32_t* rows, int64_t n, VjpScratch& s, WeightList* weights, double* v_background) {
  constexpr int GROUPS = TILE_BLOCKS / W;
  const BlendArgs& f = a.forward;
  const bool features = a.v_features_out != nullptr;
  const int tile_at_x = tile % f.tiles_x, tile_at_y = tile / f.tiles_x, tile_x = tile_at_x * SK_TILE, tile_y = tile_at_y * SK_TILE;
  uint32_t alive = start_tile(f, tile_x, tile_y, s.t);
  start_vjp_tile(a, tile_x, tile_y, s, v_background);
  Lanes bx[GROUPS], by[GROUPS];
  for (int k = 0; k < TILE_BLOCKS; k++) {
    bx[k / W][k % W] = (real)(tile_x + BLOCK * (k & 3)) + (real)0.5;
    by[k / W][k % W] = (real)(tile_y + BLOCK * (k >> 2)) + (real)0.5;
  }
  uint32_t masks[BATCH];
  auto record_of = [&](int32_t row) {
    const PairSlots& slots = a.slots[row];
    return a.records + (slots.first + (int64_t)tile_at_y * slots.stride + tile_at_x) * PAIR_RECORD;
  };
  int64_t first = 0;
  for (; first < n && alive; first += BATCH) {
    const int batch = (int)(n - first < BATCH ? n - first : BATCH);
    load_batch(f, rows + first, n - first, batch, s.t);
    for (int i = 0; i < batch; i++) masks[i] = blocks_touched(s.t.g + i * SK_SPLAT, f.cut - CULL_SLACK, bx, by);
    if (EXTRA && features) features_of_batch(a, tile_x, tile_y, alive, masks, batch, s, weights);
    int cursor[TILE_BLOCKS] = {};
    for (int i = 0; i < batch; i++) {
      real* record = record_of(s.t.rows[i]);
      if (i + 8 < batch) __builtin_prefetch(a.slots + s.t.rows[i + 8]);
      const uint32_t blocks = masks[i] & alive;
      if (blocks)
        alive &= ~walk_gaussian<EXTRA>(f, s.t.g + i * SK_SPLAT, blocks, (real)tile_x, (real)tile_y, features, cursor, s, record);
      else
        __builtin_memset(record, 0, sizeof(real) * PAIR_RECORD);
    }
  }
  for (int64_t i = first; i < n; i++) __builtin_memset(record_of(rows[i]), 0, sizeof(real) * PAIR_RECORD);   // behind opaque pixels
}

}  // namespace

void blend_tile_vjp(const BlendVjpArgs& a, int tile, const int32_t* rows, int64_t n, VjpScratch& s, WeightList* weights, double* v_background) {
  if (a.v_features_out || a.v_expected_depth || a.stats)
    walk_vjp<true>(a, tile, rows, n, s, weights, v_background);
  else
    walk_vjp<false>(a, tile, rows, n, s, weights, v_background);
}

void sum_weighted(const BlendArgs& a, int tile, const WeightList& list, const real* map, int first, int last, real* sums) {
  const int tile_x = tile % a.tiles_x * SK_TILE, tile_y = tile / a.tiles_x * SK_TILE;
  constexpr int V = 3, G = 4;   // registers of channels, Gaussians: 12 sums
  const int whole = first + (last - first) / W * W;
  real none[BLOCK_PIXELS] = {};
  for (int b = 0; b < TILE_BLOCKS; b++) {
    const int64_t n = list.count[b];
    if (n == 0) continue;
    const int x = tile_x + BLOCK * (b & 3), y = tile_y + BLOCK * (b >> 2);
    const real *in[BLOCK_PIXELS], *weights = list.weights + b * list.capacity * BLOCK_PIXELS;
    const int32_t* rows = list.rows + b * list.capacity;
    int pixels[BLOCK_PIXELS], count = 0;   // those inside the picture
    for (int p = 0; p < BLOCK_PIXELS; p++)
      if (x + (p & 3) < a.width && y + (p >> 2) < a.height) {
        in[count] = map + ((int64_t)(y + (p >> 2)) * a.width + x + (p & 3)) * a.channels;
        pixels[count++] = p;
      }
    for (int c = first; c < whole; c += V * W) {
      const int vectors = (whole - c) / W < V ? (whole - c) / W : V;
      for (int64_t i = 0; i < n; i += G) {
        const int group = n - i < G ? (int)(n - i) : G;
        const real* w[G];
        for (int g = 0; g < G; g++) w[g] = g < group ? weights + (i + g) * BLOCK_PIXELS : none;
        Lanes sum[G][V];
        for (int g = 0; g < G; g++)
          for (int v = 0; v < V; v++) sum[g][v] = splat(0);
        if (vectors == V) {
          for (int k = 0; k < count; k++) {
            const Lanes m0 = load(in[k] + c), m1 = load(in[k] + c + W), m2 = load(in[k] + c + 2 * W);
            for (int g = 0; g < G; g++) {
              const Lanes t = splat(w[g][pixels[k]]);
              sum[g][0] += t * m0;
              sum[g][1] += t * m1;
              sum[g][2] += t * m2;
            }
          }
        } else {
          for (int k = 0; k < count; k++)
            for (int v = 0; v < vectors; v++) {
              const Lanes m = load(in[k] + c + v * W);
              for (int g = 0; g < G; g++) sum[g][v] += m * w[g][pixels[k]];
            }
        }
        for (int g = 0; g < group; g++)   // a row may stand in the list once only, so the order of these sums is the list's
          for (int v = 0; v < vectors; v++) {
            real* out = sums + (int64_t)rows[i + g] * a.channels + c + v * W;
            store(out, load(out) + sum[g][v]);
          }
      }
    }
    for (int64_t i = 0; i < n; i++)
      for (int c = whole; c < last; c++) {
        real sum = 0;
        for (int k = 0; k < count; k++) sum += weights[i * BLOCK_PIXELS + pixels[k]] * in[k][c];
        sums[(int64_t)rows[i] * a.channels + c] += sum;
      }
  }
}

void reduce_pairs(const real* splat, const real* records, int64_t n, bool full, real* v, real* weight_sum) {
  Lanes sum[PAIR_RECORD / W];
  for (int j = 0; j < PAIR_RECORD / W; j++) sum[j] = load(records + j * W);
  for (int64_t i = 1; i < n; i++)
    for (int j = 0; j < PAIR_RECORD / W; j++) sum[j] += load(records + i * PAIR_RECORD + j * W);
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
