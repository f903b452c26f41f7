// Blending of one tile, forward: Gaussians are culled against 4 x 4 blocks of pixels, then each block walks its own list with its
// pixels in registers.
#include "cpu_core.h"
#include "cpu_tile.h"

namespace sk {

namespace {

#if !defined(__AVX512F__)
// Which bits of a number of four are set, in order, in 16 bits each.
struct Four {
  uint64_t places[16];
  constexpr Four() : places() {
    for (int m = 0; m < 16; m++)
      for (int bit = 0, at = 0; bit < 4; bit++)
        if (m >> bit & 1) places[m] |= (uint64_t)bit << 16 * at++;
  }
};
constexpr Four FOUR;
#endif

// Lists, per block, the Gaussians of the batch that may touch it (in order).
SK_FN void list_blocks(const BlendArgs& a, int tile_x, int tile_y, int n, uint32_t alive, TileScratch& s) {
  for (int b = 0; b < TILE_BLOCKS; b++) s.count[b] = 0;
  for (int at = 0; at < n; at += W) {
    LaneMask touched[TILE_BLOCKS];
    touching(a, tile_x, tile_y, at, alive, s, touched);
    const uint32_t used = n - at >= W ? ~0u : (1u << (n - at)) - 1;
    for (uint32_t left = alive; left; left &= left - 1) {
      const int b = __builtin_ctz(left);
      uint32_t m = bits(touched[b]) & used;
      uint16_t* list = s.list[b] + s.count[b];
#if defined(__AVX512F__)
      const __m512i row = _mm512_add_epi32(_mm512_load_si512(COUNTING), _mm512_set1_epi32(at));
      _mm256_storeu_si256((__m256i*)list, _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32((__mmask16)m, row)));
      s.count[b] += __builtin_popcount(m);
#else
      for (int from = at; m; from += 4, m >>= 4) {   // four numbers are written, whether or not so many are wanted: no jump to foresee
        const uint64_t four = FOUR.places[m & 15] + (uint64_t)from * 0x0001000100010001;
        __builtin_memcpy(list, &four, sizeof four);
        list += __builtin_popcount(m & 15);
      }
      s.count[b] = (int)(list - s.list[b]);
#endif
    }
  }
}

// One block over its list. Returns whether any of its pixels is still going.
template <bool DEPTH, bool WEIGHTS> SK_FN bool blend_block(const BlendArgs& a, int b, TileScratch& s) {
  const int at = b * BLOCK_PIXELS;
  const Block zero = splat_of<Block>(0), half = splat_of<Block>(0.5), transmittance_min = splat_of<Block>(a.transmittance_min);
  Block px[IN_STEP], py[IN_STEP];
  for (int k = 0; k < IN_STEP; k++) px[k] = load_pack<R>(s.px + at), py[k] = load_pack<R>(s.py + at);
  Block left = load_pack<R>(s.left + at), red = load_pack<R>(s.r + at), green = load_pack<R>(s.gr + at), blue = load_pack<R>(s.b + at);
  Block depth = load_pack<R>(s.depth + at), median = load_pack<R>(s.median + at);
  PackMask<R> going = less(zero, load_pack<R>(s.running + at));
  uint16_t* list = s.list[b];
  for (int k = 0; k < IN_STEP - 1; k++) list[s.count[b] + k] = BATCH;   // fills the last step with Gaussians that touch nothing
  bool block_going = true;
  int kept = 0;   // with WEIGHTS: the list keeps the Gaussians that have a weight at any pixel
  for (int i = 0; i < s.count[b] && block_going; i += IN_STEP) {
    const real* p[IN_STEP];
    for (int k = 0; k < IN_STEP; k++) p[k] = s.g + list[i + k] * SK_SPLAT;
    const Several alpha = alphas_at(a, p, px, py).alpha;
#pragma GCC unroll 4
    for (int k = 0; k < IN_STEP; k++) {
      const Step<Block> step = blend_step(left, part(alpha, k), transmittance_min);
      going = both(going, step.going);
      const Block w = where(going, step.weight, zero);
      red += w * p[k][SK_R];
      green += w * p[k][SK_G];
      blue += w * p[k][SK_BLUE];
      if (DEPTH) {
        depth += w * p[k][SK_Z];
        median = where(both(going, both(less(half, left), at_least(half, step.left))), splat_of<Block>(p[k][SK_Z]), median);
      }
      left = where(going, step.left, left);
      if (WEIGHTS) {
        store(s.weights + kept * BLOCK_PIXELS, w);
        list[kept] = list[i + k];
        kept += any(less(zero, w));
      }
    }
    block_going = any(going);
  }
  if (WEIGHTS) s.count[b] = kept;
  store(s.running + at, where(going, left, zero));
  store(s.left + at, left);
  store(s.r + at, red);
  store(s.gr + at, green);
  store(s.b + at, blue);
  if (DEPTH) {
    store(s.depth + at, depth);
    store(s.median + at, median);
  }
  return block_going;
}

template <bool DEPTH, bool WEIGHTS> void walk_tile(const BlendArgs& a, int tile, const int32_t* rows, int64_t n, TileScratch& s, WeightList* weights) {
  const int tile_x = tile % a.tiles_x * SK_TILE, tile_y = tile / a.tiles_x * SK_TILE;
  uint32_t alive = start_tile(a, tile_x, tile_y, s), unwritten = alive;   // the latter of features_out
  for (int64_t first = 0; first < n && alive; first += BATCH) {
    const int batch = (int)(n - first < BATCH ? n - first : BATCH);
    load_batch(a, rows + first, n - first, batch, s);
    list_blocks(a, tile_x, tile_y, batch, alive, s);
    for (uint32_t left = alive; left; left &= left - 1) {
      const int b = __builtin_ctz(left);
      if (s.count[b] == 0) continue;
      if (!blend_block<DEPTH, WEIGHTS>(a, b, s)) alive &= ~(1u << b);
      if (WEIGHTS && weights) keep_weights(b, s, *weights);
      if (WEIGHTS && !weights) {
        add_features(a, b, tile_x + BLOCK * (b & 3), tile_y + BLOCK * (b >> 2), unwritten >> b & 1, s);
        unwritten &= ~(1u << b);
      }
    }
  }
  for (uint32_t left = WEIGHTS && !weights ? unwritten : 0; left; left &= left - 1) {
    const int b = __builtin_ctz(left);
    s.count[b] = 0;
    add_features(a, b, tile_x + BLOCK * (b & 3), tile_y + BLOCK * (b >> 2), true, s);
  }
}

}  // namespace

void blend_tile(const BlendArgs& a, int tile, const int32_t* rows, int64_t n, TileScratch& s) {
  const bool depth = a.expected_depth || a.median_depth;
  const int tile_x = tile % a.tiles_x * SK_TILE, tile_y = tile / a.tiles_x * SK_TILE;
  if (a.features_out)
    walk_tile<true, true>(a, tile, rows, n, s, nullptr);
  else if (depth)
    walk_tile<true, false>(a, tile, rows, n, s, nullptr);
  else
    walk_tile<false, false>(a, tile, rows, n, s, nullptr);
  const real none[3] = {}, *bg = a.background ? a.background : none;
  for (int b = 0; b < TILE_BLOCKS; b++) {
    const BlockOfMap at(a, tile_x + BLOCK * (b & 3), tile_y + BLOCK * (b >> 2));
    if (at.empty()) continue;
    const Block left = load_pack<R>(s.left + b * BLOCK_PIXELS), opaque = splat_of<Block>(1) - left, alpha[1] = {opaque};
    write_block(at, alpha, a.alpha);
    if (a.color) {
      const real* sums[3] = {s.r, s.gr, s.b};
      Block color[3];
      for (int k = 0; k < 3; k++) color[k] = load_pack<R>(sums[k] + b * BLOCK_PIXELS) + left * bg[k];
      write_block(at, color, a.color);
    }
    if (a.expected_depth) {
      const PackMask<R> some = less(splat_of<Block>(1e-6), opaque);
      const Block depth[1] = {where(some, load_pack<R>(s.depth + b * BLOCK_PIXELS) * reciprocal(opaque), splat_of<Block>(0))};
      write_block(at, depth, a.expected_depth);
    }
    if (a.median_depth) {
      const Block depth[1] = {load_pack<R>(s.median + b * BLOCK_PIXELS)};
      write_block(at, depth, a.median_depth);
    }
  }
}

void tile_weights(const BlendArgs& a, int tile, const int32_t* rows, int64_t n, TileScratch& s, WeightList& weights) {
  walk_tile<false, true>(a, tile, rows, n, s, &weights);
}

}  // namespace sk
