// Projection and its gradient on the card: a thread a Gaussian. The formulas are sk/project.h's.
#include "cuda_kernels.h"

namespace sk {

namespace {

__device__ void share_view(View<float>& view, const ProjectArgs& a) {
  if (threadIdx.x == 0) view = make_view(a.world_to_cam, a.K, a.width, a.height, a.settings.values);
  __syncthreads();
}

__device__ GaussianIn<float> load_gaussian(const ProjectArgs& a, int64_t row) {
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

__device__ bool finite(float x) { return x - x == 0; }

template <int DEGREE> __global__ void __launch_bounds__(ROWS) project_kernel(ProjectArgs a) {
  __shared__ View<float> view;
  __shared__ unsigned long long sums[3];   // visible, pairs, not finite
  if (threadIdx.x < 3) sums[threadIdx.x] = 0;
  share_view(view, a);
  const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  int bad = 0, tiles = 0;
  bool drawn = false;
  if (row < a.n) {
    uint32_t key = 0xffffffffu;
    float radius = 0;
    int64_t box = 0;
    const bool in_range = !a.rows || (row >= a.rows[0] && row < a.rows[1]);
    const float* m = a.means + 3 * row;
    const float depth = in_range ? depth_key(view.key, m[0], m[1], m[2]) : 0;
    bad = !finite(depth);
    if (in_range && depth >= view.near_key && depth < 1e30f) {
      const GaussianIn<float> g = load_gaussian(a, row);
      const Splatted<float> s = project(view, g);
      const bool sound = finite(g.quat.w + g.quat.x + g.quat.y + g.quat.z) && finite(g.log_scale.x + g.log_scale.y + g.log_scale.z) && finite(g.logit);
      bad += !sound;
      drawn = s.drawn && sound;
      if (drawn) {
        const TileSpan span = {(int)s.x_first / SK_TILE, (int)s.x_last / SK_TILE + 1, (int)s.y_first / SK_TILE, (int)s.y_last / SK_TILE + 1};
        tiles = tiles_reached(ellipse_of(Gaussian2D<float>{s.x, s.y, s.a, s.b, s.c, s.logo}, view.cut), span, a.width, a.height);
        Vec3<float> c = {0, 0, 0};
        if constexpr (DEGREE >= 0) {
          float inv, y[16];
          sh_basis(DEGREE, direction(view, g.mean, inv), y);
          const float* sh = a.sh + row * a.sh_bands * 3;
          c = colour_of<DEGREE>(sh, a.sh_bands % 4 == 0, y);
          bad += !finite(c.x + c.y + c.z);
          c = {max(c.x, 0.0f), max(c.y, 0.0f), max(c.z, 0.0f)};
        }
        float4* out = (float4*)(a.splats + row * SK_SPLAT);
        out[0] = make_float4(s.x, s.y, s.a, s.b);
        out[1] = make_float4(s.c, s.logo, c.x, c.y);
        out[2] = make_float4(c.z, s.z, s.rx, s.ry);
        key = (uint32_t)to_bits(depth);
        radius = view.unbounded ? INFINITY : max(max(s.rx, s.ry), 1e-6f);
        box = packed(span);
      }
    }
    a.keys[row] = key;
    a.ids[row] = (int32_t)row;
    a.radii[row] = radius;
    a.tiles[row] = box;
  }
  const int visible = __popc(__ballot_sync(FULL, drawn));
  tiles = sum_of_warp(tiles);
  bad = sum_of_warp(bad);
  if (threadIdx.x % 32 == 0) {
    if (visible) atomicAdd(&sums[0], (unsigned long long)visible);
    if (tiles) atomicAdd(&sums[1], (unsigned long long)tiles);
    if (bad) atomicAdd(&sums[2], (unsigned long long)bad);
  }
  __syncthreads();
  if (threadIdx.x < 3 && sums[threadIdx.x]) atomicAdd((unsigned long long*)a.counts + threadIdx.x, sums[threadIdx.x]);
}

__device__ void put(float* p, float x, bool add) { *p = add ? *p + x : x; }

// POSE: also the sums that the camera's gradients are made of, 16 a block.
template <int DEGREE, bool POSE> __global__ void __launch_bounds__(VJP_ROWS) project_vjp_kernel(ProjectArgs a, ProjectGrads out, bool add) {
  __shared__ View<float> view;
  share_view(view, a);
  const int64_t row = (int64_t)blockIdx.x * VJP_ROWS + threadIdx.x;
  float pose[16] = {};
  const bool drawn = row < a.n && a.radii[row] > 0;
  constexpr int bands = DEGREE < 0 ? 0 : sh_count(DEGREE);
  const bool aligned = a.sh_bands % 4 == 0 && bands > 1;
  float* v_sh = out.sh && row < a.n ? out.sh + row * a.sh_bands * 3 : nullptr;
  if (drawn) {
    const Record v = load_record(a.v_splats, row);
    const GaussianIn<float> g = load_gaussian(a, row);
    GaussianVjp<float> o = project_vjp(view, g, v[SK_X], v[SK_Y], v[SK_A], v[SK_B], v[SK_C], v[SK_LOGO], v[SK_Z]);
    if constexpr (DEGREE >= 0) {   // the view direction pulls at means and pose, whether or not sh itself wants a gradient
      float inv, y[16], v_y[16];
      const Vec3<float> d = direction(view, g.mean, inv);
      sh_basis(DEGREE, d, y);
      const float* sh = a.sh + row * a.sh_bands * 3;
      const Vec3<float> c = colour_of<DEGREE>(sh, aligned, y);
      const Vec3<float> v_c = {c.x > 0 ? v[SK_R] : 0.0f, c.y > 0 ? v[SK_G] : 0.0f, c.z > 0 ? v[SK_BLUE] : 0.0f};
#pragma unroll
      for (int k = 0; k < bands; k += 4) {
        float in[12], made[12];
        load_sh<3 * bands>(sh, aligned, 3 * k, in);
#pragma unroll
        for (int j = 0; j < 4 && k + j < bands; j++) {
          v_y[k + j] = v_c.x * in[3 * j] + v_c.y * in[3 * j + 1] + v_c.z * in[3 * j + 2];
          made[3 * j] = y[k + j] * v_c.x, made[3 * j + 1] = y[k + j] * v_c.y, made[3 * j + 2] = y[k + j] * v_c.z;
        }
        if (!v_sh) continue;
#pragma unroll
        for (int i = 0; i < 12; i += 4) {
          if (3 * k + i >= 3 * bands) continue;
          if (aligned && !add) {
            *(float4*)(v_sh + 3 * k + i) = make_float4(made[i], made[i + 1], made[i + 2], made[i + 3]);
          } else {
#pragma unroll
            for (int j = 0; j < 4 && 3 * k + i + j < 3 * bands; j++) put(v_sh + 3 * k + i + j, made[i + j], add);
          }
        }
      }
      const ColourVjp<float> by_direction = direction_vjp(view, DEGREE, d, inv, v_y);
      o.mean = o.mean + by_direction.mean;
      o.t = o.t + by_direction.t;
      o.r = o.r + by_direction.r;
    }
    float *m = out.means + 3 * row, *s = out.log_scales + 3 * row, *q = out.quats + 4 * row;
    put(m, o.mean.x, add), put(m + 1, o.mean.y, add), put(m + 2, o.mean.z, add);
    put(s, o.log_scale.x, add), put(s + 1, o.log_scale.y, add), put(s + 2, o.log_scale.z, add);
    put(q, o.quat.w, add), put(q + 1, o.quat.x, add), put(q + 2, o.quat.y, add), put(q + 3, o.quat.z, add);
    put(out.logit_opacities + row, o.logit, add);
    if (POSE) {
      const float parts[16] = {o.r.r0.x, o.r.r0.y, o.r.r0.z, o.t.x, o.r.r1.x, o.r.r1.y, o.r.r1.z, o.t.y, o.r.r2.x, o.r.r2.y, o.r.r2.z, o.t.z, o.fx, o.fy, o.cx, o.cy};
      for (int i = 0; i < 16; i++) pose[i] = parts[i];
    }
  } else if (row < a.n && !add) {
    for (int i = 0; i < 3; i++) out.means[3 * row + i] = out.log_scales[3 * row + i] = 0;
    ((float4*)out.quats)[row] = make_float4(0, 0, 0, 0);
    out.logit_opacities[row] = 0;
  }
  if (v_sh && !add)   // bands above the degree, and rows that were not drawn
    for (int i = drawn ? 3 * bands : 0; i < 3 * a.sh_bands; i++) {
      if (a.sh_bands % 4 == 0 && i % 4 == 0)
        *(float4*)(v_sh + i) = make_float4(0, 0, 0, 0), i += 3;
      else
        v_sh[i] = 0;
    }
  if (POSE) {
    __shared__ float warps[VJP_ROWS / 32][16];
    const int lane = threadIdx.x % 32;
    const TransposedSum<16> sum(lane);
    const float total = TransposedSum<16>::of(pose, lane);
    if (sum.first) warps[threadIdx.x / 32][sum.index] = total;
    __syncthreads();
    if (threadIdx.x < 16) {
      double block = 0;
      for (int w = 0; w < VJP_ROWS / 32; w++) block += warps[w][threadIdx.x];
      out.pose[(int64_t)blockIdx.x * 16 + threadIdx.x] = block;
    }
  }
}

// One block: sums [blocks,16] in a fixed order, and lays them out as gradients of world_to_cam [4,4] and K [3,3].
__global__ void __launch_bounds__(ROWS) pose_kernel(const double* parts, int64_t blocks, float* v_world_to_cam, float* v_K) {
  __shared__ double sums[16][ROWS / 16];
  const int which = threadIdx.x % 16, slice = threadIdx.x / 16;
  double sum = 0;
  for (int64_t b = slice; b < blocks; b += ROWS / 16) sum += parts[b * 16 + which];
  sums[which][slice] = sum;
  __syncthreads();
  if (threadIdx.x >= 16) return;
  sum = 0;
  for (int i = 0; i < ROWS / 16; i++) sum += sums[threadIdx.x][i];
  const int i = threadIdx.x;
  if (v_world_to_cam && i < 12) v_world_to_cam[i] = (float)sum;
  if (v_world_to_cam && i >= 12) v_world_to_cam[i] = 0;
  if (!v_K) return;
  if (i >= 12) v_K[i == 12 ? 0 : i == 13 ? 4 : i == 14 ? 2 : 5] = (float)sum;
  if (i < 5) v_K[i == 0 ? 1 : i == 1 ? 3 : i + 4] = 0;
}

template <int DEGREE> void project_vjp_of(const ProjectArgs& a, const ProjectGrads& out, bool add, cudaStream_t stream) {
  launch("project_vjp", out.pose ? project_vjp_kernel<DEGREE, true> : project_vjp_kernel<DEGREE, false>, dim3(blocks_for(a.n, VJP_ROWS)), dim3(VJP_ROWS), 0, stream, a, out, add);
}

}  // namespace

void project(const ProjectArgs& a, cudaStream_t stream) {
  decltype(&project_kernel<0>) kernels[] = {project_kernel<-1>, project_kernel<0>, project_kernel<1>, project_kernel<2>, project_kernel<3>};
  launch("project", kernels[a.sh_degree + 1], dim3(blocks_for(a.n)), dim3(ROWS), 0, stream, a);
}

void project_vjp(const ProjectArgs& a, const ProjectGrads& out, bool add, float* v_world_to_cam, float* v_K, cudaStream_t stream) {
  decltype(&project_vjp_of<0>) of_degree[] = {project_vjp_of<-1>, project_vjp_of<0>, project_vjp_of<1>, project_vjp_of<2>, project_vjp_of<3>};
  of_degree[a.sh_degree + 1](a, out, add, stream);
  if (out.pose) launch("pose", pose_kernel, dim3(1), dim3(ROWS), 0, stream, out.pose, (int64_t)blocks_for(a.n, VJP_ROWS), v_world_to_cam, v_K);
}

}  // namespace sk
