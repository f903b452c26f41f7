// Projection, its gradient, and the depth sort of the CPU core.
#include "cpu_core.h"

namespace sk {

namespace {

struct RowLanes {
  int32_t row[W];   // relative to the chunk's first; unused lanes repeat the last used one
  int used;
};

SK_FN RowLanes take_rows(const int32_t* list, int at, int n) {
  RowLanes r;
  r.used = n - at < W ? n - at : W;
  for (int i = 0; i < W; i++) r.row[i] = list[at + (i < r.used ? i : r.used - 1)];
  return r;
}

SK_FN GaussianIn<Lanes> load_gaussian(const ProjectArgs& a, int64_t first, const RowLanes& r) {
  Lanes m[4], q[4], s[4], o[4];
  load_columns(a.means + first * 3, r.row, 3, 3, m);
  load_columns(a.quats + first * 4, r.row, 4, 4, q);
  load_columns(a.log_scales + first * 3, r.row, 3, 3, s);
  load_columns(a.logit_opacities + first, r.row, 1, 1, o);
  return {{m[0], m[1], m[2]}, {s[0], s[1], s[2]}, {q[0], q[1], q[2], q[3]}, o[0]};
}

// The coefficients of the rows: sh[3 k + channel], whole groups of four numbers.
SK_FN void load_sh(const ProjectArgs& a, const real* sh, const RowLanes& r, int numbers, Lanes* out) {
  for (int j = 0; j < numbers; j += 4) load_columns(sh + j, r.row, 3 * a.sh_bands, numbers - j < 4 ? numbers - j : 4, out + j);
}

}  // namespace

int project_chunk(const ProjectArgs& a, int64_t first, int64_t last, real* splats, real* radii, int64_t* tiles, uint32_t* keys, int32_t* rows, int64_t* pairs, int64_t* not_finite) {
  const int n = (int)(last - first);
  const float* key = a.view.key;
  // The rows in front of the near plane, by the float32 key that every build shares.
  int32_t near_rows[CHUNK], drawn_rows[CHUNK + W];
  uint32_t near_keys[CHUNK];
  int count = 0;
  for (int i = 0; i < n; i++) {
    const real* m = a.means + (first + i) * 3;
    const float d = depth_key(key, (float)m[0], (float)m[1], (float)m[2]);
    *not_finite += !(d - d == 0);
    near_rows[count] = i;
    near_keys[count] = (uint32_t)to_bits(d);
    count += d >= a.view.near_key && d < 1e30f;
    radii[first + i] = 0;
    tiles[first + i] = 0;
  }
  int drawn = 0;
  for (int at = 0; at < count; at += W) {
    const RowLanes r = take_rows(near_rows, at, count);
    const GaussianIn<Lanes> g = load_gaussian(a, first, r);
    const Splatted<Lanes> s = project(a.view, g);
    const Lanes sum = (real)0 * (g.quat.w + g.quat.x + g.quat.y + g.quat.z + g.log_scale.x + g.log_scale.y + g.log_scale.z + g.logit);
    const uint32_t finite = bits(at_least(sum, splat(0))), mask = bits(s.drawn) & finite;
    *not_finite += __builtin_popcount(~finite & ((1u << (r.used - 1) << 1) - 1));
    const Lanes zero = splat(0);
    const Lanes planes[SK_SPLAT] = {s.x, s.y, s.a, s.b, s.c, s.logo, zero, zero, zero, s.z, s.rx, s.ry};
    real* chunk = splats + first * SK_SPLAT;   // records of rows that are not drawn are written too, and never read
    for (int j = 0; j < SK_SPLAT; j += 4) store_columns(chunk + j, r.row, r.used, SK_SPLAT, 4, planes + j, false);
    real radius[W], x_first[W], x_last[W], y_first[W], y_last[W];
    store(radius, a.view.unbounded ? splat((real)__builtin_inf()) : max(max(s.rx, s.ry), splat((real)1e-6)));
    store(x_first, s.x_first);
    store(x_last, s.x_last);
    store(y_first, s.y_first);
    store(y_last, s.y_last);
    for (uint32_t left = mask & ((1u << (r.used - 1) << 1) - 1); left; left &= left - 1) {
      const int i = __builtin_ctz(left);
      const int32_t row = near_rows[at + i];
      radii[first + row] = radius[i];
      const TileSpan t = {(int32_t)x_first[i] / SK_TILE, (int32_t)x_last[i] / SK_TILE + 1, (int32_t)y_first[i] / SK_TILE, (int32_t)y_last[i] / SK_TILE + 1};
      tiles[first + row] = packed(t, t.count());
      *pairs += t.count();
      keys[drawn] = near_keys[at + i];
      rows[drawn] = (int32_t)(first + row);
      drawn_rows[drawn++] = row;
    }
  }
  if (a.sh_degree < 0) return drawn;
  const real* sh = a.sh + first * a.sh_bands * 3;
  const int bands = sh_count(a.sh_degree);
  for (int at = 0; at < drawn; at += W) {
    const RowLanes r = take_rows(drawn_rows, at, drawn);
    Lanes inv, y[16], m[4], coefficients[48];
    load_columns(a.means + first * 3, r.row, 3, 3, m);
    sh_basis(a.sh_degree, direction(a.view, Vec3<Lanes>{m[0], m[1], m[2]}, inv), y);
    load_sh(a, sh, r, 3 * bands, coefficients);
    Lanes c[4];
    for (int j = 0; j < 3; j++) c[j] = splat((real)0.5) + y[0] * coefficients[j];
    for (int k = 1; k < bands; k++)
      for (int j = 0; j < 3; j++) c[j] += y[k] * coefficients[3 * k + j];
    const uint32_t finite = bits(at_least((real)0 * (c[0] + c[1] + c[2]), splat(0)));
    *not_finite += __builtin_popcount(~finite & ((1u << (r.used - 1) << 1) - 1));
    for (int j = 0; j < 3; j++) c[j] = max(c[j], splat(0));
    c[3] = c[2];
    store_columns(splats + first * SK_SPLAT + SK_R, r.row, r.used, SK_SPLAT, 3, c, false);
  }
  return drawn;
}

void project_vjp_chunk(const ProjectArgs& a, int64_t first, int64_t last, const real* radii, const real* v_splats, const ProjectGrads& out, bool add, double* v_pose, double* v_k) {
  const int n = (int)(last - first);
  int32_t list[CHUNK + W];
  int drawn = 0;
  for (int i = 0; i < n; i++) {
    list[drawn] = i;
    drawn += radii[first + i] > 0;
  }
  if (!add) {   // rows that are not drawn get zeros
    for (int i = 0; i < n; i++) {
      if (radii[first + i] > 0) continue;
      for (int j = 0; j < 3; j++) out.means[(first + i) * 3 + j] = out.log_scales[(first + i) * 3 + j] = 0;
      for (int j = 0; j < 4; j++) out.quats[(first + i) * 4 + j] = 0;
      out.logit_opacities[first + i] = 0;
      if (out.sh) __builtin_memset(out.sh + (first + i) * a.sh_bands * 3, 0, sizeof(real) * a.sh_bands * 3);
    }
  }
  const int bands = a.sh_degree >= 0 ? sh_count(a.sh_degree) : 0;
  for (int at = 0; at < drawn; at += W) {
    const RowLanes r = take_rows(list, at, drawn);
    Lanes v[SK_SPLAT];
    for (int j = 0; j < SK_SPLAT; j += 4) load_columns(v_splats + first * SK_SPLAT + j, r.row, SK_SPLAT, 4, v + j);
    const GaussianIn<Lanes> g = load_gaussian(a, first, r);
    GaussianVjp<Lanes> o = project_vjp(a.view, g, v[SK_X], v[SK_Y], v[SK_A], v[SK_B], v[SK_C], v[SK_LOGO], v[SK_Z]);
    if (a.sh_degree >= 0) {   // the view direction pulls at means and pose, whether or not sh itself wants a gradient
      Lanes inv, y[16], v_y[16], v_c[3], coefficients[48];
      const Vec3<Lanes> d = direction(a.view, g.mean, inv);
      sh_basis(a.sh_degree, d, y);
      load_sh(a, a.sh + first * a.sh_bands * 3, r, 3 * bands, coefficients);
      for (int j = 0; j < 3; j++) {
        Lanes c = splat((real)0.5) + y[0] * coefficients[j];
        for (int k = 1; k < bands; k++) c += y[k] * coefficients[3 * k + j];
        v_c[j] = where(less(splat(0), c), v[SK_R + j], splat(0));
      }
      for (int k = 0; k < bands; k++) v_y[k] = v_c[0] * coefficients[3 * k] + v_c[1] * coefficients[3 * k + 1] + v_c[2] * coefficients[3 * k + 2];
      const ColourVjp<Lanes> c = direction_vjp(a.view, a.sh_degree, d, inv, v_y);
      o.mean = o.mean + c.mean;
      o.t = o.t + c.t;
      o.r = o.r + c.r;
      for (int k = 0; k < bands; k++)
        for (int j = 0; j < 3; j++) coefficients[3 * k + j] = y[k] * v_c[j];
      if (!add)   // bands above the degree
        for (int i = 3 * bands; i < 3 * a.sh_bands; i++) coefficients[i] = splat(0);
      const int numbers = out.sh ? 3 * (add ? bands : a.sh_bands) : 0;
      for (int j = 0; j < numbers; j += 4) store_columns(out.sh + first * a.sh_bands * 3 + j, r.row, r.used, 3 * a.sh_bands, numbers - j < 4 ? numbers - j : 4, coefficients + j, add);
    }
    const Lanes means[4] = {o.mean.x, o.mean.y, o.mean.z, o.mean.z}, quats[4] = {o.quat.w, o.quat.x, o.quat.y, o.quat.z};
    const Lanes scales[4] = {o.log_scale.x, o.log_scale.y, o.log_scale.z, o.log_scale.z}, logits[4] = {o.logit, o.logit, o.logit, o.logit};
    store_columns(out.means + first * 3, r.row, r.used, 3, 3, means, add);
    store_columns(out.quats + first * 4, r.row, r.used, 4, 4, quats, add);
    store_columns(out.log_scales + first * 3, r.row, r.used, 3, 3, scales, add);
    store_columns(out.logit_opacities + first, r.row, r.used, 1, 1, logits, add);
    if (v_pose) {
      const Lanes pose[16] = {o.r.r0.x, o.r.r0.y, o.r.r0.z, o.t.x, o.r.r1.x, o.r.r1.y, o.r.r1.z, o.t.y, o.r.r2.x, o.r.r2.y, o.r.r2.z, o.t.z, o.fx, o.fy, o.cx, o.cy};
      for (int j = 0; j < 16; j++)
        for (int i = 0; i < r.used; i++) (j < 12 ? v_pose[j] : v_k[j - 12]) += pose[j][i];
    }
  }
  if (out.sh && a.sh_degree < 0 && !add)
    for (int i = 0; i < drawn; i++) __builtin_memset(out.sh + (first + list[i]) * a.sh_bands * 3, 0, sizeof(real) * a.sh_bands * 3);
}

int32_t* radix_sort(int64_t n, uint32_t* keys, int32_t* rows, uint32_t* keys_b, int32_t* rows_b) {
  // Depths are positive floats, whose bits sort like the numbers: three passes of 11 bits, least significant first.
  constexpr int BITS = 11, SIZE = 1 << BITS;
  uint32_t start[3][SIZE];
  __builtin_memset(start, 0, sizeof start);
  for (int64_t i = 0; i < n; i++)
    for (int p = 0; p < 3; p++) start[p][keys[i] >> (BITS * p) & (SIZE - 1)]++;
  for (int p = 0; p < 3; p++) {
    uint32_t sum = 0;
    bool one_digit = false;
    for (int d = 0; d < SIZE; d++) {
      const uint32_t c = start[p][d];
      one_digit |= c == (uint32_t)n;
      start[p][d] = sum;
      sum += c;
    }
    if (one_digit) continue;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t at = start[p][keys[i] >> (BITS * p) & (SIZE - 1)]++;
      keys_b[at] = keys[i];
      rows_b[at] = rows[i];
    }
    uint32_t* k = keys;
    keys = keys_b;
    keys_b = k;
    int32_t* r = rows;
    rows = rows_b;
    rows_b = r;
  }
  return rows;
}

}  // namespace sk
