// Feature channels and lists of weights: small matrix products of Gaussians, pixels and channels, channels in the lanes.
#include "cpu_core.h"
#include "cpu_tile.h"

namespace sk {

namespace {

// Addresses of the block's 16 pixels in a map [H,W,channels]; pixels outside the picture all point at `spare` [channels].
SK_FN void block_rows(const BlendArgs& a, int x, int y, real* map, int channels, real* spare, real** out) {
  for (int p = 0; p < BLOCK_PIXELS; p++) {
    const int px = x + (p & 3), py = y + (p >> 2);
    out[p] = px < a.width && py < a.height ? map + ((int64_t)py * a.width + px) * channels : spare;
  }
}

// Sums of V registers of channels at P pixels, from channel c and pixel p0 on: P x V sums stay in registers over the whole list.
template <int P, int V> SK_FN void add_feature_columns(const BlendArgs& a, const uint16_t* list, int n, const TileScratch& s, int c, int p0, bool first, real* const* out) {
  Lanes sum[P][V];
  for (int p = 0; p < P; p++)
    for (int v = 0; v < V; v++) sum[p][v] = first ? splat(0) : load(out[p0 + p] + c + v * W);
  for (int i = 0; i < n; i++) {
    const real *f = a.features + (int64_t)s.rows[list[i]] * a.channels + c, *w = s.weights + i * BLOCK_PIXELS + p0;
    if (i + 8 < n)
      for (int v = 0; v < V; v++) __builtin_prefetch(a.features + (int64_t)s.rows[list[i + 8]] * a.channels + c + v * W);
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

// feature_dot[b][place[i]][pixel] = feature of the i-th listed Gaussian . v_features at the pixel: G Gaussians by P pixels at a time, channels
// in the lanes. The pixels' gradients stay in the first cache, the Gaussians' features pass by.
void dot_features(const BlendArgs& a, int b, const uint16_t* place, const real* const* v, VjpScratch& s) {
  constexpr int G = 3, P = W >= 16 ? 8 : 4;
  const int n = s.t.count[b], whole = a.channels / W * W;
  for (int p0 = 0; p0 < BLOCK_PIXELS; p0 += P)
    for (int i0 = 0; i0 < n; i0 += G) {
      const real *f[G], *next[G];
      for (int g = 0; g < G; g++) {
        f[g] = a.features + (int64_t)s.t.rows[s.t.list[b][i0 + g < n ? i0 + g : n - 1]] * a.channels;
        next[g] = a.features + (int64_t)s.t.rows[s.t.list[b][i0 + G + g < n ? i0 + G + g : n - 1]] * a.channels;
      }
      Lanes sum[G * P];
      for (int k = 0; k < G * P; k++) sum[k] = splat(0);
      for (int c = 0; c < whole; c += W) {
        Lanes feature[G];
        for (int g = 0; g < G; g++) feature[g] = load(f[g] + c), __builtin_prefetch(next[g] + c);
        for (int p = 0; p < P; p++) {
          const Lanes column = load(v[p0 + p] + c);
          for (int g = 0; g < G; g++) sum[g * P + p] += feature[g] * column;
        }
      }
      for (int g = 0; g < G && i0 + g < n; g++) {
        real dots[16];
        add_lanes<P>(sum + g * P, dots);
        for (int p = 0; p < P; p++) {
          for (int c = whole; c < a.channels; c++) dots[p] += f[g][c] * v[p0 + p][c];
          s.feature_dot[b][place[i0 + g]][p0 + p] = dots[p];
        }
      }
    }
}

}  // namespace

void add_features(const BlendArgs& a, int b, int x, int y, bool first, const TileScratch& s) {
  real* out[BLOCK_PIXELS];
  block_rows(a, x, y, a.features_out, a.channels, s.spare, out);
  const uint16_t* list = s.list[b];
  const int n = s.count[b];
  constexpr int P = W >= 16 ? 8 : 4, V = 3;   // 24 or 12 sums, as many as the registers hold
  int c = 0;
  for (; c + V * W <= a.channels; c += V * W)
    for (int p0 = 0; p0 < BLOCK_PIXELS; p0 += P) add_feature_columns<P, V>(a, list, n, s, c, p0, first, out);
  for (; c + W <= a.channels; c += W)
    for (int p0 = 0; p0 < BLOCK_PIXELS; p0 += 8) add_feature_columns<8, 1>(a, list, n, s, c, p0, first, out);
  for (int p = 0; p < BLOCK_PIXELS && first; p++)
    for (int k = c; k < a.channels; k++) out[p][k] = 0;
  for (int i = 0; i < n && c < a.channels; i++) {
    const real *f = a.features + (int64_t)s.rows[list[i]] * a.channels, *w = s.weights + i * BLOCK_PIXELS;
    for (int p = 0; p < BLOCK_PIXELS; p++)
      for (int k = c; k < a.channels; k++) out[p][k] += f[k] * w[p];
  }
}

Block dot_maps(const BlendArgs& f, const BlockOfMap& at, const real* v_features_out) {
  real out[BLOCK_PIXELS] = {};
  for (int p = 0; p < BLOCK_PIXELS; p++) {
    if (!at.holds(p)) continue;
    const int64_t first = (at.corner + at.pixel[p]) * f.channels;
    Lanes sum = splat(0);
    int c = 0;
    for (; c + W <= f.channels; c += W) sum += load(v_features_out + first + c) * load(f.features_out + first + c);
    for (int k = 0; k < W; k++) out[p] += sum[k];
    for (; c < f.channels; c++) out[p] += v_features_out[first + c] * f.features_out[first + c];
  }
  return load_pack<R>(out);
}

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
    const Block transmittance_min = splat_of<Block>(f.transmittance_min), zero = splat_of<Block>(0);
    Block running = load_pack<R>(s.second_running + b * BLOCK_PIXELS), px[IN_STEP], py[IN_STEP];
    for (int k = 0; k < IN_STEP; k++) px[k] = load_pack<R>(s.t.px + b * BLOCK_PIXELS), py[k] = load_pack<R>(s.t.py + b * BLOCK_PIXELS);
    for (int k = 0; k < IN_STEP - 1; k++) s.t.list[b][s.t.count[b] + k] = BATCH;
    uint16_t place[BATCH + 3];   // in the list as it was; what has no weight at any pixel leaves it
    int kept = 0;
    for (int i = 0; i < s.t.count[b]; i += IN_STEP) {
      const real* p[IN_STEP];
      for (int k = 0; k < IN_STEP; k++) p[k] = s.t.g + s.t.list[b][i + k] * SK_SPLAT;
      const Several alpha = alphas_at(f, p, px, py).alpha;
      for (int k = 0; k < IN_STEP; k++) {
        const Step<Block> step = blend_step(running, part(alpha, k), transmittance_min);
        const Block weight = where(step.going, step.weight, zero);
        running = where(step.going, step.left, zero);
        store(s.feature_dot[b][i + k < BATCH ? i + k : BATCH - 1], zero);
        store(s.t.weights + kept * BLOCK_PIXELS, weight);
        s.t.list[b][kept] = s.t.list[b][i + k];
        place[kept] = (uint16_t)(i + k);
        kept += any(less(zero, weight));
      }
    }
    s.t.count[b] = kept;
    store(s.second_running + b * BLOCK_PIXELS, running);
    if (kept == 0) continue;
    if (weights) keep_weights(b, s.t, *weights);
    real* v[BLOCK_PIXELS];
    block_rows(f, x, y, const_cast<real*>(a.v_features_out), f.channels, s.t.spare, v);
    dot_features(f, b, place, v, s);
  }
}

void keep_weights(int b, const TileScratch& s, WeightList& list) {
  const int64_t at = b * list.capacity + list.count[b];
  for (int i = 0; i < s.count[b]; i++) list.rows[at + i] = s.rows[s.list[b][i]];
  __builtin_memcpy(list.weights + at * BLOCK_PIXELS, s.weights, sizeof(real) * BLOCK_PIXELS * (size_t)s.count[b]);
  list.count[b] += s.count[b];
}

void sum_weighted(const BlendArgs& a, int tile, const WeightList& list, const real* map, int first, int last, real* sums) {
  const int tile_x = tile % a.tiles_x * SK_TILE, tile_y = tile / a.tiles_x * SK_TILE;
  constexpr int V = 3, G = 4;   // registers of channels, Gaussians: 12 sums
  const int whole = first + (last - first) / W * W;
  const real none[BLOCK_PIXELS] = {}, zeros[V * W] = {};
  auto row_of = [](int32_t entry) { return (int64_t)(entry < 0 ? ~entry : entry); };
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
        for (int g = 0; g < G; g++)
          for (int v = 0; v < vectors && i + 2 * G + g < n; v++) __builtin_prefetch(sums + row_of(rows[i + 2 * G + g]) * a.channels + c + v * W, 1);
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
        for (int g = 0; g < group; g++) {   // a row may stand in the list once only, so the order of these sums is the list's
          real* out = sums + row_of(rows[i + g]) * a.channels + c;
          const real* before = rows[i + g] < 0 ? zeros : out;
          for (int v = 0; v < vectors; v++) store(out + v * W, load(before + v * W) + sum[g][v]);
        }
      }
    }
    for (int64_t i = 0; i < n; i++)
      for (int c = whole; c < last; c++) {
        real sum = 0;
        for (int k = 0; k < count; k++) sum += weights[i * BLOCK_PIXELS + pixels[k]] * in[k][c];
        real& out = sums[row_of(rows[i]) * a.channels + c];
        out = rows[i] < 0 ? sum : out + sum;
      }
  }
}

}  // namespace sk
