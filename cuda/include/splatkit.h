// splatkit.h: the C ABI of every splatkit library (CPU per instruction set, CPU double, CUDA). splatkit/native.py parses this file.
//
// Grammar, so that a few lines of Python can read it: one prototype per line; types are int32_t, int64_t, double, real, pointers to
// those, and `void* stream`; `real` is float, or double in the library built with -DSK_REAL=double. Only sk_last_error returns text.
// Every entry that returns int32_t status returns SK_OK, SK_MORE (a capacity was too small: the needed count is written, nothing else
// is touched) or SK_ERROR (sk_last_error() says why). Arrays are dense, row-major, owned by the caller; NULL where marked optional.
// The CUDA library takes device arrays, but for `settings`, which it reads on the host; `stream` is the CUDA stream that every launch goes to, and
// `scratch` are scratch_words 8-byte words of device memory, as many as sk_scratch() says (NULL and 0 for CPU libraries). But for sk_fma_peak it never
// waits for the card, so sk_blend cannot answer SK_MORE there: with capacity < needed[0] the pictures are the background, and the caller looks at needed.
// What kernels touch four numbers at a time must start at a multiple of 16 bytes. Counts are int64_t.
#ifndef SPLATKIT_H
#define SPLATKIT_H
#include <stdint.h>

#ifndef SK_REAL
#define SK_REAL float
#endif
typedef SK_REAL real;

#if defined(_WIN32)
#define SK_API __declspec(dllexport)
#else
#define SK_API __attribute__((visibility("default")))
#endif

enum { SK_OK = 0, SK_MORE = 1, SK_ERROR = 2 };

// `settings` is an array of SK_SETTINGS doubles in this order (splatkit.raster.RasterSettings has their meaning and defaults).
enum { SK_NEAR = 0, SK_BLUR_PX2 = 1, SK_ANTIALIAS = 2, SK_ALPHA_MIN = 3, SK_ALPHA_MAX = 4, SK_TRANSMITTANCE_MIN = 5, SK_FOV_MARGIN = 6, SK_DETERMINISTIC = 7, SK_SETTINGS = 8 };

// One projected Gaussian is SK_SPLAT reals. log2 alpha(x, y) = LOGO - (A dx + B dy)^2 - (C dy)^2 with dx = x - X, dy = y - Y in pixels:
// squares do not cancel, as the three terms of the conic do for thin Gaussians. X, Y count from the middle of the picture, for the same
// reason: pixel (column, row) has its centre at (column + 1/2 - width / 2, row + 1/2 - height / 2).
// RX, RY are the half sides of the smallest axis-parallel box outside of which alpha < alpha_min.
// A gradient record has the derivative by the coefficients of dx^2, dx dy and dy^2 at A, B, C; RX, RY hold the sums over pixels of
// |d loss / d X|, |d loss / d Y|; the other places match.
enum { SK_X = 0, SK_Y = 1, SK_A = 2, SK_B = 3, SK_C = 4, SK_LOGO = 5, SK_R = 6, SK_G = 7, SK_BLUE = 8, SK_Z = 9, SK_RX = 10, SK_RY = 11, SK_SPLAT = 12 };

// Pictures are cut into tiles of SK_TILE x SK_TILE pixels, row by row; a pair is one (Gaussian, tile) incidence.
enum { SK_TILE = 16 };

#ifdef __cplusplus
extern "C" {
#endif

// Hash of this file in the library; the binding compares it with the file it parses.
SK_API int64_t sk_abi(void);
// Text of the calling thread's last SK_ERROR.
SK_API const char* sk_last_error(void);
// Best x86-64 level that this processor and system run: 2, 3 or 4; 0 on other processors.
SK_API int32_t sk_cpu_level(void);
// Number of threads of the CPU pool (1 to 256); the default is 1.
SK_API int32_t sk_set_threads(int32_t threads);
// GFLOP/s of independent fused multiply-adds in registers on `threads` threads, measured for about `seconds`.
SK_API double sk_fma_peak(int32_t threads, double seconds);

// Words of scratch that an entry needs on this library; capacity is sk_project's or sk_blend's, and for sk_blend_vjp 1 where the settings say SK_DETERMINISTIC, else 0.
enum { SK_FOR_PROJECT = 0, SK_FOR_PROJECT_VJP = 1, SK_FOR_BLEND = 2, SK_FOR_BLEND_VJP = 3, SK_FOR_UPLIFT = 4, SK_FOR_L1_SSIM = 5 };
SK_API int64_t sk_scratch(int32_t entry, int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t channels, int64_t capacity);

// Projects n Gaussians into C cameras. sh_degree = -1: no colour (sh may be NULL). sh_bands is K, the coefficients stored per row. The CUDA library sorts up to
// `capacity` visible rows of a camera: where there are more, they stand in `order` in no order, and the caller looks at counts. n is always enough.
// Out: splats [C,n,SK_SPLAT] (rows with radii > 0 only), order [C,n] (visible rows, front to back, ties by row), radii [C,n] (0 = not drawn), tiles [C,n] (the box that a row reaches: x0 | x1 << 12 | y0 << 24 | y1 << 36, ends excluded, and << 48 how many of its tiles, 65535 for more; 0 = nothing), counts [C,3] (visible, pairs, rows that hold a NaN or an infinity and were left out).
SK_API int32_t sk_project(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t sh_degree, int32_t sh_bands, const double* settings, const real* means, const real* quats, const real* log_scales, const real* logit_opacities, const real* sh, const real* world_to_cam, const real* K, const int64_t* rows, int64_t capacity, real* splats, int32_t* order, real* radii, int64_t* tiles, int64_t* counts, int64_t* scratch, int64_t scratch_words, void* stream);

// The vector-Jacobian product of sk_project. v_splats is overwritten nowhere; v_sh, v_world_to_cam, v_K optional. All v_ outputs are overwritten whole.
SK_API int32_t sk_project_vjp(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t sh_degree, int32_t sh_bands, const double* settings, const real* means, const real* quats, const real* log_scales, const real* logit_opacities, const real* sh, const real* world_to_cam, const real* K, const int64_t* rows, const real* radii, const real* v_splats, real* v_means, real* v_quats, real* v_log_scales, real* v_logit_opacities, real* v_sh, real* v_world_to_cam, real* v_K, int64_t* scratch, int64_t scratch_words, void* stream);

// Bins and blends. needed[0] gets the pair count; with capacity < needed the status is SK_MORE. channels = width of features [n,channels], 0 for none.
// Out, optional: color [C,H,W,3] over background [C,3] (NULL: black), expected_depth, median_depth [C,H,W], features_out [C,H,W,channels]. Always: alpha [C,H,W], pairs [capacity] (rows, tile by tile, front to back), tile_offsets [C*tiles+1].
SK_API int32_t sk_blend(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t channels, const double* settings, const real* splats, const int32_t* order, const int64_t* tiles, const int64_t* counts, const real* features, const real* background, int64_t capacity, int64_t* needed, int32_t* pairs, int64_t* tile_offsets, real* color, real* alpha, real* expected_depth, real* median_depth, real* features_out, int64_t* scratch, int64_t scratch_words, void* stream);

// The vector-Jacobian product of sk_blend. v_color, v_alpha, v_expected_depth, v_features_out are optional inputs (absent = 0).
// Out: v_splats [C,n,SK_SPLAT] (every row), v_features [n,channels] and v_background [C,3] (optional); weight_sums [C,n] (optional): sum over pixels of the blending weight.
SK_API int32_t sk_blend_vjp(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t channels, const double* settings, const real* splats, const int64_t* tiles, const int64_t* counts, const real* features, const real* background, const int32_t* pairs, const int64_t* tile_offsets, const real* color, const real* alpha, const real* expected_depth, const real* features_out, const real* v_color, const real* v_alpha, const real* v_expected_depth, const real* v_features_out, real* v_splats, real* v_features, real* v_background, real* weight_sums, int64_t* scratch, int64_t scratch_words, void* stream);

// Row sums of the blending weights times a map: sums [n,channels] += sum over pixels of w * map [H,W,channels], weights [n] += sum of w, over one camera.
SK_API int32_t sk_uplift(int64_t n, int32_t width, int32_t height, int32_t channels, const double* settings, const real* splats, const int32_t* pairs, const int64_t* tile_offsets, const real* map, real* sums, real* weights, int64_t* scratch, int64_t scratch_words, void* stream);

// Photometric loss of one picture [H,W,3]: terms[0] = mean |image - target|, terms[1] = mean SSIM (11x11 Gaussian window, sigma 1.5, zero padding), both over pixels with mask != 0 (mask [H,W] optional).
// v_image [H,W,3] (optional) gets the gradient of (1 - ssim_weight) L1 + ssim_weight (1 - SSIM).
SK_API int32_t sk_l1_ssim(int32_t width, int32_t height, const real* image, const real* target, const real* mask, double ssim_weight, double* terms, real* v_image, int64_t* scratch, int64_t scratch_words, void* stream);

// What AdamW-GS decays beside the step: nothing, sigmoid(param), exp(param).
enum { SK_PLAIN = 0, SK_OPACITY = 1, SK_SCALE = 2 };

// Adam (Kingma & Ba 2015) in place on param [n,columns] with a learning rate per column. Bias corrections 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t) are
// of t = step, or where given those of t = row_steps [n] as corrections [T,2] has them, 0 <= t < T. visible [n] optional: rows that are 0 are left untouched.
// For SK_OPACITY and SK_SCALE a step also has learning rate x min(decay x d attribute / d param / (sqrt(v) correction + epsilon), decay_max) taken off.
SK_API int32_t sk_adam(int64_t n, int32_t columns, real* param, const real* grad, real* m, real* v, const real* learning_rates, double beta1, double beta2, double epsilon, int64_t step, const real* corrections, const int32_t* row_steps, const int32_t* visible, int32_t attribute, double decay, double decay_max, void* stream);

// sk_project_vjp of one camera and sk_adam on its gradients in one pass, so that no gradient is stored: in place on the fields and on their moments m_ and v_
// (both NULL: the field is frozen). v_splats is used up. learning_rates holds 3 for means, 4 quats, 3 log_scales, 1 logit_opacities, 3 sh_bands for sh. The gradients of opacity and
// scale first get pull x d attribute / d param. sparse != 0: rows with radii 0 are left untouched, else they take a step without a photometric gradient.
SK_API int32_t sk_project_vjp_adam(int64_t n, int32_t width, int32_t height, int32_t sh_degree, int32_t sh_bands, const double* settings, real* means, real* quats, real* log_scales, real* logit_opacities, real* sh, const real* world_to_cam, const real* K, const real* radii, real* v_splats, real* m_means, real* m_quats, real* m_log_scales, real* m_logit_opacities, real* m_sh, real* v_means, real* v_quats, real* v_log_scales, real* v_logit_opacities, real* v_sh, const real* learning_rates, double beta1, double beta2, double epsilon, int64_t step, const real* corrections, const int32_t* row_steps, int32_t sparse, double opacity_decay, double scale_decay, double decay_max, double opacity_pull, double scale_pull, int64_t* scratch, int64_t scratch_words, void* stream);

// 3DGS-MCMC position noise in place (Kheradmand et al. 2024, eq. 9): means += Sigma (noise * gate(opacity) * scale), noise [n,3] standard normal.
SK_API int32_t sk_mcmc_noise(int64_t n, real* means, const real* quats, const real* log_scales, const real* logit_opacities, const real* noise, double scale, void* stream);

// Opacity and scale of Gaussians that are replaced by `copies` equal ones at the same place (3DGS-MCMC eq. 9 of the supplement), in place on m rows.
SK_API int32_t sk_relocate(int64_t m, real* logit_opacities, real* log_scales, const int32_t* copies, void* stream);

// The core planes of all chunks of chunk_rows rows as splatkit/wire.py defines them: planes [chunks,words_per_chunk], of which the last chunk needs fewer words. unfit [chunks] gets 0, or 1 where a
// value of the chunk is not finite or beyond 1e30 (scales are clamped) and its plane was not written. Numbers below 1e-38 count as 0. Of sh [n,sh_bands,3] only band 0 is read. CPU libraries only.
SK_API int32_t sk_pack_core(int64_t n, int32_t sh_bands, const real* means, const real* quats, const real* log_scales, const real* logit_opacities, const real* sh, int64_t chunk_rows, int64_t words_per_chunk, int32_t* planes, int32_t* unfit, void* stream);

#ifdef __cplusplus
}
#endif
#endif
