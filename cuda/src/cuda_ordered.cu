// The deterministic backward's records: where each row's stand, and their sums in a fixed order.
#include "cuda_kernels.h"
#include "cuda_sort.h"

namespace sk {

namespace {

constexpr int SUMS = SK_SPLAT + 1;   // of a record, without what aligns it

__global__ void __launch_bounds__(ROWS) slots_kernel(const int64_t* tiles, int64_t rows, int32_t* count) {
  const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (i < rows) count[i] = unpacked(tiles[i]).count();
}

// Each row's records in a fixed order, so that the sum does not depend on which tile was finished first: `lanes` threads take every lanes-th tile each.
__device__ void add_tiles(const BlendVjpArgs& v, int64_t first, int count, int lane, int lanes, float (&sums)[RECORD]) {
  static_assert(SUBS == 8 && RECORD == 16, "eight flags are two words, a record four vectors");
  for (int t = lane; t < count && first + t < v.slots; t += lanes) {
    const uint2 flags = ((const uint2*)v.written)[first + t];
    if (!(flags.x | flags.y)) continue;
    for (int sub = 0; sub < SUBS; sub++) {
      if (!((sub < 4 ? flags.x >> 8 * sub : flags.y >> 8 * (sub - 4)) & 0xff)) continue;
      const float4* record = (const float4*)(v.records + ((first + t) * SUBS + sub) * RECORD);
#pragma unroll
      for (int j = 0; j < RECORD; j += 4) {
        const float4 four = record[j / 4];
        sums[j] += four.x, sums[j + 1] += four.y, sums[j + 2] += four.z, sums[j + 3] += four.w;
      }
    }
  }
}

__device__ void write_sums(const BlendVjpArgs& v, int64_t row, const float (&sums)[RECORD]) {
  float4* out = (float4*)(v.v_splats + row * SK_SPLAT);
#pragma unroll
  for (int j = 0; j < SK_SPLAT; j += 4) out[j / 4] = make_float4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]);
  if (v.weight_sums) v.weight_sums[row] = sums[SK_SPLAT];
}

// Eight lanes a row; rows of many tiles, which the others would wait for, are taken by the whole block.
constexpr int MANY = 256, LANES = 8, ROWS_OF_BLOCK = ROWS / LANES;
__global__ void __launch_bounds__(ROWS) sum_slots_kernel(BlendVjpArgs v) {
  __shared__ float parts[ROWS / 32][RECORD];
  __shared__ int32_t many[ROWS_OF_BLOCK];
  const int lane = threadIdx.x % LANES;
  const int64_t rows = v.forward.cameras * v.forward.n, first_row = (int64_t)blockIdx.x * ROWS_OF_BLOCK, row = first_row + threadIdx.x / LANES;
  const int count = row < rows ? unpacked(v.tiles[row]).count() : 0;
  if (lane == 0) many[threadIdx.x / LANES] = count >= MANY ? count : 0;
  float sums[RECORD] = {};
  if (count && count < MANY) add_tiles(v, v.slot_of[row], count, lane, LANES, sums);
#pragma unroll
  for (int j = 0; j < SUMS; j++)
    for (int bit = LANES / 2; bit; bit >>= 1) sums[j] += __shfl_xor_sync(FULL, sums[j], bit);
  if (lane == 0 && row < rows && count < MANY) write_sums(v, row, sums);
  __syncthreads();
  for (int r = 0; r < ROWS_OF_BLOCK; r++) {
    if (!many[r]) continue;
    for (int j = 0; j < RECORD; j++) sums[j] = 0;
    add_tiles(v, v.slot_of[first_row + r], many[r], threadIdx.x, ROWS, sums);
#pragma unroll
    for (int j = 0; j < SUMS; j++) sums[j] = sum_of_warp(sums[j]);
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int j = 0; j < RECORD; j++) parts[threadIdx.x / 32][j] = sums[j];
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
      for (int j = 0; j < RECORD; j++) {
        sums[j] = 0;
        for (int w = 0; w < ROWS / 32; w++) sums[j] += parts[w][j];
      }
      write_sums(v, first_row + r, sums);
    }
    __syncthreads();
  }
}

}  // namespace

void count_slots(const BlendVjpArgs& a, int32_t* count, void* temporary, size_t bytes, cudaStream_t stream) {
  const int64_t rows = a.forward.cameras * a.forward.n;
  launch("slots", slots_kernel, dim3(blocks_for(rows)), dim3(ROWS), 0, stream, a.tiles, rows, count);
  if (rows) exclusive_sum(temporary, bytes, count, a.slot_of, rows, stream);
}

void sum_slots(const BlendVjpArgs& v, cudaStream_t stream) {
  launch("sum_slots", sum_slots_kernel, dim3(blocks_for(v.forward.cameras * v.forward.n, ROWS_OF_BLOCK)), dim3(ROWS), 0, stream, v);
}

}  // namespace sk
