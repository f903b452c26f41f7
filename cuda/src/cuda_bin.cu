// Lists of Gaussians per tile, front to back: count each one's tiles in depth order, add up, write (tile, row) pairs, sort by tile (stable).
#include "cuda_kernels.h"
#include "cuda_sort.h"

namespace sk {

namespace {

struct Reached {
  Ellipse<float> ellipse;
  TileSpan box;
  int32_t row;
};

// The i-th Gaussian of camera c, front to back; false where there is none.
__device__ bool reached(const BinArgs& a, int c, int64_t i, Reached& out) {
  if (i >= a.n || i >= a.counts[3 * c]) return false;
  out.row = a.order[c * a.n + i];
  out.box = unpacked(a.tiles[c * a.n + out.row]);
  const float4* p = (const float4*)(a.splats + (c * a.n + out.row) * SK_SPLAT);
  const float4 first = p[0];
  const float2 second = *(const float2*)(p + 1);
  out.ellipse = ellipse_of(Gaussian2D<float>{first.x, first.y, first.z, first.w, second.x, second.y}, a.cut);
  return true;
}

__global__ void __launch_bounds__(ROWS) count_kernel(BinArgs a, int32_t* count) {
  const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  const int c = blockIdx.y;
  if (i >= a.n) return;
  int32_t tiles = i < a.counts[3 * c] ? reached_of(a.tiles[c * a.n + a.order[c * a.n + i]]) : 0;
  Reached g;
  if (tiles == MANY_TILES && reached(a, c, i, g)) tiles = tiles_reached(g.ellipse, g.box, a.width, a.height);
  count[c * a.n + i] = tiles;
}

__global__ void needed_kernel(BinArgs a, const int32_t* count, const int64_t* starts) {
  const int64_t last = a.cameras * a.n - 1;
  a.needed[0] = last < 0 ? 0 : starts[last] + count[last];
}

// Gaussians of up to this many pairs are written by one thread, others by a warp each: the nearest stand next to each other in depth order, and
// 32 of them, over the whole picture, in one warp took ten times as long as all the rest.
constexpr int FEW = 24;

struct Large {
  int32_t camera, index;    // in depth order
};

// The pairs of a warp's Gaussians, which stand next to each other in memory but for those of large ones, are gathered in shared memory and leave together.
template <class K> __global__ void __launch_bounds__(ROWS) pairs_kernel(BinArgs a, const int32_t* count, const int64_t* starts, K* keys, int32_t* values, Large* large, unsigned* large_count) {
  __shared__ K gathered_by_warp[ROWS / 32][32 * FEW];
  __shared__ uint8_t owner_by_warp[ROWS / 32][32 * FEW];
  if (a.needed[0] > a.capacity) return;
  const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  const int c = blockIdx.y, lane = threadIdx.x % 32;
  K* gathered = gathered_by_warp[threadIdx.x / 32];
  uint8_t* owner = owner_by_warp[threadIdx.x / 32];
  Reached g;
  g.row = 0;
  const bool any = reached(a, c, i, g);
  const int32_t all = any ? count[c * a.n + i] : 0, mine = all > FEW ? 0 : all;
  const int64_t start = any ? starts[c * a.n + i] : 0;
  if (all > FEW) large[atomicAdd(large_count, 1u)] = {c, (int32_t)i};   // in any order: where its pairs stand is known
  int end = mine;
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_sync(FULL, end, lane - step < 0 ? lane : lane - step);
    if (lane >= step) end += before;
  }
  const int total = __shfl_sync(FULL, end, 31);
  int at = end - mine;
  for (int y = g.box.y0; mine && y < g.box.y1; y++) {
    int x0, x1;
    columns_of_row(g.ellipse, g.box, y, a.width, a.height, x0, x1);
    const int first = (c * a.tiles_y + y) * a.tiles_x;
    for (int x = x0; x < x1 && at < end; x++, at++) {
      gathered[at] = (K)(first + x);
      owner[at] = (uint8_t)lane;
    }
  }
  __syncwarp();
  const int64_t shift = start - (end - mine);
  for (int base = 0; base < total; base += 32) {
    const int k = base + lane, from = k < total ? owner[k] : 0;
    const int64_t to = k + __shfl_sync(FULL, shift, from);
    const int32_t row = __shfl_sync(FULL, g.row, from);
    if (k >= total) continue;
    keys[to] = gathered[k];
    values[to] = row;
  }
}

template <class K> __global__ void __launch_bounds__(ROWS) large_pairs_kernel(BinArgs a, const int64_t* starts, K* keys, int32_t* values, const Large* large, const unsigned* large_count) {
  const unsigned count = *large_count;
  const int lane = threadIdx.x % 32;
  for (unsigned k = (blockIdx.x * ROWS + threadIdx.x) / 32; k < count; k += gridDim.x * (ROWS / 32)) {
    const int c = large[k].camera;
    Reached g;
    reached(a, c, large[k].index, g);
    int64_t at = starts[c * a.n + large[k].index];
    for (int top = g.box.y0; top < g.box.y1; top += 32) {   // a lane works out a row of tiles, all lanes write it
      int x0 = 0, x1 = 0;
      if (top + lane < g.box.y1) columns_of_row(g.ellipse, g.box, top + lane, a.width, a.height, x0, x1);
      const int rows = g.box.y1 - top < 32 ? g.box.y1 - top : 32;
      for (int r = 0; r < rows; r++) {
        const int from = __shfl_sync(FULL, x0, r), to = __shfl_sync(FULL, x1, r), first = (c * a.tiles_y + top + r) * a.tiles_x;
        for (int x = from + lane; x < to; x += 32) {
          keys[at + x - from] = (K)(first + x);
          values[at + x - from] = g.row;
        }
        at += to - from;
      }
    }
  }
}

// tile_offsets[t] = how many of the sorted keys are below t; none where they had no room, so that the picture is the background.
template <class K> __global__ void __launch_bounds__(ROWS) offsets_kernel(BinArgs a, const K* keys, int64_t tiles) {
  const int64_t t = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (t > tiles) return;
  int64_t low = 0, high = a.needed[0] > a.capacity ? 0 : a.needed[0];
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < t) low = middle + 1;
    else high = middle;
  }
  a.tile_offsets[t] = low;
}

template <class K> void bin_with(const BinArgs& a, int64_t tiles, const int32_t* count, const int64_t* starts, K* keys, K* keys_sorted, int32_t* values, Large* large, unsigned* large_count, void* temporary, size_t bytes, cudaStream_t stream) {
  int bits = 1;
  while (((int64_t)1 << bits) <= tiles) bits++;
  check(cudaMemsetAsync(keys, 0xff, sizeof(K) * a.capacity, stream), "memset");   // what is not written sorts behind every tile
  check(cudaMemsetAsync(large_count, 0, sizeof *large_count, stream), "memset");
  launch("pairs", pairs_kernel<K>, dim3(blocks_for(a.n), a.cameras), dim3(ROWS), 0, stream, a, count, starts, keys, values, large, large_count);
  launch("large_pairs", large_pairs_kernel<K>, dim3(blocks_for(a.cameras * a.n) < 1024 ? blocks_for(a.cameras * a.n) : 1024), dim3(ROWS), 0, stream, a, starts, keys, values, large, large_count);
  sort_pairs(temporary, bytes, keys, keys_sorted, values, a.pairs, a.capacity, bits, stream);
  launch("offsets", offsets_kernel<K>, dim3(blocks_for(tiles + 1)), dim3(ROWS), 0, stream, a, keys_sorted, tiles);
}

}  // namespace

void bin(const BinArgs& a, Scratch& scratch, cudaStream_t stream) {
  const int64_t tiles = (int64_t)a.cameras * a.tiles_x * a.tiles_y, rows = a.cameras * a.n;
  const int key_bytes = tiles < 0xffff ? 2 : 4;
  int32_t* count = scratch.take<int32_t>(rows);
  int64_t* starts = scratch.take<int64_t>(rows);
  const size_t adding = sum_bytes(rows), sorting = sort_bytes(a.capacity, key_bytes);
  char* temporary = scratch.take<char>(adding > sorting ? adding : sorting);
  char *keys = scratch.take<char>(key_bytes * a.capacity), *keys_sorted = scratch.take<char>(key_bytes * a.capacity);
  int32_t* values = scratch.take<int32_t>(a.capacity);
  Large* large = scratch.take<Large>(a.capacity / FEW + 1);   // each has more than FEW of the capacity's pairs
  unsigned* large_count = scratch.take<unsigned>(1);
  if (!scratch.memory) return;
  launch("count", count_kernel, dim3(blocks_for(a.n), a.cameras), dim3(ROWS), 0, stream, a, count);
  if (rows) exclusive_sum(temporary, adding, count, starts, rows, stream);
  launch("needed", needed_kernel, dim3(1), dim3(1), 0, stream, a, count, starts);
  if (key_bytes == 2)
    bin_with(a, tiles, count, starts, (uint16_t*)keys, (uint16_t*)keys_sorted, values, large, large_count, temporary, sorting, stream);
  else
    bin_with(a, tiles, count, starts, (uint32_t*)keys, (uint32_t*)keys_sorted, values, large, large_count, temporary, sorting, stream);
}

}  // namespace sk
