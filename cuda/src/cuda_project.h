// What projection and its gradient share on the card.
#pragma once
#include "cuda_kernels.h"

namespace sk {

__device__ inline void share_view(View<float>& view, const ProjectArgs& a) {
  if (threadIdx.x == 0) {
    view = make_view(a.world_to_cam, a.K, a.width, a.height, a.settings.values);
    view.cut = a.cut;
  }
  __syncthreads();
}

__device__ inline GaussianIn<float> load_gaussian(const ProjectArgs& a, int64_t row) {
  const float *m = a.means + 3 * row, *s = a.log_scales + 3 * row;
  const float4 q = ((const float4*)a.quats)[row];
  return {{m[0], m[1], m[2]}, {s[0], s[1], s[2]}, {q.x, q.y, q.z, q.w}, a.logit_opacities[row]};
}

// Coefficients sh[3 k + channel] of bands [4 g, 4 g + 4), as far as there are `numbers`.
template <int numbers> __device__ void load_sh(const float* sh, bool aligned, int at, float (&out)[12]) {
  if (aligned) {
#pragma unroll
    for (int i = 0; i < 12; i += 4)
      if (at + i < numbers) {
        const float4 v = *(const float4*)(sh + at + i);
        out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
      }
  } else {
#pragma unroll
    for (int i = 0; i < 12; i++)
      if (at + i < numbers) out[i] = sh[at + i];
  }
}

// 1/2 + y . sh, before the clamp.
template <int DEGREE> __device__ Vec3<float> colour_of(const float* sh, bool aligned, const float* y) {
  constexpr int bands = sh_count(DEGREE);
  Vec3<float> c = {0.5f, 0.5f, 0.5f};
#pragma unroll
  for (int k = 0; k < bands; k += 4) {
    float v[12];
    load_sh<3 * bands>(sh, aligned && bands > 1, 3 * k, v);
#pragma unroll
    for (int j = 0; j < 4 && k + j < bands; j++) c = {c.x + y[k + j] * v[3 * j], c.y + y[k + j] * v[3 * j + 1], c.z + y[k + j] * v[3 * j + 2]};
  }
  return c;
}

}  // namespace sk
