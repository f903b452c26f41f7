// 3DGS-MCMC (Kheradmand et al. 2024): position noise, and opacity and scale of Gaussians that share a place.
#pragma once
#include "vec.h"

namespace sk {

// Displacement Sigma * noise * gate * scale; gate = 1 / (1 + exp(-100 ((1 - opacity) - 0.995))) is near 1 only where opacity is below 0.005.
template <class T> SK_FN Vec3<T> mcmc_noise(Quat<T> quat, Vec3<T> log_scale, T logit, Vec3<T> noise, Scalar<T> scale) {
  typedef Scalar<T> S;
  const T gate = sigmoid((S)100 * ((S)0.005 - sigmoid(logit)));
  T unused;
  const Mat3<T> r = rotation(normalised(quat, unused));
  const T lo = splat_of<T>(-30), hi = splat_of<T>(30);
  const Vec3<T> s = {exp((S)2 * clamp(log_scale.x, lo, hi)), exp((S)2 * clamp(log_scale.y, lo, hi)), exp((S)2 * clamp(log_scale.z, lo, hi))};
  const Vec3<T> local = transposed_times(r, (gate * scale) * noise);
  return r * Vec3<T>{s.x * local.x, s.y * local.y, s.z * local.z};
}

// `copies` equal Gaussians at one place that blend like one of opacity `opacity`: each gets `each` = 1 - (1 - opacity)^(1/copies), and
// scales times `factor` = opacity / sum_{i=1..copies} sum_{k=0..i-1} binomial(i-1, k) (-1)^k each^(k+1) / sqrt(k+1). Terms of equal k add
// up to binomial(copies, k+1), which leaves one sum. In double always: the terms alternate.
SK_FN void relocation(double opacity, int copies, double& each, double& factor) {
  const double c = copies < 1 ? 1 : copies, o = opacity < 0.9999999 ? opacity : 0.9999999;
  each = 1 - exp2(log2(1 - o) / c);
  double term = 1, sum = 0, sign = 1;
  for (int j = 1; j <= copies && (j <= 1 || term > 1e-18); j++) {
    term *= (c - j + 1) / j * each;   // binomial(copies, j) each^j
    sum += sign * term / sqrt((double)j);
    sign = -sign;
  }
  factor = o / sum;
}

// The same in place on one row; the opacity ends in [0.005, 1 - 2^-23].
template <class S> SK_FN void relocate_row(S& logit, S* log_scales, int copies) {
  double opacity, factor;
  relocation(sigmoid((double)logit), copies, opacity, factor);
  const double kept = clamp(opacity, 0.005, 1 - 1.1920929e-7);
  logit = (S)((log2(kept) - log2(1 - kept)) * LN2);
  for (int k = 0; k < 3; k++) log_scales[k] += (S)(log2(factor) * LN2);
}

}  // namespace sk
