// What the files of kernels offer to the ABI (cuda.cu). All pointers are of one camera unless said otherwise, all calls go to `stream`.
#pragma once
#include "cuda_core.h"

namespace sk {

// ---- cuda_project.cu, cuda_project_vjp.cu
struct ProjectArgs {
  int64_t n;
  int32_t width, height, sh_degree, sh_bands;
  Settings settings;
  float cut;                      // of the host: binning must have the same, to the bit
  const float *means, *quats, *log_scales, *logit_opacities, *sh, *world_to_cam, *K;
  const int64_t* rows;            // [2] or null: every row
  float *splats, *radii;
  int64_t *tiles, *counts;
  uint32_t* keys;                 // [n]: depth, or all ones where not drawn
  int32_t *ids, *drawn;           // [n]: 0, 1, 2 ..., [warps_of(n)]: how many rows of a warp are drawn; either may be null
  float* v_splats;                // of the gradient alone; a step uses it up
};
void project(const ProjectArgs& a, cudaStream_t stream);   // counts must be 0 before
inline int64_t warps_of(int64_t n) { return (n + 31) / 32; }
// Packs the keys and rows of the drawn; starts [warps_of(n)] says where those of a warp's rows begin. Behind `capacity` of them the rows go to `order`.
void pack_drawn(const ProjectArgs& a, const int64_t* starts, int64_t capacity, uint32_t* keys, int32_t* ids, int32_t* order, cudaStream_t stream);

constexpr int VJP_ROWS = 128;      // rows of a block: its registers leave no room for more
// What becomes of the gradients: written (or added), or taken at once as a step of Adam.
enum { MEANS = 0, QUATS = 1, LOG_SCALES = 2, LOGITS = 3, SH = 4, GROUPS = 5 };
struct ProjectGrads {
  float* groups[GROUPS];          // sh may be null
  double* pose;                   // [blocks_for(n, VJP_ROWS),16] or null
  bool add;
};
struct ProjectStep {
  float *params[GROUPS], *m[GROUPS], *v[GROUPS];   // moments are null where a group is frozen
  const float *learning_rates, *corrections;
  const int32_t* row_steps;
  double beta1, beta2, epsilon, correct1, correct2, opacity_decay, scale_decay, decay_max;
  float opacity_pull, scale_pull;
  bool sparse;
};
void project_vjp(const ProjectArgs& a, const ProjectGrads& out, float* v_world_to_cam, float* v_K, cudaStream_t stream);
void project_vjp_step(const ProjectArgs& a, const ProjectStep& out, cudaStream_t stream);

// ---- cuda_bin.cu
struct BinArgs {
  int64_t n, capacity;
  int32_t cameras, width, height, tiles_x, tiles_y;   // tiles of one camera's picture
  float cut;
  const float* splats;            // [C,n,SK_SPLAT]
  const int32_t* order;           // [C,n]
  const int64_t *tiles, *counts;  // [C,n], [C,3]
  int64_t* needed;
  int32_t* pairs;                 // [capacity]
  int64_t* tile_offsets;          // [C tiles + 1]
};
void bin(const BinArgs& a, Scratch& scratch, cudaStream_t stream);   // with a scratch without memory: only adds up what it takes

// ---- cuda_blend.cu, cuda_blend_vjp.cu, cuda_fixed.cu
struct BlendArgs {
  int64_t n;
  int32_t cameras, width, height, tiles_x, tiles_y, channels;
  float cut, alpha_max, transmittance_min;
  const float *splats, *features, *background;   // [C,n,SK_SPLAT], [n,channels], [C,3]
  const int32_t* pairs;
  const int64_t* tile_offsets;
  float *color, *alpha, *expected_depth, *median_depth, *features_out;   // [C,H,W,...]
};
void blend(const BlendArgs& a, cudaStream_t stream);

// What blending's gradient sums up for a row: by log2 alpha = logo - u^2 - v^2 with u = a dx + b dy, v = c dy and h = d loss / d log2 alpha, over pixels h,
// h's share of d loss / d x and d y, h dx^2, h dx dy, h dy^2, weight times v_colour; and in the full version weight times v_depth, |d loss / d x|,
// |d loss / d y|, the weight.
constexpr int SUMS_GEOMETRY = 6, SUMS = 9, SUMS_FULL = 13;
// A deterministic backward adds them up as whole numbers. Sum j of a row is scaled by 2^(exponents[j] - 127), which bounds of what may be added choose, and no
// share of it may be more than 2^(exponents[ROOM] - 127).
constexpr int EXPONENTS = 16, ROOM = SUMS_FULL;
constexpr int SUBS = 8;                // warps of a tile at most
struct alignas(16) Incoming {          // the largest |v_colour|, what the loss gains or loses by all that is drawn at a pixel, |v_expected_depth|
  float color, behind, depth, unused;
};
struct BlendVjpArgs {
  BlendArgs forward;
  const float *v_color, *v_alpha, *v_expected_depth, *v_features_out;
  float *v_splats, *v_features, *v_background, *weight_sums;
  const int64_t* tiles;           // [C,n]
  float* tile_background;         // [C tiles,3] or null
  bool every_channel;             // blend_vjp itself takes the features' share of geometry, pixel by pixel: slow, but |d loss / d x| is not a sum over channels
  int32_t fields;                 // SUMS or SUMS_FULL
  // Deterministic, else null; of rows with no tiles nothing is read or written.
  long long* sums;                // [C,n,fields]
  uint8_t* exponents;             // [C,n,EXPONENTS]
  Incoming* incoming;             // [C tiles + C]: by tile, and by camera
  long long* features_sums;       // [n,channels]: of v_features, if that is wanted
  float* features_scale;          // [3]: of those sums; the largest |v_features_out|, the largest |feature|
};
void blend_vjp(const BlendVjpArgs& a, cudaStream_t stream);
// Deterministic: before, the exponents, and all sums 0; after everything that adds to them, v_splats and weight_sums.
void start_sums(const BlendVjpArgs& a, cudaStream_t stream);
void finish_sums(const BlendVjpArgs& a, cudaStream_t stream);

// ---- cuda_features.cu
void blend_features(const BlendArgs& a, cudaStream_t stream);
void blend_features_vjp(const BlendVjpArgs& a, cudaStream_t stream);
// sums [n,channels] += weights of the first camera times map, row_weights [n] += the weights' sums.
void uplift(const BlendArgs& a, const float* map, float* sums, float* row_weights, cudaStream_t stream);

// ---- cuda_loss.cu, cuda_train.cu
int64_t l1_ssim_words(int32_t width, int32_t height);
void l1_ssim(int32_t width, int32_t height, const float* image, const float* target, const float* mask, double ssim_weight, double* terms, float* v_image, Scratch& scratch, cudaStream_t stream);
struct AdamArgs {
  int64_t n;
  int32_t columns, attribute;
  float* param;
  const float* grad;
  float *m, *v;
  const float* learning_rates;
  double beta1, beta2, epsilon, decay, decay_max, correct1, correct2;
  const float* corrections;
  const int32_t *row_steps, *visible;
};
void adam_rows(const AdamArgs& a, cudaStream_t stream);
void mcmc_noise_rows(int64_t n, float* means, const float* quats, const float* log_scales, const float* logits, const float* noise, float scale, cudaStream_t stream);
void relocate_rows(int64_t m, float* logits, float* log_scales, const int32_t* copies, cudaStream_t stream);
double fma_peak(double seconds);   // GFLOP/s

}  // namespace sk
