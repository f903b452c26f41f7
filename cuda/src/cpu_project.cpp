// Projection, its gradient, and the depth sort of the CPU core.
#include "cpu_core.h"

namespace sk {

View<real> make_view(const real* m, const real* K, int width, int height, const double* settings) {
  View<real> v;
  for (int i = 0; i < 3; i++) {
    for (int j = 0; j < 3; j++) v.r[3 * i + j] = m[4 * i + j];
    v.t[i] = m[4 * i + 3];
  }
  for (int j = 0; j < 4; j++) v.key[j] = (float)m[8 + j];
  for (int j = 0; j < 3; j++) v.centre[j] = -(v.r[j] * v.t[0] + v.r[3 + j] * v.t[1] + v.r[6 + j] * v.t[2]);
  v.fx = K[0];
  v.fy = K[4];
  v.cx = K[2];
  v.cy = K[5];
  v.width = (real)width;
  v.height = (real)height;
  v.near = (real)settings[SK_NEAR];
  v.near_key = (float)settings[SK_NEAR];
  v.blur_px2 = (real)settings[SK_BLUR_PX2];
  v.fov_margin = (real)(settings[SK_FOV_MARGIN] < 1e18 ? settings[SK_FOV_MARGIN] : 1e18);   // infinity times a zero offset would be NaN
  v.antialias = settings[SK_ANTIALIAS] != 0;
  v.unbounded = settings[SK_ALPHA_MIN] <= 0;
  v.cut = v.unbounded ? (real)exponent_min(real()) : log2((real)settings[SK_ALPHA_MIN]);
  return v;
}

static TileSpan tile_span(const real* s, int width, int height) {
  // The spans are not empty (project() saw to that) and start at 0, so truncation rounds down.
  real first, last;
  TileSpan t;
  pixel_span(s[SK_X], s[SK_RX], (real)width, first, last);
  t.x0 = ((int32_t)first + ((real)(int32_t)first < first)) / SK_TILE;
  t.x1 = (int32_t)last / SK_TILE + 1;
  pixel_span(s[SK_Y], s[SK_RY], (real)height, first, last);
  t.y0 = ((int32_t)first + ((real)(int32_t)first < first)) / SK_TILE;
  t.y1 = (int32_t)last / SK_TILE + 1;
  return t;
}

namespace {

struct RowLanes {
  IntLanes offset;   // rows relative to the chunk's first; unused lanes repeat the last used one
  int used;
};

SK_FN RowLanes take_rows(const int32_t* list, int at, int n) {
  RowLanes r;
  r.used = n - at < W ? n - at : W;
  for (int i = 0; i < W; i++) r.offset[i] = list[at + (i < r.used ? i : r.used - 1)];
  return r;
}

SK_FN Lanes column(const real* base, IntLanes row, int columns, int j) { return gather(base, row * (ireal)columns + (ireal)j); }

SK_FN GaussianIn<Lanes> load_gaussian(const ProjectArgs& a, int64_t first, IntLanes row) {
  const real *m = a.means + first * 3, *q = a.quats + first * 4, *s = a.log_scales + first * 3;
  GaussianIn<Lanes> g;
  g.mean = {column(m, row, 3, 0), column(m, row, 3, 1), column(m, row, 3, 2)};
  g.quat = {column(q, row, 4, 0), column(q, row, 4, 1), column(q, row, 4, 2), column(q, row, 4, 3)};
  g.log_scale = {column(s, row, 3, 0), column(s, row, 3, 1), column(s, row, 3, 2)};
  g.logit = gather(a.logit_opacities + first, row);
  return g;
}

// Rows of one picture plane each -> one record a row: out[lane * stride + j] = planes[j][lane].
template <int count> SK_FN void store_rows(const Lanes (&planes)[count], int used, real* out, const int32_t* list, int stride, bool add) {
  real flat[count][W];
  for (int j = 0; j < count; j++) store(flat[j], planes[j]);
  for (int i = 0; i < used; i++) {
    real* row = out + (int64_t)list[i] * stride;
    if (add)
      for (int j = 0; j < count; j++) row[j] += flat[j][i];
    else
      for (int j = 0; j < count; j++) row[j] = flat[j][i];
  }
}

SK_FN Lanes sh_dot(const real* sh, IntLanes offset, const Lanes* y, int bands, int channel) {
  Lanes sum = y[0] * gather(sh, offset + (ireal)channel);
  for (int k = 1; k < bands; k++) sum += y[k] * gather(sh, offset + (ireal)(3 * k + channel));
  return sum;
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
    const GaussianIn<Lanes> g = load_gaussian(a, first, r.offset);
    const Splatted<Lanes> s = project(a.view, g);
    const Lanes sum = (real)0 * (g.quat.w + g.quat.x + g.quat.y + g.quat.z + g.log_scale.x + g.log_scale.y + g.log_scale.z + g.logit);
    const uint32_t finite = bits(at_least(sum, splat(0))), mask = bits(s.drawn) & finite;
    *not_finite += __builtin_popcount(~finite & ((1u << (r.used - 1) << 1) - 1));
    const Lanes zero = splat(0);
    const Lanes planes[SK_SPLAT] = {s.x, s.y, s.a, s.b, s.c, s.logo, zero, zero, zero, s.z, s.rx, s.ry};
    real flat[SK_SPLAT][W];
    for (int j = 0; j < SK_SPLAT; j++) store(flat[j], planes[j]);
    for (int i = 0; i < r.used; i++) {
      if (!(mask >> i & 1)) continue;
      const int32_t row = near_rows[at + i];
      real* out = splats + (first + row) * SK_SPLAT;
      for (int j = 0; j < SK_SPLAT; j++) out[j] = flat[j][i];
      radii[first + row] = a.view.unbounded ? (real)__builtin_inf() : max(max(out[SK_RX], out[SK_RY]), (real)1e-6);
      const TileSpan t = tile_span(out, (int)a.view.width, (int)a.view.height);
      tiles[first + row] = packed(t);
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
    const real* m = a.means + first * 3;
    Lanes inv, y[16];
    const Vec3<Lanes> mean = {column(m, r.offset, 3, 0), column(m, r.offset, 3, 1), column(m, r.offset, 3, 2)};
    sh_basis(a.sh_degree, direction(a.view, mean, inv), y);
    const IntLanes offset = r.offset * (ireal)(3 * a.sh_bands);
    Lanes c[3];
    for (int j = 0; j < 3; j++) c[j] = splat((real)0.5) + sh_dot(sh, offset, y, bands, j);
    const uint32_t finite = bits(at_least((real)0 * (c[0] + c[1] + c[2]), splat(0)));
    *not_finite += __builtin_popcount(~finite & ((1u << (r.used - 1) << 1) - 1));
    for (int j = 0; j < 3; j++) c[j] = max(c[j], splat(0));
    store_rows(c, r.used, splats + first * SK_SPLAT + SK_R, drawn_rows + at, SK_SPLAT, false);
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
  const bool colour = a.sh_degree >= 0 && out.sh != nullptr;
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
    const real* v = v_splats + first * SK_SPLAT;
    auto grad = [&](int j) { return column(v, r.offset, SK_SPLAT, j); };
    const GaussianIn<Lanes> g = load_gaussian(a, first, r.offset);
    GaussianVjp<Lanes> o = project_vjp(a.view, g, grad(SK_X), grad(SK_Y), grad(SK_A), grad(SK_B), grad(SK_C), grad(SK_LOGO), grad(SK_Z));
    if (colour) {
      Lanes inv, y[16], v_y[16];
      const Vec3<Lanes> d = direction(a.view, g.mean, inv);
      sh_basis(a.sh_degree, d, y);
      const real* sh = a.sh + first * a.sh_bands * 3;
      const IntLanes offset = r.offset * (ireal)(3 * a.sh_bands);
      Lanes v_c[3];
      Lanes coefficients[3][16];
      for (int j = 0; j < 3; j++) {
        for (int k = 0; k < bands; k++) coefficients[j][k] = gather(sh, offset + (ireal)(3 * k + j));
        Lanes c = splat((real)0.5) + y[0] * coefficients[j][0];
        for (int k = 1; k < bands; k++) c += y[k] * coefficients[j][k];
        v_c[j] = where(less(splat(0), c), grad(SK_R + j), splat(0));
      }
      for (int k = 0; k < bands; k++) v_y[k] = v_c[0] * coefficients[0][k] + v_c[1] * coefficients[1][k] + v_c[2] * coefficients[2][k];
      const ColourVjp<Lanes> c = direction_vjp(a.view, a.sh_degree, d, inv, v_y);
      o.mean = o.mean + c.mean;
      o.t = o.t + c.t;
      o.r = o.r + c.r;
      real flat[48][W];
      for (int k = 0; k < bands; k++)
        for (int j = 0; j < 3; j++) store(flat[3 * k + j], y[k] * v_c[j]);
      for (int i = 0; i < r.used; i++) {
        real* row = out.sh + (first + list[at + i]) * a.sh_bands * 3;
        if (add)
          for (int j = 0; j < 3 * bands; j++) row[j] += flat[j][i];
        else
          for (int j = 0; j < 3 * bands; j++) row[j] = flat[j][i];
        if (!add)
          for (int j = 3 * bands; j < 3 * a.sh_bands; j++) row[j] = 0;
      }
    }
    const Lanes means[3] = {o.mean.x, o.mean.y, o.mean.z}, quats[4] = {o.quat.w, o.quat.x, o.quat.y, o.quat.z};
    const Lanes scales[3] = {o.log_scale.x, o.log_scale.y, o.log_scale.z}, logits[1] = {o.logit};
    store_rows(means, r.used, out.means + first * 3, list + at, 3, add);
    store_rows(quats, r.used, out.quats + first * 4, list + at, 4, add);
    store_rows(scales, r.used, out.log_scales + first * 3, list + at, 3, add);
    store_rows(logits, r.used, out.logit_opacities + first, list + at, 1, add);
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
