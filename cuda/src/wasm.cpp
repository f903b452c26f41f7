// The WebAssembly module of the browser: exports and memory around the loops of cpu_core. One thread, no imports. Numbers and addresses are 32 bits wide,
// because JavaScript has no other integers without a detour. viewer/src/wasm.ts is its only caller and owns the order of the calls.
#include "cpu_core.h"

using namespace sk;

extern "C" uint8_t __heap_base;   // by the linker: where its own memory ends

namespace {

constexpr uint32_t PAGE = 65536;
uintptr_t top = 0;   // allocated memory ends here

// What the caller writes before a call: the numbers of one scene and one camera.
struct Parameters {
  double settings[SK_SETTINGS];
  float world_to_cam[16], K[9], background[3];
} parameters;

struct Gaussians {
  int32_t n, sh_degree;
  const float *means, *quats, *log_scales, *logit_opacities, *sh, *attribute;   // attribute [n,3] or null: drawn in place of colour
} scene;

struct Prepared {   // projected, sorted, binned
  int32_t width, height, visible;
  float* splats;
  int32_t* pairs;
  int64_t* tile_offsets;
} view;

TileScratch scratch;

// Memory beyond `top`; null where the machine has no more.
void* take(uint64_t bytes) {
  const uintptr_t at = (top + 63) / 64 * 64;
  if (bytes > 0xFFFF0000u - at) return nullptr;
  const uintptr_t end = at + (uintptr_t)bytes;
  const uintptr_t pages = (end + PAGE - 1) / PAGE, now = __builtin_wasm_memory_size(0);
  if (pages > now && __builtin_wasm_memory_grow(0, pages - now) == (uintptr_t)-1) return nullptr;
  top = end;
  return (void*)at;
}
template <class T> T* take_array(int64_t count) { return (T*)take((uint64_t)count * sizeof(T)); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// What the calls below return where memory ends.
constexpr int32_t NO_MEMORY = -1;

EXPORT void* parameters_at() { return &parameters; }
EXPORT void* allocate(uint32_t bytes) { return take(bytes); }

// Memory is a stack: everything that was taken after mark() is given back by release(mark).
EXPORT uintptr_t mark() { return top ? top : top = (uintptr_t)&__heap_base; }
EXPORT void release(uintptr_t mark) { top = mark; }

EXPORT void set_scene(int32_t n, int32_t sh_degree, const float* means, const float* quats, const float* log_scales, const float* logit_opacities, const float* sh) {
  scene = {n, sh_degree, means, quats, log_scales, logit_opacities, sh, nullptr};
}
EXPORT void set_attribute(const float* attribute) { scene.attribute = attribute; }

// Projects, sorts and bins for the camera in `parameters`. Returns how many Gaussians are visible.
EXPORT int32_t prepare(int32_t width, int32_t height) {
  const int32_t n = scene.n, degree = scene.attribute ? -1 : scene.sh_degree;
  const View<float> camera = make_view(parameters.world_to_cam, parameters.K, width, height, parameters.settings);
  const ProjectArgs args = {n, degree, sh_count(scene.sh_degree), scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh, camera, 0, n};
  view = {width, height, 0, take_array<float>((int64_t)n * SK_SPLAT), nullptr, nullptr};
  float* radii = take_array<float>(n);
  int64_t* reached = take_array<int64_t>(n);
  uint32_t *keys = take_array<uint32_t>(n), *keys_b = take_array<uint32_t>(n);
  int32_t *rows = take_array<int32_t>(n), *rows_b = take_array<int32_t>(n);
  if (!view.splats || !radii || !reached || !keys || !keys_b || !rows || !rows_b) return NO_MEMORY;
  int64_t pairs = 0, not_finite = 0;
  for (int32_t first = 0; first < n; first += CHUNK)
    view.visible += project_chunk(args, first, n - first < CHUNK ? n : first + CHUNK, view.splats, radii, reached, keys + view.visible, rows + view.visible, &pairs, &not_finite);
  const int32_t* order = radix_sort(view.visible, keys, rows, keys_b, rows_b);
  for (int32_t i = 0; scene.attribute && i < view.visible; i++)
    __builtin_memcpy(view.splats + (int64_t)order[i] * SK_SPLAT + SK_R, scene.attribute + (int64_t)order[i] * 3, 3 * sizeof(float));
  const BlendArgs a = blend_args(width, height, 0, parameters.settings, view.splats, nullptr);
  const int64_t tiles = (int64_t)a.tiles_x * a.tiles_y;
  int64_t* spans = take_array<int64_t>(view.visible);
  int32_t* next = take_array<int32_t>(tiles);
  view.pairs = take_array<int32_t>(pairs);
  view.tile_offsets = take_array<int64_t>(tiles + 1);
  if (!spans || !next || !view.pairs || !view.tile_offsets) return NO_MEMORY;
  count_tiles(a, order, reached, 0, view.visible, view.visible, spans, next);
  start_tiles(a, 1, 0, next, view.tile_offsets);
  fill_tiles(a, order, spans, 0, view.visible, next, view.pairs);
  return view.visible;
}

// Blends what prepare() left. Pictures [height,width,..]; color, the depths and features_out may be null; features [n,channels].
EXPORT int32_t blend(float* color, float* alpha, float* expected_depth, float* median_depth, const float* features, int32_t channels, float* features_out) {
  BlendArgs a = blend_args(view.width, view.height, channels, parameters.settings, view.splats, features);
  a.background = parameters.background;
  a.color = color;
  a.alpha = alpha;
  a.expected_depth = expected_depth;
  a.median_depth = median_depth;
  a.features_out = features_out;
  const uintptr_t before = top;
  if (!(scratch.spare = take_array<float>(channels))) return NO_MEMORY;
  __builtin_memset(scratch.spare, 0, sizeof(float) * channels);
  for (int32_t t = 0; t < a.tiles_x * a.tiles_y; t++) {
    const int64_t first = view.tile_offsets[t];
    blend_tile(a, t, view.pairs + first, view.tile_offsets[t + 1] - first, scratch);
  }
  top = before;
  return 0;
}

// How many Gaussians reach the tile of pixel (x, y) after prepare(): no more have a weight there.
EXPORT int32_t pairs_at(int32_t x, int32_t y) {
  const int32_t tile = y / SK_TILE * tiles_of(view.width) + x / SK_TILE;
  return (int32_t)(view.tile_offsets[tile + 1] - view.tile_offsets[tile]);
}
// The blending weights of pixel (x, y) after prepare(), front to back: rows and weights [pairs_at(x, y)] of those that have one. Returns how many.
EXPORT int32_t weights_at(int32_t x, int32_t y, int32_t* rows, float* weights) {
  const BlendArgs a = blend_args(view.width, view.height, 0, parameters.settings, view.splats, nullptr);
  const int32_t tile = y / SK_TILE * a.tiles_x + x / SK_TILE, n = pairs_at(x, y);
  const int32_t* pairs = view.pairs + view.tile_offsets[tile];
  const float px = from_centre<float>(x, view.width), py = from_centre<float>(y, view.height);
  float left = 1;
  int32_t count = 0;
  for (int32_t i = 0; i < n; i++) {
    const float* p = view.splats + (int64_t)pairs[i] * SK_SPLAT;
    const Gaussian2D<float> g = {p[SK_X], p[SK_Y], p[SK_A], p[SK_B], p[SK_C], p[SK_LOGO]};
    const Step<float> step = blend_step(left, alpha_at(g, px - g.x, py - g.y, a.cut, a.alpha_max).alpha, a.transmittance_min);
    if (!step.going) break;
    rows[count] = pairs[i];
    weights[count] = step.weight;
    count += step.weight > 0;
    left = step.left;
  }
  return count;
}
