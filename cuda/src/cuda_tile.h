// How a warp walks the Gaussians of a tile: it has a sub-tile of 8 x 4 PX pixels, PX a lane, tests 32 Gaussians at a time, one a lane, and keeps
// those that may touch it in shared memory of its own. Warps wait for nobody.
#pragma once
#include "cuda_kernels.h"

namespace sk {

template <int PX> struct Sub {
  static constexpr int THREADS = SK_TILE * SK_TILE / PX, WARPS = THREADS / 32, HEIGHT = 4 * PX;
  int lane, left, top;             // of the sub-tile's first pixel in the picture
  float x, y[PX];                  // this lane's pixel centres, from the picture's middle
  bool inside[PX];
  int64_t pixel[PX];               // in a map [H,W]

  __device__ Sub(const BlendArgs& a, int tile) : Sub(a, tile, threadIdx.x / 32) {}
  __device__ Sub(const BlendArgs& a, int tile, int warp) {   // warp: of the tile's WARPS
    lane = threadIdx.x % 32;
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

  __device__ bool touched_by(const BlendArgs& a, const Gaussian2D<float>& g) const {
    const float lx = from_centre<float>(left, a.width) - g.x, ly = from_centre<float>(top, a.height) - g.y;
    return peak_in(g, column_of(g, y_per_x_of(g), lx, lx + 7), row_of(g, ly, ly + (HEIGHT - 1))) >= a.cut - (float)CULL_SLACK;
  }
};

// Light that still reaches a pixel: above 0 while it goes on, minus what was left once it has stopped, 0 outside of the picture.
struct Light {
  float left;
  __device__ bool going() const { return left > 0; }
  // The weight of a Gaussian of this alpha.
  __device__ float pass(float alpha, float transmittance_min) {
    const Step<float> step = blend_step(left, alpha, transmittance_min);
    left = step.going ? step.left : -abs(left);
    return step.going ? step.weight : 0;
  }
};

constexpr int GROUP = 32, PADDED = GROUP + 4;

// What a warp keeps in shared memory: the records of a group that may touch its sub-tile, in order, and their rows. Behind them, up to a multiple of
// 4, stand records that touch nothing.
struct Kept {
  Record records[PADDED];
  int32_t rows[PADDED];
};

// The pairs of a tile, GROUP at a time; the next group is on its way while one is worked on.
struct Walk {
  const int32_t* pairs;
  const float* splats;
  int64_t at, end;
  int lane, row, row_after;
  Record record;

  __device__ Walk(const BlendArgs& a, int camera, int tile, int lane) : pairs(a.pairs), splats(a.splats + camera * a.n * SK_SPLAT), lane(lane) {
    const int64_t t = (int64_t)camera * a.tiles_x * a.tiles_y + tile;
    at = a.tile_offsets[t];
    end = a.tile_offsets[t + 1];
    row = at + lane < end ? pairs[at + lane] : 0;
    row_after = at + GROUP + lane < end ? pairs[at + GROUP + lane] : 0;
    if (at + lane < end) record = load_record(splats, row);
  }
  __device__ bool more() const { return at < end; }

  // Keeps what may touch the sub-tile; returns how many.
  template <class S> __device__ int next(const BlendArgs& a, const S& sub, Kept& kept) {
    __syncwarp();   // nobody still reads what was kept before
    const bool touches = at + lane < end && sub.touched_by(a, record.gaussian());
    const unsigned mask = __ballot_sync(FULL, touches);
    const int count = __popc(mask), place = __popc(mask & ((1u << lane) - 1));
    if (touches) {
      kept.records[place] = record;
      kept.rows[place] = row;
    }
    if (lane < 4 && count + lane < PADDED) {
      kept.records[count + lane] = {{make_float4(0, 0, 0, 0), make_float4(0, -1e30f, 0, 0), make_float4(0, 0, 0, 0)}};
    }
    at += GROUP;
    row = row_after;
    if (at + lane < end) record = load_record(splats, row);
    row_after = at + GROUP + lane < end ? pairs[at + GROUP + lane] : 0;
    __syncwarp();
    return count;
  }
};

// Where each sum of a row stands in its gradient record, and behind that the weight.
__device__ constexpr int FIELD[SUMS_FULL] = {SK_LOGO, SK_X, SK_Y, SK_A, SK_B, SK_C, SK_R, SK_G, SK_BLUE, SK_Z, SK_RX, SK_RY, SK_SPLAT};

// Sums of whole numbers stay within 2^61; what is not finite lifts its sum so far above that no others bring it back.
__device__ constexpr long long WHOLE_MAX = 1ll << 61, WHOLE_NAN = 3 * WHOLE_MAX;
__device__ inline void add_whole(long long* sum, float scaled, float most) {
  if (abs(scaled) < INFINITY)
    atomicAdd((unsigned long long*)sum, (unsigned long long)__float2ll_rn(clamp(scaled, -most, most)));
  else
    atomicMax(sum, WHOLE_NAN);
}
__device__ inline float number_of(long long sum) { return sum > WHOLE_MAX ? NAN : (float)sum; }

// Adds to sum j of a row, which has these sums and exponents.
__device__ inline void add_share(long long* sums, const uint8_t* exponents, int j, float share) {
  add_whole(sums + j, share * from_bits((int)exponents[j] << 23), from_bits((int)exponents[ROOM] << 23));
}

}  // namespace sk
