// Blending forward: colour, alpha, depths. A block a tile; the arithmetic is sk/blend.h's.
#include "cuda_tile.h"

namespace sk {

namespace {

#ifndef SK_BLEND_PX
#define SK_BLEND_PX 2
#endif
constexpr int PX = SK_BLEND_PX;   // pixels a lane
typedef Sub<PX> S;

template <bool DEPTH> __global__ void __launch_bounds__(S::THREADS) blend_kernel(BlendArgs a) {
  __shared__ Kept warps[S::WARPS];
  const int c = blockIdx.y;
  Kept& kept = warps[threadIdx.x / 32];
  const S sub(a, blockIdx.x);
  Walk walk(a, c, blockIdx.x, sub.lane);
  Light light[PX];
  float depth[PX], median[PX];
  Vec3<float> sum[PX];
#pragma unroll
  for (int p = 0; p < PX; p++) {
    light[p].left = sub.inside[p] ? 1 : 0;
    depth[p] = median[p] = 0;
    sum[p] = {0, 0, 0};
  }
  for (bool going = true; going && walk.more();) {
    const int count = walk.next(a, sub, kept);
#pragma unroll 2
    for (int i = 0; i < count; i++) {
      const Record& r = kept.records[i];
      const Gaussian2D<float> g = r.gaussian();
      const float dx = sub.x - g.x;
#pragma unroll
      for (int p = 0; p < PX; p++) {
        const float before = light[p].left, w = light[p].pass(alpha_at(g, dx, sub.y[p] - g.y, a.cut, a.alpha_max).alpha, a.transmittance_min);
        sum[p] = {sum[p].x + w * r[SK_R], sum[p].y + w * r[SK_G], sum[p].z + w * r[SK_BLUE]};
        if (DEPTH) {
          depth[p] += w * r[SK_Z];
          if (before > 0.5f && light[p].left <= 0.5f && light[p].left >= 0) median[p] = r[SK_Z];
        }
      }
    }
    going = false;
#pragma unroll
    for (int p = 0; p < PX; p++) going |= light[p].going();
    going = __any_sync(FULL, going);   // and every lane is done with what was kept
  }
  const int64_t picture = (int64_t)a.width * a.height * c;
  Vec3<float> background = {0, 0, 0};
  if (a.background) background = {a.background[3 * c], a.background[3 * c + 1], a.background[3 * c + 2]};
#pragma unroll
  for (int p = 0; p < PX; p++) {
    if (!sub.inside[p]) continue;
    const int64_t at = picture + sub.pixel[p];
    const float left = abs(light[p].left), opaque = 1 - left;
    a.alpha[at] = opaque;
    if (a.color) {
      a.color[3 * at] = sum[p].x + left * background.x;
      a.color[3 * at + 1] = sum[p].y + left * background.y;
      a.color[3 * at + 2] = sum[p].z + left * background.z;
    }
    if (a.expected_depth) a.expected_depth[at] = opaque > (float)1e-6 ? depth[p] * reciprocal(opaque) : 0;
    if (a.median_depth) a.median_depth[at] = median[p];
  }
}

}  // namespace

void blend(const BlendArgs& a, cudaStream_t stream) {
  const bool depth = a.expected_depth || a.median_depth;
  launch("blend", depth ? blend_kernel<true> : blend_kernel<false>, dim3(a.tiles_x * a.tiles_y, a.cameras), dim3(S::THREADS), 0, stream, a);
}

}  // namespace sk
