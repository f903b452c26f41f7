// A kernel that touches every header of sk/ with T = float, so that shared arithmetic never grows something that nvcc refuses.
// test_guards.py compiles it; nothing runs it.
#include "sk/adam.h"
#include "sk/blend.h"
#include "sk/lanes.h"
#include "sk/mcmc.h"
#include "sk/num.h"
#include "sk/project.h"
#include "sk/scalar.h"
#include "sk/sh.h"
#include "sk/ssim.h"
#include "sk/vec.h"
#include "splatkit.h"

// Inside the namespace, not `using` it: the host half of nvcc includes CUDA's math headers behind this page, whose plain sqrt(double)
// would become ambiguous.
namespace sk {

constexpr int BANDS = sh_count(3);

static __global__ void project_one(View<float> view, const float* in, float* out) {
  const GaussianIn<float> g = {{in[0], in[1], in[2]}, {in[3], in[4], in[5]}, {in[6], in[7], in[8], in[9]}, in[10]};
  const float key = depth_key(view.key, in[0], in[1], in[2]);
  if (!(key >= view.near_key)) return;
  const Splatted<float> s = project(view, g);
  if (!s.drawn) return;
  float inv, y[16], v_y[16];
  const Vec3<float> d = direction(view, g.mean, inv);
  sh_basis(3, d, y);
  float colour = 0.5f;
  for (int k = 0; k < BANDS; k++) colour += y[k] * in[11 + k];
  for (int k = 0; k < BANDS; k++) v_y[k] = in[27] * in[11 + k];
  const ColourVjp<float> c = direction_vjp(view, 3, d, inv, v_y);
  const GaussianVjp<float> v = project_vjp(view, g, in[28], in[29], in[30], in[31], in[32], in[33], in[34]);
  out[0] = s.x + s.y + s.a + s.b + s.c + s.logo + s.z + s.rx + s.ry + colour + key;
  out[1] = dot(v.mean + c.mean, v.log_scale) + v.quat.w + v.quat.x + v.quat.y + v.quat.z + v.logit + dot(v.t + c.t, v.r.r0 + c.r.r1)
           + v.fx + v.fy + v.cx + v.cy;
}

static __global__ void blend_one(Gaussian2D<float> g, float cut, float* out) {
  const float x = (float)threadIdx.x + 0.5f, y = (float)threadIdx.y + 0.5f;
  const Column<float> column = column_of(g, y_per_x_of(g), 0.5f - g.x, 15.5f - g.x);
  if (peak_in(g, column, row_of(g, 0.5f - g.y, 15.5f - g.y)) < cut) return;
  const AlphaAt<float> a = alpha_at(g, x - g.x, y - g.y, cut, 0.99f);
  const Step<float> step = blend_step(1.0f, a.alpha, 1e-4f);
  out[threadIdx.y * SK_TILE + threadIdx.x] = a.free && step.going ? exponent_vjp(step.weight, dimming(a.alpha), step.left) : 1;
}

static __global__ void train_one(float* p, const float* in, int copies) {
  const AdamStep<float> step = {0.9f, 0.999f, 0.1f, 0.001f, 1e-8f, 1e-8f, 10};
  adam<PLAIN>(p[0], in[0], p[1], p[2], 1e-3f, 1.0f, 1.0f, step);
  adam<OPACITY>(p[0], in[0], p[1], p[2], 1e-3f, 1.0f, 1.0f, step);
  adam<SCALE>(p[0], in[0], p[1], p[2], 1e-3f, 1.0f, 1.0f, step);
  const Vec3<float> moved = mcmc_noise<float>({in[0], in[1], in[2], in[3]}, {in[4], in[5], in[6]}, in[7], {in[8], in[9], in[10]}, 0.1f);
  p[3] += moved.x + moved.y + moved.z;
  double each, factor;
  relocation(sigmoid((double)in[7]), copies, each, factor);
  p[4] = (float)(each + factor);
  float mean = 0;
  for (int j = -SSIM_RADIUS; j <= SSIM_RADIUS; j++) mean += (float)ssim_window(j) * in[16 + j];
  const Ssim<float> s = ssim(mean, in[1], in[2], in[3]);
  p[5] = s.value + s.by_mean + s.by_square + s.by_product + exp(in[0]) + log2(in[1]);
}

// The launches make the compiler keep the kernels, for the host as for the device.
void every_header(const View<float>& view, const Gaussian2D<float>& g, const float* in, float* out, cudaStream_t stream) {
  project_one<<<1, 1, 0, stream>>>(view, in, out);
  blend_one<<<1, dim3(SK_TILE, SK_TILE), 0, stream>>>(g, -8.0f, out);
  train_one<<<1, 1, 0, stream>>>(out, in, 3);
}

}  // namespace sk
