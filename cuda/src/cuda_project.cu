// Projection on the card: a thread a Gaussian. The formulas are sk/project.h's.
#include "cuda_project.h"

namespace sk {

namespace {

constexpr uint32_t NOT_DRAWN = 0xffffffffu;

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
    uint32_t key = NOT_DRAWN;
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
        box = packed(span, tiles);
      }
    }
    a.keys[row] = key;
    if (a.ids) a.ids[row] = (int32_t)row;
    a.radii[row] = radius;
    a.tiles[row] = box;
  }
  if (row == 0 && !(a.K[0] > 0 && a.K[4] > 0 && a.K[1] == 0 && a.K[3] == 0)) bad++;   // a camera that cannot be drawn, said where all else is counted
  const int visible = __popc(__ballot_sync(FULL, drawn));
  tiles = sum_of_warp(tiles);
  bad = sum_of_warp(bad);
  if (threadIdx.x % 32 == 0) {
    if (a.drawn && row < a.n) a.drawn[row / 32] = visible;
    if (visible) atomicAdd(&sums[0], (unsigned long long)visible);
    if (tiles) atomicAdd(&sums[1], (unsigned long long)tiles);
    if (bad) atomicAdd(&sums[2], (unsigned long long)bad);
  }
  __syncthreads();
  if (threadIdx.x < 3 && sums[threadIdx.x]) atomicAdd((unsigned long long*)a.counts + threadIdx.x, sums[threadIdx.x]);
}

// The keys and rows of the drawn, side by side.
__global__ void __launch_bounds__(ROWS) pack_kernel(ProjectArgs a, const int64_t* starts, int64_t capacity, uint32_t* keys, int32_t* ids, int32_t* order) {
  const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  const uint32_t key = row < a.n ? a.keys[row] : NOT_DRAWN;
  const unsigned mask = __ballot_sync(FULL, key != NOT_DRAWN);
  if (key == NOT_DRAWN) return;
  const int64_t at = starts[row / 32] + __popc(mask & ((1u << threadIdx.x % 32) - 1));
  if (at < capacity) {
    keys[at] = key;
    ids[at] = (int32_t)row;
  } else {
    order[at] = (int32_t)row;
  }
}

}  // namespace

void project(const ProjectArgs& a, cudaStream_t stream) {
  decltype(&project_kernel<0>) kernels[] = {project_kernel<-1>, project_kernel<0>, project_kernel<1>, project_kernel<2>, project_kernel<3>};
  launch("project", kernels[a.sh_degree + 1], dim3(blocks_for(a.n)), dim3(ROWS), 0, stream, a);
}

void pack_drawn(const ProjectArgs& a, const int64_t* starts, int64_t capacity, uint32_t* keys, int32_t* ids, int32_t* order, cudaStream_t stream) {
  launch("pack", pack_kernel, dim3(blocks_for(a.n)), dim3(ROWS), 0, stream, a, starts, capacity, keys, ids, order);
}

}  // namespace sk
