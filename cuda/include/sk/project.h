// Projection of one Gaussian into one camera, and its vector-Jacobian product (Kerbl et al. 2023; Zwicker et al. 2001).
#pragma once
#include "sh.h"
#include "splatkit.h"

namespace sk {

// One camera and the settings, as numbers of the scalar.
template <class S> struct View {
  S r[9], t[3];                       // world_to_cam: rotation rows, translation
  float key[4];                       // its third row in float32, for depth_key
  S fx, fy, cx, cy, width, height;
  S blur_px2, fov_margin, cut;  // cut = log2 alpha_min, at least exponent_min
  float near_key;
  bool antialias, unbounded;          // unbounded: alpha_min is 0, every Gaussian reaches every pixel
  S centre[3];                        // of the camera in the world: -R^T t
};

// log2 alpha_min: below it a Gaussian does not touch a pixel.
template <class S> SK_FN S cut_of(const double* settings) { return settings[SK_ALPHA_MIN] <= 0 ? (S)exponent_min(S()) : log2((S)settings[SK_ALPHA_MIN]); }

template <class S> SK_FN View<S> make_view(const S* world_to_cam, const S* K, int width, int height, const double* settings) {
  View<S> v;
  for (int i = 0; i < 3; i++) {
    for (int j = 0; j < 3; j++) v.r[3 * i + j] = world_to_cam[4 * i + j];
    v.t[i] = world_to_cam[4 * i + 3];
  }
  for (int j = 0; j < 4; j++) v.key[j] = (float)world_to_cam[8 + j];
  for (int j = 0; j < 3; j++) v.centre[j] = -(v.r[j] * v.t[0] + v.r[3 + j] * v.t[1] + v.r[6 + j] * v.t[2]);
  v.fx = K[0];
  v.fy = K[4];
  v.cx = K[2];
  v.cy = K[5];
  v.width = (S)width;
  v.height = (S)height;
  v.near_key = (float)settings[SK_NEAR];
  v.blur_px2 = (S)settings[SK_BLUR_PX2];
  v.fov_margin = (S)(settings[SK_FOV_MARGIN] < 1e18 ? settings[SK_FOV_MARGIN] : 1e18);   // infinity times a zero offset would be NaN
  v.antialias = settings[SK_ANTIALIAS] != 0;
  v.unbounded = settings[SK_ALPHA_MIN] <= 0;
  v.cut = cut_of<S>(settings);
  return v;
}

template <class T> SK_FN Vec3<T> broadcast(const Scalar<T>* v) { return {splat_of<T>(v[0]), splat_of<T>(v[1]), splat_of<T>(v[2])}; }
template <class T> SK_FN Mat3<T> rotation_of(const View<Scalar<T>>& view) { return {broadcast<T>(view.r), broadcast<T>(view.r + 3), broadcast<T>(view.r + 6)}; }

// Camera depth for sorting and the near plane: float32, every product and sum rounded by itself in this order, bit-equal in every build.
SK_FN float depth_key(const float key[4], float x, float y, float z) {
  return rounded_sum(rounded_sum(rounded_sum(rounded_product(key[0], x), rounded_product(key[1], y)), rounded_product(key[2], z)), key[3]);
}

// The parts of log2 alpha = logo - (a dx + b dy)^2 - (c dy)^2, the Gaussian's place in pixels from the picture's centre (from its corner,
// float32 would keep less of the places in its middle), its depth and its reach.
template <class T> struct Splatted {
  T x, y, a, b, c, logo, z, rx, ry;
  T x_first, x_last, y_first, y_last;   // pixels of the picture that it reaches, as whole numbers
  Mask<T> drawn;
};

template <class T> struct GaussianIn {
  Vec3<T> mean, log_scale;
  Quat<T> quat;
  T logit;
};

// What the forward and the vjp share. Rows of `j` are the two rows of J * R * R_q * S: the screen covariance is j j^T + blur.
template <class T> struct Projection {
  Vec3<T> t;                          // in the camera
  T iz, u, v;                         // 1 / depth; x/z, y/z clamped to the widened field of view
  T u_raw, v_raw;
  Quat<T> q;
  T inv_length;
  Mat3<T> rq, n, p;                   // rotation; R_q S; R R_q S
  Vec3<T> scale, d0, d1, j0, j1;
  T a, b, c, a_blur, c_blur, det0, det;
};

template <class T> SK_FN void clamp_limits(const View<Scalar<T>>& w, Scalar<T>& ulo, Scalar<T>& uhi, Scalar<T>& vlo, Scalar<T>& vhi) {
  const Scalar<T> mx = w.fov_margin * (Scalar<T>)0.5 * w.width / w.fx, my = w.fov_margin * (Scalar<T>)0.5 * w.height / w.fy;
  ulo = -w.cx / w.fx - mx;
  uhi = (w.width - w.cx) / w.fx + mx;
  vlo = -w.cy / w.fy - my;
  vhi = (w.height - w.cy) / w.fy + my;
}

template <class T> SK_FN Projection<T> project_geometry(const View<Scalar<T>>& w, const GaussianIn<T>& g) {
  Projection<T> o;
  const Mat3<T> r = rotation_of<T>(w);
  o.t = r * g.mean + broadcast<T>(w.t);
  o.iz = splat_of<T>(1) / o.t.z;
  Scalar<T> ulo, uhi, vlo, vhi;
  clamp_limits<T>(w, ulo, uhi, vlo, vhi);
  o.u_raw = o.t.x * o.iz;
  o.v_raw = o.t.y * o.iz;
  o.u = clamp(o.u_raw, splat_of<T>(ulo), splat_of<T>(uhi));
  o.v = clamp(o.v_raw, splat_of<T>(vlo), splat_of<T>(vhi));
  o.q = normalised(g.quat, o.inv_length);
  o.rq = rotation(o.q);
  const T lo = splat_of<T>(-30), hi = splat_of<T>(30);
  o.scale = {exp(clamp(g.log_scale.x, lo, hi)), exp(clamp(g.log_scale.y, lo, hi)), exp(clamp(g.log_scale.z, lo, hi))};
  o.n = scale_columns(o.rq, o.scale);
  o.p = r * o.n;
  o.d0 = o.p.r0 - o.u * o.p.r2;
  o.d1 = o.p.r1 - o.v * o.p.r2;
  o.j0 = (w.fx * o.iz) * o.d0;
  o.j1 = (w.fy * o.iz) * o.d1;
  o.a = dot(o.j0, o.j0);
  o.b = dot(o.j0, o.j1);
  o.c = dot(o.j1, o.j1);
  const Vec3<T> normal = cross(o.j0, o.j1);
  o.det0 = dot(normal, normal);       // = a c - b^2 without its cancellation (Cauchy-Binet)
  o.a_blur = o.a + w.blur_px2;
  o.c_blur = o.c + w.blur_px2;
  o.det = o.det0 + w.blur_px2 * (o.a + o.c + w.blur_px2);
  return o;
}

// Pixel columns (or rows) whose centres lie in [at - reach, at + reach] and in the picture: none where the last lies before the first.
template <class T> SK_FN void pixel_span(T at, T reach, Scalar<T> size, T& first, T& last) {
  first = ceil_of(max(at - reach - (Scalar<T>)0.5, splat_of<T>(0)));
  last = floor_of(min(at + reach - (Scalar<T>)0.5, splat_of<T>((double)size - 1)));
}

// The Gaussian's place on the screen. Its rounding decides at which pixels alpha passes the cut: half of float32's error against the
// double build was of pixels that flipped, hence the wide numbers.
template <class T> SK_FN void place(const View<Scalar<T>>& w, Vec3<T> mean, T& x, T& y) {
  const Wide<T> mx = widened(mean.x), my = widened(mean.y), mz = widened(mean.z);
  const Wide<T> tx = mx * (double)w.r[0] + my * (double)w.r[1] + mz * (double)w.r[2] + (double)w.t[0];
  const Wide<T> ty = mx * (double)w.r[3] + my * (double)w.r[4] + mz * (double)w.r[5] + (double)w.t[1];
  const Wide<T> tz = mx * (double)w.r[6] + my * (double)w.r[7] + mz * (double)w.r[8] + (double)w.t[2];
  const Wide<T> iz = 1.0 / tz;
  narrow(tx * iz * (double)w.fx + ((double)w.cx - 0.5 * (double)w.width), x);
  narrow(ty * iz * (double)w.fy + ((double)w.cy - 0.5 * (double)w.height), y);
}

template <class T> SK_FN Splatted<T> project(const View<Scalar<T>>& w, const GaussianIn<T>& g) {
  typedef Scalar<T> S;
  const Projection<T> o = project_geometry(w, g);
  Splatted<T> s;
  const T inv_det = splat_of<T>(1) / o.det;
  // Cholesky factors of the inverse covariance times log2(e) / 2.
  const S half = (S)(0.5 * LOG2E);
  s.a = sqrt(half * o.c_blur * inv_det);
  s.b = -half * o.b * inv_det / s.a;
  s.c = sqrt(half / o.c_blur);
  place(w, g.mean, s.x, s.y);
  s.z = o.t.z;
  s.logo = log2_sigmoid(g.logit);
  const T zero = splat_of<T>(0), huge = splat_of<T>(1e30);
  auto drawn = both(less(zero, o.det), both(less(o.det, huge), both(less(zero, s.a), both(less(s.a, huge), less(s.c, huge)))));
  if (w.antialias) {
    const T ratio = max(o.det0 * inv_det, splat_of<T>(1e-37));
    s.logo = s.logo + (S)0.5 * log2(ratio);
  }
  const T q = (S)(2 * LN2) * (s.logo - w.cut);
  if (w.unbounded) {
    s.rx = s.ry = huge;
  } else {
    drawn = both(drawn, at_least(q, zero));
    s.rx = sqrt(max(q, zero) * o.a_blur);
    s.ry = sqrt(max(q, zero) * o.c_blur);
  }
  pixel_span(s.x + (S)0.5 * w.width, s.rx, w.width, s.x_first, s.x_last);
  pixel_span(s.y + (S)0.5 * w.height, s.ry, w.height, s.y_first, s.y_last);
  drawn = both(drawn, both(at_least(s.x_last, s.x_first), at_least(s.y_last, s.y_first)));
  s.drawn = drawn;
  return s;
}

// Gradients by everything that project() read. v_a, v_b, v_c are by the coefficients of dx^2, dx dy, dy^2; v_z is by the camera depth.
template <class T> struct GaussianVjp {
  Vec3<T> mean, log_scale;
  Quat<T> quat;
  T logit;
  Mat3<T> r;                           // world_to_cam
  Vec3<T> t;
  T fx, fy, cx, cy;
};

template <class T> SK_FN GaussianVjp<T> project_vjp(const View<Scalar<T>>& w, const GaussianIn<T>& g, T v_x, T v_y, T v_a, T v_b, T v_c, T v_logo, T v_z) {
  typedef Scalar<T> S;
  const Projection<T> o = project_geometry(w, g);
  const T zero = splat_of<T>(0), one = splat_of<T>(1), inv_det = one / o.det;
  // Inverse covariance [qa qb; qb qc]; its gradient H = [ha hb; hb hc], symmetric; that of the covariance is -Q H Q.
  const T qa = o.c_blur * inv_det, qb = -o.b * inv_det, qc = o.a_blur * inv_det;
  const S l = (S)LOG2E;
  const T ha = (S)-0.5 * l * v_a, hb = (S)-0.5 * l * v_b, hc = (S)-0.5 * l * v_c;
  const T m00 = qa * ha + qb * hb, m01 = qa * hb + qb * hc, m10 = qb * ha + qc * hb, m11 = qb * hb + qc * hc;
  T va = -(m00 * qa + m01 * qb), vb = -(m00 * qb + m01 * qc) - (m10 * qa + m11 * qb), vc = -(m10 * qb + m11 * qc);
  Vec3<T> v_j0, v_j1;
  if (w.antialias) {                   // logo gained log2(det0 / det) / 2
    const auto flat = less(o.det0 * inv_det, splat_of<T>(1e-37));
    const T half = where(flat, zero, (S)0.5 * l * v_logo);
    const T v_det = -half * inv_det, v_det0 = half / where(flat, one, o.det0);
    va = va + v_det * o.c_blur;
    vc = vc + v_det * o.a_blur;
    vb = vb - (S)2 * v_det * o.b;
    const Vec3<T> v_normal = ((S)2 * v_det0) * cross(o.j0, o.j1);
    v_j0 = cross(o.j1, v_normal);
    v_j1 = cross(v_normal, o.j0);
  } else {
    v_j0 = v_j1 = {zero, zero, zero};
  }
  v_j0 = v_j0 + ((S)2 * va) * o.j0 + vb * o.j1;
  v_j1 = v_j1 + ((S)2 * vc) * o.j1 + vb * o.j0;

  GaussianVjp<T> out;
  const T kx = w.fx * o.iz, ky = w.fy * o.iz;
  const T v_kx = dot(v_j0, o.d0), v_ky = dot(v_j1, o.d1);
  const Vec3<T> v_d0 = kx * v_j0, v_d1 = ky * v_j1;
  const Mat3<T> v_p = {v_d0, v_d1, (-o.u) * v_d0 - o.v * v_d1};
  const T v_u = -dot(o.p.r2, v_d0), v_v = -dot(o.p.r2, v_d1);

  Scalar<T> ulo, uhi, vlo, vhi;
  clamp_limits<T>(w, ulo, uhi, vlo, vhi);
  const auto u_inside = both(at_least(o.u_raw, splat_of<T>(ulo)), at_least(splat_of<T>(uhi), o.u_raw));
  const auto v_inside = both(at_least(o.v_raw, splat_of<T>(vlo)), at_least(splat_of<T>(vhi), o.v_raw));
  const T v_u_raw = w.fx * v_x + where(u_inside, v_u, zero), v_v_raw = w.fy * v_y + where(v_inside, v_v, zero);
  // A clamped u sits on a limit (.. - cx) / fx, which moves with the intrinsics.
  const T v_u_limit = where(u_inside, zero, v_u) * ((S)1 / w.fx), v_v_limit = where(v_inside, zero, v_v) * ((S)1 / w.fy);
  out.cx = v_x - v_u_limit;
  out.cy = v_y - v_v_limit;
  out.fx = o.u_raw * v_x + o.iz * v_kx - o.u * v_u_limit;
  out.fy = o.v_raw * v_y + o.iz * v_ky - o.v * v_v_limit;
  // Slopes, not places times 1 / depth: of a centre at 1e30 the latter overflow before they cancel.
  const T by_depth = o.iz * (w.fx * v_kx + w.fy * v_ky) + o.u_raw * v_u_raw + o.v_raw * v_v_raw;
  const Vec3<T> v_t = {o.iz * v_u_raw, o.iz * v_v_raw, v_z - o.iz * by_depth};

  const Mat3<T> r = rotation_of<T>(w);
  const Mat3<T> v_n = {transposed_times(r, Vec3<T>{v_p.r0.x, v_p.r1.x, v_p.r2.x}), transposed_times(r, Vec3<T>{v_p.r0.y, v_p.r1.y, v_p.r2.y}),
                       transposed_times(r, Vec3<T>{v_p.r0.z, v_p.r1.z, v_p.r2.z})};   // transposed: row k is column k of v_n
  const Mat3<T> rqt = transpose(o.rq);
  const T lo = splat_of<T>(-30), hi = splat_of<T>(30);
  const auto in0 = both(at_least(g.log_scale.x, lo), at_least(hi, g.log_scale.x)), in1 = both(at_least(g.log_scale.y, lo), at_least(hi, g.log_scale.y)),
             in2 = both(at_least(g.log_scale.z, lo), at_least(hi, g.log_scale.z));
  out.log_scale = {where(in0, dot(v_n.r0, rqt.r0) * o.scale.x, zero), where(in1, dot(v_n.r1, rqt.r1) * o.scale.y, zero), where(in2, dot(v_n.r2, rqt.r2) * o.scale.z, zero)};
  const Mat3<T> v_rq = scale_columns(transpose(v_n), o.scale);
  out.quat = normalised_vjp(o.q, o.inv_length, rotation_vjp(o.q, v_rq));
  out.logit = v_logo * (S)LOG2E * ((S)1 - sigmoid(g.logit));
  out.mean = transposed_times(r, v_t);
  out.t = v_t;
  out.r = outer(v_t, g.mean) + v_p * transpose(o.n);
  return out;
}

// ---- colour ----
// max(0, 1/2 + Y(direction from the camera) . sh), sh[k] as three channels.
template <class T> SK_FN Vec3<T> direction(const View<Scalar<T>>& w, Vec3<T> mean, T& inv_distance) {
  const Vec3<T> d = mean - broadcast<T>(w.centre);
  const T l2 = dot(d, d), zero = splat_of<T>(0);
  const auto none = at_least(zero, l2);
  inv_distance = where(none, zero, splat_of<T>(1) / sqrt(where(none, splat_of<T>(1), l2)));
  return inv_distance * d;
}

template <class T> struct ColourVjp {
  Vec3<T> mean, t;
  Mat3<T> r;
};

// v_basis_dot[k] = gradient by y[k], i.e. v_colour . sh[k]; colour clamped channels must come in with v_colour 0.
template <class T> SK_FN ColourVjp<T> direction_vjp(const View<Scalar<T>>& w, int degree, Vec3<T> d, T inv_distance, const T* v_basis) {
  ColourVjp<T> out;
  const Vec3<T> v_d = sh_basis_vjp(degree, d, v_basis);
  out.mean = inv_distance * (v_d - dot(v_d, d) * d);
  // centre = -R^T t, and d moves against the centre: gradient of the centre is -out.mean.
  out.t = rotation_of<T>(w) * out.mean;
  out.r = outer(broadcast<T>(w.t), out.mean);
  return out;
}

}  // namespace sk
