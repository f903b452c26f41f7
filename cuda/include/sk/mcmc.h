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

// `copies` equal Gaussians at one place that blend like one of opacity `opacity`: each gets `new_opacity` = 1 - (1 - opacity)^(1/copies)
// and scales times `factor` = opacity / sum_{i=1..copies} sum_{k=0..i-1} binomial(i-1, k) (-1)^k new_opacity^(k+1) / sqrt(k+1).
template <class S> SK_FN void relocation(S opacity, int copies, S& new_opacity, S& factor) {
  constexpr int MOST = 51;   // the alternating sum loses its digits beyond that
  copies = copies < 1 ? 1 : copies > MOST ? MOST : copies;
  double o = (double)opacity, each = 1 - exp2(log2(1 - (o < 0.9999999 ? o : 0.9999999)) / (double)copies), sum = 0;
  for (int i = 1; i <= copies; i++) {
    double binomial = 1, power = each, sign = 1;
    for (int k = 0; k < i; k++) {
      sum += sign * binomial * power / sqrt((double)(k + 1));
      binomial = binomial * (i - 1 - k) / (k + 1);
      power *= each;
      sign = -sign;
    }
  }
  new_opacity = (S)each;
  factor = (S)(o / sum);
}

}  // namespace sk
