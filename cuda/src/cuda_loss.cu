// The photometric loss and its gradient. The formula of SSIM is sk/ssim.h's.
#include "cuda_kernels.h"
#include "sk/ssim.h"

namespace sk {

namespace {

// A block works on SIDE x SIDE pixels of one channel at a time and reads HALO x HALO. A thread makes RUN neighbouring results from registers that slide:
// a third of the reads of one result a thread.
constexpr int SIDE = 32, HALO = SIDE + 2 * SSIM_RADIUS, RUN = 4, TAPS = 2 * SSIM_RADIUS + 1;
static_assert(SIDE * SIDE == RUN * ROWS, "a thread has RUN results");

__device__ float window(int offset) {
  constexpr float weights[SSIM_RADIUS + 1] = {(float)ssim_window(0), (float)ssim_window(1), (float)ssim_window(2), (float)ssim_window(3), (float)ssim_window(4), (float)ssim_window(5)};
  return weights[offset < 0 ? -offset : offset];
}

struct LossArgs {
  int32_t width, height;
  const float *image, *target, *mask;
  double ssim_weight;
  const unsigned long long* pixels;   // how many count
  float* maps;                        // [3 channels,3,H,W]: d SSIM by mean, square, product; or null
  double* partial;                    // [blocks,2]
  double* terms;
  float* v_image;
};
__device__ double seed_of(const LossArgs& a) { return a.pixels[0] ? 1 / (3 * (double)a.pixels[0]) : 0; }

__global__ void __launch_bounds__(ROWS) mask_kernel(const float* mask, int64_t count, unsigned long long* pixels) {
  int some = 0;
  for (int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x; i < count; i += (int64_t)gridDim.x * ROWS) some += !mask || mask[i] != 0;
  some = sum_of_warp(some);
  if (threadIdx.x % 32 == 0 && some) atomicAdd(pixels, (unsigned long long)some);
}

// Sums of a block's numbers in a fixed order: thread 0 has them.
__device__ double sum_of_block(double x) {
  __shared__ double warps[ROWS / 32];
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < ROWS / 32; w++) total += warps[w];
  __syncthreads();
  return total;
}

// Weighted sums of the numbers that `at` has at each place of a halo, RUN neighbours each, along its rows.
template <int MAPS, class F> __device__ void along(float (&rows)[MAPS][HALO][SIDE], F&& at) {
  for (int i = threadIdx.x; i < HALO * SIDE / RUN; i += ROWS) {
    const int r = i / (SIDE / RUN), c = i % (SIDE / RUN) * RUN;
    float sum[MAPS][RUN] = {};
#pragma unroll
    for (int j = 0; j < TAPS + RUN - 1; j++) {
      float x[MAPS];
      at(r, c + j, x);
#pragma unroll
      for (int k = 0; k < RUN; k++)
        if (j - k >= 0 && j - k < TAPS) {
          const float w = window(j - k - SSIM_RADIUS);
#pragma unroll
          for (int m = 0; m < MAPS; m++) sum[m][k] += w * x[m];
        }
    }
#pragma unroll
    for (int m = 0; m < MAPS; m++) *(float4*)&rows[m][r][c] = make_float4(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
  }
}

// And down the columns of what it made.
template <int MAPS> __device__ void down(const float (&rows)[MAPS][HALO][SIDE], int column, int top, float (&out)[RUN][MAPS]) {
#pragma unroll
  for (int j = 0; j < TAPS + RUN - 1; j++)
#pragma unroll
    for (int k = 0; k < MAPS; k++) {
      const float x = rows[k][top + j][column];
#pragma unroll
      for (int r = 0; r < RUN; r++)
        if (j - r >= 0 && j - r < TAPS) out[r][k] += window(j - r - SSIM_RADIUS) * x;
    }
}

struct Corner {   // of the halo, and whether a place in it is in the picture
  int left, top, width, height;
  __device__ bool inside(int row, int column) const {
    const int x = left + column, y = top + row;
    return x >= 0 && x < width && y >= 0 && y < height;
  }
  __device__ int64_t pixel(int row, int column) const { return (int64_t)(top + row) * width + left + column; }
};

// SSIM of SIDE x SIDE pixels: weighted means along rows, then down columns.
__global__ void __launch_bounds__(ROWS, 4) ssim_kernel(LossArgs a) {
  __shared__ float x[HALO][HALO + 1], y[HALO][HALO + 1];
  alignas(16) __shared__ float rows[4][HALO][SIDE];
  const Corner corner = {(int)blockIdx.x * SIDE - SSIM_RADIUS, (int)blockIdx.y * SIDE - SSIM_RADIUS, a.width, a.height};
  const int column = threadIdx.x % SIDE, top = threadIdx.x / SIDE * RUN;
  const int64_t plane = (int64_t)a.width * a.height;
  float l1 = 0, total = 0;
  for (int channel = 0; channel < 3; channel++) {
    __syncthreads();
    for (int i = threadIdx.x; i < HALO * HALO; i += ROWS) {
      const int r = i / HALO, c = i % HALO;
      const bool there = corner.inside(r, c);
      const int64_t at = 3 * corner.pixel(r, c) + channel;
      x[r][c] = there ? a.image[at] : 0;
      y[r][c] = there ? a.target[at] : 0;
    }
    __syncthreads();
    along<4>(rows, [&](int r, int c, float (&out)[4]) {
      const float p = x[r][c], q = y[r][c];
      out[0] = p, out[1] = q, out[2] = p * p + q * q, out[3] = p * q;
    });
    __syncthreads();
    float mean[RUN][4] = {};
    down<4>(rows, column, top, mean);
#pragma unroll
    for (int r = 0; r < RUN; r++) {
      const int row = top + r + SSIM_RADIUS, c = column + SSIM_RADIUS;
      if (!corner.inside(row, c)) continue;
      const int64_t pixel = corner.pixel(row, c);
      const float keep = !a.mask || a.mask[pixel] != 0 ? 1 : 0;
      const Ssim<float> s = ssim(mean[r][0], mean[r][1], mean[r][2], mean[r][3]);
      l1 += keep * abs(x[row][c] - y[row][c]);
      total += keep * s.value;
      if (!a.maps) continue;
      float* out = a.maps + 3 * channel * plane + pixel;
      out[0] = keep * s.by_mean;
      out[plane] = keep * s.by_square;
      out[2 * plane] = keep * s.by_product;
    }
  }
  const double sum_l1 = sum_of_block(l1), sum_ssim = sum_of_block(total);
  double* partial = a.partial + 2 * ((int64_t)blockIdx.y * gridDim.x + blockIdx.x);
  if (threadIdx.x == 0) partial[0] = sum_l1, partial[1] = sum_ssim;
}

__global__ void __launch_bounds__(ROWS) terms_kernel(LossArgs a, int64_t blocks) {
  double l1 = 0, total = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += ROWS) l1 += a.partial[2 * i], total += a.partial[2 * i + 1];
  l1 = sum_of_block(l1);
  total = sum_of_block(total);
  if (threadIdx.x == 0) a.terms[0] = l1 * seed_of(a), a.terms[1] = total * seed_of(a);
}

__global__ void __launch_bounds__(ROWS) loss_vjp_kernel(LossArgs a) {
  __shared__ float in[3][HALO][HALO + 1];
  alignas(16) __shared__ float rows[3][HALO][SIDE];
  const Corner corner = {(int)blockIdx.x * SIDE - SSIM_RADIUS, (int)blockIdx.y * SIDE - SSIM_RADIUS, a.width, a.height};
  const int column = threadIdx.x % SIDE, top = threadIdx.x / SIDE * RUN;
  const int64_t plane = (int64_t)a.width * a.height;
  float result[3][RUN];
  const float seed = (float)seed_of(a), w1 = (float)(1 - a.ssim_weight) * seed, w2 = (float)-a.ssim_weight * seed;
#pragma unroll
  for (int channel = 0; channel < 3; channel++) {
    __syncthreads();
    for (int i = threadIdx.x; i < HALO * HALO; i += ROWS) {
      const int r = i / HALO, c = i % HALO;
      const bool there = corner.inside(r, c);
      const float* from = a.maps + 3 * channel * plane + corner.pixel(r, c);
#pragma unroll
      for (int k = 0; k < 3; k++) in[k][r][c] = there ? from[k * plane] : 0;
    }
    __syncthreads();
    along<3>(rows, [&](int r, int c, float (&out)[3]) { out[0] = in[0][r][c], out[1] = in[1][r][c], out[2] = in[2][r][c]; });
    __syncthreads();
    float sum[RUN][3] = {};
    down<3>(rows, column, top, sum);
#pragma unroll
    for (int r = 0; r < RUN; r++) {
      const int row = top + r + SSIM_RADIUS, c = column + SSIM_RADIUS;
      result[channel][r] = 0;
      if (!corner.inside(row, c)) continue;
      const int64_t pixel = corner.pixel(row, c), at = 3 * pixel + channel;
      const float keep = !a.mask || a.mask[pixel] != 0 ? 1 : 0;
      const float x = a.image[at], y = a.target[at], sign = x > y ? 1.0f : x < y ? -1.0f : 0.0f;
      result[channel][r] = w1 * keep * sign + w2 * (sum[r][0] + 2 * x * sum[r][1] + y * sum[r][2]);
    }
  }
  __syncthreads();
  float* out = &in[0][0][0];   // rows of 3 SIDE numbers, as they are in the picture: lanes 12 bytes apart would write each sector three times
  static_assert(3 * SIDE * SIDE <= 3 * HALO * (HALO + 1), "fits");
#pragma unroll
  for (int r = 0; r < RUN; r++)
#pragma unroll
    for (int channel = 0; channel < 3; channel++) out[(top + r) * 3 * SIDE + 3 * column + channel] = result[channel][r];
  __syncthreads();
  for (int i = threadIdx.x; i < 3 * SIDE * SIDE; i += ROWS) {
    const int r = i / (3 * SIDE), c = i % (3 * SIDE);
    if (corner.inside(r + SSIM_RADIUS, c / 3 + SSIM_RADIUS)) a.v_image[3 * corner.pixel(r + SSIM_RADIUS, SSIM_RADIUS) + c] = out[i];
  }
}

}  // namespace

int64_t l1_ssim_words(int32_t width, int32_t height) {
  Scratch s(nullptr, 0);
  l1_ssim(width, height, nullptr, nullptr, nullptr, 0, nullptr, nullptr, s, nullptr);
  return s.words();
}

void l1_ssim(int32_t width, int32_t height, const float* image, const float* target, const float* mask, double ssim_weight, double* terms, float* v_image, Scratch& scratch, cudaStream_t stream) {
  const int64_t count = (int64_t)width * height;
  const dim3 grid((width + SIDE - 1) / SIDE, (height + SIDE - 1) / SIDE), block(ROWS);
  auto* pixels = scratch.take<unsigned long long>(1);
  double* partial = scratch.take<double>((int64_t)2 * grid.x * grid.y);
  float* maps = scratch.take<float>(9 * count);
  if (!scratch.memory) return;
  const LossArgs a = {width, height, image, target, mask, ssim_weight, pixels, v_image ? maps : nullptr, partial, terms, v_image};
  check(cudaMemsetAsync(pixels, 0, sizeof *pixels, stream), "memset");
  launch("mask", mask_kernel, dim3(blocks_for(count) < 512 ? blocks_for(count) : 512), block, 0, stream, mask, count, pixels);
  launch("ssim", ssim_kernel, grid, block, 0, stream, a);
  launch("terms", terms_kernel, dim3(1), block, 0, stream, a, (int64_t)grid.x * grid.y);
  if (v_image) launch("loss_vjp", loss_vjp_kernel, grid, block, 0, stream, a);
}

}  // namespace sk
