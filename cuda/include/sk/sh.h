// Real spherical harmonics up to degree 3 in the order and signs of Kerbl et al. 2023, and the derivative by direction.
#pragma once
#include "vec.h"

namespace sk {

SK_FN constexpr int sh_count(int degree) { return (degree + 1) * (degree + 1); }

// y[0 .. sh_count(degree)) at unit direction d.
template <class T> SK_FN void sh_basis(int degree, Vec3<T> d, T* y) {
  typedef Scalar<T> S;
  y[0] = splat_of<T>(0.28209479177387814);
  if (degree < 1) return;
  y[1] = (S)-0.4886025119029199 * d.y;
  y[2] = (S)0.4886025119029199 * d.z;
  y[3] = (S)-0.4886025119029199 * d.x;
  if (degree < 2) return;
  T xx = d.x * d.x, yy = d.y * d.y, zz = d.z * d.z;
  y[4] = (S)1.0925484305920792 * d.x * d.y;
  y[5] = (S)-1.0925484305920792 * d.y * d.z;
  y[6] = (S)0.31539156525252005 * ((S)2 * zz - xx - yy);
  y[7] = (S)-1.0925484305920792 * d.x * d.z;
  y[8] = (S)0.5462742152960396 * (xx - yy);
  if (degree < 3) return;
  T four = (S)4 * zz - xx - yy;
  y[9] = (S)-0.5900435899266435 * d.y * ((S)3 * xx - yy);
  y[10] = (S)2.890611442640554 * d.x * d.y * d.z;
  y[11] = (S)-0.4570457994644658 * d.y * four;
  y[12] = (S)0.3731763325901154 * d.z * ((S)2 * zz - (S)3 * xx - (S)3 * yy);
  y[13] = (S)-0.4570457994644658 * d.x * four;
  y[14] = (S)1.445305721320277 * d.z * (xx - yy);
  y[15] = (S)-0.5900435899266435 * d.x * (xx - (S)3 * yy);
}

// Gradient by direction of sum_k v[k] y[k].
template <class T> SK_FN Vec3<T> sh_basis_vjp(int degree, Vec3<T> d, const T* v) {
  typedef Scalar<T> S;
  const T zero = splat_of<T>(0);
  Vec3<T> g = {zero, zero, zero};
  if (degree < 1) return g;
  g.x = (S)-0.4886025119029199 * v[3];
  g.y = (S)-0.4886025119029199 * v[1];
  g.z = (S)0.4886025119029199 * v[2];
  if (degree < 2) return g;
  const S a = (S)1.0925484305920792, b = (S)(2 * 0.31539156525252005), c = (S)(2 * 0.5462742152960396);
  g.x = g.x + a * (d.y * v[4] - d.z * v[7]) + d.x * (c * v[8] - b * v[6]);
  g.y = g.y + a * (d.x * v[4] - d.z * v[5]) - d.y * (b * v[6] + c * v[8]);
  g.z = g.z - a * (d.y * v[5] + d.x * v[7]) + (S)2 * b * d.z * v[6];
  if (degree < 3) return g;
  T xx = d.x * d.x, yy = d.y * d.y, zz = d.z * d.z, xy = d.x * d.y, xz = d.x * d.z, yz = d.y * d.z;
  const S k9 = (S)0.5900435899266435, k10 = (S)2.890611442640554, k11 = (S)0.4570457994644658, k12 = (S)0.3731763325901154, k14 = (S)1.445305721320277;
  g.x = g.x - (S)6 * k9 * xy * v[9] + k10 * yz * v[10] + (S)2 * k11 * xy * v[11] - (S)6 * k12 * xz * v[12] - k11 * ((S)4 * zz - (S)3 * xx - yy) * v[13]
        + (S)2 * k14 * xz * v[14] - (S)3 * k9 * (xx - yy) * v[15];
  g.y = g.y - (S)3 * k9 * (xx - yy) * v[9] + k10 * xz * v[10] - k11 * ((S)4 * zz - xx - (S)3 * yy) * v[11] - (S)6 * k12 * yz * v[12] + (S)2 * k11 * xy * v[13]
        - (S)2 * k14 * yz * v[14] + (S)6 * k9 * xy * v[15];
  g.z = g.z + k10 * xy * v[10] - (S)8 * k11 * yz * v[11] + k12 * ((S)6 * zz - (S)3 * xx - (S)3 * yy) * v[12] - (S)8 * k11 * xz * v[13] + k14 * (xx - yy) * v[14];
  return g;
}

}  // namespace sk
