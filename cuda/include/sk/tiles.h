// Pictures in tiles: which of them a projected Gaussian reaches. Scalars only.
#pragma once
#include "blend.h"
#include "splatkit.h"

namespace sk {

// Culls round differently from the pixel loop; a bound this much (in log2 alpha) above the cut keeps them conservative.
constexpr double CULL_SLACK = 0.02;

// The centre of a pixel column (or row), counted from the picture's centre as the records are.
template <class T> SK_FN T from_centre(int pixel, int size) { return (T)(2 * pixel + 1 - size) * (T)0.5; }

// How many tiles cover a side of the picture.
SK_FN int32_t tiles_of(int32_t size) { return (size + SK_TILE - 1) / SK_TILE; }

// The tiles of a box, x0 <= x < x1, y0 <= y < y1, and how sk_project hands them on: pictures have at most 32768 pixels a side, 2048 tiles.
struct TileSpan {
  int32_t x0, x1, y0, y1;
  SK_FN int32_t count() const { return (x1 - x0) * (y1 - y0); }
};
SK_FN TileSpan unpacked(int64_t t) { return {(int32_t)(t & 0xFFF), (int32_t)(t >> 12 & 0xFFF), (int32_t)(t >> 24 & 0xFFF), (int32_t)(t >> 36 & 0xFFF)}; }
// With how many of them are reached; MANY_TILES where that does not fit.
constexpr int MANY_TILES = 0xFFFF;
SK_FN int64_t packed(TileSpan t, int32_t reached) {
  const uint64_t count = reached < MANY_TILES ? reached : MANY_TILES;
  return (int64_t)((uint64_t)t.x0 | (uint64_t)t.x1 << 12 | (uint64_t)t.y0 << 24 | (uint64_t)t.y1 << 36 | count << 48);
}
SK_FN int32_t reached_of(int64_t t) { return (int32_t)(t >> 48 & 0xFFFF); }

// The ellipse inside of which a Gaussian may pass the cut: (a dx + b dy)^2 + (c dy)^2 <= room.
template <class T> struct Ellipse {
  T x, y, a, b, c, room;
  T inv_a;
  T half_height;          // dy of its topmost and lowest points
  T right_dy;             // dy of its rightmost point; the leftmost lies opposite
};

// Counted once and written once, by two kernels that must agree: every product and sum is rounded by itself.
template <class T> SK_FN Ellipse<T> ellipse_of(const Gaussian2D<T>& g, T cut) {
  Ellipse<T> e = {g.x, g.y, g.a, g.b, g.c, max(rounded_sum(g.logo, (T)CULL_SLACK - cut), (T)0), reciprocal(g.a), 0, 0};
  const T length2 = rounded_sum(rounded_product(g.b, g.b), rounded_product(g.c, g.c));
  e.half_height = rounded_product(quick_sqrt(e.room), reciprocal(g.c));
  e.right_dy = -rounded_product(rounded_product(g.b, e.half_height), reciprocal(quick_sqrt(length2)));
  return e;
}

// How far it reaches to the right (side = 1) or left (-1) at height dy, as a distance in x.
template <class T> SK_FN T edge_at(const Ellipse<T>& e, T dy, T side) {
  const T v = rounded_product(e.c, dy), inside = max(rounded_sum(e.room, -rounded_product(v, v)), (T)0);
  return rounded_product(rounded_sum(rounded_product(side, quick_sqrt(inside)), -rounded_product(e.b, dy)), e.inv_a);
}

// The tiles x0 <= x < x1 of one row of tiles that the ellipse may reach, within the box: none where x0 == x1. It touches all four sides of its box, so a
// box of one row or one column is taken whole.
template <class T> SK_FN void columns_of_row(const Ellipse<T>& e, const TileSpan& box, int tile_y, int width, int height, int& x0, int& x1) {
  x0 = box.x0, x1 = box.x1;
  if (box.x1 - box.x0 == 1 || box.y1 - box.y0 == 1) return;
  const T top = rounded_sum(from_centre<T>(tile_y * SK_TILE, height), -e.y);
  const T low = max(top, -e.half_height), high = min(rounded_sum(top, (T)(SK_TILE - 1)), e.half_height);
  x1 = x0;
  if (!(low <= high)) return;
  const T first = from_centre<T>(0, width), per_tile = (T)(1.0 / SK_TILE);
  const T left = rounded_sum(rounded_sum(edge_at(e, clamp(-e.right_dy, low, high), (T)-1), e.x), -first);   // in pixels from the first centre
  const T right = rounded_sum(rounded_sum(edge_at(e, clamp(e.right_dy, low, high), (T)1), e.x), -first);
  const T from = ceil_of(rounded_product(rounded_sum(left, (T)(1 - SK_TILE)), per_tile)), to = floor_of(rounded_product(right, per_tile));
  x0 = (int)clamp(from, (T)box.x0, (T)box.x1);
  x1 = (int)clamp(to + (T)1, (T)x0, (T)box.x1);
}

// How many tiles of the box the ellipse reaches.
template <class T> SK_FN int32_t tiles_reached(const Ellipse<T>& e, const TileSpan& box, int width, int height) {
  if (box.x1 - box.x0 == 1 || box.y1 - box.y0 == 1) return box.count();
  int32_t count = 0;
  for (int y = box.y0; y < box.y1; y++) {
    int x0, x1;
    columns_of_row(e, box, y, width, height, x0, x1);
    count += x1 - x0;
  }
  return count;
}

}  // namespace sk
