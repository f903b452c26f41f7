// Blending forward: colour, alpha, depths. A block a tile; the arithmetic is sk/blend.h's.
#include "cuda_tile.h"

namespace sk {

namespace {

#ifndef SK_BLEND_PX
#define SK_BLEND_PX 2
#endif
constexpr int PX = SK_BLEND_PX;   // pixels a lane

template <bool DEPTH> __global__ void __launch_bounds__(Sub<PX>::THREADS) blend_kernel(BlendArgs a) {
  typedef Sub<PX> S;
  __shared__ Record batch[S::BATCH];
  if (a.needed && a.needed[0] > a.capacity) return;
  const int c = blockIdx.y;
  const S sub(a, blockIdx.x);
  const TileList list(a, (int64_t)c * a.tiles_x * a.tiles_y + blockIdx.x);
  const float* splats = a.splats + c * a.n * SK_SPLAT;
  float left[PX], depth[PX], median[PX];
  Vec3<float> sum[PX];
  bool going[PX], any_going = false;
#pragma unroll
  for (int p = 0; p < PX; p++) {
    left[p] = 1, depth[p] = median[p] = 0;
    sum[p] = {0, 0, 0};
    going[p] = sub.inside[p];
    any_going |= going[p];
  }
  bool warp_going = __any_sync(FULL, any_going);
  for (int64_t first = list.at; first < list.end; first += S::BATCH) {
    if (!__syncthreads_or(warp_going)) break;
    const int n = list.end - first < S::BATCH ? (int)(list.end - first) : S::BATCH;
    if ((int)threadIdx.x < n) batch[threadIdx.x] = load_record(splats, list.pairs[first + threadIdx.x]);
    __syncthreads();
    for (int group = 0; group < n && warp_going; group += 32) {
      for (unsigned left_over = sub.touching(a, batch, group, n); left_over; left_over &= left_over - 1) {
        const Record& r = batch[group + __ffs(left_over) - 1];
        const Gaussian2D<float> g = r.gaussian();
        const float dx = sub.x - g.x;
#pragma unroll
        for (int p = 0; p < PX; p++) {
          const AlphaAt<float> e = alpha_at(g, dx, sub.y[p] - g.y, a.cut, a.alpha_max);
          const Step<float> step = blend_step(left[p], e.alpha, a.transmittance_min);
          going[p] = going[p] && step.going;
          const float w = going[p] ? step.weight : 0;
          sum[p] = {sum[p].x + w * r[SK_R], sum[p].y + w * r[SK_G], sum[p].z + w * r[SK_BLUE]};
          if (DEPTH) {
            depth[p] += w * r[SK_Z];
            if (going[p] && left[p] > 0.5f && step.left <= 0.5f) median[p] = r[SK_Z];
          }
          left[p] = going[p] ? step.left : left[p];
        }
      }
      any_going = false;
#pragma unroll
      for (int p = 0; p < PX; p++) any_going |= going[p];
      warp_going = __any_sync(FULL, any_going);
    }
  }
  const int64_t picture = (int64_t)a.width * a.height * c;
  Vec3<float> background = {0, 0, 0};
  if (a.background) background = {a.background[3 * c], a.background[3 * c + 1], a.background[3 * c + 2]};
#pragma unroll
  for (int p = 0; p < PX; p++) {
    if (!sub.inside[p]) continue;
    const int64_t at = picture + sub.pixel[p];
    const float opaque = 1 - left[p];
    a.alpha[at] = opaque;
    if (a.color) {
      a.color[3 * at] = sum[p].x + left[p] * background.x;
      a.color[3 * at + 1] = sum[p].y + left[p] * background.y;
      a.color[3 * at + 2] = sum[p].z + left[p] * background.z;
    }
    if (a.expected_depth) a.expected_depth[at] = opaque > (float)1e-6 ? depth[p] * reciprocal(opaque) : 0;
    if (a.median_depth) a.median_depth[at] = median[p];
  }
}

}  // namespace

void blend(const BlendArgs& a, cudaStream_t stream) {
  const bool depth = a.expected_depth || a.median_depth;
  launch("blend", depth ? blend_kernel<true> : blend_kernel<false>, dim3(a.tiles_x * a.tiles_y, a.cameras), dim3(Sub<PX>::THREADS), 0, stream, a);
}

}  // namespace sk
