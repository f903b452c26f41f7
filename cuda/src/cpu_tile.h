// What the forward and the backward walk over a tile share.
#pragma once
#include "cpu_core.h"

namespace sk {

// The block cull rounds differently from the pixel loop; a bound this much (in log2 alpha) above the cut keeps it conservative.
constexpr real CULL_SLACK = (real)0.02;

// Pixel centres of register r of the block whose first pixel is (x0, y0): row by row, 4 pixels a row.
alignas(64) constexpr real PIXEL_X[BLOCK_PIXELS] = {0.5, 1.5, 2.5, 3.5, 0.5, 1.5, 2.5, 3.5, 0.5, 1.5, 2.5, 3.5, 0.5, 1.5, 2.5, 3.5};
alignas(64) constexpr real PIXEL_Y[BLOCK_PIXELS] = {0.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5, 2.5, 2.5, 2.5, 2.5, 3.5, 3.5, 3.5, 3.5};
SK_FN void block_pixels(int r, real x0, real y0, Lanes& px, Lanes& py) {
  px = load(PIXEL_X + r * W) + x0;
  py = load(PIXEL_Y + r * W) + y0;
}

// Clears the sums; pixels outside the picture start stopped. Returns the blocks that hold a pixel of the picture.
SK_FN uint32_t start_tile(const BlendArgs& a, int tile_x, int tile_y, TileScratch& s) {
  for (int i = 0; i < 256; i += W) {
    store(s.running + i, splat(1));
    store(s.left + i, splat(1));
    store(s.r + i, splat(0));
    store(s.gr + i, splat(0));
    store(s.b + i, splat(0));
    store(s.depth + i, splat(0));
    store(s.median + i, splat(0));
  }
  if (tile_x + SK_TILE <= a.width && tile_y + SK_TILE <= a.height) return 0xFFFF;
  uint32_t alive = 0;
  for (int i = 0; i < 256; i++) {
    const int b = i / BLOCK_PIXELS, p = i % BLOCK_PIXELS;
    if (tile_x + BLOCK * (b & 3) + (p & 3) < a.width && tile_y + BLOCK * (b >> 2) + (p >> 2) < a.height)
      alive |= 1u << b;
    else
      s.running[i] = 0;
  }
  return alive;
}

// Copies the projected records of the batch next to each other.
SK_FN void load_batch(const BlendArgs& a, const int32_t* rows, int64_t following, int n, TileScratch& s) {
  for (int i = 0; i < n; i++) {
    if (i + 16 < following) {   // a record may straddle two cache lines
      const real* ahead = a.splats + (int64_t)rows[i + 16] * SK_SPLAT;
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + SK_SPLAT - 1);
    }
    s.rows[i] = rows[i];
    __builtin_memcpy(s.g + i * SK_SPLAT, a.splats + (int64_t)rows[i] * SK_SPLAT, sizeof(real) * SK_SPLAT);
  }
  const int whole = (n + W - 1) / W * W;   // the block test reads full registers: repeat the last record
  for (int i = n; i < whole; i++) __builtin_memcpy(s.g + i * SK_SPLAT, s.g + (n - 1) * SK_SPLAT, sizeof(real) * SK_SPLAT);
}

// Addresses of the block's 16 pixels in a map [H,W,channels]; pixels outside the picture all point at `spare` [channels].
SK_FN void block_rows(const BlendArgs& a, int x, int y, real* map, int channels, real* spare, real** out) {
  for (int p = 0; p < BLOCK_PIXELS; p++) {
    const int px = x + (p & 3), py = y + (p >> 2);
    out[p] = px < a.width && py < a.height ? map + ((int64_t)py * a.width + px) * channels : spare;
  }
}

// Appends the block's weights of this batch to the tile's list.
SK_FN void keep_weights(int b, const TileScratch& s, WeightList& list) {
  const int64_t at = b * list.capacity + list.count[b];
  for (int i = 0; i < s.count[b]; i++) list.rows[at + i] = s.rows[s.list[b][i]];
  __builtin_memcpy(list.weights + at * BLOCK_PIXELS, s.weights, sizeof(real) * BLOCK_PIXELS * (size_t)s.count[b]);
  list.count[b] += s.count[b];
}

}  // namespace sk
