// What training needs beside the rasterizer: photometric loss, Adam, MCMC. Loops only; the formulas are in sk/.
#include "cpu_train.h"

#include <type_traits>
#include <vector>

#include "cpu_memory.h"
#include "cpu_threads.h"
#include "sk/adam.h"
#include "sk/mcmc.h"
#include "sk/ssim.h"

namespace sk {
namespace {

constexpr int PAD = 3 * SSIM_RADIUS + 1, BAND = 16;   // zero columns beside a row of interleaved channels; rows of one task

SK_FN real window(int j) { return (real)ssim_window(j); }

// out[i] = sum_j window(j) in[i + 3 j] over a padded row.
SK_FN Lanes along_row(const real* in) {
  Lanes sum = window(0) * load(in);
  for (int j = 1; j <= SSIM_RADIUS; j++) sum += window(j) * (load(in - 3 * j) + load(in + 3 * j));
  return sum;
}

struct Rows {   // the padded rows that one task convolves
  std::vector<real> memory;
  int stride;
  Rows(int planes, int length) : memory((size_t)planes * (length + 2 * PAD + 2 * W), 0), stride(length + 2 * PAD + 2 * W) {}
  real* operator[](int plane) { return memory.data() + (size_t)plane * stride + PAD; }
};

}  // namespace

void l1_ssim(int width, int height, const real* image, const real* target, const real* mask, double ssim_weight, double* terms, real* v_image) {
  const int length = 3 * width, stride = (length + W - 1) / W * W, bands = (height + BAND - 1) / BAND;
  double pixels = 0;
  if (mask)
    for (int64_t i = 0; i < (int64_t)width * height; i++) pixels += mask[i] != 0;
  else
    pixels = (double)width * height;
  const real seed = (real)(pixels > 0 ? 1 / (3 * pixels) : 0);
  Buffer<real> maps(v_image ? (int64_t)3 * stride * height : 0);   // dSSIM by mean, square, product
  std::vector<double> partial((size_t)2 * bands, 0);
  parallel(bands, [&](int64_t band, int) {
    Rows v(4, stride);
    std::vector<real> kept(stride, 0);
    for (int i = 0; i < length; i++) kept[i] = 1;
    double l1 = 0, total = 0;
    for (int y = (int)band * BAND; y < height && y < ((int)band + 1) * BAND; y++) {
      for (int i = 0; i < length; i += W) {   // down the columns
        Lanes mx = splat(0), my = mx, squares = mx, product = mx;
        for (int j = -SSIM_RADIUS; j <= SSIM_RADIUS; j++) {
          if (y + j < 0 || y + j >= height) continue;
          const int64_t at = (int64_t)(y + j) * length + i;
          Lanes a, b;
          if (i + W <= length) {
            a = load(image + at);
            b = load(target + at);
          } else {
            a = b = splat(0);
            for (int k = 0; i + k < length; k++) a[k] = image[at + k], b[k] = target[at + k];
          }
          const Lanes wa = window(j) * a, wb = window(j) * b;
          mx += wa;
          my += wb;
          squares += wa * a + wb * b;
          product += wa * b;
        }
        store(v[0] + i, mx);
        store(v[1] + i, my);
        store(v[2] + i, squares);
        store(v[3] + i, product);
      }
      for (int i = 0; mask && i < length; i++) kept[i] = mask[(int64_t)y * width + i / 3] != 0 ? (real)1 : (real)0;
      const real *a = image + (int64_t)y * length, *b = target + (int64_t)y * length;
      Lanes row_l1 = splat(0), row_ssim = splat(0);
      for (int i = 0; i < length; i += W) {
        const Ssim<Lanes> s = ssim(along_row(v[0] + i), along_row(v[1] + i), along_row(v[2] + i), along_row(v[3] + i));
        const Lanes keep = load(kept.data() + i);
        Lanes d;
        if (i + W <= length) {
          d = load(a + i) - load(b + i);
        } else {
          d = splat(0);
          for (int k = 0; i + k < length; k++) d[k] = a[i + k] - b[i + k];
        }
        row_l1 += keep * abs(d);
        row_ssim += keep * s.value;
        if (v_image) {
          real* out = maps.data + ((size_t)3 * y) * stride + i;
          store(out, keep * s.by_mean);
          store(out + stride, keep * s.by_square);
          store(out + 2 * stride, keep * s.by_product);
        }
      }
      for (int k = 0; k < W; k++) l1 += row_l1[k], total += row_ssim[k];
    }
    partial[2 * band] = l1;
    partial[2 * band + 1] = total;
  });
  terms[0] = terms[1] = 0;
  for (int band = 0; band < bands; band++) terms[0] += partial[2 * band] * seed, terms[1] += partial[2 * band + 1] * seed;
  if (!v_image) return;
  const real w1 = (real)(1 - ssim_weight) * seed, w2 = (real)-ssim_weight * seed;
  parallel(bands, [&](int64_t band, int) {
    Rows v(3, stride);
    for (int y = (int)band * BAND; y < height && y < ((int)band + 1) * BAND; y++) {
      for (int i = 0; i < length; i += W) {
        Lanes sum[3] = {splat(0), splat(0), splat(0)};
        for (int j = -SSIM_RADIUS; j <= SSIM_RADIUS; j++) {
          if (y + j < 0 || y + j >= height) continue;
          const real* in = maps.data + ((size_t)3 * (y + j)) * stride + i;
          for (int k = 0; k < 3; k++) sum[k] += window(j) * load(in + k * stride);
        }
        for (int k = 0; k < 3; k++) store(v[k] + i, sum[k]);
      }
      for (int k = 0; k < 3; k++)
        for (int i = length; i < stride; i++) v[k][i] = 0;   // lanes behind the row's end
      const int64_t at = (int64_t)y * length;
      for (int i = 0; i < length; i += W) {
        real tail[3][W];
        const int used = length - i < W ? length - i : W;
        const bool plain = used == W && !mask;
        if (!plain) __builtin_memset(tail, 0, sizeof tail);
        if (!plain)
          for (int k = 0; k < used; k++) tail[0][k] = image[at + i + k], tail[1][k] = target[at + i + k], tail[2][k] = !mask || mask[(at + i + k) / 3] != 0 ? (real)1 : (real)0;
        const Lanes a = plain ? load(image + at + i) : load(tail[0]), b = plain ? load(target + at + i) : load(tail[1]);
        const Lanes keep = plain ? splat(1) : load(tail[2]), d = a - b, zero = splat(0);
        const Lanes sign = where(less(zero, d), splat(1), where(less(d, zero), splat(-1), zero));
        const Lanes g = w1 * keep * sign + w2 * (along_row(v[0] + i) + (real)2 * a * along_row(v[1] + i) + b * along_row(v[2] + i));
        if (used == W) {
          store(v_image + at + i, g);
        } else {
          for (int k = 0; k < used; k++) v_image[at + i + k] = g[k];
        }
      }
    }
  });
}

namespace {

// Every row alike: the rows are one long vector.
template <int attribute> void adam_evenly(int64_t n, int columns, real* param, const real* grad, real* m, real* v, const real* rates, const AdamStep<real>& step, real correct1, real correct2) {
  const int64_t rows_per_task = 16384 / columns + 1;
  std::vector<real> pattern((size_t)columns * W);   // learning rates of W whole rows
  for (size_t i = 0; i < pattern.size(); i++) pattern[i] = rates[i % columns];
  parallel((n + rows_per_task - 1) / rows_per_task, [&](int64_t task, int) {
    const int64_t first = task * rows_per_task, last = first + rows_per_task < n ? first + rows_per_task : n, end = last * columns;
    int64_t i = first * columns;
    size_t at = 0;
    for (; i + W <= end; i += W) {
      Lanes p = load(param + i), mi = load(m + i), vi = load(v + i);
      adam<attribute>(p, load(grad + i), mi, vi, load(pattern.data() + at), splat(correct1), splat(correct2), step);
      store(param + i, p);
      store(m + i, mi);
      store(v + i, vi);
      at = at + W == pattern.size() ? 0 : at + W;
    }
    for (; i < end; i++) adam<attribute>(param[i], grad[i], m[i], v[i], rates[i % columns], correct1, correct2, step);
  });
}

// Rows with corrections of their own, some of them left untouched: visible ones are gathered, W numbers at a time.
template <int attribute> void adam_row_by_row(int64_t n, int columns, real* param, const real* grad, real* m, real* v, const real* rates, const AdamStep<real>& step, real correct1, real correct2, const real* corrections, const int32_t* row_steps, const int32_t* visible) {
  const int64_t rows_per_task = 16384 / columns + 1;
  parallel((n + rows_per_task - 1) / rows_per_task, [&](int64_t task, int) {
    const int64_t first = task * rows_per_task, last = first + rows_per_task < n ? first + rows_per_task : n;
    int64_t place[W];
    real p[W] = {}, g[W] = {}, mi[W] = {}, vi[W] = {}, rate[W] = {}, c1[W] = {}, c2[W] = {};
    int held = 0;
    auto flush = [&] {
      Lanes pl = load(p), ml = load(mi), vl = load(vi);
      adam<attribute>(pl, load(g), ml, vl, load(rate), load(c1), load(c2), step);
      store(p, pl);
      store(mi, ml);
      store(vi, vl);
      for (int k = 0; k < held; k++) param[place[k]] = p[k], m[place[k]] = mi[k], v[place[k]] = vi[k];
      held = 0;
    };
    for (int64_t row = first; row < last; row++) {
      if (visible && !visible[row]) continue;
      const real* own = row_steps ? corrections + 2 * row_steps[row] : nullptr;
      const real one = own ? own[0] : correct1, two = own ? own[1] : correct2;
      int c = 0;
      for (; c + W <= columns; c += W) {
        const int64_t i = row * columns + c;
        Lanes pl = load(param + i), ml = load(m + i), vl = load(v + i);
        adam<attribute>(pl, load(grad + i), ml, vl, load(rates + c), splat(one), splat(two), step);
        store(param + i, pl);
        store(m + i, ml);
        store(v + i, vl);
      }
      for (; c < columns; c++) {
        const int64_t i = row * columns + c;
        place[held] = i;
        p[held] = param[i], g[held] = grad[i], mi[held] = m[i], vi[held] = v[i], rate[held] = rates[c], c1[held] = one, c2[held] = two;
        if (++held == W) flush();
      }
    }
    if (held) flush();
  });
}

}  // namespace

void adam_rows(int64_t n, int columns, real* param, const real* grad, real* m, real* v, const real* rates, const AdamStep<real>& step, int attribute, real correct1, real correct2, const real* corrections, const int32_t* row_steps, const int32_t* visible) {
  auto run = [&](auto which) {
    constexpr int a = decltype(which)::value;
    if (row_steps || visible)
      adam_row_by_row<a>(n, columns, param, grad, m, v, rates, step, correct1, correct2, corrections, row_steps, visible);
    else
      adam_evenly<a>(n, columns, param, grad, m, v, rates, step, correct1, correct2);
  };
  if (attribute == OPACITY)
    run(std::integral_constant<int, OPACITY>());
  else if (attribute == SCALE)
    run(std::integral_constant<int, SCALE>());
  else
    run(std::integral_constant<int, PLAIN>());
}

void mcmc_noise_rows(int64_t n, real* means, const real* quats, const real* log_scales, const real* logits, const real* noise, real scale) {
  parallel((n + 1023) / 1024, [&](int64_t task, int) {
    for (int64_t i = task * 1024; i < n && i < (task + 1) * 1024; i++) {
      if (logits[i] > (real)0) continue;   // gate below 1e-21
      const real *q = quats + 4 * i, *s = log_scales + 3 * i, *e = noise + 3 * i;
      const Vec3<real> d = mcmc_noise<real>({q[0], q[1], q[2], q[3]}, {s[0], s[1], s[2]}, logits[i], {e[0], e[1], e[2]}, scale);
      means[3 * i] += d.x;
      means[3 * i + 1] += d.y;
      means[3 * i + 2] += d.z;
    }
  });
}

void relocate_rows(int64_t m, real* logits, real* log_scales, const int32_t* copies) {
  parallel((m + 255) / 256, [&](int64_t task, int) {
    for (int64_t i = task * 256; i < m && i < (task + 1) * 256; i++) relocate_row(logits[i], log_scales + 3 * i, copies[i]);
  });
}

}  // namespace sk
