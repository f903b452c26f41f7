// Small vectors and matrices over the value type T: only what projection needs.
#pragma once
#include "num.h"

namespace sk {

template <class T> struct Vec3 {
  T x, y, z;
};
template <class T> SK_FN Vec3<T> operator+(Vec3<T> a, Vec3<T> b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
template <class T> SK_FN Vec3<T> operator-(Vec3<T> a, Vec3<T> b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
template <class T> SK_FN Vec3<T> operator*(T s, Vec3<T> a) { return {s * a.x, s * a.y, s * a.z}; }
template <class T> SK_FN T dot(Vec3<T> a, Vec3<T> b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
template <class T> SK_FN Vec3<T> cross(Vec3<T> a, Vec3<T> b) { return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x}; }

// Three rows.
template <class T> struct Mat3 {
  Vec3<T> r0, r1, r2;
};
template <class T> SK_FN Vec3<T> operator*(const Mat3<T>& m, Vec3<T> v) { return {dot(m.r0, v), dot(m.r1, v), dot(m.r2, v)}; }
template <class T> SK_FN Vec3<T> transposed_times(const Mat3<T>& m, Vec3<T> v) { return v.x * m.r0 + v.y * m.r1 + v.z * m.r2; }
template <class T> SK_FN Mat3<T> operator+(const Mat3<T>& a, const Mat3<T>& b) { return {a.r0 + b.r0, a.r1 + b.r1, a.r2 + b.r2}; }
// a * b, row by row: row i of the product is b^T times row i of a.
template <class T> SK_FN Mat3<T> operator*(const Mat3<T>& a, const Mat3<T>& b) {
  return {transposed_times(b, a.r0), transposed_times(b, a.r1), transposed_times(b, a.r2)};
}
template <class T> SK_FN Mat3<T> transpose(const Mat3<T>& m) {
  return {{m.r0.x, m.r1.x, m.r2.x}, {m.r0.y, m.r1.y, m.r2.y}, {m.r0.z, m.r1.z, m.r2.z}};
}
template <class T> SK_FN Mat3<T> outer(Vec3<T> a, Vec3<T> b) { return {a.x * b, a.y * b, a.z * b}; }
template <class T> SK_FN Mat3<T> scale_columns(const Mat3<T>& m, Vec3<T> s) {
  return {{m.r0.x * s.x, m.r0.y * s.y, m.r0.z * s.z}, {m.r1.x * s.x, m.r1.y * s.y, m.r1.z * s.z}, {m.r2.x * s.x, m.r2.y * s.y, m.r2.z * s.z}};
}

// Unit quaternion wxyz -> rotation matrix.
template <class T> struct Quat {
  T w, x, y, z;
};
template <class T> SK_FN Mat3<T> rotation(Quat<T> q) {
  const Scalar<T> one = 1, two = 2;
  return {{one - two * (q.y * q.y + q.z * q.z), two * (q.x * q.y - q.w * q.z), two * (q.x * q.z + q.w * q.y)},
          {two * (q.x * q.y + q.w * q.z), one - two * (q.x * q.x + q.z * q.z), two * (q.y * q.z - q.w * q.x)},
          {two * (q.x * q.z - q.w * q.y), two * (q.y * q.z + q.w * q.x), one - two * (q.x * q.x + q.y * q.y)}};
}
template <class T> SK_FN Quat<T> rotation_vjp(Quat<T> q, const Mat3<T>& v) {
  const Scalar<T> two = 2, minus4 = -4;
  return {two * (q.x * (v.r2.y - v.r1.z) + q.y * (v.r0.z - v.r2.x) + q.z * (v.r1.x - v.r0.y)),
          two * (q.y * (v.r0.y + v.r1.x) + q.z * (v.r0.z + v.r2.x) + q.w * (v.r2.y - v.r1.z)) + minus4 * q.x * (v.r1.y + v.r2.z),
          two * (q.x * (v.r0.y + v.r1.x) + q.z * (v.r1.z + v.r2.y) + q.w * (v.r0.z - v.r2.x)) + minus4 * q.y * (v.r0.x + v.r2.z),
          two * (q.x * (v.r0.z + v.r2.x) + q.y * (v.r1.z + v.r2.y) + q.w * (v.r1.x - v.r0.y)) + minus4 * q.z * (v.r0.x + v.r1.y)};
}

// Any quaternion -> the unit quaternion of its rotation; zero gives the identity. inv_length is what the vjp needs (0 for zero).
template <class T> SK_FN Quat<T> normalised(Quat<T> q, T& inv_length) {
  // Scaled by the largest component first, so that tiny and huge lengths neither vanish nor overflow when squared.
  const T zero = splat_of<T>(0), one = splat_of<T>(1);
  T largest = max(max(abs(q.w), abs(q.x)), max(abs(q.y), abs(q.z)));
  auto empty = less(largest, splat_of<T>(1e-37));
  T s = one / where(empty, one, largest);
  T w = q.w * s, x = q.x * s, y = q.y * s, z = q.z * s;
  T inv = one / sqrt(where(empty, one, w * w + x * x + y * y + z * z));
  inv_length = where(empty, zero, inv * s);
  return {where(empty, one, w * inv), where(empty, zero, x * inv), where(empty, zero, y * inv), where(empty, zero, z * inv)};
}
template <class T> SK_FN Quat<T> normalised_vjp(Quat<T> unit, T inv_length, Quat<T> v) {
  T along = unit.w * v.w + unit.x * v.x + unit.y * v.y + unit.z * v.z;
  return {inv_length * (v.w - along * unit.w), inv_length * (v.x - along * unit.x), inv_length * (v.y - along * unit.y), inv_length * (v.z - along * unit.z)};
}

}  // namespace sk
