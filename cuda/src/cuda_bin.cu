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
  Reached g;
  if (i < a.n) count[c * a.n + i] = reached(a, c, i, g) ? tiles_reached(g.ellipse, g.box, a.width, a.height) : 0;
}

__global__ void needed_kernel(BinArgs a, const int32_t* count, const int64_t* starts) {
  const int64_t last = a.cameras * a.n - 1;
  a.needed[0] = last < 0 ? 0 : starts[last] + count[last];
}

// Writes the pairs of one Gaussian from `at` on; `step` lanes take turns within a row of tiles.
template <class K> __device__ void write_pairs(const BinArgs& a, int c, const Ellipse<float>& e, const TileSpan& box, int32_t row, int64_t at, int lane, int step, K* keys, int32_t* values) {
  for (int y = box.y0; y < box.y1; y++) {
    int x0, x1;
    columns_of_row(e, box, y, a.width, a.height, x0, x1);
    const int first = (c * a.tiles_y + y) * a.tiles_x;
    for (int x = x0 + lane; x < x1; x += step) {
      keys[at + x - x0] = (K)(first + x);
      values[at + x - x0] = row;
    }
    at += x1 - x0;
  }
}

constexpr int MANY = 64;   // pairs from which a Gaussian is written by its whole warp

template <class K> __global__ void __launch_bounds__(ROWS) pairs_kernel(BinArgs a, const int32_t* count, const int64_t* starts, K* keys, int32_t* values) {
  if (a.needed[0] > a.capacity) return;
  const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  const int c = blockIdx.y, lane = threadIdx.x % 32;
  Reached g;
  g.row = 0;
  const bool any = reached(a, c, i, g);
  const int32_t mine = any ? count[c * a.n + i] : 0;
  const int64_t at = any ? starts[c * a.n + i] : 0;
  if (mine > 0 && mine < MANY) write_pairs(a, c, g.ellipse, g.box, g.row, at, 0, 1, keys, values);
  for (unsigned large = __ballot_sync(FULL, mine >= MANY); large; large &= large - 1) {
    const int from = __ffs(large) - 1;
    const int32_t row = __shfl_sync(FULL, g.row, from);
    const int64_t start = __shfl_sync(FULL, at, from);
    const Record r = load_record(a.splats, c * a.n + row);
    write_pairs(a, c, ellipse_of(r.gaussian(), a.cut), unpacked(a.tiles[c * a.n + row]), row, start, lane, 32, keys, values);
  }
}

// tile_offsets[t] = how many of the sorted keys are below t.
template <class K> __global__ void __launch_bounds__(ROWS) offsets_kernel(BinArgs a, const K* keys, int64_t tiles) {
  if (a.needed[0] > a.capacity) return;
  const int64_t t = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (t > tiles) return;
  int64_t low = 0, high = a.needed[0];
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < t) low = middle + 1;
    else high = middle;
  }
  a.tile_offsets[t] = low;
}

template <class K> void bin_with(const BinArgs& a, int64_t tiles, const int32_t* count, const int64_t* starts, K* keys, K* keys_sorted, int32_t* values, void* temporary, size_t bytes, cudaStream_t stream) {
  int bits = 1;
  while (((int64_t)1 << bits) <= tiles) bits++;
  check(cudaMemsetAsync(keys, 0xff, sizeof(K) * a.capacity, stream), "memset");   // what is not written sorts behind every tile
  launch("pairs", pairs_kernel<K>, dim3(blocks_for(a.n), a.cameras), dim3(ROWS), 0, stream, a, count, starts, keys, values);
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
  if (!scratch.memory) return;
  launch("count", count_kernel, dim3(blocks_for(a.n), a.cameras), dim3(ROWS), 0, stream, a, count);
  if (rows) exclusive_sum(temporary, adding, count, starts, rows, stream);
  launch("needed", needed_kernel, dim3(1), dim3(1), 0, stream, a, count, starts);
  if (key_bytes == 2)
    bin_with(a, tiles, count, starts, (uint16_t*)keys, (uint16_t*)keys_sorted, values, temporary, sorting, stream);
  else
    bin_with(a, tiles, count, starts, (uint32_t*)keys, (uint32_t*)keys_sorted, values, temporary, sorting, stream);
}

}  // namespace sk
