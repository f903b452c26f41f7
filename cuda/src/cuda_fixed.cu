// The deterministic backward's sums as whole numbers, which come out the same in whatever order they are added: how large a row's may become, hence by
// which power of two each is scaled, before; what they are as floats, after.
#include "cuda_tile.h"

namespace sk {

namespace {

// The smallest e, -126 at least, with |x| < 2^e.
__device__ int exponent_above(float x) { return (int)((unsigned)to_bits(abs(x)) >> 23) - 126; }

// What is not finite is passed over: it makes the rows that it reaches NaN (add_whole), and no others.
__device__ void keep_larger(float& most, float x) {
  if (x > most && x < INFINITY) most = x;
}
__device__ void keep_larger(Incoming& most, const Incoming& x) {
  keep_larger(most.color, x.color), keep_larger(most.behind, x.behind), keep_larger(most.depth, x.depth);
}
__device__ float largest_of_warp(float x) {
  for (int bit = 16; bit; bit >>= 1) x = max(x, __shfl_xor_sync(FULL, x, bit));
  return x;
}
__device__ void raise_to(float& most, float x) { atomicMax((unsigned*)&most, (unsigned)to_bits(x)); }   // for x >= 0, whose bits are ordered like the numbers
__device__ void raise_to(Incoming& most, const Incoming& x) { raise_to(most.color, x.color), raise_to(most.behind, x.behind), raise_to(most.depth, x.depth); }

__global__ void __launch_bounds__(ROWS) largest_kernel(const float* x, int64_t count, float* largest) {
  float most = 0;
  for (int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x; i < count; i += (int64_t)gridDim.x * ROWS) keep_larger(most, abs(x[i]));
  most = largest_of_warp(most);
  if (threadIdx.x % 32 == 0) raise_to(*largest, most);
}

// A warp a tile: the largest that comes in at its pixels. Behind the tiles' stand the cameras', which must be 0 before.
constexpr int TILES_OF_BLOCK = ROWS / 32;
__global__ void __launch_bounds__(ROWS) incoming_kernel(BlendVjpArgs v) {
  __shared__ Incoming of_block;
  const BlendArgs& a = v.forward;
  const int tiles = a.tiles_x * a.tiles_y, c = blockIdx.y, tile = blockIdx.x * TILES_OF_BLOCK + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int left = tile % a.tiles_x * SK_TILE, top = tile / a.tiles_x * SK_TILE;
  if (threadIdx.x == 0) of_block = {};
  __syncthreads();
  Incoming most = {};
  for (int i = lane; i < SK_TILE * SK_TILE; i += 32) {
    const int column = left + i % SK_TILE, row = top + i / SK_TILE;
    if (column >= a.width || row >= a.height) continue;
    const int64_t at = ((int64_t)c * a.height + row) * a.width + column;
    const float opaque = a.alpha[at], last = 1 - opaque;
    float behind = v.v_alpha ? last * abs(v.v_alpha[at]) : 0;
    for (int k = 0; k < 3 && v.v_color; k++) {
      const float slope = abs(v.v_color[3 * at + k]), background = a.background ? last * abs(a.background[3 * c + k]) : 0;
      keep_larger(most.color, slope);
      behind += slope * (abs(a.color[3 * at + k]) + 2 * background);   // colours are not negative, a background may be
    }
    if (v.v_expected_depth) {
      const float slope = abs(v.v_expected_depth[at]);
      keep_larger(most.depth, slope);
      if (opaque > (float)1e-6) behind += slope * reciprocal(opaque) * abs(a.expected_depth[at]);
    }
    keep_larger(most.behind, behind);
  }
  most = {largest_of_warp(most.color), largest_of_warp(most.behind), largest_of_warp(most.depth), 0};
  if (lane == 0 && tile < tiles) v.incoming[(int64_t)c * tiles + tile] = most;
  if (lane == 0) raise_to(of_block, most);
  __syncthreads();
  if (threadIdx.x == 0) raise_to(v.incoming[(int64_t)a.cameras * tiles + c], of_block);
}

// Each drawn row's exponents, from bounds of what one pixel adds to a sum; its sums become 0. Rows of more tiles than a thread should look at take the
// camera's largest.
constexpr int FEW = 16;
__global__ void __launch_bounds__(ROWS) exponents_kernel(BlendVjpArgs v) {
  const BlendArgs& a = v.forward;
  const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  const TileSpan box = row < a.cameras * a.n ? unpacked(v.tiles[row]) : TileSpan{};
  if (!box.count()) return;
  const int64_t c = row / a.n, tiles = (int64_t)a.tiles_x * a.tiles_y;
  Incoming in = {};
  if (box.count() > FEW) in = v.incoming[a.cameras * tiles + c];
  for (int y = box.y0; y < box.y1 && box.count() <= FEW; y++)
    for (int x = box.x0; x < box.x1; x++) keep_larger(in, v.incoming[c * tiles + (int64_t)y * a.tiles_x + x]);

  const Record r = load_record(a.splats, row);
  const Gaussian2D<float> g = r.gaussian();
  // |h| <= weight |colour . v_colour| + weight z |v_z| + dimming |behind|, and channel by channel twice the weight times the most that any Gaussian has.
  const float alpha = min(exp2(g.logo), a.alpha_max), through = max(1 - alpha, (float)0x1p-24), colour = alpha * in.color;
  float h = colour * (abs(r[SK_R]) + abs(r[SK_G]) + abs(r[SK_BLUE])) + in.depth * abs(r[SK_Z]) + alpha * in.behind / through;
  if (v.v_features_out) h += 2 * alpha * a.channels * v.features_scale[1] * v.features_scale[2];
  // Where it touches, u^2 + v^2 <= logo - cut, and |dx|, |dy| are within its reach and its tiles; all with some room for rounding.
  const float root = quick_sqrt(max(g.logo - a.cut, 0.0f) + 0.1f), x = 2 * h * abs(g.a) * root, y = 2 * h * (abs(g.b) + abs(g.c)) * root;
  const float left = from_centre<float>(box.x0 * SK_TILE, a.width) - g.x, right = from_centre<float>(box.x1 * SK_TILE, a.width) - g.x;
  const float top = from_centre<float>(box.y0 * SK_TILE, a.height) - g.y, bottom = from_centre<float>(box.y1 * SK_TILE, a.height) - g.y;
  const float dx = min(1.05f * r[SK_RX] + 0.1f, max(abs(left), abs(right))), dy = min(1.05f * r[SK_RY] + 0.1f, max(abs(top), abs(bottom)));

  // Shares that a row may get: of every warp of its tiles, once and for each 32 channels. What one of them may be at most, times them, stays below 2^61.
  const int64_t shares = (int64_t)box.count() * SUBS * (1 + (v.v_features_out ? (a.channels + 31) / 32 : 0));
  const int room = 61 - exponent_above((float)shares), pixels = 6;
  const float bounds[SUMS_FULL] = {h, x, y, h * dx * dx, h * dx * dy, h * dy * dy, colour, colour, colour, in.depth, x, y, alpha};
  uint32_t words[EXPONENTS / 4] = {};
  auto put = [&](int place, int power) { words[place / 4] |= (uint32_t)(power < -126 ? 1 : power > 126 ? 253 : 127 + power) << 8 * (place % 4); };
#pragma unroll
  for (int j = 0; j < SUMS_FULL; j++) put(j, room - pixels - 1 - exponent_above(bounds[j]));   // one for what rounding adds
  put(ROOM, room);
  ((uint4*)v.exponents)[row] = {words[0], words[1], words[2], words[3]};
  for (int j = 0; j < v.fields; j++) v.sums[row * v.fields + j] = 0;
}

__global__ void __launch_bounds__(ROWS) finish_kernel(BlendVjpArgs v) {
  const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (row >= v.forward.cameras * v.forward.n) return;
  float out[SK_SPLAT + 1] = {};
  if (unpacked(v.tiles[row]).count()) {
    const uint4 four = ((const uint4*)v.exponents)[row];
    const uint32_t words[EXPONENTS / 4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < SUMS_FULL; j++)
      if (j < v.fields) out[FIELD[j]] = number_of(v.sums[row * v.fields + j]) * from_bits((int)(254 - (words[j / 4] >> 8 * (j % 4) & 0xff)) << 23);
  }
  float4* to = (float4*)(v.v_splats + row * SK_SPLAT);
#pragma unroll
  for (int j = 0; j < SK_SPLAT; j += 4) to[j / 4] = make_float4(out[j], out[j + 1], out[j + 2], out[j + 3]);
  if (v.weight_sums) v.weight_sums[row] = out[SK_SPLAT];
}

void largest(const float* x, int64_t count, float* out, cudaStream_t stream) {
  launch("largest", largest_kernel, dim3(blocks_for(count) < 1024 ? blocks_for(count) : 1024), dim3(ROWS), 0, stream, x, count, out);
}

}  // namespace

void start_sums(const BlendVjpArgs& v, cudaStream_t stream) {
  const BlendArgs& a = v.forward;
  const int tiles = a.tiles_x * a.tiles_y;
  if (v.v_features_out) {
    check(cudaMemsetAsync(v.features_scale, 0, sizeof(float) * 3, stream), "memset");
    largest(v.v_features_out, (int64_t)a.width * a.height * a.cameras * a.channels, v.features_scale + 1, stream);
    largest(a.features, a.n * a.channels, v.features_scale + 2, stream);
  }
  check(cudaMemsetAsync(v.incoming + (int64_t)a.cameras * tiles, 0, sizeof(Incoming) * a.cameras, stream), "memset");
  launch("incoming", incoming_kernel, dim3(blocks_for(tiles, TILES_OF_BLOCK), a.cameras), dim3(ROWS), 0, stream, v);
  launch("exponents", exponents_kernel, dim3(blocks_for(a.cameras * a.n)), dim3(ROWS), 0, stream, v);
}

void finish_sums(const BlendVjpArgs& v, cudaStream_t stream) {
  launch("finish", finish_kernel, dim3(blocks_for(v.forward.cameras * v.forward.n)), dim3(ROWS), 0, stream, v);
}

}  // namespace sk
