// The C ABI of the CPU library but for the rasterizer (cpu_raster.cpp) and the viewer's wire (cpu_pack.cpp): the library itself, loss, optimiser, MCMC.
#include <chrono>
#include <cstdio>
#include <vector>

#include "cpu_entry.h"
#include "cpu_threads.h"
#include "cpu_train.h"

using namespace sk;

static thread_local char error_text[512] = "";
int32_t sk::keep_error(const char* entry, const char* why) {
  snprintf(error_text, sizeof error_text, "%s: %s", entry, why);
  return SK_ERROR;
}

extern "C" {

int64_t sk_abi(void) { return SK_ABI; }
const char* sk_last_error(void) { return error_text; }

int32_t sk_cpu_level(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#define HAS(f) __builtin_cpu_supports(f)
  if (!(HAS("avx2") && HAS("fma") && HAS("bmi") && HAS("bmi2"))) return 2;
  return HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") && HAS("avx512vl") ? 4 : 3;
#undef HAS
#else
  return 0;
#endif
}

int64_t sk_scratch(int32_t, int64_t, int32_t, int32_t, int32_t, int32_t, int64_t) { return 0; }   // the CPU library keeps its own

int32_t sk_set_threads(int32_t threads) {
  set_pool_threads(threads);
  return SK_OK;
}

double sk_fma_peak(int32_t threads, double seconds) {
  constexpr int SUMS = W >= 16 ? 24 : 10;
  std::vector<double> rate(threads < 1 ? 1 : threads, 0);
  const int before = pool_threads();
  set_pool_threads((int)rate.size());
  parallel((int64_t)rate.size(), [&](int64_t t, int) {
    typedef std::chrono::steady_clock clock;
    Lanes s[SUMS];
    for (int i = 0; i < SUMS; i++) s[i] = splat((real)i);
    Lanes a = splat((real)0.999), b = splat((real)1e-3);
    const auto start = clock::now();
    int64_t rounds = 0;
    double spent;
    do {
      for (int k = 0; k < 20000; k++) {
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; i++) s[i] = s[i] * a + b;
      }
      rounds += 20000;
      spent = std::chrono::duration<double>(clock::now() - start).count();
    } while (spent < seconds);
    volatile real keep = 0;
    for (int i = 0; i < SUMS; i++) keep = keep + s[i][0];
    rate[t] = (double)rounds * SUMS * W * 2 / spent * 1e-9;
  });
  set_pool_threads(before);
  double sum = 0;
  for (double r : rate) sum += r;
  return sum;
}

int32_t sk_l1_ssim(int32_t width, int32_t height, const real* image, const real* target, const real* mask, double ssim_weight, double* terms, real* v_image, int64_t*, int64_t, void*) {
  return guarded("sk_l1_ssim", [&] { return l1_ssim(width, height, image, target, mask, ssim_weight, terms, v_image), SK_OK; });
}

int32_t sk_adam(int64_t n, int32_t columns, real* param, const real* grad, real* m, real* v, const real* learning_rates, double beta1, double beta2, double epsilon, int64_t step, const real* corrections, const int32_t* row_steps, const int32_t* visible, int32_t attribute, double decay, double decay_max, void*) {
  return guarded("sk_adam", [&] {
    double correct1, correct2;
    bias_corrections(beta1, beta2, step, correct1, correct2);
    const AdamStep<real> s = {(real)beta1, (real)beta2, (real)(1 - beta1), (real)(1 - beta2), (real)epsilon, (real)decay, (real)decay_max};
    adam_rows(n, columns, param, grad, m, v, learning_rates, s, attribute, (real)correct1, (real)correct2, corrections, row_steps, visible);
    return SK_OK;
  });
}

int32_t sk_project_vjp_adam(int64_t n, int32_t width, int32_t height, int32_t sh_degree, int32_t sh_bands, const double* settings, real* means, real* quats, real* log_scales, real* logit_opacities, real* sh, const real* world_to_cam, const real* K, const real* radii, real* v_splats, real* m_means, real* m_quats, real* m_log_scales, real* m_logit_opacities, real* m_sh, real* v_means, real* v_quats, real* v_log_scales, real* v_logit_opacities, real* v_sh, const real* learning_rates, double beta1, double beta2, double epsilon, int64_t step, const real* corrections, const int32_t* row_steps, int32_t sparse, double opacity_decay, double scale_decay, double decay_max, double opacity_pull, double scale_pull, int64_t*, int64_t, void*) {
  return guarded("sk_project_vjp_adam", [&] {   // here the gradients do take memory: what this saves is a card's
    const int columns[] = {3, 4, 3, 1, 3 * sh_bands}, attributes[] = {SK_PLAIN, SK_PLAIN, SK_SCALE, SK_OPACITY, SK_PLAIN};
    real *const params[] = {means, quats, log_scales, logit_opacities, sh}, *const m[] = {m_means, m_quats, m_log_scales, m_logit_opacities, m_sh}, *const v[] = {v_means, v_quats, v_log_scales, v_logit_opacities, v_sh};
    std::vector<real> grads[5];
    for (int g = 0; g < 5; g++) grads[g].resize(n * columns[g]);
    if (sk_project_vjp(n, 1, width, height, sh_degree, sh_bands, settings, means, quats, log_scales, logit_opacities, sh, world_to_cam, K, nullptr, radii, v_splats, grads[0].data(), grads[1].data(), grads[2].data(), grads[3].data(), m_sh ? grads[4].data() : nullptr, nullptr, nullptr, nullptr, 0, nullptr) != SK_OK) return (int32_t)SK_ERROR;
    for (int64_t i = 0; i < 3 * n && scale_pull != 0; i++) grads[2][i] += (real)scale_pull * slope<SCALE>(log_scales[i]);
    for (int64_t i = 0; i < n && opacity_pull != 0; i++) grads[3][i] += (real)opacity_pull * slope<OPACITY>(logit_opacities[i]);
    std::vector<int32_t> visible(sparse ? n : 0);
    for (int64_t i = 0; i < (int64_t)visible.size(); i++) visible[i] = radii[i] > 0;
    double correct1, correct2;
    bias_corrections(beta1, beta2, step, correct1, correct2);
    for (int g = 0; g < 5; g++) {
      const double decay = attributes[g] == SK_SCALE ? scale_decay : attributes[g] == SK_OPACITY ? opacity_decay : 0;
      const AdamStep<real> s = {(real)beta1, (real)beta2, (real)(1 - beta1), (real)(1 - beta2), (real)epsilon, (real)decay, (real)decay_max};
      if (m[g]) adam_rows(n, columns[g], params[g], grads[g].data(), m[g], v[g], learning_rates, s, decay != 0 ? attributes[g] : SK_PLAIN, (real)correct1, (real)correct2, corrections, row_steps, sparse ? visible.data() : nullptr);
      learning_rates += columns[g];
    }
    return (int32_t)SK_OK;
  });
}

int32_t sk_mcmc_noise(int64_t n, real* means, const real* quats, const real* log_scales, const real* logit_opacities, const real* noise, double scale, void*) {
  return guarded("sk_mcmc_noise", [&] { return mcmc_noise_rows(n, means, quats, log_scales, logit_opacities, noise, (real)scale), SK_OK; });
}

int32_t sk_relocate(int64_t m, real* logit_opacities, real* log_scales, const int32_t* copies, void*) {
  return guarded("sk_relocate", [&] { return relocate_rows(m, logit_opacities, log_scales, copies), SK_OK; });
}

}  // extern "C"
