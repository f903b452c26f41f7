// The gradient of projection on the card, written down or taken at once as a step of Adam.
#include "cuda_project.h"
#include "sk/adam.h"

namespace sk {

namespace {

// A row's gradients stand in shared memory until its whole warp is done: what a warp's rows are in memory is one piece, which it then reads and writes as
// such. Rows of 192 bytes written by a lane each kept the second-level cache busy with halves of its sectors.
__device__ constexpr int PLACES[GROUPS] = {48, 51, 55, 58, 0};   // of the groups in a row
constexpr int STAGED = 60;   // numbers of a row; eight lanes that write four numbers each do not meet in a bank

struct Staged {              // of one warp
  float rows[32][STAGED];
  bool drawn[32];
  int32_t steps[32];         // that the rows have taken; set by TakeStep alone
};

template <int V> struct alignas(4 * V) Numbers {
  float x[V];
};

struct Write {
  ProjectGrads out;
  static constexpr bool stages_sh = true;
  __device__ void begin(Staged&, int64_t, int64_t, int) const {}
  __device__ void row(float*, const ProjectArgs&, int64_t) const {}
  template <int GROUP_, int V> __device__ void piece(const Staged& s, int64_t first, int columns, int rows, int lane) const {
    float* to = out.groups[GROUP_];
    if (!to) return;
    to += first * columns;
    for (int i = lane * V; i < rows * columns; i += 32 * V) {
      const float* from = &s.rows[i / columns][PLACES[GROUP_] + i % columns];
      if (out.add)
        for (int k = 0; k < V; k++) to[i + k] += from[k];
      else
        *(Numbers<V>*)(to + i) = *(const Numbers<V>*)from;
    }
  }
};

// Steps of all groups but sh, whose gradient is a product of the basis and the colour's gradient: the direction and that stay in the row's gradient record,
// and sh_step_kernel, which is small enough to keep the memory busy, works it out again.
struct TakeStep {
  ProjectStep s;
  static constexpr bool stages_sh = false;
  __device__ void begin(Staged& staged, int64_t row, int64_t n, int lane) const {
    if (s.row_steps && row < n) staged.steps[lane] = s.row_steps[row];
  }
  // Pulls beside the photometric gradient.
  __device__ void row(float* staged, const ProjectArgs& a, int64_t row) const {
    if (s.opacity_pull != 0) staged[PLACES[LOGITS]] += s.opacity_pull * slope<OPACITY>(a.logit_opacities[row]);
    for (int k = 0; k < 3 && s.scale_pull != 0; k++) staged[PLACES[LOG_SCALES] + k] += s.scale_pull * slope<SCALE>(a.log_scales[3 * row + k]);
  }
  template <int GROUP_, int V> __device__ void piece(const Staged& staged, int64_t first, int columns, int rows, int lane) const {
    if (!s.m[GROUP_]) return;
    constexpr int attribute = GROUP_ == LOGITS ? OPACITY : GROUP_ == LOG_SCALES ? SCALE : PLAIN, before[GROUPS] = {0, 3, 7, 10, 11};
    const double decay = GROUP_ == LOGITS ? s.opacity_decay : GROUP_ == LOG_SCALES ? s.scale_decay : 0;
    const AdamStep<float> step = {(float)s.beta1, (float)s.beta2, (float)(1 - s.beta1), (float)(1 - s.beta2), (float)s.epsilon, (float)decay, (float)s.decay_max};
    const float* rates = s.learning_rates + before[GROUP_];
    float *params = s.params[GROUP_] + first * columns, *m = s.m[GROUP_] + first * columns, *v = s.v[GROUP_] + first * columns;
    // All reads of a few rounds before the first write: the compiler may not move them past it.
    constexpr int ROUNDS = V == 4 ? 2 : 3;
    for (int base = lane * V; base < rows * columns; base += 32 * V * ROUNDS) {
      Numbers<V> x[ROUNDS], mi[ROUNDS], vi[ROUNDS];
      float one[ROUNDS], two[ROUNDS];
      bool takes[ROUNDS];
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        const int i = base + 32 * V * r, row = i / columns;
        takes[r] = i < rows * columns && !(s.sparse && !staged.drawn[row]);
        if (!takes[r]) continue;
        x[r] = *(const Numbers<V>*)(params + i), mi[r] = *(const Numbers<V>*)(m + i), vi[r] = *(const Numbers<V>*)(v + i);
        const float* own = s.row_steps ? s.corrections + 2 * staged.steps[row] : nullptr;
        one[r] = own ? own[0] : (float)s.correct1, two[r] = own ? own[1] : (float)s.correct2;
      }
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        if (!takes[r]) continue;
        const int i = base + 32 * V * r, row = i / columns, column = i % columns;
        const Numbers<V> g = *(const Numbers<V>*)&staged.rows[row][PLACES[GROUP_] + column];
#pragma unroll
        for (int k = 0; k < V; k++) {
          if (attribute != PLAIN && decay != 0) adam<attribute>(x[r].x[k], g.x[k], mi[r].x[k], vi[r].x[k], rates[column + k], one[r], two[r], step);
          else adam<PLAIN>(x[r].x[k], g.x[k], mi[r].x[k], vi[r].x[k], rates[column + k], one[r], two[r], step);
        }
        *(Numbers<V>*)(params + i) = x[r];
        *(Numbers<V>*)(m + i) = mi[r];
        *(Numbers<V>*)(v + i) = vi[r];
      }
    }
  }
};

// POSE: also the sums that the camera's gradients are made of, 16 a block.
template <int DEGREE, bool POSE, class Use> __global__ void __launch_bounds__(VJP_ROWS, POSE ? 3 : 4) project_vjp_kernel(ProjectArgs a, Use use, double* pose_sums) {
  __shared__ View<float> view;
  alignas(16) __shared__ Staged staged_by_warp[VJP_ROWS / 32];
  share_view(view, a);
  const int64_t row = (int64_t)blockIdx.x * VJP_ROWS + threadIdx.x;
  const int lane = threadIdx.x % 32;
  Staged& staged = staged_by_warp[threadIdx.x / 32];
  float* mine = staged.rows[lane];
  float pose[16] = {};
  constexpr int bands = DEGREE < 0 ? 0 : sh_count(DEGREE);
  for (int i = 0; i < STAGED; i += 4) *(float4*)(mine + i) = make_float4(0, 0, 0, 0);
  const bool drawn = row < a.n && a.radii[row] > 0;
  staged.drawn[lane] = drawn;
  use.begin(staged, row, a.n, lane);
  if (drawn) {
    const Record v = load_record(a.v_splats, row);
    const GaussianIn<float> g = load_gaussian(a, row);
    GaussianVjp<float> o = project_vjp(view, g, v[SK_X], v[SK_Y], v[SK_A], v[SK_B], v[SK_C], v[SK_LOGO], v[SK_Z]);
    if constexpr (DEGREE >= 0) {   // the view direction pulls at means and pose, whether or not sh itself wants a gradient
      float inv, y[16], v_y[16];
      const Vec3<float> d = direction(view, g.mean, inv);
      sh_basis(DEGREE, d, y);
      const float* sh = a.sh + row * a.sh_bands * 3;
      const bool aligned = a.sh_bands % 4 == 0 && bands > 1;
      const Vec3<float> c = colour_of<DEGREE>(sh, aligned, y);
      const Vec3<float> v_c = {c.x > 0 ? v[SK_R] : 0.0f, c.y > 0 ? v[SK_G] : 0.0f, c.z > 0 ? v[SK_BLUE] : 0.0f};
#pragma unroll
      for (int k = 0; k < bands; k += 4) {
        float in[12], made[12] = {};
        load_sh<3 * bands>(sh, aligned, 3 * k, in);
#pragma unroll
        for (int j = 0; j < 4 && k + j < bands; j++) {
          v_y[k + j] = v_c.x * in[3 * j] + v_c.y * in[3 * j + 1] + v_c.z * in[3 * j + 2];
          made[3 * j] = y[k + j] * v_c.x, made[3 * j + 1] = y[k + j] * v_c.y, made[3 * j + 2] = y[k + j] * v_c.z;
        }
#pragma unroll
        for (int i = 0; i < 12 && Use::stages_sh; i += 4) *(float4*)(mine + 3 * k + i) = make_float4(made[i], made[i + 1], made[i + 2], made[i + 3]);
      }
      if (!Use::stages_sh) {
        float* record = a.v_splats + row * SK_SPLAT;
        record[SK_X] = d.x, record[SK_Y] = d.y, record[SK_A] = d.z;
        record[SK_R] = v_c.x, record[SK_G] = v_c.y, record[SK_BLUE] = v_c.z;
      }
      const ColourVjp<float> by_direction = direction_vjp(view, DEGREE, d, inv, v_y);
      o.mean = o.mean + by_direction.mean;
      o.t = o.t + by_direction.t;
      o.r = o.r + by_direction.r;
    }
    float *means = mine + PLACES[MEANS], *quats = mine + PLACES[QUATS], *scales = mine + PLACES[LOG_SCALES];
    means[0] = o.mean.x, means[1] = o.mean.y, means[2] = o.mean.z;
    quats[0] = o.quat.w, quats[1] = o.quat.x, quats[2] = o.quat.y, quats[3] = o.quat.z;
    scales[0] = o.log_scale.x, scales[1] = o.log_scale.y, scales[2] = o.log_scale.z;
    mine[PLACES[LOGITS]] = o.logit;
    if (POSE) {
      const float parts[16] = {o.r.r0.x, o.r.r0.y, o.r.r0.z, o.t.x, o.r.r1.x, o.r.r1.y, o.r.r1.z, o.t.y, o.r.r2.x, o.r.r2.y, o.r.r2.z, o.t.z, o.fx, o.fy, o.cx, o.cy};
      for (int i = 0; i < 16; i++) pose[i] = parts[i];
    }
  }
  if (row < a.n) use.row(mine, a, row);
  __syncwarp();
  const int64_t first = row - lane, left = a.n - first;
  const int rows = left < 0 ? 0 : left < 32 ? (int)left : 32, numbers = a.sh_bands * 3;
  if (rows > 0) {
    use.template piece<MEANS, 1>(staged, first, 3, rows, lane);
    use.template piece<QUATS, 1>(staged, first, 4, rows, lane);
    use.template piece<LOG_SCALES, 1>(staged, first, 3, rows, lane);
    use.template piece<LOGITS, 1>(staged, first, 1, rows, lane);
    if (!Use::stages_sh) {}
    else if (numbers == 48) use.template piece<SH, 4>(staged, first, 48, rows, lane);
    else use.template piece<SH, 1>(staged, first, numbers, rows, lane);
  }
  if (POSE) {
    __shared__ float warps[VJP_ROWS / 32][16];
    const TransposedSum<16> sum(lane);
    const float total = TransposedSum<16>::of(pose, lane);
    if (sum.first) warps[threadIdx.x / 32][sum.index] = total;
    __syncthreads();
    if (threadIdx.x < 16) {
      double block = 0;
      for (int w = 0; w < VJP_ROWS / 32; w++) block += warps[w][threadIdx.x];
      pose_sums[(int64_t)blockIdx.x * 16 + threadIdx.x] = block;
    }
  }
}

template <int DEGREE> __global__ void __launch_bounds__(VJP_ROWS, 7) sh_step_kernel(ProjectArgs a, TakeStep use) {
  alignas(16) __shared__ Staged staged_by_warp[VJP_ROWS / 32];
  const int64_t row = (int64_t)blockIdx.x * VJP_ROWS + threadIdx.x, lane = threadIdx.x % 32, first = row - lane, left = a.n - first;
  Staged& staged = staged_by_warp[threadIdx.x / 32];
  float* mine = staged.rows[lane];
  const bool drawn = row < a.n && a.radii[row] > 0;
  staged.drawn[lane] = drawn;
  use.begin(staged, row, a.n, lane);
  for (int i = 0; i < STAGED; i += 4) *(float4*)(mine + i) = make_float4(0, 0, 0, 0);
  if (drawn) {
    const Record v = load_record(a.v_splats, row);
    float y[16];
    sh_basis(DEGREE, Vec3<float>{v[SK_X], v[SK_Y], v[SK_A]}, y);
#pragma unroll
    for (int k = 0; k < sh_count(DEGREE); k++) mine[3 * k] = y[k] * v[SK_R], mine[3 * k + 1] = y[k] * v[SK_G], mine[3 * k + 2] = y[k] * v[SK_BLUE];
  }
  __syncwarp();
  const int rows = left < 0 ? 0 : left < 32 ? (int)left : 32, numbers = a.sh_bands * 3;
  if (numbers == 48) use.template piece<SH, 4>(staged, first, 48, rows, (int)lane);
  else use.template piece<SH, 1>(staged, first, numbers, rows, (int)lane);
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

template <bool POSE, class Use> void project_vjp_by(const ProjectArgs& a, const Use& use, double* pose, cudaStream_t stream) {
  decltype(&project_vjp_kernel<0, POSE, Use>) kernels[] = {project_vjp_kernel<-1, POSE, Use>, project_vjp_kernel<0, POSE, Use>, project_vjp_kernel<1, POSE, Use>,
                                                           project_vjp_kernel<2, POSE, Use>, project_vjp_kernel<3, POSE, Use>};
  launch("project_vjp", kernels[a.sh_degree + 1], dim3(blocks_for(a.n, VJP_ROWS)), dim3(VJP_ROWS), 0, stream, a, use, pose);
}

}  // namespace

void project_vjp(const ProjectArgs& a, const ProjectGrads& out, float* v_world_to_cam, float* v_K, cudaStream_t stream) {
  if (!out.pose) return project_vjp_by<false>(a, Write{out}, nullptr, stream);
  project_vjp_by<true>(a, Write{out}, out.pose, stream);
  launch("pose", pose_kernel, dim3(1), dim3(ROWS), 0, stream, out.pose, (int64_t)blocks_for(a.n, VJP_ROWS), v_world_to_cam, v_K);
}

void project_vjp_step(const ProjectArgs& a, const ProjectStep& step, cudaStream_t stream) {
  project_vjp_by<false>(a, TakeStep{step}, nullptr, stream);
  if (!step.m[SH]) return;
  decltype(&sh_step_kernel<0>) kernels[] = {sh_step_kernel<0>, sh_step_kernel<1>, sh_step_kernel<2>, sh_step_kernel<3>};
  launch("sh_step", kernels[a.sh_degree < 0 ? 0 : a.sh_degree], dim3(blocks_for(a.n, VJP_ROWS)), dim3(VJP_ROWS), 0, stream, a, TakeStep{step});
}

}  // namespace sk
