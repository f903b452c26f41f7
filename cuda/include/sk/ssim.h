// SSIM of one window (Wang et al. 2004) from its weighted means, and its derivatives by those means.
#pragma once
#include "num.h"

namespace sk {

constexpr int SSIM_RADIUS = 5;   // 11 x 11 Gaussian window of sigma 1.5; weights sum to 1
SK_FN constexpr double ssim_window(int offset) {
  constexpr double weights[SSIM_RADIUS + 1] = {0.26601172486179436, 0.21300553771125370, 0.10936068950970002, 0.03600077212843083, 0.00759875813523919, 0.00102838008447911};
  return weights[offset < 0 ? -offset : offset];
}

template <class T> struct Ssim {
  T value, by_mean, by_square, by_product;   // derivatives by E[x], E[x^2], E[x y], x being the picture that is optimised
};

// mx, my: means of the two pictures; squares = E[x^2] + E[y^2]; product = E[x y].
template <class T> SK_FN Ssim<T> ssim(T mx, T my, T squares, T product) {
  typedef Scalar<T> S;
  const S c1 = (S)1e-4, c2 = (S)9e-4;
  const T mxy = mx * my, mm = mx * mx + my * my;
  const T a = (S)2 * mxy + c1, b = (S)2 * (product - mxy) + c2, c = mm + c1, d = squares - mm + c2;
  const T inv = splat_of<T>(1) / (c * d), value = a * b * inv;
  Ssim<T> o;
  o.value = value;
  o.by_product = (S)2 * a * inv;
  o.by_square = -value * c * inv;           // -value / d
  o.by_mean = (S)2 * my * (b - a) * inv - (S)2 * mx * value * (d - c) * inv;
  return o;
}

}  // namespace sk
