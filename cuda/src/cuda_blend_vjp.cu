// The gradient of blending: walks the forward once more, front to back, and keeps per pixel what is still behind.
#include "cuda_tile.h"

namespace sk {

namespace {

#ifndef SK_BLEND_VJP_PX
#define SK_BLEND_VJP_PX 2
#endif
constexpr int PX = SK_BLEND_VJP_PX;

typedef Sub<PX> S;

__device__ float dot_of(const float* x, const float* y, int count) {
  float sum = 0;
  for (int k = 0; k < count; k++) sum += x[k] * y[k];
  return sum;
}

// A lane's pixels before the walk: the gradients that come in, and the loss-weighted sum of everything that is blended (each Gaussian's share is
// taken off as the walk passes it).
template <bool FULL_RECORD> struct Pixels {
  Light light[PX];
  float behind[PX], v_z[PX];
  Vec3<float> v_c[PX];

  __device__ Pixels(const BlendVjpArgs& v, const S& sub, int c, int tile) {
    const BlendArgs& a = v.forward;
    const int64_t picture = (int64_t)a.width * a.height * c;
    const int warp = threadIdx.x / 32;
    Vec3<float> v_background = {0, 0, 0};
#pragma unroll
    for (int p = 0; p < PX; p++) {
      light[p].left = sub.inside[p] ? 1 : 0;
      behind[p] = 0, v_z[p] = 0;
      v_c[p] = {0, 0, 0};
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
  }
  __device__ bool going() const {
    bool any = false;
#pragma unroll
    for (int p = 0; p < PX; p++) any |= light[p].going();
    return __any_sync(FULL, any);
  }
};

// FIXED: adds whole numbers, whose sum has no order; the full version spills on 7.5 where more than six blocks are wanted.
template <bool FULL_RECORD, bool FIXED> __global__ void __launch_bounds__(S::THREADS, FULL_RECORD && FIXED ? 6 : 0) blend_vjp_kernel(BlendVjpArgs v) {
  constexpr int N = FULL_RECORD ? SUMS_FULL : SUMS;
  __shared__ Kept kept_by_warp[S::WARPS];
  const BlendArgs& a = v.forward;
  const int c = blockIdx.y, tile = blockIdx.x, warp = threadIdx.x / 32;
  Kept& kept = kept_by_warp[warp];
  const S sub(a, tile);
  const int64_t first_row = c * a.n, picture = (int64_t)a.width * a.height * c;
  Pixels<FULL_RECORD> pixels(v, sub, c, tile);
  const TransposedSum<N> transposed(sub.lane);
  [[maybe_unused]] const int field = FIELD[transposed.index];
  Walk walk(a, c, tile, sub.lane);
  for (bool going = true; going && walk.more(); going = pixels.going()) {
    const int count = walk.next(a, sub, kept);
    for (int i = 0; i < count; i++) {
      const Record& r = kept.records[i];
      const Gaussian2D<float> g = r.gaussian();
      const float dx = sub.x - g.x;
      float m[N];
#pragma unroll
      for (int j = 0; j < N; j++) m[j] = 0;
      bool seen = false;
#pragma unroll
      for (int p = 0; p < PX; p++) {
        const Vec3<float> v_c = pixels.v_c[p];
        const float dy = sub.y[p] - g.y, ux = g.a * dx + g.b * dy, vy = g.c * dy;
        const AlphaAt<float> e = alpha_at(g, dx, dy, a.cut, a.alpha_max);
        const float w = pixels.light[p].pass(e.alpha, a.transmittance_min);
        seen |= w > 0;
        float dot = v_c.x * r[SK_R] + v_c.y * r[SK_G] + v_c.z * r[SK_BLUE];
        if (FULL_RECORD) dot += pixels.v_z[p] * r[SK_Z];
        if (FULL_RECORD && v.every_channel && w > 0)
          dot += dot_of(v.v_features_out + (picture + sub.pixel[p]) * a.channels, a.features + (int64_t)kept.rows[i] * a.channels, a.channels);
        const float weighted = w * dot;
        pixels.behind[p] -= weighted;
        const float h = e.free && w > 0 ? (float)LN2 * exponent_vjp(weighted, dimming(e.alpha), pixels.behind[p]) : 0;
        const float hx = h * dx, hy = h * dy, hu = h * ux, hv = h * vy;
        m[0] += h;
        m[1] += hu;
        m[2] += hv;
        m[3] += hx * dx;
        m[4] += hx * dy;
        m[5] += hy * dy;
        m[6] += w * v_c.x;
        m[7] += w * v_c.y;
        m[8] += w * v_c.z;
        if constexpr (FULL_RECORD) {
          m[9] += w * pixels.v_z[p];
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
      const int64_t row = first_row + kept.rows[i];
      if constexpr (FIXED) {
        if (transposed.first) add_share(v.sums + row * N, v.exponents + row * EXPONENTS, transposed.index, total);
      } else if (transposed.first) {
        if (field < SK_SPLAT)
          atomicAdd(v.v_splats + row * SK_SPLAT + field, total);
        else if (v.weight_sums)
          atomicAdd(v.weight_sums + row, total);
      }
    }
  }
}

// ---- the same for colour alone, with h's moments by the matrix units (compute capability 8.0 on)
// The sums of h times 1, x, y, x^2, x y, y^2 over a sub-tile's 64 pixels are a product of matrices, sixteen Gaussians by 64 pixels by six monomials. Counted
// from the sub-tile's middle the monomials are exact in tf32, and h is two tf32 numbers, so only h's last two bits are lost. 160 instructions a step become 110.
constexpr int SIXTEEN = 16, SIDE = 8, PIXELS = SIDE * SIDE;
struct alignas(16) Shares {                   // of one Gaussian, and where they go: in the place of its h
  float share[SUMS];
  int64_t first;                              // where the Gaussian's sums start; a pointer read from memory might be to shared memory, whose atomics differ
  alignas(16) uint8_t exponents[EXPONENTS];
};
struct Moments {                              // of one warp; rows are Gaussians
  float h[SIXTEEN][PIXELS + 4];               // padded: the four pixels that eight rows read at once lie in 32 banks
  float sums[SIXTEEN][8], colour[SIXTEEN][4];
};

__device__ void add4(float* p, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  atomicAdd((float4*)p, make_float4(x, y, z, w));
#else
  atomicAdd(p, x), atomicAdd(p + 1, y), atomicAdd(p + 2, z), atomicAdd(p + 3, w);
#endif
}

// Adds what `count` Gaussians have left in m to their records; lane l < count has number `mine` of those kept.
template <bool FIXED> __device__ void add_moments(const BlendVjpArgs& v, Moments& m, const Kept& kept, int64_t first_row, int count, int mine, int lane, float middle_x, float middle_y) {
  __syncwarp();
  // This lane's monomial, as p + y (q + r y) with y the row of pixels, at the two columns that it holds.
  int n = lane / 4;
  const float x0 = (float)(lane % 4) - 3.5f, x1 = x0 + 4;
  const float p0 = n == 0 ? 1 : n == 1 ? x0 : n == 3 ? x0 * x0 : 0, p1 = n == 0 ? 1 : n == 1 ? x1 : n == 3 ? x1 * x1 : 0;
  const float q0 = n == 2 ? 1 : n == 4 ? x0 : 0, q1 = n == 2 ? 1 : n == 4 ? x1 : 0, r = n == 5 ? 1 : 0;
  float sums[4] = {};
#pragma unroll
  for (int row = 0; row < SIDE; row++) {
    const float y = (float)row - 3.5f, b[2] = {p0 + y * (q0 + r * y), p1 + y * (q1 + r * y)};
    const float *h = &m.h[lane / 4][row * SIDE + lane % 4], *below = h + 8 * (PIXELS + 4);
    const float a[4] = {h[0], below[0], h[4], below[4]}, high[4] = {kept_by_tf32(a[0]), kept_by_tf32(a[1]), kept_by_tf32(a[2]), kept_by_tf32(a[3])};
    const float low[4] = {a[0] - high[0], a[1] - high[1], a[2] - high[2], a[3] - high[3]};
    multiply_add(sums, high, b);
    multiply_add(sums, low, b);
  }
  *(float2*)&m.sums[lane / 4][2 * (lane % 4)] = {sums[0], sums[1]};
  *(float2*)&m.sums[lane / 4 + 8][2 * (lane % 4)] = {sums[2], sums[3]};
  __syncwarp();
  if (lane < count) {
    const float* s = m.sums[lane];
    const float m1 = s[0], mx = s[1], my = s[2];
    const Gaussian2D<float> g = kept.records[mine].gaussian();
    const float x = middle_x - g.x, y = middle_y - g.y;   // from the Gaussian to the sub-tile's middle
    const float dx = mx + x * m1, dy = my + y * m1;
    const float xx = s[3] + x * (mx + dx), xy = s[4] + x * my + y * dx, yy = s[5] + y * (my + dy);
    const float hu = g.a * dx + g.b * dy, hv = g.c * dy;
    const float* colour = m.colour[lane];
    if constexpr (FIXED) {
      const float share[SUMS] = {m1, 2 * g.a * hu, 2 * (g.b * hu + g.c * hv), xx, xy, yy, colour[0], colour[1], colour[2]};
      Shares& to = *(Shares*)m.h[lane];
#pragma unroll
      for (int j = 0; j < SUMS; j++) to.share[j] = share[j];
      to.first = (first_row + kept.rows[mine]) * SUMS;
      *(uint4*)to.exponents = ((const uint4*)v.exponents)[first_row + kept.rows[mine]];
    } else {
      float* record = v.v_splats + (first_row + kept.rows[mine]) * SK_SPLAT;
      add4(record, 2 * g.a * hu, 2 * (g.b * hu + g.c * hv), xx, xy);
      add4(record + SK_C, yy, m1, colour[0], colour[1]);
      atomicAdd(record + SK_BLUE, colour[2]);
      static_assert(SK_C == 4 && SK_LOGO == 5 && SK_R == 6 && SK_G == 7, "four numbers at once");
    }
  }
  if constexpr (FIXED) {   // sums that stand side by side are added by lanes that do: whole numbers have no vectors
    __syncwarp();
    constexpr int AT_ONCE = 32 / SUMS;
    const int j = lane % SUMS;
#pragma unroll 1
    for (int i = lane < AT_ONCE * SUMS ? lane / SUMS : count; i < count; i += AT_ONCE) {
      const Shares& s = *(const Shares*)m.h[i];
      add_share(v.sums + s.first, s.exponents, j, s.share[j]);
    }
  }
  __syncwarp();
}

template <bool FIXED> __global__ void __launch_bounds__(S::THREADS) blend_vjp_moments_kernel(BlendVjpArgs v) {
  static_assert(PX == 2, "sub-tiles of 8 x 8 pixels");
  __shared__ Kept kept_by_warp[S::WARPS];
  alignas(16) __shared__ Moments moments_by_warp[S::WARPS];
  const BlendArgs& a = v.forward;
  const int c = blockIdx.y, tile = blockIdx.x, warp = threadIdx.x / 32;
  Kept& kept = kept_by_warp[warp];
  Moments& m = moments_by_warp[warp];
  const S sub(a, tile);
  const int64_t first_row = c * a.n;
  const float middle_x = from_centre<float>(sub.left, a.width) + 3.5f, middle_y = from_centre<float>(sub.top, a.height) + 3.5f;
  Pixels<false> pixels(v, sub, c, tile);
  const TransposedSum<3> transposed(sub.lane);
  Walk walk(a, c, tile, sub.lane);
  for (bool going = true; going && walk.more(); going = pixels.going()) {
    const int count = walk.next(a, sub, kept);
    int filled = 0, mine = 0;
    for (int i = 0; i < count; i++) {
      const Record& r = kept.records[i];
      const Gaussian2D<float> g = r.gaussian();
      const float dx = sub.x - g.x;
      float h[PX], colour[3] = {};
      bool seen = false;
#pragma unroll
      for (int p = 0; p < PX; p++) {
        const Vec3<float> v_c = pixels.v_c[p];
        const AlphaAt<float> e = alpha_at(g, dx, sub.y[p] - g.y, a.cut, a.alpha_max);
        const float w = pixels.light[p].pass(e.alpha, a.transmittance_min);
        seen |= w > 0;
        const float weighted = w * (v_c.x * r[SK_R] + v_c.y * r[SK_G] + v_c.z * r[SK_BLUE]);
        pixels.behind[p] -= weighted;
        h[p] = e.free && w > 0 ? (float)LN2 * exponent_vjp(weighted, dimming(e.alpha), pixels.behind[p]) : 0;
        colour[0] += w * v_c.x, colour[1] += w * v_c.y, colour[2] += w * v_c.z;
      }
      if (!__any_sync(FULL, seen)) continue;
#pragma unroll
      for (int p = 0; p < PX; p++) m.h[filled][sub.lane + 32 * p] = h[p];
      const float total = TransposedSum<3>::of(colour, sub.lane);
      if (transposed.first) m.colour[filled][transposed.index] = total;
      if (sub.lane == filled) mine = i;
      if (++filled == SIXTEEN) {
        add_moments<FIXED>(v, m, kept, first_row, filled, mine, sub.lane, middle_x, middle_y);
        filled = 0;
      }
    }
    if (filled) add_moments<FIXED>(v, m, kept, first_row, filled, mine, sub.lane, middle_x, middle_y);
  }
}

// Of the code, not of the card: code for 7.5 may have been compiled for a later card, without the products.
bool has_matrix_units() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, (const void*)blend_vjp_moments_kernel<false>), "blend_vjp");
  return attributes.ptxVersion >= 80;
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

void blend_vjp(const BlendVjpArgs& v, cudaStream_t stream) {
  const BlendArgs& a = v.forward;
  const bool full = v.fields == SUMS_FULL, fixed = v.sums != nullptr;
  auto* kernel = full ? fixed ? blend_vjp_kernel<true, true> : blend_vjp_kernel<true, false>
               : has_matrix_units() ? fixed ? blend_vjp_moments_kernel<true> : blend_vjp_moments_kernel<false>
                                    : fixed ? blend_vjp_kernel<false, true> : blend_vjp_kernel<false, false>;
  launch("blend_vjp", kernel, dim3(a.tiles_x * a.tiles_y, a.cameras), dim3(Sub<PX>::THREADS), 0, stream, v);
  if (v.v_background) launch("background", background_kernel, dim3(a.cameras), dim3(ROWS), 0, stream, v.tile_background, (int64_t)a.tiles_x * a.tiles_y, v.v_background);
}

}  // namespace sk
