// Binning of the CPU core: the visible rows, front to back, into the lists of the tiles that they reach. A counting sort by tile, stable.
#include "cpu_core.h"

namespace sk {

BlendArgs blend_args(int32_t width, int32_t height, int32_t channels, const double* settings, const real* splats, const real* features) {
  BlendArgs a = {};
  a.width = width;
  a.height = height;
  a.tiles_x = tiles_of(width);
  a.tiles_y = tiles_of(height);
  a.channels = channels;
  a.cut = cut_of<real>(settings);
  a.alpha_max = (real)settings[SK_ALPHA_MAX];
  a.transmittance_min = (real)settings[SK_TRANSMITTANCE_MIN];
  a.splats = splats;
  a.features = features;
  return a;
}

namespace {

template <class F> SK_FN void for_tiles(const BlendArgs& a, int64_t span, F&& f) {
  const TileSpan t = unpacked(span);
  for (int32_t row = t.y0 * a.tiles_x; row < t.y1 * a.tiles_x; row += a.tiles_x)
    for (int32_t x = t.x0; x < t.x1; x++) f(row + x);
}

}  // namespace

void count_tiles(const BlendArgs& a, const int32_t* order, const int64_t* reached, int64_t first, int64_t last, int64_t visible, int64_t* spans, int32_t* count) {
  __builtin_memset(count, 0, sizeof(int32_t) * (size_t)a.tiles_x * a.tiles_y);
  for (int64_t from = first; from < last; from += CHUNK) {   // first fetched, then counted: what waits for memory waits together
    const int64_t to = last - from < CHUNK ? last : from + CHUNK;
    for (int64_t i = from; i < to; i++) {
      if (i + 16 < visible) __builtin_prefetch(reached + order[i + 16]);
      spans[i] = reached[order[i]];
    }
    for (int64_t i = from; i < to; i++) for_tiles(a, spans[i], [&](int32_t t) { count[t]++; });
  }
}

void start_tiles(const BlendArgs& a, int64_t slices, int64_t base, int32_t* next, int64_t* tile_offsets) {
  const int64_t tiles = (int64_t)a.tiles_x * a.tiles_y;
  int64_t at = 0;
  for (int64_t t = 0; t < tiles; t++) {
    tile_offsets[t] = base + at;
    for (int64_t s = 0; s < slices; s++) {
      const int32_t c = next[s * tiles + t];
      next[s * tiles + t] = (int32_t)at;
      at += c;
    }
  }
  tile_offsets[tiles] = base + at;
}

void fill_tiles(const BlendArgs& a, const int32_t* order, const int64_t* spans, int64_t first, int64_t last, int32_t* next, int32_t* pairs) {
  for (int64_t i = first; i < last; i++) for_tiles(a, spans[i], [&](int32_t t) { pairs[next[t]++] = order[i]; });
}

}  // namespace sk
