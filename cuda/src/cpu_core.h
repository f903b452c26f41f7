// The CPU core: loops over rows, tiles and pixels. Freestanding (no std, new, threads or static objects), so that it also compiles to
// wasm32. Every function takes pointers, a range and scratch; cpu.cpp adds memory and threads, and the browser build its exports.
#pragma once
#include "sk/blend.h"
#include "sk/project.h"
#include "sk/tiles.h"
#include "splatkit.h"

namespace sk {

constexpr int CHUNK = 256;                       // rows of one projection task
constexpr int BLOCK = 4, BLOCK_PIXELS = 16;      // pixels a block: what the pixel loops hold in registers
constexpr int TILE_BLOCKS = 16;                  // blocks a tile
constexpr int BATCH = 256;                       // Gaussians of a tile that are worked on together
// The sums over a tile's pixels that one (Gaussian, tile) pair leaves: h, h dx, h dy, h dx^2, h dx dy, h dy^2 with h = d loss / d exponent;
// weight times v_colour; and in the full record weight times v_depth, |d loss / d x|, |d loss / d y|, the weight.
constexpr int MOMENTS = 9, MOMENTS_STATS = 13, PAIR_RECORD = 16;
constexpr int R = BLOCK_PIXELS / W;              // registers of a block
typedef Pack<R> Block;                           // a number for each of its pixels, row by row
static_assert(SK_TILE == 16 && BLOCK_PIXELS % W == 0, "a tile is 4 x 4 blocks of 4 x 4 pixels");

struct ProjectArgs {
  int64_t n;
  int32_t sh_degree, sh_bands;
  const real *means, *quats, *log_scales, *logit_opacities, *sh;
  View<real> view;
  int64_t row_first, row_last;
};

// Projects rows [first, last) (at most CHUNK): splats [n,SK_SPLAT], radii [n] and tiles [n] at their rows; keys and rows of the visible ones in row
// order. Returns how many are visible, adds their tiles to pairs and the rows that hold a NaN or an infinity to not_finite.
int project_chunk(const ProjectArgs& a, int64_t first, int64_t last, real* splats, real* radii, int64_t* tiles, uint32_t* keys, int32_t* rows, int64_t* pairs, int64_t* not_finite);

// Gradients of rows [first, last) (at most CHUNK) are added to v_*; pose [12] and intrinsics [4] get the chunk's sums.
struct ProjectGrads {
  real *means, *quats, *log_scales, *logit_opacities, *sh;
};
void project_vjp_chunk(const ProjectArgs& a, int64_t first, int64_t last, const real* radii, const real* v_splats, const ProjectGrads& out, bool add, double* v_pose, double* v_k);

// Sorts rows by key; equal keys keep their order. Returns where the sorted rows stand: in rows or in the scratch.
int32_t* radix_sort(int64_t n, uint32_t* keys, int32_t* rows, uint32_t* keys_scratch, int32_t* rows_scratch);

struct BlendArgs {
  int32_t width, height, tiles_x, tiles_y, channels;
  real cut, alpha_max, transmittance_min;
  const real *splats, *features, *background;   // of one camera; features [n,channels] or null; background [3] or null
  real *color, *alpha, *expected_depth, *median_depth, *features_out;
};

BlendArgs blend_args(int32_t width, int32_t height, int32_t channels, const double* settings, const real* splats, const real* features);

// The lists of all tiles, made in slices of the visible rows [visible] that `order` has front to back. First every slice [first, last): spans [visible]
// are the boxes of its rows, count [tiles] how many rows a tile gets from it. Then once: next [slices,tiles] are those counts, and become where each slice
// writes; tile_offsets [tiles+1] start at base. Then every slice again, with its row of `next`.
void count_tiles(const BlendArgs& a, const int32_t* order, const int64_t* reached, int64_t first, int64_t last, int64_t visible, int64_t* spans, int32_t* count);
void start_tiles(const BlendArgs& a, int64_t slices, int64_t base, int32_t* next, int64_t* tile_offsets);
void fill_tiles(const BlendArgs& a, const int32_t* order, const int64_t* spans, int64_t first, int64_t last, int32_t* next, int32_t* pairs);

struct TileScratch {
  alignas(64) real g[(BATCH + 1) * SK_SPLAT];   // the last one is a Gaussian that touches nothing
  alignas(64) real px[256], py[256], running[256], left[256], r[256], gr[256], b[256], depth[256], median[256];
  alignas(64) real weights[(BATCH + 3) * BLOCK_PIXELS];   // of one block
  int32_t rows[BATCH];
  uint16_t list[TILE_BLOCKS][BATCH + 16];
  int32_t count[TILE_BLOCKS];
  real* spare;           // [channels], where pixels outside the picture read and write
};

void blend_tile(const BlendArgs& a, int tile, const int32_t* rows, int64_t n, TileScratch& s);

// Where a row's pair records stand: that of tile (x, y) is number first + y * stride + x. Records of one row lie next to each other,
// tile by tile, so that their sum does not depend on which tile was finished first.
struct PairSlots {
  int32_t first, stride;
};

struct BlendVjpArgs {
  BlendArgs forward;                             // with the forward's outputs
  const real *v_color, *v_alpha, *v_expected_depth, *v_features_out;
  const PairSlots* slots;                        // [n]
  real* records;                                 // [pairs,PAIR_RECORD]
  uint8_t* written;                              // [pairs]: 0 where the record is all zeros and was not written
  bool stats;                                    // full records even where only colour has a gradient
};

// Blending weights of one tile, block by block: what the feature gradient and uplift are summed from.
struct WeightList {
  int64_t capacity, count[TILE_BLOCKS];          // entries a block may hold; entries it holds
  int32_t* rows;                                 // [TILE_BLOCKS,capacity]
  real* weights;                                 // [TILE_BLOCKS,capacity,BLOCK_PIXELS]
};

struct VjpScratch {
  TileScratch t;
  alignas(64) real behind[256], v_r[256], v_g[256], v_b[256], v_z[256];
  alignas(64) real feature_dot[TILE_BLOCKS][BATCH][BLOCK_PIXELS];   // touched only where there are features
  alignas(64) real second_running[256];
};

// Pair records of one tile, and background [3] += gradient by the background. weights may be null when there are no features.
void blend_tile_vjp(const BlendVjpArgs& a, int tile, const int32_t* rows, int64_t n, VjpScratch& s, WeightList* weights, double* v_background);

// Weights of one tile without gradients (uplift).
void tile_weights(const BlendArgs& a, int tile, const int32_t* rows, int64_t n, TileScratch& s, WeightList& weights);

// sums[row, first..last) += sum over pixels of weight * map, in the order of the list; map [H,W,channels]. sums [n,channels].
void sum_weighted(const BlendArgs& a, int tile, const WeightList& weights, const real* map, int first, int last, real* sums);

// The pair records of one row -> its gradient record, its weight sum (may be null).
void reduce_pairs(const real* splat, const real* records, const uint8_t* written, int64_t n, bool full, real* v_splat, real* weight_sum);

}  // namespace sk
