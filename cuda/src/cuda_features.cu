// Feature channels: a block has one tile and CH channels, a warp 8 x 4 pixels, a lane one pixel with its CH sums in registers. The walk over
// the Gaussians (25 instructions a step) is repeated for each CH channels (CH multiply-adds a step and more).
#include <cuda_pipeline_primitives.h>

#include "cuda_tile.h"

namespace sk {

namespace {

typedef Sub<1> S;

struct Chunk {
  int first, count;        // channels
  __device__ Chunk(int channels, int chunk, int size) : first(chunk * size), count(channels - chunk * size < size ? channels - chunk * size : size) {}
};

// CH channels of the next AHEAD Gaussians that a warp kept, on their way into shared memory while others are worked on.
constexpr int AHEAD = 8;
template <int CH> struct Ring {
  float slots[AHEAD][CH];
};
template <int CH> struct FeatureStream {
  const BlendArgs& a;
  const Kept& kept;
  Ring<CH>& ring;
  const Chunk chunk;
  int count, lane;

  __device__ FeatureStream(const BlendArgs& a, const Kept& kept, Ring<CH>& ring, Chunk chunk, int count, int lane) : a(a), kept(kept), ring(ring), chunk(chunk), count(count), lane(lane) {
    for (int i = 0; i < AHEAD; i++) send(i);
  }
  __device__ void send(int i) {
    const int at = 4 * lane;
    if (i < count && at < CH) {
      const float* f = a.features + (int64_t)kept.rows[i] * a.channels + chunk.first + at;
      float* to = &ring.slots[i % AHEAD][at];
      if (a.channels % 4 == 0 && at < chunk.count)
        __pipeline_memcpy_async(to, f, 16);
      else
        for (int k = 0; k < 4; k++) to[k] = at + k < chunk.count ? f[k] : 0;
    }
    __pipeline_commit();
  }
  __device__ const float* get(int i) {     // of Gaussian i, in turn
    __pipeline_wait_prior(AHEAD - 1);
    __syncwarp();
    return ring.slots[i % AHEAD];
  }
  __device__ void done(int i) {
    __syncwarp();
    send(i + AHEAD);
  }
};

template <int CH> __global__ void __launch_bounds__(S::THREADS) features_kernel(BlendArgs a) {
  __shared__ Kept kept_by_warp[S::WARPS];
  __shared__ Ring<CH> rings[S::WARPS];
  const int c = blockIdx.z, warp = threadIdx.x / 32;
  Kept& kept = kept_by_warp[warp];
  const S sub(a, blockIdx.x);
  const Chunk chunk(a.channels, blockIdx.y, CH);
  Walk walk(a, c, blockIdx.x, sub.lane);
  Light light = {sub.inside[0] ? 1.0f : 0.0f};
  float sum[CH];
#pragma unroll
  for (int k = 0; k < CH; k++) sum[k] = 0;
  for (bool going = true; going && walk.more(); going = __any_sync(FULL, light.going())) {
    const int count = walk.next(a, sub, kept);
    FeatureStream<CH> stream(a, kept, rings[warp], chunk, count, sub.lane);
    for (int i = 0; i < count; i++) {
      const Gaussian2D<float> g = kept.records[i].gaussian();
      const float w = light.pass(alpha_at(g, sub.x - g.x, sub.y[0] - g.y, a.cut, a.alpha_max).alpha, a.transmittance_min);
      const float* f = stream.get(i);
      if (__any_sync(FULL, w > 0)) {
#pragma unroll
        for (int k = 0; k < CH; k += 4) {
          const float4 four = *(const float4*)(f + k);
          sum[k] += w * four.x, sum[k + 1] += w * four.y, sum[k + 2] += w * four.z, sum[k + 3] += w * four.w;
        }
      }
      stream.done(i);
    }
  }
  if (!sub.inside[0]) return;
  float* out = a.features_out + ((int64_t)a.width * a.height * c + sub.pixel[0]) * a.channels + chunk.first;
  const bool by_four = a.channels % 4 == 0;
#pragma unroll
  for (int k = 0; k < CH; k += 4) {
    if (by_four && k < chunk.count) {
      *(float4*)(out + k) = make_float4(sum[k], sum[k + 1], sum[k + 2], sum[k + 3]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (k + j < chunk.count) out[k + j] = sum[k + j];
    }
  }
}

// What goes back from pixels to Gaussians. GRADIENT: geometry's share of the chunk by v_splats (linear in the channels, so chunks add up) beside
// the features'; else the features' (uplift: the map's) alone, and the weights' sums. FIXED: as whole numbers, whose sum has no order.
constexpr int TOGETHER = 8;   // Gaussians whose sums over pixels are taken together

struct BackArgs {
  BlendVjpArgs v;
  const float* map;             // [C,H,W,channels]
  float *sums, *row_weights;    // [n,channels]; [n] or null
};

template <int CH> struct BackShared {               // of one warp
  Kept kept;
  Ring<CH> ring;
  float map[32][CH + 4];                            // its pixels; padded, so that 8 lanes read 4 numbers each of their own pixels at once
  float weights[32][TOGETHER];                      // of the Gaussians that wait for their sums
  int32_t waiting[TOGETHER];                        // their rows
};

// v_features has 2^34 to 2^35 steps up to the largest |v_features_out|: sums of up to 2^26 pixels of all cameras stay within WHOLE_MAX, a warp's within this.
constexpr float WARP_MAX = 0x1p40f;

// Adds the waiting Gaussians' sums over the warp's pixels of weight times map: lane l has channels l, l + 32 ...
template <int CH, bool FIXED> __device__ void flush(const BackArgs& b, BackShared<CH>& s, int lane, int count, Chunk chunk) {
  constexpr int V = CH / 32;
  __syncwarp();
  float sum[TOGETHER][V] = {};
#pragma unroll 4
  for (int p = 0; p < 32; p++) {
    float w[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; i += 4) *(float4*)&w[i] = *(const float4*)&s.weights[p][i];
#pragma unroll
    for (int k = 0; k < V; k++) {
      const float m = s.map[p][k * 32 + lane];
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) sum[i][k] += w[i] * m;
    }
  }
#pragma unroll
  for (int i = 0; i < TOGETHER; i++) {
    if (i >= count) continue;
    const int64_t at = (int64_t)s.waiting[i] * b.v.forward.channels + chunk.first;
#pragma unroll
    for (int k = 0; k < V; k++) {
      const int channel = k * 32 + lane;
      if (channel >= chunk.count) continue;
      if (FIXED)
        add_whole(b.v.features_sums + at + channel, sum[i][k] * b.v.features_scale[0], WARP_MAX);
      else
        atomicAdd(b.sums + at + channel, sum[i][k]);
    }
  }
  __syncwarp();
}

// The warp's pixels of a map [H,W,channels] into shared memory; zeros outside the picture and behind the last channel.
template <int CH> __device__ void share_pixels(const BlendArgs& a, const S& sub, const float* map, int count, float (&out)[32][CH + 4]) {
  for (int p = 0; p < 32; p++) {
    const int column = sub.left + p % 8, row = sub.top + p / 8;
    const bool inside = column < a.width && row < a.height;
    const float* from = map + ((int64_t)row * a.width + column) * a.channels;
#pragma unroll
    for (int k = 0; k < CH; k += 32) out[p][k + sub.lane] = inside && k + sub.lane < count ? from[k + sub.lane] : 0;
  }
  __syncwarp();
}

// A block has half a tile, for the shared memory of a whole one is more than any card but the largest gives a block.
constexpr int HALF_WARPS = S::WARPS / 2, HALF_THREADS = 32 * HALF_WARPS;
static_assert(HALF_WARPS * sizeof(BackShared<64>) <= 64 << 10, "what compute capability 7.5 gives a block");

template <int CH, bool GRADIENT, bool FIXED> __global__ void __launch_bounds__(HALF_THREADS) features_back_kernel(BackArgs b) {
  SK_DYNAMIC_SHARED(dynamic_shared);
  BackShared<CH>& s = ((BackShared<CH>*)dynamic_shared)[threadIdx.x / 32];
  const BlendArgs& a = b.v.forward;
  const int c = blockIdx.z, tile = blockIdx.x / 2, warp = threadIdx.x / 32 + blockIdx.x % 2 * HALF_WARPS;
  const S sub(a, tile, warp);
  const int lane = sub.lane;
  const Chunk chunk(a.channels, blockIdx.y, CH);
  const int64_t first_row = c * a.n, picture = (int64_t)a.width * a.height * c;
  Light light = {sub.inside[0] ? 1.0f : 0.0f};
  float behind = 0, v_out[GRADIENT ? CH : 1];
  share_pixels<CH>(a, sub, b.map + picture * a.channels + chunk.first, chunk.count, s.map);
  if constexpr (GRADIENT) {
#pragma unroll
    for (int k = 0; k < CH; k += 4) *(float4*)&v_out[k] = *(const float4*)&s.map[lane][k];
    __syncwarp();
    share_pixels<CH>(a, sub, a.features_out + picture * a.channels + chunk.first, chunk.count, s.map);
#pragma unroll
    for (int k = 0; k < CH; k++) behind += v_out[k] * s.map[lane][k];
    __syncwarp();
    share_pixels<CH>(a, sub, b.map + picture * a.channels + chunk.first, chunk.count, s.map);
  }
  const bool wants_sums = FIXED ? b.v.features_sums != nullptr : b.sums != nullptr;
  int waiting = 0;
  const TransposedSum<SUMS_GEOMETRY> transposed(lane);
  [[maybe_unused]] const int field = FIELD[transposed.index];
  Walk walk(a, c, tile, lane);
  for (bool going = true; going && walk.more(); going = __any_sync(FULL, light.going())) {
    const int count = walk.next(a, sub, s.kept);
    FeatureStream<CH> stream(a, s.kept, s.ring, chunk, GRADIENT ? count : 0, lane);
    for (int i = 0; i < count; i++) {
      const Gaussian2D<float> g = s.kept.records[i].gaussian();
      const float dx = sub.x - g.x, dy = sub.y[0] - g.y;
      const AlphaAt<float> e = alpha_at(g, dx, dy, a.cut, a.alpha_max);
      const float w = light.pass(e.alpha, a.transmittance_min);
      const bool some = __any_sync(FULL, w > 0);
      const float* f = GRADIENT ? stream.get(i) : nullptr;
      if (GRADIENT && some) {
        float dot[4] = {};
#pragma unroll
        for (int k = 0; k < CH; k += 4) {
          const float4 four = *(const float4*)(f + k);
          dot[0] += v_out[GRADIENT ? k : 0] * four.x, dot[1] += v_out[GRADIENT ? k + 1 : 0] * four.y;
          dot[2] += v_out[GRADIENT ? k + 2 : 0] * four.z, dot[3] += v_out[GRADIENT ? k + 3 : 0] * four.w;
        }
        const float weighted = w * ((dot[0] + dot[1]) + (dot[2] + dot[3]));
        behind -= weighted;
        const float h = e.free && w > 0 ? (float)LN2 * exponent_vjp(weighted, dimming(e.alpha), behind) : 0;
        const float hu = h * (g.a * dx + g.b * dy), hv = h * (g.c * dy), hx = h * dx;
        float m[SUMS_GEOMETRY] = {h, 2 * g.a * hu, 2 * (g.b * hu + g.c * hv), hx * dx, hx * dy, h * dy * dy};
        const float total = TransposedSum<SUMS_GEOMETRY>::of(m, lane);
        const int64_t row = first_row + s.kept.rows[i];
        if constexpr (FIXED) {
          if (transposed.first) add_share(b.v.sums + row * b.v.fields, b.v.exponents + row * EXPONENTS, transposed.index, total);
        } else if (transposed.first) {
          atomicAdd(b.v.v_splats + row * SK_SPLAT + field, total);
        }
      }
      if (GRADIENT) stream.done(i);
      if (!GRADIENT && b.row_weights && blockIdx.y == 0 && some) {
        const float total = sum_of_warp(w);
        if (lane == 0) atomicAdd(b.row_weights + s.kept.rows[i], total);
      }
      if (!some || !wants_sums) continue;
      s.weights[lane][waiting] = w;
      if (lane == 0) s.waiting[waiting] = s.kept.rows[i];
      if (++waiting == TOGETHER) {
        flush<CH, FIXED>(b, s, lane, TOGETHER, chunk);
        waiting = 0;
      }
    }
  }
  if (waiting) {
    for (int i = waiting; i < TOGETHER; i++) s.weights[lane][i] = 0;
    flush<CH, FIXED>(b, s, lane, waiting, chunk);
  }
}

template <bool GRADIENT, bool FIXED> void features_back(const BackArgs& b, cudaStream_t stream) {
  const BlendArgs& a = b.v.forward;
  const bool wide = a.channels > 32;
  const int size = wide ? 64 : 32;
  launch("features_back", wide ? features_back_kernel<64, GRADIENT, FIXED> : features_back_kernel<32, GRADIENT, FIXED>,
         dim3(2 * a.tiles_x * a.tiles_y, (a.channels + size - 1) / size, a.cameras), dim3(HALF_THREADS), HALF_WARPS * (wide ? sizeof(BackShared<64>) : sizeof(BackShared<32>)), stream, b);
}

__global__ void scale_kernel(float* scale) {
  const int exponent = (to_bits(scale[1]) >> 23) - 127;     // of the largest, rounded down
  const int power = 34 - exponent;
  scale[0] = from_bits(((power < 127 ? power : 127) + 127) << 23);
}
__global__ void __launch_bounds__(ROWS) unfix_kernel(const long long* fixed, const float* scale, int64_t count, float* out) {
  const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (i < count) out[i] = number_of(fixed[i]) / scale[0];
}

}  // namespace

void blend_features(const BlendArgs& a, cudaStream_t stream) {
  const int size = a.channels > 64 ? 128 : a.channels > 32 ? 64 : 32;
  launch("features", size == 128 ? features_kernel<128> : size == 64 ? features_kernel<64> : features_kernel<32>,
         dim3(a.tiles_x * a.tiles_y, (a.channels + size - 1) / size, a.cameras), dim3(S::THREADS), 0, stream, a);
}

void blend_features_vjp(const BlendVjpArgs& v, cudaStream_t stream) {
  const BackArgs b = {v, v.v_features_out, v.v_features, nullptr};
  if (!v.sums) return v.every_channel ? features_back<false, false>(b, stream) : features_back<true, false>(b, stream);
  if (!v.features_sums) return v.every_channel ? void() : features_back<true, true>(b, stream);
  const int64_t numbers = v.forward.n * v.forward.channels;
  check(cudaMemsetAsync(v.features_sums, 0, sizeof(long long) * numbers, stream), "memset");
  launch("scale", scale_kernel, dim3(1), dim3(1), 0, stream, v.features_scale);
  v.every_channel ? features_back<false, true>(b, stream) : features_back<true, true>(b, stream);
  launch("unfix", unfix_kernel, dim3(blocks_for(numbers)), dim3(ROWS), 0, stream, v.features_sums, v.features_scale, numbers, v.v_features);
}

void uplift(const BlendArgs& a, const float* map, float* sums, float* row_weights, cudaStream_t stream) {
  BackArgs b = {};
  b.v.forward = a;
  b.map = map;
  b.sums = sums;
  b.row_weights = row_weights;
  features_back<false, false>(b, stream);
}

}  // namespace sk
