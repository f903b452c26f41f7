// The gradient of blending: walks the forward once more, front to back, and keeps per pixel what is still behind.
#include "cuda_sort.h"
#include "cuda_tile.h"

namespace sk {

namespace {

#ifndef SK_BLEND_VJP_PX
#define SK_BLEND_VJP_PX 2
#endif
constexpr int PX = SK_BLEND_VJP_PX;

// What a (Gaussian, sub-tile) leaves, by log2 alpha = logo - u^2 - v^2 with u = a dx + b dy, v = c dy and h = d loss / d log2 alpha: h, h u, h v, h dx^2,
// h dx dy, h dy^2, weight times v_colour; and in the full version weight times v_depth, |d loss / d x|, |d loss / d y|, the weight.
constexpr int SUMS = 9, SUMS_FULL = 13;
// Where each of the full version stands in a record; the gradient by the place needs a and b, c first.
__device__ constexpr int FIELD[SUMS_FULL] = {SK_LOGO, SK_X, SK_Y, SK_A, SK_B, SK_C, SK_R, SK_G, SK_BLUE, SK_Z, SK_RX, SK_RY, 12};

__device__ float dot_of(const float* x, const float* y, int count) {
  float sum = 0;
  for (int k = 0; k < count; k++) sum += x[k] * y[k];
  return sum;
}

template <bool FULL_RECORD, bool FIXED_ORDER> __global__ void __launch_bounds__(Sub<PX>::THREADS) blend_vjp_kernel(BlendVjpArgs v) {
  typedef Sub<PX> S;
  constexpr int N = FULL_RECORD ? SUMS_FULL : SUMS;
  constexpr int KEPT = FIXED_ORDER ? S::BATCH : 1;
  __shared__ Record batch[S::BATCH];
  __shared__ int32_t rows[S::BATCH];
  __shared__ float kept[KEPT][S::WARPS][N];     // FIXED_ORDER: what each warp found, summed in the order of the warps
  __shared__ uint8_t has[KEPT][S::WARPS];
  const BlendArgs& a = v.forward;
  const int c = blockIdx.y, tile = blockIdx.x, warp = threadIdx.x / 32;
  const S sub(a, tile);
  const TileList list(a, (int64_t)c * a.tiles_x * a.tiles_y + tile);
  const int64_t first_row = c * a.n, picture = (int64_t)a.width * a.height * c;
  const float* splats = a.splats + first_row * SK_SPLAT;
  float left[PX], behind[PX], v_z[PX];
  Vec3<float> v_c[PX], v_background = {0, 0, 0};
  bool going[PX], any_going = false;
#pragma unroll
  for (int p = 0; p < PX; p++) {
    left[p] = 1, behind[p] = 0, v_z[p] = 0;
    v_c[p] = {0, 0, 0};
    going[p] = sub.inside[p];
    any_going |= going[p];
    if (!sub.inside[p]) continue;
    const int64_t at = picture + sub.pixel[p];
    const float opaque = a.alpha[at], last = 1 - opaque;
    float v_opaque = v.v_alpha ? v.v_alpha[at] : 0;
    if (v.v_color) {
      v_c[p] = {v.v_color[3 * at], v.v_color[3 * at + 1], v.v_color[3 * at + 2]};
      behind[p] = v_c[p].x * a.color[3 * at] + v_c[p].y * a.color[3 * at + 1] + v_c[p].z * a.color[3 * at + 2];
      v_background = v_background + last * v_c[p];
    }
    if (FULL_RECORD && v.every_channel) behind[p] += dot_of(v.v_features_out + at * a.channels, a.features_out + at * a.channels, a.channels);
    if (FULL_RECORD && v.v_expected_depth) {
      const float z = a.expected_depth[at];
      v_z[p] = opaque > (float)1e-6 ? v.v_expected_depth[at] * reciprocal(opaque) : 0;
      v_opaque -= v_z[p] * z;
      behind[p] += v_z[p] * z * opaque;
    }
    behind[p] -= last * v_opaque;
  }
  if (v.tile_background) {
    __shared__ float warps[S::WARPS][3];
    const Vec3<float> total = {sum_of_warp(v_background.x), sum_of_warp(v_background.y), sum_of_warp(v_background.z)};
    if (sub.lane == 0) warps[warp][0] = total.x, warps[warp][1] = total.y, warps[warp][2] = total.z;
    __syncthreads();
    if (threadIdx.x < 3) {
      float sum = 0;
      for (int w = 0; w < S::WARPS; w++) sum += warps[w][threadIdx.x];
      v.tile_background[3 * ((int64_t)c * a.tiles_x * a.tiles_y + tile) + threadIdx.x] = sum;
    }
  }
  const TransposedSum<N> transposed(sub.lane);
  const int field = FIELD[transposed.index];
  bool warp_going = __any_sync(FULL, any_going);
  for (int64_t first = list.at; first < list.end; first += S::BATCH) {
    if (!__syncthreads_or(warp_going)) break;
    const int n = list.end - first < S::BATCH ? (int)(list.end - first) : S::BATCH;
    if ((int)threadIdx.x < n) {
      rows[threadIdx.x] = list.pairs[first + threadIdx.x];
      batch[threadIdx.x] = load_record(splats, rows[threadIdx.x]);
      if (FIXED_ORDER)
        for (int w = 0; w < S::WARPS; w++) has[threadIdx.x][w] = 0;
    }
    __syncthreads();
    for (int group = 0; group < n && warp_going; group += 32) {
      for (unsigned left_over = sub.touching(a, batch, group, n); left_over; left_over &= left_over - 1) {
        const int i = group + __ffs(left_over) - 1;
        const Record& r = batch[i];
        const Gaussian2D<float> g = r.gaussian();
        const float dx = sub.x - g.x;
        float m[N];
#pragma unroll
        for (int j = 0; j < N; j++) m[j] = 0;
        bool seen = false;
#pragma unroll
        for (int p = 0; p < PX; p++) {
          const float dy = sub.y[p] - g.y, ux = g.a * dx + g.b * dy, vy = g.c * dy;
          const AlphaAt<float> e = alpha_at(g, dx, dy, a.cut, a.alpha_max);
          const Step<float> step = blend_step(left[p], e.alpha, a.transmittance_min);
          going[p] = going[p] && step.going;
          const float w = going[p] ? step.weight : 0;
          left[p] = going[p] ? step.left : left[p];
          seen |= w > 0;
          float dot = v_c[p].x * r[SK_R] + v_c[p].y * r[SK_G] + v_c[p].z * r[SK_BLUE];
          if (FULL_RECORD) dot += v_z[p] * r[SK_Z];
          if (FULL_RECORD && v.every_channel && w > 0)
            dot += dot_of(v.v_features_out + (picture + sub.pixel[p]) * a.channels, a.features + (int64_t)rows[i] * a.channels, a.channels);
          const float weighted = w * dot;
          behind[p] -= weighted;
          const float h = e.free && going[p] ? (float)LN2 * exponent_vjp(weighted, dimming(e.alpha), behind[p]) : 0;
          const float hx = h * dx, hu = h * ux, hv = h * vy;
          m[0] += h;
          m[1] += hu;
          m[2] += hv;
          m[3] += hx * dx;
          m[4] += hx * dy;
          m[5] += h * dy * dy;
          m[6] += w * v_c[p].x;
          m[7] += w * v_c[p].y;
          m[8] += w * v_c[p].z;
          if constexpr (FULL_RECORD) {
            m[9] += w * v_z[p];
            m[10] += abs(2 * g.a * hu);
            m[11] += abs(2 * (g.b * hu + g.c * hv));
            m[12] += w;
          }
        }
        if (!__any_sync(FULL, seen)) continue;
        const float hu = m[1];
        m[1] = 2 * g.a * hu;
        m[2] = 2 * (g.b * hu + g.c * m[2]);
        const float total = TransposedSum<N>::of(m, sub.lane);
        if constexpr (FIXED_ORDER) {
          if (transposed.first) kept[i][warp][transposed.index] = total;
          if (sub.lane == 0) has[i][warp] = 1;
        } else if (transposed.first) {
          if (field < SK_SPLAT)
            atomicAdd(v.v_splats + (first_row + rows[i]) * SK_SPLAT + field, total);
          else if (v.weight_sums)
            atomicAdd(v.weight_sums + first_row + rows[i], total);
        }
      }
      any_going = false;
#pragma unroll
      for (int p = 0; p < PX; p++) any_going |= going[p];
      warp_going = __any_sync(FULL, any_going);
    }
    if constexpr (FIXED_ORDER) {
      __syncthreads();
      if ((int)threadIdx.x < n) {
        const int64_t slot = slot_at(v, first_row + rows[threadIdx.x], tile);
        bool some = false;
        float sums[N] = {};
        for (int w = 0; w < S::WARPS; w++) {
          if (!has[threadIdx.x][w]) continue;
          some = true;
          for (int j = 0; j < N; j++) sums[j] += kept[threadIdx.x][w][j];
        }
        if (some && slot < v.slots) {
          for (int j = N; j < RECORD; j++) v.records[slot * RECORD + FIELD[j]] = 0;
          for (int j = 0; j < N; j++) v.records[slot * RECORD + FIELD[j]] = sums[j];
          v.written[slot] = 1;
        }
      }
    }
  }
}

__global__ void __launch_bounds__(ROWS) slots_kernel(const int64_t* tiles, int64_t rows, int32_t* count) {
  const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (i < rows) count[i] = unpacked(tiles[i]).count();
}

// Each row's records, tile by tile, so that the sum does not depend on which tile was finished first.
__global__ void __launch_bounds__(ROWS) sum_slots_kernel(BlendVjpArgs v) {
  const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (row >= v.forward.cameras * v.forward.n) return;
  const int32_t count = unpacked(v.tiles[row]).count();
  float sums[RECORD] = {};
  for (int64_t s = v.slot_of[row]; s < v.slot_of[row] + count && s < v.slots; s++)
    if (v.written[s])
#pragma unroll
      for (int j = 0; j < RECORD; j++) sums[j] += v.records[s * RECORD + j];
  for (int j = 0; j < SK_SPLAT; j++) v.v_splats[row * SK_SPLAT + j] = sums[j];
  if (v.weight_sums) v.weight_sums[row] = sums[SK_SPLAT];
}

// One block a camera: adds up what its tiles found, in a fixed order.
__global__ void __launch_bounds__(ROWS) background_kernel(const float* tile_background, int64_t tiles, float* v_background) {
  __shared__ double sums[ROWS][3];
  double sum[3] = {};
  for (int64_t t = threadIdx.x; t < tiles; t += ROWS)
    for (int k = 0; k < 3; k++) sum[k] += tile_background[3 * (blockIdx.x * tiles + t) + k];
  for (int k = 0; k < 3; k++) sums[threadIdx.x][k] = sum[k];
  __syncthreads();
  if (threadIdx.x >= 3) return;
  double total = 0;
  for (int i = 0; i < ROWS; i++) total += sums[i][threadIdx.x];
  v_background[3 * blockIdx.x + threadIdx.x] = (float)total;
}

}  // namespace

void count_slots(const BlendVjpArgs& a, int32_t* count, void* temporary, size_t bytes, cudaStream_t stream) {
  const int64_t rows = a.forward.cameras * a.forward.n;
  launch("slots", slots_kernel, dim3(blocks_for(rows)), dim3(ROWS), 0, stream, a.tiles, rows, count);
  if (rows) exclusive_sum(temporary, bytes, count, a.slot_of, rows, stream);
}

void sum_slots(const BlendVjpArgs& v, cudaStream_t stream) {
  launch("sum_slots", sum_slots_kernel, dim3(blocks_for(v.forward.cameras * v.forward.n)), dim3(ROWS), 0, stream, v);
}

void blend_vjp(const BlendVjpArgs& v, cudaStream_t stream) {
  const BlendArgs& a = v.forward;
  const bool full = v.v_expected_depth || v.weight_sums, ordered = v.slots > 0;
  auto* kernel = full ? ordered ? blend_vjp_kernel<true, true> : blend_vjp_kernel<true, false> : ordered ? blend_vjp_kernel<false, true> : blend_vjp_kernel<false, false>;
  launch("blend_vjp", kernel, dim3(a.tiles_x * a.tiles_y, a.cameras), dim3(Sub<PX>::THREADS), 0, stream, v);
  if (v.v_background) launch("background", background_kernel, dim3(a.cameras), dim3(ROWS), 0, stream, v.tile_background, (int64_t)a.tiles_x * a.tiles_y, v.v_background);
}

}  // namespace sk
