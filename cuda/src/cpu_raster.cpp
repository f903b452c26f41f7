// The rasterizer's entries of the C ABI: memory, tasks and threads around the loops of cpu_core.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_core.h"
#include "cpu_entry.h"
#include "cpu_memory.h"
#include "cpu_threads.h"

using namespace sk;

namespace {

// One T for each thread that takes part, made when it first asks.
template <class T> struct PerWorker {
  std::vector<std::unique_ptr<Buffer<T>>> items{(size_t)pool_threads()};
  T& operator[](int worker) {
    if (!items[worker]) items[worker].reset(new Buffer<T>(1));
    return *items[worker]->data;
  }
};

struct Spares {   // zeros [count] for each thread
  std::vector<std::vector<real>> items{(size_t)pool_threads()};
  int64_t count;
  explicit Spares(int64_t count) : count(count) {}
  real* operator[](int worker) {
    if (items[worker].empty()) items[worker].assign(count > 0 ? count : 1, 0);
    return items[worker].data();
  }
};

// Puts the visible rows, front to back, into the lists of the tiles that they reach, in slices.
void bin(const BlendArgs& a, const int32_t* order, const int64_t* reached, int64_t visible, int64_t base, int32_t* pairs, int64_t* tile_offsets) {
  const int64_t tiles = (int64_t)a.tiles_x * a.tiles_y;
  const int64_t slices = visible < 8192 ? 1 : visible / 4096 < 16 ? visible / 4096 : 16;
  Buffer<int32_t> next(slices * tiles);
  Buffer<int64_t> spans(visible);
  parallel(slices, [&](int64_t s, int) { count_tiles(a, order, reached, visible * s / slices, visible * (s + 1) / slices, visible, spans.data, next.data + s * tiles); });
  start_tiles(a, slices, base, next.data, tile_offsets);
  parallel(slices, [&](int64_t s, int) { fill_tiles(a, order, spans.data, visible * s / slices, visible * (s + 1) / slices, next.data + s * tiles, pairs + base); });
}

// Marks the entries that are the first ones of their rows: ~row instead of row. seen [n] has the rows that came before.
void mark_first(WeightList& list, uint8_t* seen) {
  for (int b = 0; b < TILE_BLOCKS; b++)
    for (int64_t i = 0; i < list.count[b]; i++) {
      int32_t& row = list.rows[b * list.capacity + i];
      if (!seen[row]) seen[row] = 1, row = ~row;
    }
}

// Runs `tile(t, worker, list)` and then `sum(first, last, t, list)` over all tiles in bands whose weight lists fit in memory. Sums go by slice of
// channels, and within one in tile order, so they do not depend on the threads. With seen [n], sums start where a row comes first.
template <class Tile, class Sum> void in_bands(const int64_t* tile_offsets, int64_t tiles, int channels, uint8_t* seen, Tile&& tile, Sum&& sum) {
  constexpr int64_t LIMIT = 48 << 20, ENTRY = BLOCK_PIXELS * sizeof(real) + sizeof(int32_t);
  auto bytes = [&](int64_t t) { return (tile_offsets[t + 1] - tile_offsets[t]) * TILE_BLOCKS * ENTRY + 64; };
  int64_t most = 0, band = 0;
  std::vector<int64_t> starts{0};
  for (int64_t t = 0; t < tiles; t++) {
    if (band + bytes(t) > LIMIT && band > 0) starts.push_back(t), band = 0;
    band += bytes(t);
    most = band > most ? band : most;
  }
  starts.push_back(tiles);
  Buffer<char> memory(most);
  std::vector<WeightList> lists;
  // As few slices as there are threads: each reads all the weights, and touches a row's sums in one piece.
  const int step = channels >= 6 * W ? 3 * W : W, steps = (channels + step - 1) / step, slice = (steps + pool_threads() - 1) / pool_threads() * step;
  for (size_t b = 0; b + 1 < starts.size(); b++) {
    const int64_t first = starts[b], count = starts[b + 1] - first;
    lists.assign(count, WeightList{});
    char* p = memory.data;
    for (int64_t i = 0; i < count; i++) {
      WeightList& l = lists[i];
      l.capacity = tile_offsets[first + i + 1] - tile_offsets[first + i];
      l.weights = (real*)p;
      l.rows = (int32_t*)(p + TILE_BLOCKS * l.capacity * BLOCK_PIXELS * sizeof(real));
      p += (TILE_BLOCKS * l.capacity * ENTRY + 63) / 64 * 64;
    }
    parallel(count, [&](int64_t i, int worker) { tile(first + i, worker, lists[i]); });
    if (seen)
      for (WeightList& l : lists) mark_first(l, seen);
    parallel((channels + slice - 1) / slice, [&](int64_t s, int) {
      const int c0 = (int)s * slice, c1 = c0 + slice < channels ? c0 + slice : channels;
      for (int64_t i = 0; i < count; i++) sum(c0, c1, first + i, lists[i]);
    });
  }
}

}  // namespace

extern "C" {

int32_t sk_project(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t sh_degree, int32_t sh_bands, const double* settings, const real* means, const real* quats, const real* log_scales, const real* logit_opacities, const real* sh, const real* world_to_cam, const real* K, const int64_t* rows, int64_t, real* splats, int32_t* order, real* radii, int64_t* tiles, int64_t* counts, int64_t*, int64_t, void*) {
  return guarded("sk_project", [&] {
    constexpr int64_t GROUP = 8;   // chunks of one task
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    Buffer<uint32_t> keys(n), keys_b(n);
    Buffer<int32_t> list(n), list_b(n);
    std::vector<int64_t> visible(chunks), pairs(chunks), bad(chunks);
    for (int c = 0; c < cameras; c++) {
      ProjectArgs a = {n, sh_degree, sh_bands, means, quats, log_scales, logit_opacities, sh, make_view(world_to_cam + 16 * c, K + 9 * c, width, height, settings), 0, n};
      const int64_t row_first = rows ? rows[2 * c] : 0, row_last = rows ? rows[2 * c + 1] : n;
      real *splats_c = splats + c * n * SK_SPLAT, *radii_c = radii + c * n;
      parallel((chunks + GROUP - 1) / GROUP, [&](int64_t task, int) {
        for (int64_t k = task * GROUP; k < chunks && k < (task + 1) * GROUP; k++) {
          int64_t first = k * CHUNK, last = first + CHUNK < n ? first + CHUNK : n;
          if (first < row_first || last > row_last) memset(radii_c + first, 0, sizeof(real) * (last - first)), memset(tiles + c * n + first, 0, sizeof(int64_t) * (last - first));
          first = first < row_first ? row_first : first;
          last = last > row_last ? row_last : last;
          pairs[k] = bad[k] = 0;
          visible[k] = first < last ? project_chunk(a, first, last, splats_c, radii_c, tiles + c * n, keys.data + k * CHUNK, list.data + k * CHUNK, &pairs[k], &bad[k]) : 0;
        }
      });
      int64_t count = 0, pair_count = 0, bad_count = 0;
      for (int64_t k = 0; k < chunks; k++) {   // close the gaps
        memmove(keys.data + count, keys.data + k * CHUNK, sizeof(uint32_t) * visible[k]);
        memmove(list.data + count, list.data + k * CHUNK, sizeof(int32_t) * visible[k]);
        count += visible[k];
        pair_count += pairs[k];
        bad_count += bad[k];
      }
      const int32_t* sorted = radix_sort(count, keys.data, list.data, keys_b.data, list_b.data);
      memcpy(order + c * n, sorted, sizeof(int32_t) * count);
      counts[3 * c] = count;
      counts[3 * c + 1] = pair_count;
      counts[3 * c + 2] = bad_count;
    }
    return SK_OK;
  });
}

int32_t sk_project_vjp(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t sh_degree, int32_t sh_bands, const double* settings, const real* means, const real* quats, const real* log_scales, const real* logit_opacities, const real* sh, const real* world_to_cam, const real* K, const int64_t* rows, const real* radii, const real* v_splats, real* v_means, real* v_quats, real* v_log_scales, real* v_logit_opacities, real* v_sh, real* v_world_to_cam, real* v_K, int64_t*, int64_t, void*) {
  return guarded("sk_project_vjp", [&] {
    constexpr int64_t GROUP = 4;
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    std::vector<double> pose(v_world_to_cam || v_K ? chunks * 16 : 0);
    const ProjectGrads out = {v_means, v_quats, v_log_scales, v_logit_opacities, v_sh};
    for (int c = 0; c < cameras; c++) {
      ProjectArgs a = {n, sh_degree, sh_bands, means, quats, log_scales, logit_opacities, sh, make_view(world_to_cam + 16 * c, K + 9 * c, width, height, settings), 0, n};
      const int64_t row_first = c && rows ? rows[2 * c] : 0, row_last = c && rows ? rows[2 * c + 1] : n;
      std::fill(pose.begin(), pose.end(), 0.0);
      parallel((chunks + GROUP - 1) / GROUP, [&](int64_t task, int) {
        for (int64_t k = task * GROUP; k < chunks && k < (task + 1) * GROUP; k++) {
          int64_t first = k * CHUNK, last = first + CHUNK < n ? first + CHUNK : n;
          first = first < row_first ? row_first : first;
          last = last > row_last ? row_last : last;
          double* p = pose.empty() ? nullptr : pose.data() + k * 16;
          if (first < last) project_vjp_chunk(a, first, last, radii + c * n, v_splats + c * n * SK_SPLAT, out, c > 0, p, p ? p + 12 : nullptr);
        }
      });
      double sum[16] = {};
      for (size_t i = 0; i < pose.size(); i++) sum[i % 16] += pose[i];
      if (v_world_to_cam) {
        for (int i = 0; i < 16; i++) v_world_to_cam[16 * c + i] = i < 12 ? (real)sum[i] : 0;
      }
      if (v_K) {
        real* k = v_K + 9 * c;
        memset(k, 0, sizeof(real) * 9);
        k[0] = (real)sum[12];
        k[4] = (real)sum[13];
        k[2] = (real)sum[14];
        k[5] = (real)sum[15];
      }
    }
    if (cameras == 0) {
      memset(v_means, 0, sizeof(real) * n * 3);
      memset(v_quats, 0, sizeof(real) * n * 4);
      memset(v_log_scales, 0, sizeof(real) * n * 3);
      memset(v_logit_opacities, 0, sizeof(real) * n);
      if (v_sh) memset(v_sh, 0, sizeof(real) * n * sh_bands * 3);
    }
    return SK_OK;
  });
}

int32_t sk_blend(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t channels, const double* settings, const real* splats, const int32_t* order, const int64_t* tiles, const int64_t* counts, const real* features, const real* background, int64_t capacity, int64_t* needed, int32_t* pairs, int64_t* tile_offsets, real* color, real* alpha, real* expected_depth, real* median_depth, real* features_out, int64_t*, int64_t, void*) {
  return guarded("sk_blend", [&] {
    int64_t total = 0;
    for (int c = 0; c < cameras; c++) total += counts[3 * c + 1];
    needed[0] = total;
    if (total > capacity) return SK_MORE;
    const int64_t pixels = (int64_t)width * height;
    if (features_out) expect_large(features_out, sizeof(real) * pixels * channels * cameras);
    std::vector<BlendArgs> args;
    int64_t base = 0;
    for (int c = 0; c < cameras; c++) {
      BlendArgs a = blend_args(width, height, channels, settings, splats + c * n * SK_SPLAT, features);
      a.background = offset(background, 3 * c);
      a.color = offset(color, 3 * pixels * c);
      a.alpha = alpha + pixels * c;
      a.expected_depth = offset(expected_depth, pixels * c);
      a.median_depth = offset(median_depth, pixels * c);
      a.features_out = offset(features_out, pixels * channels * c);
      args.push_back(a);
      bin(a, order + c * n, tiles + c * n, counts[3 * c], base, pairs, tile_offsets + (int64_t)a.tiles_x * a.tiles_y * c);
      base += counts[3 * c + 1];
    }
    const int64_t tile_count = args.empty() ? 0 : (int64_t)args[0].tiles_x * args[0].tiles_y;
    PerWorker<TileScratch> scratch;
    Spares spare(channels);
    parallel(tile_count * cameras, [&](int64_t t, int worker) {
      TileScratch& s = scratch[worker];
      s.spare = spare[worker];
      blend_tile(args[t / tile_count], (int)(t % tile_count), pairs + tile_offsets[t], tile_offsets[t + 1] - tile_offsets[t], s);
    });
    return SK_OK;
  });
}

int32_t sk_blend_vjp(int64_t n, int32_t cameras, int32_t width, int32_t height, int32_t channels, const double* settings, const real* splats, const int64_t* tiles, const int64_t* counts, const real* features, const real* background, const int32_t* pairs, const int64_t* tile_offsets, const real* color, const real* alpha, const real* expected_depth, const real* features_out, const real* v_color, const real* v_alpha, const real* v_expected_depth, const real* v_features_out, real* v_splats, real* v_features, real* v_background, real* weight_sums, int64_t*, int64_t, void*) {
  return guarded("sk_blend_vjp", [&] {
    const int64_t pixels = (int64_t)width * height;
    Buffer<uint8_t> seen(n);   // rows of v_features that have been written
    memset(seen.data, 0, n);
    if (v_features) expect_large(v_features, sizeof(real) * n * channels);
    PerWorker<VjpScratch> scratch;
    Spares spare(channels);
    for (int c = 0; c < cameras; c++) {
      BlendVjpArgs a = {};
      BlendArgs& f = a.forward = blend_args(width, height, channels, settings, splats + c * n * SK_SPLAT, features);
      f.background = offset(background, 3 * c);
      f.color = const_cast<real*>(offset(color, 3 * pixels * c));
      f.alpha = const_cast<real*>(alpha + pixels * c);
      f.expected_depth = const_cast<real*>(offset(expected_depth, pixels * c));
      f.features_out = const_cast<real*>(offset(features_out, pixels * channels * c));
      a.v_color = offset(v_color, 3 * pixels * c);
      a.v_alpha = offset(v_alpha, pixels * c);
      a.v_expected_depth = offset(v_expected_depth, pixels * c);
      a.v_features_out = offset(v_features_out, pixels * channels * c);
      a.stats = weight_sums != nullptr || v_features_out || v_expected_depth;
      const int64_t tile_count = (int64_t)f.tiles_x * f.tiles_y;
      const int64_t* offsets = tile_offsets + tile_count * c;
      constexpr int64_t GROUP = 1024;   // rows of one task
      const int64_t groups = (n + GROUP - 1) / GROUP;
      Buffer<PairSlots> slots(n);
      std::vector<int64_t> start(groups + 1, 0);
      parallel(groups, [&](int64_t g, int) {
        int64_t at = 0;
        for (int64_t row = g * GROUP; row < n && row < (g + 1) * GROUP; row++) {
          const TileSpan t = unpacked(tiles[c * n + row]);
          slots[row] = {(int32_t)at - t.y0 * (t.x1 - t.x0) - t.x0, t.x1 - t.x0};
          at += t.count();
        }
        start[g + 1] = at;
      });
      for (int64_t g = 0; g < groups; g++) start[g + 1] += start[g];
      parallel(groups, [&](int64_t g, int) {
        for (int64_t row = g * GROUP; row < n && row < (g + 1) * GROUP; row++) slots[row].first += (int32_t)start[g];
      });
      const int64_t pair_count = counts[3 * c + 1];
      Buffer<real> records(pair_count * PAIR_RECORD);
      Buffer<uint8_t> written(pair_count);
      memset(written.data, 0, pair_count);
      a.slots = slots.data;
      a.records = records.data;
      a.written = written.data;
      std::vector<double> tile_background(v_background ? 3 * tile_count : 0, 0.0);
      auto tile = [&](int64_t t, int worker, WeightList* weights) {
        VjpScratch& s = scratch[worker];
        s.t.spare = spare[worker];
        blend_tile_vjp(a, (int)t, pairs + offsets[t], offsets[t + 1] - offsets[t], s, weights, v_background ? &tile_background[3 * t] : nullptr);
      };
      if (a.v_features_out && v_features)
        in_bands(offsets, tile_count, channels, seen.data, [&](int64_t t, int worker, WeightList& l) { tile(t, worker, &l); },
                 [&](int c0, int c1, int64_t t, const WeightList& l) { sum_weighted(f, (int)t, l, a.v_features_out, c0, c1, v_features); });
      else
        parallel(tile_count, [&](int64_t t, int worker) { tile(t, worker, nullptr); });
      parallel(groups, [&](int64_t g, int) {
        int64_t at = start[g];
        for (int64_t row = g * GROUP; row < n && row < (g + 1) * GROUP; row++) {
          real *v = v_splats + (c * n + row) * SK_SPLAT, *w = weight_sums ? weight_sums + c * n + row : nullptr;
          if (const int32_t count = unpacked(tiles[c * n + row]).count()) {
            reduce_pairs(f.splats + row * SK_SPLAT, records.data + at * PAIR_RECORD, written.data + at, count, a.stats, v, w);
            at += count;
          } else {
            memset(v, 0, sizeof(real) * SK_SPLAT);
            if (w) *w = 0;
          }
        }
      });
      if (v_background)
        for (int k = 0; k < 3; k++) {
          double sum = 0;
          for (int64_t t = 0; t < tile_count; t++) sum += tile_background[3 * t + k];
          v_background[3 * c + k] = (real)sum;
        }
    }
    constexpr int64_t PART = 256;
    parallel(v_features ? (n + PART - 1) / PART : 0, [&](int64_t p, int) {
      for (int64_t row = p * PART; row < n && row < (p + 1) * PART; row++)
        if (!seen[row]) memset(v_features + row * channels, 0, sizeof(real) * channels);
    });
    return SK_OK;
  });
}

int32_t sk_uplift(int64_t n, int32_t width, int32_t height, int32_t channels, const double* settings, const real* splats, const int32_t* pairs, const int64_t* tile_offsets, const real* map, real* sums, real* weights, int64_t*, int64_t, void*) {
  (void)n;
  return guarded("sk_uplift", [&] {
    const BlendArgs a = blend_args(width, height, channels, settings, splats, nullptr);
    const int64_t tiles = (int64_t)a.tiles_x * a.tiles_y;
    PerWorker<TileScratch> scratch;
    in_bands(tile_offsets, tiles, channels, nullptr,
             [&](int64_t t, int worker, WeightList& l) { tile_weights(a, (int)t, pairs + tile_offsets[t], tile_offsets[t + 1] - tile_offsets[t], scratch[worker], l); },
             [&](int c0, int c1, int64_t t, const WeightList& l) {
               sum_weighted(a, (int)t, l, map, c0, c1, sums);
               if (c0 != 0) return;   // the weights belong to the first slice
               for (int b = 0; b < TILE_BLOCKS; b++)
                 for (int64_t i = 0; i < l.count[b]; i++) {
                   const real* w = l.weights + (b * l.capacity + i) * BLOCK_PIXELS;
                   real sum = 0;
                   for (int p = 0; p < BLOCK_PIXELS; p++) sum += w[p];
                   weights[l.rows[b * l.capacity + i]] += sum;
                 }
             });
    return SK_OK;
  });
}

}  // extern "C"
