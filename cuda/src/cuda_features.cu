// Feature channels: a block has one tile and CH channels, a warp 8 x 4 pixels, a lane one pixel with its CH sums in registers. The walk over
// the Gaussians (25 instructions a step) is repeated for each CH channels (CH multiply-adds a step and more).
#include "cuda_tile.h"

namespace sk {

namespace {

typedef Sub<1> S;
constexpr int SOME = 32;   // Gaussians of a batch: one for each lane

struct Chunk {
  int first, count;        // channels
  __device__ Chunk(int channels, int chunk, int size) : first(chunk * size), count(channels - chunk * size < size ? channels - chunk * size : size) {}
};

// Shared memory of a batch: records, rows, and CH channels of their features (or nothing).
template <int CH> struct Batch {
  Record records[SOME];
  int32_t rows[SOME];
  float features[SOME][CH];
  __device__ void load(const BlendArgs& a, const float* splats, const TileList& list, int64_t first, int n, Chunk chunk) {
    if ((int)threadIdx.x < n) {
      rows[threadIdx.x] = list.pairs[first + threadIdx.x];
      records[threadIdx.x] = load_record(splats, rows[threadIdx.x]);
    }
    if (!a.features) return;
    const bool by_four = a.channels % 4 == 0;
    for (int i = threadIdx.x; i < n * (CH / 4); i += S::THREADS) {
      const int k = i / (CH / 4), at = i % (CH / 4) * 4;
      const float* f = a.features + (int64_t)list.pairs[first + k] * a.channels + chunk.first + at;
      float4 v = make_float4(0, 0, 0, 0);
      if (by_four && at < chunk.count) {
        v = *(const float4*)f;
      } else {
        if (at < chunk.count) v.x = f[0];
        if (at + 1 < chunk.count) v.y = f[1];
        if (at + 2 < chunk.count) v.z = f[2];
        if (at + 3 < chunk.count) v.w = f[3];
      }
      *(float4*)&features[k][at] = v;
    }
  }
};

template <int CH> __global__ void __launch_bounds__(S::THREADS) features_kernel(BlendArgs a) {
  __shared__ Batch<CH> batch;
  if (a.needed && a.needed[0] > a.capacity) return;
  const int c = blockIdx.z;
  const S sub(a, blockIdx.x);
  const Chunk chunk(a.channels, blockIdx.y, CH);
  const TileList list(a, (int64_t)c * a.tiles_x * a.tiles_y + blockIdx.x);
  const float* splats = a.splats + c * a.n * SK_SPLAT;
  float left = 1, sum[CH];
#pragma unroll
  for (int k = 0; k < CH; k++) sum[k] = 0;
  bool going = sub.inside[0], warp_going = __any_sync(FULL, going);
  for (int64_t first = list.at; first < list.end; first += SOME) {
    if (!__syncthreads_or(warp_going)) break;
    const int n = list.end - first < SOME ? (int)(list.end - first) : SOME;
    batch.load(a, splats, list, first, n, chunk);
    __syncthreads();
    if (!warp_going) continue;
    for (unsigned left_over = sub.touching(a, batch.records, 0, n); left_over; left_over &= left_over - 1) {
      const int i = __ffs(left_over) - 1;
      const Gaussian2D<float> g = batch.records[i].gaussian();
      const AlphaAt<float> e = alpha_at(g, sub.x - g.x, sub.y[0] - g.y, a.cut, a.alpha_max);
      const Step<float> step = blend_step(left, e.alpha, a.transmittance_min);
      going = going && step.going;
      const float w = going ? step.weight : 0;
      left = going ? step.left : left;
      if (!__any_sync(FULL, w > 0)) continue;
#pragma unroll
      for (int k = 0; k < CH; k += 4) {
        const float4 f = *(const float4*)&batch.features[i][k];
        sum[k] += w * f.x, sum[k + 1] += w * f.y, sum[k + 2] += w * f.z, sum[k + 3] += w * f.w;
      }
    }
    warp_going = __any_sync(FULL, going);
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
// the features'; else the features' (uplift: the map's) alone, and the weights' sums. FIXED: as whole numbers of fixed_scale, whose sum has no order.
constexpr int TOGETHER = 8;   // Gaussians whose sums over pixels are taken together
struct BackArgs {
  BlendVjpArgs v;
  const float* map;             // [C,H,W,channels]
  float *sums, *row_weights;    // [n,channels]; [n] or null
  int32_t first_chunk;          // of the launch
};

constexpr int SUMS = 6;   // h, h u, h v, h dx^2, h dx dy, h dy^2 as in cuda_blend_vjp.cu
__device__ constexpr int FIELD[SUMS] = {SK_LOGO, SK_X, SK_Y, SK_A, SK_B, SK_C};

template <int CH> struct BackShared {
  Batch<CH> batch;
  float map[S::WARPS][32][CH + 4];                  // the warp's pixels; padded, so that 8 lanes read 4 numbers each of their own pixels at once
  float weights[S::WARPS][32][TOGETHER];            // of the Gaussians that wait for their sums
  int32_t waiting[S::WARPS][TOGETHER];              // their rows
  float kept[SOME][S::WARPS][SUMS];                 // FIXED: what each warp found, summed in the order of the warps
  uint8_t has[SOME][S::WARPS];
};

// Adds the waiting Gaussians' sums over the warp's pixels of weight times map: lane l has channels l, l + 32 ...
template <int CH, bool FIXED> __device__ void flush(const BackArgs& b, BackShared<CH>& s, int warp, int lane, int count, Chunk chunk) {
  constexpr int V = CH / 32;
  __syncwarp();
  float sum[TOGETHER][V] = {};
#pragma unroll 4
  for (int p = 0; p < 32; p++) {
    float w[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; i += 4) *(float4*)&w[i] = *(const float4*)&s.weights[warp][p][i];
#pragma unroll
    for (int k = 0; k < V; k++) {
      const float m = s.map[warp][p][k * 32 + lane];
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) sum[i][k] += w[i] * m;
    }
  }
#pragma unroll
  for (int i = 0; i < TOGETHER; i++) {
    if (i >= count) continue;
    const int64_t at = (int64_t)s.waiting[warp][i] * b.v.forward.channels + chunk.first;
#pragma unroll
    for (int k = 0; k < V; k++) {
      const int channel = k * 32 + lane;
      if (channel >= chunk.count) continue;
      if (FIXED)
        atomicAdd((unsigned long long*)b.v.fixed_features + at + channel, (unsigned long long)__float2ll_rn(sum[i][k] * b.v.fixed_scale[0]));
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

template <int CH, bool GRADIENT, bool FIXED> __global__ void __launch_bounds__(S::THREADS) features_back_kernel(BackArgs b) {
  SK_DYNAMIC_SHARED(dynamic_shared);
  BackShared<CH>& s = *(BackShared<CH>*)dynamic_shared;
  const BlendArgs& a = b.v.forward;
  const int c = blockIdx.z, warp = threadIdx.x / 32;
  const S sub(a, blockIdx.x);
  const int lane = sub.lane;
  const Chunk chunk(a.channels, b.first_chunk + blockIdx.y, CH);
  const TileList list(a, (int64_t)c * a.tiles_x * a.tiles_y + blockIdx.x);
  const int64_t first_row = c * a.n, picture = (int64_t)a.width * a.height * c;
  const float* splats = a.splats + first_row * SK_SPLAT;
  float left = 1, behind = 0, v_out[GRADIENT ? CH : 1];
  bool going = sub.inside[0];
  share_pixels<CH>(a, sub, b.map + picture * a.channels + chunk.first, chunk.count, s.map[warp]);
  if constexpr (GRADIENT) {
#pragma unroll
    for (int k = 0; k < CH; k += 4) *(float4*)&v_out[k] = *(const float4*)&s.map[warp][lane][k];
    __syncwarp();
    share_pixels<CH>(a, sub, a.features_out + picture * a.channels + chunk.first, chunk.count, s.map[warp]);
#pragma unroll
    for (int k = 0; k < CH; k++) behind += v_out[k] * s.map[warp][lane][k];
    __syncwarp();
    share_pixels<CH>(a, sub, b.map + picture * a.channels + chunk.first, chunk.count, s.map[warp]);
  }
  int waiting = 0;
  const TransposedSum<SUMS> transposed(lane);
  const int field = FIELD[transposed.index];
  bool warp_going = __any_sync(FULL, going);
  for (int64_t first = list.at; first < list.end; first += SOME) {
    if (!__syncthreads_or(warp_going)) break;
    const int n = list.end - first < SOME ? (int)(list.end - first) : SOME;
    s.batch.load(a, splats, list, first, n, chunk);
    if (FIXED) s.has[threadIdx.x / S::WARPS][threadIdx.x % S::WARPS] = 0;
    __syncthreads();
    for (unsigned left_over = warp_going ? sub.touching(a, s.batch.records, 0, n) : 0; left_over; left_over &= left_over - 1) {
      const int i = __ffs(left_over) - 1;
      const Gaussian2D<float> g = s.batch.records[i].gaussian();
      const float dx = sub.x - g.x, dy = sub.y[0] - g.y;
      const AlphaAt<float> e = alpha_at(g, dx, dy, a.cut, a.alpha_max);
      const Step<float> step = blend_step(left, e.alpha, a.transmittance_min);
      going = going && step.going;
      const float w = going ? step.weight : 0;
      left = going ? step.left : left;
      if (!__any_sync(FULL, w > 0)) continue;
      if constexpr (GRADIENT) {
        float dot[4] = {};
#pragma unroll
        for (int k = 0; k < CH; k += 4) {
          const float4 f = *(const float4*)&s.batch.features[i][k];
          dot[0] += v_out[k] * f.x, dot[1] += v_out[k + 1] * f.y, dot[2] += v_out[k + 2] * f.z, dot[3] += v_out[k + 3] * f.w;
        }
        const float weighted = w * ((dot[0] + dot[1]) + (dot[2] + dot[3]));
        behind -= weighted;
        const float h = e.free && going ? (float)LN2 * exponent_vjp(weighted, dimming(e.alpha), behind) : 0;
        const float hu = h * (g.a * dx + g.b * dy), hv = h * (g.c * dy), hx = h * dx;
        float m[SUMS] = {h, 2 * g.a * hu, 2 * (g.b * hu + g.c * hv), hx * dx, hx * dy, h * dy * dy};
        const float total = TransposedSum<SUMS>::of(m, lane);
        if constexpr (FIXED) {
          if (transposed.first) s.kept[i][warp][transposed.index] = total;
          if (lane == 0) s.has[i][warp] = 1;
        } else if (transposed.first) {
          atomicAdd(b.v.v_splats + (first_row + s.batch.rows[i]) * SK_SPLAT + field, total);
        }
      }
      if (!GRADIENT && b.row_weights && blockIdx.y == 0) {
        const float total = sum_of_warp(w);
        if (lane == 0) atomicAdd(b.row_weights + s.batch.rows[i], total);
      }
      if (!(FIXED ? (void*)b.v.fixed_features : (void*)b.sums)) continue;
      s.weights[warp][lane][waiting] = w;
      if (lane == 0) s.waiting[warp][waiting] = s.batch.rows[i];
      if (++waiting == TOGETHER) {
        flush<CH, FIXED>(b, s, warp, lane, TOGETHER, chunk);
        waiting = 0;
      }
    }
    warp_going = __any_sync(FULL, going);
    if constexpr (GRADIENT && FIXED) {   // the tile's block is the only one that writes its records, and launches take the chunks in turn
      __syncthreads();
      bool some = false;
      float sums[SUMS] = {};
      for (int w = 0; w < S::WARPS && (int)threadIdx.x < n; w++) {
        if (!s.has[threadIdx.x][w]) continue;
        some = true;
        for (int j = 0; j < SUMS; j++) sums[j] += s.kept[threadIdx.x][w][j];
      }
      const int64_t slot = some ? slot_at(b.v, first_row + s.batch.rows[threadIdx.x], blockIdx.x) : 0;
      if (some && slot < b.v.slots) {
        float* record = b.v.records + slot * RECORD;
        for (int j = 0; j < RECORD && !b.v.written[slot]; j++) record[j] = 0;
        for (int j = 0; j < SUMS; j++) record[FIELD[j]] += sums[j];
        b.v.written[slot] = 1;
      }
    }
  }
  if (waiting) {
    for (int i = waiting; i < TOGETHER; i++) s.weights[warp][lane][i] = 0;
    flush<CH, FIXED>(b, s, warp, lane, waiting, chunk);
  }
}

template <bool GRADIENT, bool FIXED> void features_back(BackArgs b, cudaStream_t stream) {
  const BlendArgs& a = b.v.forward;
  const bool wide = a.channels > 32;
  const int size = wide ? 64 : 32, chunks = (a.channels + size - 1) / size, at_once = FIXED ? 1 : chunks;
  for (b.first_chunk = 0; b.first_chunk < chunks; b.first_chunk += at_once)
    launch("features_back", wide ? features_back_kernel<64, GRADIENT, FIXED> : features_back_kernel<32, GRADIENT, FIXED>, dim3(a.tiles_x * a.tiles_y, at_once, a.cameras), dim3(S::THREADS),
           wide ? sizeof(BackShared<64>) : sizeof(BackShared<32>), stream, b);
}

// Whole numbers with 2^40 steps up to the largest |v_features_out|: sums of up to 2^22 pixels stay below 2^63.
__global__ void __launch_bounds__(ROWS) largest_kernel(const float* x, int64_t count, unsigned* largest) {
  unsigned most = 0;
  for (int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x; i < count; i += (int64_t)gridDim.x * ROWS) {
    const unsigned bits = (unsigned)to_bits(abs(x[i]));   // ordered like the numbers
    most = bits > most ? bits : most;
  }
  atomicMax(largest, most);
}
__global__ void scale_kernel(const unsigned* largest, float* scale) {
  const int exponent = (int)(largest[0] >> 23) - 127;     // of the largest, rounded down
  const int power = 39 - exponent;
  scale[0] = from_bits(((power < 127 ? power : 127) + 127) << 23);
}
__global__ void __launch_bounds__(ROWS) unfix_kernel(const long long* fixed, const float* scale, int64_t count, float* out) {
  const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (i < count) out[i] = (float)((double)fixed[i] / scale[0]);
}

}  // namespace

void blend_features(const BlendArgs& a, cudaStream_t stream) {
  const int size = a.channels > 64 ? 128 : a.channels > 32 ? 64 : 32;
  launch("features", size == 128 ? features_kernel<128> : size == 64 ? features_kernel<64> : features_kernel<32>,
         dim3(a.tiles_x * a.tiles_y, (a.channels + size - 1) / size, a.cameras), dim3(S::THREADS), 0, stream, a);
}

void blend_features_vjp(const BlendVjpArgs& v, cudaStream_t stream) {
  const BackArgs b = {v, v.v_features_out, v.v_features, nullptr, 0};
  if (!v.slots) return v.every_channel ? features_back<false, false>(b, stream) : features_back<true, false>(b, stream);
  if (!v.fixed_features) return v.every_channel ? void() : features_back<true, true>(b, stream);
  const BlendArgs& a = v.forward;
  const int64_t numbers = (int64_t)a.width * a.height * a.channels * a.cameras, rows = a.n * a.channels;
  check(cudaMemsetAsync(v.fixed_scale, 0, 2 * sizeof(float), stream), "memset");
  check(cudaMemsetAsync(v.fixed_features, 0, sizeof(long long) * rows, stream), "memset");
  launch("largest", largest_kernel, dim3(blocks_for(numbers) < 1024 ? blocks_for(numbers) : 1024), dim3(ROWS), 0, stream, v.v_features_out, numbers, (unsigned*)v.fixed_scale + 1);
  launch("scale", scale_kernel, dim3(1), dim3(1), 0, stream, (const unsigned*)v.fixed_scale + 1, v.fixed_scale);
  v.every_channel ? features_back<false, true>(b, stream) : features_back<true, true>(b, stream);
  launch("unfix", unfix_kernel, dim3(blocks_for(rows)), dim3(ROWS), 0, stream, v.fixed_features, v.fixed_scale, rows, v.v_features);
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
