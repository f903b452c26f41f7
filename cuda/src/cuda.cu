// The C ABI of the CUDA library: scratch, the order of launches, errors. No exception leaves it, nothing waits for the card, no memory is its own.
#include <exception>

#include "cuda_kernels.h"
#include "cuda_sort.h"
#include "sk/adam.h"

// Inside the namespace, not `using` it: the host half of nvcc includes CUDA's math headers behind this page, whose sqrt(double) would become ambiguous.
namespace sk {
namespace {

thread_local std::string error_text;

template <class F> int32_t guarded(const char* entry, F&& f) {
  try {
    f();
    return SK_OK;
  } catch (const std::exception& e) {
    error_text = std::string(entry) + ": " + e.what();
    return SK_ERROR;
  }
}

struct ProjectScratch {
  uint32_t *keys, *keys_sorted, *keys_packed = nullptr;
  int32_t *ids, *drawn = nullptr;
  int64_t* starts = nullptr;
  size_t adding = 0, sorting;
  char* temporary;
  ProjectScratch(Scratch& s, int64_t n, int64_t capacity) : keys(s.take<uint32_t>(n)), keys_sorted(s.take<uint32_t>(capacity)), ids(s.take<int32_t>(capacity)), sorting(sort_bytes(capacity, 4)) {
    if (capacity < n) {
      keys_packed = s.take<uint32_t>(capacity), drawn = s.take<int32_t>(warps_of(n)), starts = s.take<int64_t>(warps_of(n));
      adding = sum_bytes(warps_of(n));
    }
    temporary = s.take<char>(adding > sorting ? adding : sorting);
  }
};

struct BlendVjpScratch {
  float* tile_background;
  Incoming* incoming = nullptr;
  uint8_t* exponents = nullptr;
  long long *sums = nullptr, *features_sums = nullptr;
  float* features_scale = nullptr;
  BlendVjpScratch(Scratch& s, int64_t n, int32_t cameras, int64_t tiles, int32_t channels, bool deterministic) : tile_background(s.take<float>(3 * tiles * cameras)) {
    if (!deterministic) return;
    incoming = s.take<Incoming>(cameras * (tiles + 1));
    exponents = s.take<uint8_t>(cameras * n * EXPONENTS);
    if (channels) features_sums = s.take<long long>(n * channels), features_scale = s.take<float>(3);
    sums = s.take<long long>(cameras * n * SUMS_FULL);
  }
};

// What binning and blending alike know of the pictures.
template <class Args> Args sized(int64_t n, int32_t cameras, int32_t width, int32_t height) {
  Args a = {};
  a.n = n;
  a.cameras = cameras;
  a.width = width;
  a.height = height;
  a.tiles_x = tiles_of(width);
  a.tiles_y = tiles_of(height);
  return a;
}

BlendArgs blend_args(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t channels, const double* settings, const float* splats, const float* features, const float* background, const int32_t* pairs, const int64_t* tile_offsets) {
  auto a = sized<BlendArgs>(n, cameras, width, height);
  a.channels = channels;
  a.cut = cut_of<float>(settings);
  a.alpha_max = (float)settings[SK_ALPHA_MAX];
  a.transmittance_min = (float)settings[SK_TRANSMITTANCE_MIN];
  a.splats = splats;
  a.features = features;
  a.background = background;
  a.pairs = pairs;
  a.tile_offsets = tile_offsets;
  return a;
}

BinArgs bin_args(int64_t n, int32_t cameras, int32_t width, int32_t height, int64_t capacity) {
  auto a = sized<BinArgs>(n, cameras, width, height);
  a.capacity = capacity;
  return a;
}

void expect_small(int64_t n) {
  if (n > 0x7fffffff) throw std::runtime_error("n = " + std::to_string(n) + " rows; rows are counted in 32 bits here, at most 2147483647");
}

}  // namespace

#pragma GCC visibility push(default)   // the header's attribute does not reach into a namespace
extern "C" {

int64_t sk_abi(void) { return SK_ABI; }
const char* sk_last_error(void) { return error_text.c_str(); }
int32_t sk_cpu_level(void) { return 0; }
int32_t sk_set_threads(int32_t) { return SK_OK; }

double sk_fma_peak(int32_t, double seconds) {
  double peak = 0;
  guarded("sk_fma_peak", [&] { peak = fma_peak(seconds); });
  return peak;
}

int64_t sk_scratch(int32_t entry, int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t channels, int64_t capacity) {
  Scratch s(nullptr, 0);
  const int32_t status = guarded("sk_scratch", [&] {
    expect_small(n);
    expect_small(capacity);
    if (entry == SK_FOR_PROJECT) ProjectScratch(s, n, capacity);
    if (entry == SK_FOR_PROJECT_VJP) s.take<double>((int64_t)16 * blocks_for(n, VJP_ROWS));
    if (entry == SK_FOR_BLEND) bin(bin_args(n, cameras, width, height, capacity), s, nullptr);
    if (entry == SK_FOR_BLEND_VJP) BlendVjpScratch(s, n, cameras, (int64_t)tiles_of(width) * tiles_of(height), channels, capacity != 0);
    if (entry == SK_FOR_L1_SSIM) s.take<int64_t>(l1_ssim_words(width, height));
  });
  return status == SK_OK ? s.words() : -1;
}

int32_t sk_project(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t sh_degree, int32_t sh_bands, const double* settings, const float* means, const float* quats, const float* log_scales, const float* logit_opacities, const float* sh, const float* world_to_cam, const float* K, const int64_t* rows, int64_t capacity, float* splats, int32_t* order, float* radii, int64_t* tiles, int64_t* counts, int64_t* scratch, int64_t scratch_words, void* stream) {
  return guarded("sk_project", [&] {
    expect_small(n);
    const cudaStream_t to = (cudaStream_t)stream;
    Scratch memory(scratch, scratch_words);
    capacity = capacity < n ? capacity : n;
    const ProjectScratch s(memory, n, capacity);
    check(cudaMemsetAsync(counts, 0, sizeof(int64_t) * 3 * cameras, to), "memset");
    for (int c = 0; c < cameras && n; c++) {
      const bool all = capacity == n;
      const ProjectArgs a = {n, width, height, sh_degree, sh_bands, Settings(settings), cut_of<float>(settings), means, quats, log_scales, logit_opacities, sh, world_to_cam + 16 * c, K + 9 * c,
                             offset(rows, 2 * c), splats + c * n * SK_SPLAT, radii + c * n, tiles + c * n, counts + 3 * c, s.keys, all ? s.ids : nullptr, s.drawn, nullptr};
      project(a, to);
      if (!all) {
        exclusive_sum(s.temporary, s.adding, s.drawn, s.starts, warps_of(n), to);
        check(cudaMemsetAsync(s.keys_packed, 0xff, sizeof *s.keys_packed * capacity, to), "memset");   // what is not written sorts behind
        pack_drawn(a, s.starts, capacity, s.keys_packed, s.ids, order + c * n, to);
      }
      sort_pairs(s.temporary, s.sorting, all ? s.keys : s.keys_packed, s.keys_sorted, s.ids, order + c * n, capacity, 32, to);
    }
  });
}

int32_t sk_project_vjp(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t sh_degree, int32_t sh_bands, const double* settings, const float* means, const float* quats, const float* log_scales, const float* logit_opacities, const float* sh, const float* world_to_cam, const float* K, const int64_t* rows, const float* radii, const float* v_splats, float* v_means, float* v_quats, float* v_log_scales, float* v_logit_opacities, float* v_sh, float* v_world_to_cam, float* v_K, int64_t* scratch, int64_t scratch_words, void* stream) {
  return guarded("sk_project_vjp", [&] {
    const cudaStream_t to = (cudaStream_t)stream;
    Scratch memory(scratch, scratch_words);
    double* pose = v_world_to_cam || v_K ? memory.take<double>((int64_t)16 * blocks_for(n, VJP_ROWS)) : nullptr;
    for (int c = 0; c < cameras && n; c++) {
      const ProjectArgs a = {n, width, height, sh_degree, sh_bands, Settings(settings), cut_of<float>(settings), means, quats, log_scales, logit_opacities, sh, world_to_cam + 16 * c, K + 9 * c,
                             offset(rows, 2 * c), nullptr, const_cast<float*>(radii) + c * n, nullptr, nullptr, nullptr, nullptr, nullptr, const_cast<float*>(v_splats) + c * n * SK_SPLAT};
      project_vjp(a, {{v_means, v_quats, v_log_scales, v_logit_opacities, v_sh}, pose, c > 0}, offset(v_world_to_cam, 16 * c), offset(v_K, 9 * c), to);
    }
    if (n == 0 && v_world_to_cam) check(cudaMemsetAsync(v_world_to_cam, 0, sizeof(float) * 16 * cameras, to), "memset");
    if (n == 0 && v_K) check(cudaMemsetAsync(v_K, 0, sizeof(float) * 9 * cameras, to), "memset");
    if (cameras) return;
    const int64_t columns[] = {3, 4, 3, 1, 3 * (int64_t)sh_bands};
    float* const outs[] = {v_means, v_quats, v_log_scales, v_logit_opacities, v_sh};
    for (int i = 0; i < 5; i++)
      if (outs[i]) check(cudaMemsetAsync(outs[i], 0, sizeof(float) * n * columns[i], to), "memset");
  });
}

int32_t sk_blend(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t channels, const double* settings, const float* splats, const int32_t* order, const int64_t* tiles, const int64_t* counts, const float* features, const float* background, int64_t capacity, int64_t* needed, int32_t* pairs, int64_t* tile_offsets, float* color, float* alpha, float* expected_depth, float* median_depth, float* features_out, int64_t* scratch, int64_t scratch_words, void* stream) {
  return guarded("sk_blend", [&] {
    expect_small(n);
    expect_small(capacity);
    const cudaStream_t to = (cudaStream_t)stream;
    Scratch memory(scratch, scratch_words);
    BinArgs b = bin_args(n, cameras, width, height, capacity);
    b.cut = cut_of<float>(settings);
    b.splats = splats;
    b.order = order;
    b.tiles = tiles;
    b.counts = counts;
    b.needed = needed;
    b.pairs = pairs;
    b.tile_offsets = tile_offsets;
    bin(b, memory, to);
    BlendArgs a = blend_args(n, cameras, width, height, channels, settings, splats, features, background, pairs, tile_offsets);
    a.color = color;
    a.alpha = alpha;
    a.expected_depth = expected_depth;
    a.median_depth = median_depth;
    a.features_out = features_out;
    blend(a, to);
    if (features_out && channels) blend_features(a, to);
  });
}

int32_t sk_blend_vjp(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t channels, const double* settings, const float* splats, const int64_t* tiles, const int64_t* counts, const float* features, const float* background, const int32_t* pairs, const int64_t* tile_offsets, const float* color, const float* alpha, const float* expected_depth, const float* features_out, const float* v_color, const float* v_alpha, const float* v_expected_depth, const float* v_features_out, float* v_splats, float* v_features, float* v_background, float* weight_sums, int64_t* scratch, int64_t scratch_words, void* stream) {
  (void)counts;
  return guarded("sk_blend_vjp", [&] {
    const cudaStream_t to = (cudaStream_t)stream;
    const bool deterministic = settings[SK_DETERMINISTIC] != 0;
    Scratch memory(scratch, scratch_words);
    const BlendVjpScratch s(memory, n, cameras, (int64_t)tiles_of(width) * tiles_of(height), channels, deterministic);
    BlendVjpArgs a = {};
    BlendArgs& f = a.forward = blend_args(n, cameras, width, height, channels, settings, splats, features, background, pairs, tile_offsets);
    f.color = const_cast<float*>(color);
    f.alpha = const_cast<float*>(alpha);
    f.expected_depth = const_cast<float*>(expected_depth);
    f.features_out = const_cast<float*>(features_out);
    a.v_color = v_color;
    a.v_alpha = v_alpha;
    a.v_expected_depth = v_expected_depth;
    a.v_features_out = v_features_out;
    a.v_splats = v_splats;
    a.v_features = v_features;
    a.v_background = v_background;
    a.weight_sums = weight_sums;
    a.tiles = tiles;
    a.tile_background = v_background ? s.tile_background : nullptr;
    const bool by_features = v_features_out && channels;
    if (!by_features) a.v_features_out = nullptr;
    a.fields = v_expected_depth || weight_sums ? SUMS_FULL : SUMS;
    a.incoming = s.incoming;
    a.exponents = s.exponents;
    a.sums = s.sums;
    a.features_sums = v_features ? s.features_sums : nullptr;
    a.features_scale = s.features_scale;
    a.every_channel = by_features && weight_sums;
    if (!deterministic) check(cudaMemsetAsync(v_splats, 0, sizeof(float) * cameras * n * SK_SPLAT, to), "memset");
    if (!deterministic && weight_sums) check(cudaMemsetAsync(weight_sums, 0, sizeof(float) * cameras * n, to), "memset");
    if (v_features) check(cudaMemsetAsync(v_features, 0, sizeof(float) * n * channels, to), "memset");
    if (deterministic) start_sums(a, to);
    if (v_color || v_alpha || v_expected_depth || weight_sums || v_background) blend_vjp(a, to);
    if (by_features) blend_features_vjp(a, to);
    if (deterministic) finish_sums(a, to);
  });
}

int32_t sk_uplift(int64_t n, int32_t width, int32_t height, int32_t channels, const double* settings, const float* splats, const int32_t* pairs, const int64_t* tile_offsets, const float* map, float* sums, float* weights, int64_t*, int64_t, void* stream) {
  return guarded("sk_uplift", [&] { uplift(blend_args(n, 1, width, height, channels, settings, splats, nullptr, nullptr, pairs, tile_offsets), map, sums, weights, (cudaStream_t)stream); });
}

int32_t sk_l1_ssim(int32_t width, int32_t height, const float* image, const float* target, const float* mask, double ssim_weight, double* terms, float* v_image, int64_t* scratch, int64_t scratch_words, void* stream) {
  return guarded("sk_l1_ssim", [&] {
    Scratch memory(scratch, scratch_words);
    l1_ssim(width, height, image, target, mask, ssim_weight, terms, v_image, memory, (cudaStream_t)stream);
  });
}

int32_t sk_adam(int64_t n, int32_t columns, float* param, const float* grad, float* m, float* v, const float* learning_rates, double beta1, double beta2, double epsilon, int64_t step, const float* corrections, const int32_t* row_steps, const int32_t* visible, int32_t attribute, double decay, double decay_max, void* stream) {
  return guarded("sk_adam", [&] {
    double correct1, correct2;
    bias_corrections(beta1, beta2, step, correct1, correct2);
    adam_rows({n, columns, attribute, param, grad, m, v, learning_rates, beta1, beta2, epsilon, decay, decay_max, correct1, correct2, corrections, row_steps, visible}, (cudaStream_t)stream);
  });
}

int32_t sk_project_vjp_adam(int64_t n, int32_t width, int32_t height, int32_t sh_degree, int32_t sh_bands, const double* settings, float* means, float* quats, float* log_scales, float* logit_opacities, float* sh, const float* world_to_cam, const float* K, const float* radii, float* v_splats, float* m_means, float* m_quats, float* m_log_scales, float* m_logit_opacities, float* m_sh, float* v_means, float* v_quats, float* v_log_scales, float* v_logit_opacities, float* v_sh, const float* learning_rates, double beta1, double beta2, double epsilon, int64_t step, const float* corrections, const int32_t* row_steps, int32_t sparse, double opacity_decay, double scale_decay, double decay_max, double opacity_pull, double scale_pull, int64_t*, int64_t, void* stream) {
  return guarded("sk_project_vjp_adam", [&] {
    const ProjectArgs a = {n, width, height, sh_degree, sh_bands, Settings(settings), cut_of<float>(settings), means, quats, log_scales, logit_opacities, sh, world_to_cam, K,
                           nullptr, nullptr, const_cast<float*>(radii), nullptr, nullptr, nullptr, nullptr, nullptr, v_splats};
    ProjectStep s = {{means, quats, log_scales, logit_opacities, sh}, {m_means, m_quats, m_log_scales, m_logit_opacities, m_sh}, {v_means, v_quats, v_log_scales, v_logit_opacities, v_sh},
                     learning_rates, corrections, row_steps, beta1, beta2, epsilon, 0, 0, opacity_decay, scale_decay, decay_max, (float)opacity_pull, (float)scale_pull, sparse != 0};
    bias_corrections(beta1, beta2, step, s.correct1, s.correct2);
    project_vjp_step(a, s, (cudaStream_t)stream);
  });
}

int32_t sk_mcmc_noise(int64_t n, float* means, const float* quats, const float* log_scales, const float* logit_opacities, const float* noise, double scale, void* stream) {
  return guarded("sk_mcmc_noise", [&] { mcmc_noise_rows(n, means, quats, log_scales, logit_opacities, noise, (float)scale, (cudaStream_t)stream); });
}

int32_t sk_relocate(int64_t m, float* logit_opacities, float* log_scales, const int32_t* copies, void* stream) {
  return guarded("sk_relocate", [&] { relocate_rows(m, logit_opacities, log_scales, copies, (cudaStream_t)stream); });
}

int32_t sk_pack_core(int64_t, int32_t, const float*, const float*, const float*, const float*, const float*, int64_t, int64_t, int32_t*, int32_t*, void*) {
  return guarded("sk_pack_core", [] { throw std::runtime_error("runs on CPUs; hand over the scene's tensors there"); });
}

}  // extern "C"
#pragma GCC visibility pop
}  // namespace sk
