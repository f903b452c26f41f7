// What training needs beside rasterizer and loss: Adam, MCMC; and what the card can do at most. Loops only; the formulas are in sk/.
#include "cuda_kernels.h"
#include "sk/adam.h"
#include "sk/mcmc.h"

namespace sk {

namespace {

// V numbers of one row at a time: rows of columns % V == 0 numbers, which start at multiples of V.
template <int ATTRIBUTE, int V> __global__ void __launch_bounds__(ROWS) adam_kernel(AdamArgs a) {
  const int64_t i = ((int64_t)blockIdx.x * ROWS + threadIdx.x) * V;
  if (i >= a.n * a.columns) return;
  const int64_t row = i / a.columns;
  const int column = (int)(i - row * a.columns);
  if (a.visible && !a.visible[row]) return;
  const AdamStep<float> s = {(float)a.beta1, (float)a.beta2, (float)(1 - a.beta1), (float)(1 - a.beta2), (float)a.epsilon, (float)a.decay, (float)a.decay_max};
  const float* own = a.row_steps ? a.corrections + 2 * a.row_steps[row] : nullptr;
  const float one = own ? own[0] : (float)a.correct1, two = own ? own[1] : (float)a.correct2;
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
