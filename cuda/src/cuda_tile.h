// How a block of threads walks the Gaussians of one tile: a warp has a sub-tile 8 pixels wide, PX pixels a lane, and skips what cannot touch it.
#pragma once
#include "cuda_kernels.h"

namespace sk {

// PX = 1: eight warps of 8 x 4 pixels; PX = 2: four of 8 x 8.
template <int PX> struct Sub {
  static constexpr int THREADS = SK_TILE * SK_TILE / PX, WARPS = THREADS / 32, HEIGHT = 4 * PX, BATCH = THREADS;
  int lane, left, top;             // of the sub-tile's first pixel in the picture
  float x, y[PX];                  // this lane's pixel centres, from the picture's middle
  bool inside[PX];
  int64_t pixel[PX];               // in a map [H,W]

  __device__ Sub(const BlendArgs& a, int tile) {
    lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    left = tile % a.tiles_x * SK_TILE + warp % 2 * 8;
    top = tile / a.tiles_x * SK_TILE + warp / 2 * HEIGHT;
    const int column = left + lane % 8;
    x = from_centre<float>(column, a.width);
#pragma unroll
    for (int p = 0; p < PX; p++) {
      const int row = top + lane / 8 + 4 * p;
      y[p] = from_centre<float>(row, a.height);
      inside[p] = column < a.width && row < a.height;
      pixel[p] = (int64_t)row * a.width + column;
    }
  }

  // Which of the 32 Gaussians from `first` on in the batch (n in all) may touch the sub-tile; bit i = Gaussian first + i.
  __device__ unsigned touching(const BlendArgs& a, const Record* batch, int first, int n) const {
    bool touches = false;
    if (first + lane < n) {
      const Record& r = batch[first + lane];
      const Gaussian2D<float> g = r.gaussian();
      const float lx = from_centre<float>(left, a.width) - g.x, ly = from_centre<float>(top, a.height) - g.y;
      const Column<float> c = column_of(g, y_per_x_of(g), lx, lx + 7);
      touches = peak_in(g, c, row_of(g, ly, ly + (HEIGHT - 1))) >= a.cut - (float)CULL_SLACK;
    }
    return __ballot_sync(FULL, touches);
  }
};

// The pairs of a tile, batch by batch into shared memory, until every pixel of the block has stopped.
struct TileList {
  const int32_t* pairs;
  int64_t at, end;
  __device__ TileList(const BlendArgs& a, int64_t tile) : pairs(a.pairs), at(a.tile_offsets[tile]), end(a.tile_offsets[tile + 1]) {}
};

// Where the record of a row and a tile stands.
__device__ inline int64_t slot_at(const BlendVjpArgs& v, int64_t row, int tile) {
  const TileSpan box = unpacked(v.tiles[row]);
  return v.slot_of[row] + (int64_t)(tile / v.forward.tiles_x - box.y0) * (box.x1 - box.x0) + tile % v.forward.tiles_x - box.x0;
}

}  // namespace sk
