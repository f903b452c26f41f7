// What training needs beside the rasterizer: photometric loss, Adam, MCMC. Loops only; the formulas are in sk/.
#include "cuda_kernels.h"
#include "sk/adam.h"
#include "sk/mcmc.h"
#include "sk/ssim.h"

namespace sk {

namespace {

constexpr int SIDE = 16, HALO = SIDE + 2 * SSIM_RADIUS;   // pixels of a block, and with what its windows reach

__device__ float window(int offset) {
  constexpr float weights[SSIM_RADIUS + 1] = {(float)ssim_window(0), (float)ssim_window(1), (float)ssim_window(2), (float)ssim_window(3), (float)ssim_window(4), (float)ssim_window(5)};
  return weights[offset < 0 ? -offset : offset];
}

struct LossArgs {
  int32_t width, height;
  const float *image, *target, *mask;
  double ssim_weight;
  const unsigned long long* pixels;   // how many count
  float* maps;                        // [3][H,W,3]: d SSIM by mean, square, product; or null
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
  for (int bit = 16; bit; bit >>= 1) x += __shfl_xor_sync(FULL, x, bit);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < ROWS / 32; w++) total += warps[w];
  __syncthreads();
  return total;
}

// SSIM of SIDE x SIDE pixels, channel by channel: weighted means along rows, then along columns.
__global__ void __launch_bounds__(ROWS) ssim_kernel(LossArgs a) {
  __shared__ float x[HALO][HALO + 1], y[HALO][HALO + 1], rows[4][HALO][SIDE];
  const int left = blockIdx.x * SIDE, top = blockIdx.y * SIDE, tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
  const int px = left + tx, py = top + ty;
  const bool inside = px < a.width && py < a.height;
  const int64_t pixel = (int64_t)py * a.width + px;
  const float keep = inside && (!a.mask || a.mask[pixel] != 0) ? 1 : 0;
  float l1 = 0, total = 0;
  for (int channel = 0; channel < 3; channel++) {
    __syncthreads();
    for (int i = threadIdx.x; i < HALO * HALO; i += ROWS) {
      const int row = i / HALO, column = i % HALO, gx = left + column - SSIM_RADIUS, gy = top + row - SSIM_RADIUS;
      const bool there = gx >= 0 && gx < a.width && gy >= 0 && gy < a.height;
      const int64_t at = 3 * ((int64_t)gy * a.width + gx) + channel;
      x[row][column] = there ? a.image[at] : 0;
      y[row][column] = there ? a.target[at] : 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HALO * SIDE; i += ROWS) {
      const int row = i / SIDE, column = i % SIDE;
      float mx = 0, my = 0, squares = 0, product = 0;
#pragma unroll
      for (int j = 0; j <= 2 * SSIM_RADIUS; j++) {
        const float p = x[row][column + j], q = y[row][column + j], wp = window(j - SSIM_RADIUS) * p, wq = window(j - SSIM_RADIUS) * q;
        mx += wp;
        my += wq;
        squares += wp * p + wq * q;
        product += wp * q;
      }
      rows[0][row][column] = mx, rows[1][row][column] = my, rows[2][row][column] = squares, rows[3][row][column] = product;
    }
    __syncthreads();
    float mean[4] = {};
#pragma unroll
    for (int j = 0; j <= 2 * SSIM_RADIUS; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) mean[k] += window(j - SSIM_RADIUS) * rows[k][ty + j][tx];
    const Ssim<float> s = ssim(mean[0], mean[1], mean[2], mean[3]);
    l1 += keep * abs(x[ty + SSIM_RADIUS][tx + SSIM_RADIUS] - y[ty + SSIM_RADIUS][tx + SSIM_RADIUS]);
    total += keep * s.value;
    if (a.maps && inside) {
      const int64_t at = 3 * pixel + channel, plane = (int64_t)3 * a.width * a.height;
      a.maps[at] = keep * s.by_mean;
      a.maps[plane + at] = keep * s.by_square;
      a.maps[2 * plane + at] = keep * s.by_product;
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
  __shared__ float in[3][HALO][HALO + 1], rows[3][HALO][SIDE];
  const int left = blockIdx.x * SIDE, top = blockIdx.y * SIDE, tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
  const int px = left + tx, py = top + ty;
  const bool inside = px < a.width && py < a.height;
  const int64_t pixel = (int64_t)py * a.width + px, plane = (int64_t)3 * a.width * a.height;
  const float seed = (float)seed_of(a), w1 = (float)(1 - a.ssim_weight) * seed, w2 = (float)-a.ssim_weight * seed;
  const float keep = inside && (!a.mask || a.mask[pixel] != 0) ? 1 : 0;
  for (int channel = 0; channel < 3; channel++) {
    __syncthreads();
    for (int i = threadIdx.x; i < HALO * HALO; i += ROWS) {
      const int row = i / HALO, column = i % HALO, gx = left + column - SSIM_RADIUS, gy = top + row - SSIM_RADIUS;
      const bool there = gx >= 0 && gx < a.width && gy >= 0 && gy < a.height;
      const int64_t at = 3 * ((int64_t)gy * a.width + gx) + channel;
#pragma unroll
      for (int k = 0; k < 3; k++) in[k][row][column] = there ? a.maps[k * plane + at] : 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HALO * SIDE; i += ROWS) {
      const int row = i / SIDE, column = i % SIDE;
      float sum[3] = {};
#pragma unroll
      for (int j = 0; j <= 2 * SSIM_RADIUS; j++)
#pragma unroll
        for (int k = 0; k < 3; k++) sum[k] += window(j - SSIM_RADIUS) * in[k][row][column + j];
#pragma unroll
      for (int k = 0; k < 3; k++) rows[k][row][column] = sum[k];
    }
    __syncthreads();
    if (!inside) continue;
    float sum[3] = {};
#pragma unroll
    for (int j = 0; j <= 2 * SSIM_RADIUS; j++)
#pragma unroll
      for (int k = 0; k < 3; k++) sum[k] += window(j - SSIM_RADIUS) * rows[k][ty + j][tx];
    const int64_t at = 3 * pixel + channel;
    const float x = a.image[at], y = a.target[at], sign = x > y ? 1.0f : x < y ? -1.0f : 0.0f;
    a.v_image[at] = w1 * keep * sign + w2 * (sum[0] + 2 * x * sum[1] + y * sum[2]);
  }
}

// V numbers of one row at a time: rows of columns % V == 0 numbers, which start at multiples of V.
template <int ATTRIBUTE, int V> __global__ void __launch_bounds__(ROWS) adam_kernel(AdamArgs a) {
  const int64_t i = ((int64_t)blockIdx.x * ROWS + threadIdx.x) * V;
  if (i >= a.n * a.columns) return;
  const int64_t row = i / a.columns;
  const int column = (int)(i - row * a.columns);
  if (a.visible && !a.visible[row]) return;
  const AdamStep<float> s = {(float)a.beta1, (float)a.beta2, (float)(1 - a.beta1), (float)(1 - a.beta2), (float)a.epsilon, (float)a.decay, (float)a.decay_max};
  const float one = a.corrections ? a.corrections[2 * row] : (float)a.correct1, two = a.corrections ? a.corrections[2 * row + 1] : (float)a.correct2;
  struct alignas(4 * V) Numbers {
    float x[V];
  };
  Numbers p = *(const Numbers*)(a.param + i), g = *(const Numbers*)(a.grad + i), m = *(const Numbers*)(a.m + i), v = *(const Numbers*)(a.v + i);
#pragma unroll
  for (int k = 0; k < V; k++) adam<ATTRIBUTE>(p.x[k], g.x[k], m.x[k], v.x[k], a.learning_rates[column + k], one, two, s);
  *(Numbers*)(a.param + i) = p;
  *(Numbers*)(a.m + i) = m;
  *(Numbers*)(a.v + i) = v;
}

template <int ATTRIBUTE> void adam_of(const AdamArgs& a, cudaStream_t stream) {
  const bool by_four = a.columns % 4 == 0;
  launch("adam", by_four ? adam_kernel<ATTRIBUTE, 4> : adam_kernel<ATTRIBUTE, 1>, dim3(blocks_for(a.n * a.columns, by_four ? 4 * ROWS : ROWS)), dim3(ROWS), 0, stream, a);
}

__global__ void __launch_bounds__(ROWS) noise_kernel(int64_t n, float* means, const float* quats, const float* log_scales, const float* logits, const float* noise, float scale) {
  const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (i >= n) return;
  const float *q = quats + 4 * i, *s = log_scales + 3 * i, *e = noise + 3 * i;
  const Vec3<float> d = mcmc_noise<float>({q[0], q[1], q[2], q[3]}, {s[0], s[1], s[2]}, logits[i], {e[0], e[1], e[2]}, scale);
  means[3 * i] += d.x;
  means[3 * i + 1] += d.y;
  means[3 * i + 2] += d.z;
}

__global__ void __launch_bounds__(ROWS) relocate_kernel(int64_t m, float* logits, float* log_scales, const int32_t* copies) {
  const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x;
  if (i < m) relocate_row(logits[i], log_scales + 3 * i, copies[i]);
}

// Independent chains of multiply-adds; what keeps the compiler from dropping them is never written.
constexpr int CHAINS = 16, LINKS = 4096;
__global__ void __launch_bounds__(ROWS) fma_kernel(float* never, float a, float b) {
  float x[CHAINS];
  for (int i = 0; i < CHAINS; i++) x[i] = (float)(threadIdx.x + i);
  for (int k = 0; k < LINKS; k++)
#pragma unroll
    for (int i = 0; i < CHAINS; i++) x[i] = x[i] * a + b;
  float sum = 0;
  for (int i = 0; i < CHAINS; i++) sum += x[i];
  if (sum == 12345.678f) *never = sum;
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

void adam_rows(const AdamArgs& a, cudaStream_t stream) {
  if (a.attribute == SK_OPACITY) adam_of<OPACITY>(a, stream);
  else if (a.attribute == SK_SCALE) adam_of<SCALE>(a, stream);
  else adam_of<PLAIN>(a, stream);
}

void mcmc_noise_rows(int64_t n, float* means, const float* quats, const float* log_scales, const float* logits, const float* noise, float scale, cudaStream_t stream) {
  launch("mcmc_noise", noise_kernel, dim3(blocks_for(n)), dim3(ROWS), 0, stream, n, means, quats, log_scales, logits, noise, scale);
}

void relocate_rows(int64_t m, float* logits, float* log_scales, const int32_t* copies, cudaStream_t stream) {
  launch("relocate", relocate_kernel, dim3(blocks_for(m)), dim3(ROWS), 0, stream, m, logits, log_scales, copies);
}

double fma_peak(double seconds) {
#if defined(SK_EMULATOR)
  return 0 * seconds;
#else
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
  const dim3 grid(processors * 8);
  const double flops = 2.0 * grid.x * ROWS * CHAINS * LINKS;
  cudaEvent_t from, to;
  check(cudaEventCreate(&from), "event");
  check(cudaEventCreate(&to), "event");
  double best = 0, spent = 0;
  do {
    float ms = 0;
    check(cudaEventRecord(from), "event");
    launch("fma", fma_kernel, grid, dim3(ROWS), 0, nullptr, (float*)nullptr, 0.999f, 1e-3f);
    check(cudaEventRecord(to), "event");
    check(cudaEventSynchronize(to), "event");
    check(cudaEventElapsedTime(&ms, from, to), "event");
    best = flops / ms > best ? flops / ms : best;
    spent += ms * 1e-3;
  } while (spent < seconds);
  cudaEventDestroy(from);
  cudaEventDestroy(to);
  return best * 1e-6;
#endif
}

}  // namespace sk
