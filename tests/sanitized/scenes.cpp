// Degenerate, extreme and random scenes through every entry of the CPU library that reads a scene, to be built with the sanitizers together
// with cuda/src/cpu*.cpp. `scenes FIRST COUNT` draws the named scenes, then the random ones of seeds FIRST to FIRST + COUNT - 1.
// Every array is a heap block of its exact size. Finite scenes must give finite pictures and gradients (the random ones with
// RasterSettings' cut-offs); a NaN or an infinity must be counted.
// One line per scene that breaks this, and exit code 1; what the sanitizers find ends the program.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "splatkit.h"

namespace {

const real INF = (real)HUGE_VAL, NOT_A_NUMBER = (real)NAN;
constexpr double DEFAULT[SK_SETTINGS] = {0.01, 0.3, 0, 1 / 255.0, 0.99, 1e-4, 0.3, 0};
constexpr double SMOOTH[SK_SETTINGS] = {0.01, 0.3, 0, 0, 1, 0, HUGE_VAL, 0};

struct Random {   // splitmix64: the same numbers on every system
  uint64_t state;
  uint64_t bits() {
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int below(int n) { return (int)(bits() % (uint64_t)n); }
  bool one_in(int n) { return below(n) == 0; }
  double uniform() { return (double)(bits() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
  template <class T> T any(const std::vector<T>& of) { return of[below((int)of.size())]; }
};

// A heap block of exactly `size` numbers, each `value` until written.
template <class T> struct Array {
  T* data;
  int64_t size;
  explicit Array(int64_t size, T value = (T)-7) : data((T*)std::malloc(size * sizeof(T))), size(size) {
    for (int64_t i = 0; i < size; i++) data[i] = value;
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data); }
  bool finite() const {
    for (int64_t i = 0; i < size; i++)
      if (!std::isfinite(data[i])) return false;
    return true;
  }
};

struct Drawing {
  int64_t n;
  int cameras, width, height, degree, bands, channels;
  std::vector<double> settings{DEFAULT, DEFAULT + SK_SETTINGS};
  std::vector<real> means, quats, log_scales, logits, sh, features, poses, K;
  std::vector<int64_t> rows;   // empty: all
  int threads = 1;

  // Gaussians of all shapes in front of cameras that look along +z.
  Drawing(Random& g, int64_t n, int cameras, int width, int height, int degree, int channels)
      : n(n), cameras(cameras), width(width), height(height), degree(degree), bands(degree < 0 ? 1 : (degree + 1) * (degree + 1)), channels(channels) {
    auto fill = [&](std::vector<real>& x, int64_t size, double mean, double spread) {
      for (int64_t i = 0; i < size; i++) x.push_back((real)(mean + spread * g.normal()));
    };
    fill(means, 3 * n, 0, 0.6);
    for (int64_t i = 0; i < n; i++) means[3 * i + 2] += 2;
    fill(quats, 4 * n, 0, 1);
    fill(log_scales, 3 * n, -2, 0.7);
    fill(logits, n, 0, 1.5);
    fill(sh, 3 * n * bands, 0, 0.5);
    fill(features, n * channels, 0, 1);
    for (int c = 0; c < cameras; c++) {
      const real angle = (real)(0.3 * g.normal()), co = std::cos(angle), si = std::sin(angle);
      const real pose[16] = {co, 0, si, (real)(0.2 * g.normal()), 0, 1, 0, (real)(0.2 * g.normal()), -si, 0, co, (real)(0.5 * g.normal()), 0, 0, 0, 1};
      const real k[9] = {(real)(1.1 * width), 0, (real)(0.52 * width), 0, (real)(1.2 * height), (real)(0.45 * height), 0, 0, 1};
      poses.insert(poses.end(), pose, pose + 16);
      K.insert(K.end(), k, k + 9);
    }
  }
  std::vector<std::pair<const char*, std::vector<real>*>> geometry() {
    return {{"means", &means}, {"quats", &quats}, {"log_scales", &log_scales}, {"logits", &logits}, {"sh", &sh}};
  }
};

struct Result {
  std::string not_finite;   // names of what holds a NaN or an infinity
  int64_t left_out = 0;     // rows that sk_project counts
  std::vector<bool> drawn;  // by any camera
};

void must(int32_t status, int32_t expected, const char* entry) {
  if (status == expected) return;
  std::printf("%s: status %d, expected %d: %s\n", entry, status, expected, sk_last_error());
  std::exit(1);
}

Result draw(const Drawing& d) {
  Result result;
  auto look = [&](const char* name, const Array<real>& x) {
    if (!x.finite()) result.not_finite += std::string(" ") + name;
  };
  auto heap = [](const std::vector<real>& x) {
    auto* copy = new Array<real>((int64_t)x.size());
    for (size_t i = 0; i < x.size(); i++) copy->data[i] = x[i];
    return std::unique_ptr<Array<real>>(copy);
  };
  const auto means = heap(d.means), quats = heap(d.quats), scales = heap(d.log_scales), logits = heap(d.logits), sh = heap(d.sh), features = heap(d.features);
  const auto poses = heap(d.poses), K = heap(d.K);
  const int C = d.cameras, W = d.width, H = d.height, F = d.channels;
  const int64_t N = d.n, pixels = (int64_t)C * W * H;
  const double* s = d.settings.data();
  const int64_t* rows = d.rows.empty() ? nullptr : d.rows.data();
  const real* coefficients = d.degree < 0 ? nullptr : sh->data;
  sk_set_threads(d.threads);

  Array<real> splats(C * N * SK_SPLAT), radii(C * N);
  Array<int32_t> order(C * N);
  Array<int64_t> tiles(C * N), counts(3 * C), offsets((int64_t)C * ((W + SK_TILE - 1) / SK_TILE) * ((H + SK_TILE - 1) / SK_TILE) + 1), needed(1);
  must(sk_project(N, C, W, H, d.degree, d.bands, s, means->data, quats->data, scales->data, logits->data, coefficients, poses->data, K->data, rows, N, splats.data, order.data,
                  radii.data, tiles.data, counts.data, nullptr, 0, nullptr), SK_OK, "sk_project");
  int64_t total = 0;
  for (int c = 0; c < C; c++) total += counts.data[3 * c + 1], result.left_out += counts.data[3 * c + 2];

  for (int64_t row = 0; row < N; row++) {
    result.drawn.push_back(false);
    for (int c = 0; c < C; c++) result.drawn[row] = result.drawn[row] || radii.data[c * N + row] > 0;
  }

  Array<real> background(3 * C, (real)0.3), color(3 * pixels), alpha(pixels), depth(pixels), median(pixels), features_out(pixels * F);
  Array<int32_t> pairs(total);
  real* const colored = d.degree < 0 ? nullptr : color.data;
  auto blend = [&](int64_t capacity) {
    return sk_blend(N, C, W, H, F, s, splats.data, order.data, tiles.data, counts.data, F ? features->data : nullptr, background.data, capacity, needed.data, pairs.data, offsets.data,
                    colored, alpha.data, depth.data, median.data, F ? features_out.data : nullptr, nullptr, 0, nullptr);
  };
  if (total > 0) must(blend(total - 1), SK_MORE, "sk_blend with too little room");
  must(blend(total), SK_OK, "sk_blend");
  look("color", color), look("alpha", alpha), look("depth", depth), look("median", median), look("features", features_out);

  Array<real> v_color(3 * pixels), v_alpha(pixels), v_depth(pixels), v_features_out(pixels * F);
  for (auto* v : {&v_color, &v_alpha, &v_depth, &v_features_out})
    for (int64_t i = 0; i < v->size; i++) v->data[i] = (real)((i * 37 % 17) / 8.0 - 1);
  Array<real> v_splats(C * N * SK_SPLAT), v_features(N * F), v_background(3 * C), weights(C * N);
  must(sk_blend_vjp(N, C, W, H, F, s, splats.data, tiles.data, counts.data, F ? features->data : nullptr, background.data, pairs.data, offsets.data, colored, alpha.data, depth.data,
                    F ? features_out.data : nullptr, colored ? v_color.data : nullptr, v_alpha.data, v_depth.data, F ? v_features_out.data : nullptr, v_splats.data,
                    F ? v_features.data : nullptr, v_background.data, weights.data, nullptr, 0, nullptr), SK_OK, "sk_blend_vjp");
  look("v_splats", v_splats), look("v_features", v_features), look("v_background", v_background), look("weights", weights);

  Array<real> v_means(3 * N), v_quats(4 * N), v_scales(3 * N), v_logits(N), v_sh(3 * N * d.bands), v_poses(16 * C), v_K(9 * C);
  must(sk_project_vjp(N, C, W, H, d.degree, d.bands, s, means->data, quats->data, scales->data, logits->data, coefficients, poses->data, K->data, rows, radii.data, v_splats.data,
                      v_means.data, v_quats.data, v_scales.data, v_logits.data, v_sh.data, v_poses.data, v_K.data, nullptr, 0, nullptr), SK_OK, "sk_project_vjp");
  look("v_means", v_means), look("v_quats", v_quats), look("v_log_scales", v_scales), look("v_logits", v_logits), look("v_sh", v_sh), look("v_world_to_cam", v_poses), look("v_K", v_K);

  if (F > 0) {
    Array<real> map((int64_t)W * H * F, (real)0.5), sums(N * F, 0), weight(N, 0);
    must(sk_uplift(N, W, H, F, s, splats.data, pairs.data, offsets.data, map.data, sums.data, weight.data, nullptr, 0, nullptr), SK_OK, "sk_uplift");
    look("uplifted", sums), look("uplifted weights", weight);
  }
  Array<real> target(3 * (int64_t)W * H, (real)0.4), v_image(3 * (int64_t)W * H);
  Array<double> terms(2);
  if (colored) {
    must(sk_l1_ssim(W, H, color.data, target.data, nullptr, 0.2, terms.data, v_image.data, nullptr, 0, nullptr), SK_OK, "sk_l1_ssim");
    look("v_image", v_image);
  }
  Array<real> noise(3 * N, (real)0.7);
  must(sk_mcmc_noise(N, means->data, quats->data, scales->data, logits->data, noise.data, 1e-4, nullptr), SK_OK, "sk_mcmc_noise");
  look("means with noise", *means);
  Array<int32_t> copies(N);
  for (int64_t i = 0; i < N; i++) copies.data[i] = 1 + (int32_t)(i % 60);
  must(sk_relocate(N, logits->data, scales->data, copies.data, nullptr), SK_OK, "sk_relocate");
  look("relocated logits", *logits), look("relocated scales", *scales);
  return result;
}

// The core planes in chunks of a few rows, each on its last byte's word: rows that are not finite or huge make exactly their chunk unfit.
std::string pack(const Drawing& d, int64_t chunk_rows) {
  const auto exact = [](const std::vector<real>& x) {
    auto copy = std::make_unique<Array<real>>((int64_t)x.size());
    std::copy(x.begin(), x.end(), copy->data);
    return copy;
  };
  const auto means = exact(d.means), quats = exact(d.quats), scales = exact(d.log_scales), logits = exact(d.logits), sh = exact(d.sh);
  const int64_t chunks = (d.n + chunk_rows - 1) / chunk_rows, words = (88 + 17 * chunk_rows + 3) / 4, last = d.n - (chunks - 1) * chunk_rows;
  Array<int32_t> planes(chunks ? (chunks - 1) * words + (88 + 17 * last + 3) / 4 : 0), unfit(chunks);
  sk_set_threads(d.threads);
  must(sk_pack_core(d.n, d.bands, means->data, quats->data, scales->data, logits->data, sh->data, chunk_rows, words, planes.data, unfit.data, nullptr), SK_OK, "sk_pack_core");
  must(sk_pack_core(d.n + 1, d.bands, means->data, quats->data, scales->data, logits->data, sh->data, chunk_rows, words - chunk_rows * 17 / 4 - 2, planes.data, unfit.data, nullptr), SK_ERROR, "sk_pack_core with too little room");
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    bool fit = true;
    for (int64_t row = chunk * chunk_rows; row < d.n && row < (chunk + 1) * chunk_rows; row++) {
      for (int k = 0; k < 3; k++) fit = fit && std::fabs(d.means[3 * row + k]) <= (real)1e30f && std::isfinite((float)d.log_scales[3 * row + k]) && std::fabs(d.sh[3 * d.bands * row + k]) <= (real)1e30f;
      for (int k = 0; k < 4; k++) fit = fit && std::fabs(d.quats[4 * row + k]) <= (real)1e30f;
      fit = fit && std::fabs(d.logits[row]) <= (real)1e30f;
    }
    if (unfit.data[chunk] != !fit) return "chunk " + std::to_string(chunk) + " is " + (fit ? "fit, but refused" : "unfit, but was packed");
    const int64_t rows = chunk < chunks - 1 ? chunk_rows : last;
    if (fit && (std::memcmp(planes.data + chunk * words, "SKC1", 4) != 0 || planes.data[chunk * words + 1] != rows)) return "chunk " + std::to_string(chunk) + " has no header";
    if (!fit && planes.data[chunk * words] != -7) return "chunk " + std::to_string(chunk) + " is unfit, but was written";
  }
  return "";
}

int broken = 0;
void complain(const std::string& name, const std::string& why) {
  std::printf("%s: %s\n", name.c_str(), why.c_str());
  broken++;
}

// ---- the named scenes

void each(std::vector<real>& x, int columns, std::vector<double> row) {
  for (size_t i = 0; i < x.size(); i++) x[i] = (real)row[i % columns % row.size()];
}

struct Named {
  const char* name;
  std::function<void(Drawing&)> change;
};
const std::vector<Named> NAMED = {
    {"zero quaternions", [](Drawing& d) { each(d.quats, 4, {0}); }},
    {"tiny quaternions", [](Drawing& d) { each(d.quats, 4, {1e-30, 0, 2e-30, 0}); }},
    {"huge quaternions", [](Drawing& d) { each(d.quats, 4, {1e30, 0, 2e30, -1e30}); }},
    {"log-scale -100", [](Drawing& d) { each(d.log_scales, 3, {-100}); }},
    {"log-scale +50", [](Drawing& d) { each(d.log_scales, 3, {50}); }},
    {"needles", [](Drawing& d) { each(d.log_scales, 3, {-30, -30, 3}); }},
    {"discs", [](Drawing& d) { each(d.log_scales, 3, {0, 0, -100}); }},
    {"logit +100: opacity exactly 1", [](Drawing& d) { each(d.logits, 1, {100}); }},
    {"logit -100", [](Drawing& d) { each(d.logits, 1, {-100}); }},
    {"centre at the camera", [](Drawing& d) { for (int c = 0; c < d.cameras; c++) d.poses[16 * c + 3] = d.poses[16 * c + 7] = d.poses[16 * c + 11] = 0; each(d.means, 3, {0}); }},
    {"behind the camera", [](Drawing& d) { each(d.means, 3, {0, 0, -9}); }},
    {"at the near plane", [](Drawing& d) { for (int c = 0; c < d.cameras; c++) { const real eye[16] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}; std::copy(eye, eye + 16, d.poses.begin() + 16 * c); } each(d.means, 3, {0.001, 0, 0.01}); }},
    {"beside the camera", [](Drawing& d) { each(d.means, 3, {1e6, 0, 0.5}); }},
    {"means 1e30", [](Drawing& d) { each(d.means, 3, {1e30}); }},
    {"means 1e30 ahead", [](Drawing& d) { each(d.means, 3, {0, 0, 1e30}); }},
    {"colours 1e12", [](Drawing& d) { each(d.sh, 1, {1e12, -1e12}); }},
    {"features 1e12", [](Drawing& d) { each(d.features, 1, {1e12, -1e12}); }},
    {"empty ranges", [](Drawing& d) { d.rows.assign(2 * d.cameras, 5); }},
    {"range of the last row", [](Drawing& d) { for (int c = 0; c < d.cameras; c++) d.rows.push_back(d.n - 1), d.rows.push_back(d.n); }},
    {"focal length 1e-6", [](Drawing& d) { for (int c = 0; c < d.cameras; c++) d.K[9 * c] = d.K[9 * c + 4] = (real)1e-6; }},
    {"focal length 1e9", [](Drawing& d) { for (int c = 0; c < d.cameras; c++) d.K[9 * c] = d.K[9 * c + 4] = (real)1e9; }},
    {"principal point 1e9", [](Drawing& d) { for (int c = 0; c < d.cameras; c++) d.K[9 * c + 2] = d.K[9 * c + 5] = (real)1e9; }},
    {"a pose of zeros", [](Drawing& d) { each(d.poses, 16, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1}); }},
    {"camera at 1e30", [](Drawing& d) { for (int c = 0; c < d.cameras; c++) d.poses[16 * c + 3] = d.poses[16 * c + 11] = (real)1e30; }},
};

void draw_named() {
  auto expect_finite = [](const std::string& name, const Drawing& d) {
    for (int64_t rows : {1, 16, 17, 1 << 16})
      if (const std::string why = pack(d, rows); !why.empty()) complain(name + " in chunks of " + std::to_string(rows), why);
    if (const Result r = draw(d); !r.not_finite.empty()) complain(name, "not finite:" + r.not_finite);
  };
  for (const Named& named : NAMED)
    for (const double* settings : {DEFAULT, SMOOTH})
      for (double antialias : {0.0, 1.0}) {
        Random g{7};
        Drawing d(g, 40, 2, 24, 19, 3, 5);
        d.settings.assign(settings, settings + SK_SETTINGS);
        d.settings[SK_ANTIALIAS] = antialias;
        named.change(d);
        expect_finite(std::string(named.name) + (settings == SMOOTH ? ", smooth" : "") + (antialias != 0 ? ", antialias" : ""), d);
      }
  struct { const char* name; int n, width, height, degree, channels; } sizes[] = {
      {"no Gaussians", 0, 40, 33, 3, 5}, {"one pixel", 40, 1, 1, 3, 5}, {"one column", 40, 1, 33, 2, 1}, {"one row", 40, 40, 1, 1, 0},
      {"one Gaussian", 1, 17, 16, 0, 3}, {"no colour", 40, 20, 20, -1, 4}, {"more rows than a chunk", 257, 32, 32, 0, 0}};
  for (const auto& s : sizes) {
    Random g{8};
    expect_finite(s.name, Drawing(g, s.n, 2, s.width, s.height, s.degree, s.channels));
  }
  Random g{9};
  Drawing many(g, 100000, 1, 24, 20, 0, 0);
  each(many.means, 3, {0.1, 0.1, 3});
  each(many.logits, 1, {-3});
  many.threads = 2;
  expect_finite("100,000 in one place", many);

  // A NaN or an infinity in any field of a row that would be drawn is counted, wherever it stands in a register.
  Random h{10};
  const Drawing good(h, 17, 1, 20, 17, 3, 5);
  const Result plain = draw(good);
  if (plain.left_out != 0) complain("a plain scene", "rows are left out");
  for (int field = 0; field < 5; field++)
    for (real value : {NOT_A_NUMBER, INF, -INF})
      for (int64_t row = 0; row < good.n; row++) {
        Drawing bad = good;
        auto [name, x] = bad.geometry()[field];
        const int64_t columns = (int64_t)x->size() / bad.n;
        (*x)[row * columns + row % columns] = value;
        if (const std::string why = pack(bad, 5); !why.empty()) complain(std::string(name) + " with " + std::to_string(value), why);
        if (draw(bad).left_out == 0 && plain.drawn[row]) complain(name, std::to_string(value) + " in row " + std::to_string(row) + " was not counted");
      }
  for (real value : {NOT_A_NUMBER, INF, -INF}) {   // what the Python edge refuses before; here it may only not index memory
    Drawing bad = good;
    each(bad.features, 1, {(double)value, 1});
    draw(bad);
    for (size_t i = 0; i < 16; i++) bad = good, bad.poses[i] = value, draw(bad);
    for (size_t i = 0; i < 9; i++) bad = good, bad.K[i] = value, draw(bad);
  }
}

// ---- the random scenes

void draw_random(uint64_t seed) {
  Random g{seed};
  Drawing d(g, g.any<int>({0, 1, 3, 16, 17, 40, 60, 300}), g.any<int>({1, 1, 1, 3}), 1 + g.below(36), 1 + g.below(20), g.below(5) - 1, g.any<int>({0, 0, 1, 3, 4, 17}));
  if (g.one_in(3)) d.settings.assign(SMOOTH, SMOOTH + SK_SETTINGS);
  d.settings[SK_ANTIALIAS] = g.below(2);
  if (g.one_in(4)) d.bands = 16, d.sh.resize(d.n * 48, (real)0.1);
  if (g.one_in(5)) d.threads = 3;
  if (g.one_in(4))
    for (int c = 0; c < d.cameras; c++) {
      const int64_t first = g.below((int)d.n + 1), last = first + g.below((int)(d.n - first) + 1);
      d.rows.push_back(first), d.rows.push_back(last);
    }
  const bool harmed = g.one_in(3);
  // Colours and depths less extreme than in the named scenes: 1e30 in one pixel with a scale of e^30 has gradients beyond float32.
  const std::vector<std::vector<double>> extremes = {
      {0, 1e8, -1e8, 1e6, 1e-30, 0.01, 0.0100001}, {0, 1e-30, 1e30, -1e30, 1e-20, 1e18}, {-100, 50, -30, 30, 10, 1e30, -1e30, 5}, {100, -100, 1e30, -1e30, 20, -20}, {1e4, -1e4, 0, 1e-30}};
  int field = 0;
  for (auto [name, x] : d.geometry()) {
    const int rarity = g.any<int>({3, 20, 200, 1 << 30});
    for (real& value : *x) {
      if (g.one_in(rarity)) value = (real)g.any(extremes[field]);
      if (harmed && g.one_in(300)) value = g.any<real>({NOT_A_NUMBER, INF, -INF});
    }
    field++;
  }
  if (g.one_in(8)) d.K[0] = (real)g.any<double>({1e-3, 1, 1e4}), d.K[2] = (real)g.any<double>({0, -1e4, 1e4});
  bool finite = true;
  for (auto [name, x] : d.geometry())
    for (real value : *x) finite &= std::isfinite(value);
  if (const std::string why = pack(d, 1 + g.below(40)); !why.empty()) complain("seed " + std::to_string(seed), why);
  const Result r = draw(d);
  // Without the cut-offs nothing bounds the gradients of what is far off and huge: there only memory must hold.
  if (finite && d.settings[SK_ALPHA_MIN] > 0 && !r.not_finite.empty()) complain("seed " + std::to_string(seed), "not finite:" + r.not_finite);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0, count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  draw_named();
  for (uint64_t seed = first; seed < first + count; seed++) draw_random(seed);
  std::printf("%zu named and %llu random scenes, %d broken\n", NAMED.size(), (unsigned long long)count, broken);
  return broken > 0;
}
