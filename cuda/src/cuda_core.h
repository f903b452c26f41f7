// What the kernels of the CUDA library share: launches, scratch, and the collectives of a warp.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "sk/project.h"
#include "sk/tiles.h"
#include "splatkit.h"

namespace sk {

#if !defined(SK_EMULATOR)
#define SK_DYNAMIC_SHARED(name) extern __shared__ char name[]
#endif

constexpr unsigned FULL = 0xffffffffu;
constexpr int ROWS = 256;       // rows, pixels or numbers that one block of an elementwise kernel works on

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// kernel<<<grid, block, shared, stream>>>(arguments): the one place that launches.
template <class... P, class... A> void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
#if defined(SK_EMULATOR)
  emulator::run(grid, block, shared, [&] { kernel((P)arguments...); });
#else
  if (shared > 48 << 10) check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), name);
  kernel<<<grid, block, shared, stream>>>((P)arguments...);
#endif
  check(cudaGetLastError(), name);
}
inline unsigned blocks_for(int64_t items, int per_block = ROWS) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) throw std::runtime_error("too many rows for one launch");
  return (unsigned)blocks;
}

// Pieces of the caller's scratch. Without memory it only adds up: sk_scratch() runs the same takes.
struct Scratch {
  char* memory;
  int64_t size, used = 0;
  Scratch(int64_t* words, int64_t count) : memory((char*)words), size(count * 8) {}
  template <class T> T* take(int64_t count) {
    const int64_t at = used;
    used = (used + count * (int64_t)sizeof(T) + 255) / 256 * 256;
    if (memory && used > size) throw std::runtime_error("scratch holds " + std::to_string(size / 8) + " words; sk_scratch() says how many it takes");
    return memory ? (T*)(memory + at) : nullptr;
  }
  int64_t words() const { return (used + 7) / 8; }
};

// `settings`, by value: kernel arguments cannot point to the host.
struct Settings {
  double values[SK_SETTINGS];
  explicit Settings(const double* s) {
    for (int i = 0; i < SK_SETTINGS; i++) values[i] = s[i];
  }
};

#if defined(__CUDACC__) || defined(SK_EMULATOR)
// One projected Gaussian in a tile's shared memory.
struct alignas(16) Record {
  float4 q[SK_SPLAT / 4];
  __device__ float operator[](int i) const { return ((const float*)q)[i]; }
  __device__ Gaussian2D<float> gaussian() const { return {q[0].x, q[0].y, q[0].z, q[0].w, q[1].x, q[1].y}; }
};
static_assert(SK_X == 0 && SK_Y == 1 && SK_A == 2 && SK_B == 3 && SK_C == 4 && SK_LOGO == 5 && SK_SPLAT == 12, "records are three vectors of four in this order");

__device__ inline Record load_record(const float* splats, int64_t row) {
  const float4* p = (const float4*)(splats + row * SK_SPLAT);
  return {{p[0], p[1], p[2]}};
}

template <class T> __device__ T sum_of_warp(T x) {
  for (int bit = 16; bit; bit >>= 1) x += __shfl_xor_sync(FULL, x, bit);
  return x;
}

// d [16,8] += a [16,8] b [8,8] by the matrix units, whose numbers keep 10 bits behind the first (tf32) and cut the rest off. Lane l holds d: rows l / 4 and
// l / 4 + 8, columns 2 (l % 4) and the next; a: (l / 4, l % 4), (l / 4 + 8, l % 4), and both again four columns on; b: (l % 4, l / 4) and four rows on.
#if defined(SK_EMULATOR)
using emulator::multiply_add;
#else
__device__ inline void multiply_add(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(to_bits(a[0])), "r"(to_bits(a[1])), "r"(to_bits(a[2])), "r"(to_bits(a[3])), "r"(to_bits(b[0])), "r"(to_bits(b[1])));
#else
  __trap();   // the launch asks what the kernel was compiled for
#endif
}
#endif
// What a tf32 number keeps of x; x minus it fits in another.
__device__ inline float kept_by_tf32(float x) { return from_bits(to_bits(x) & (int32_t)0xffffe000); }

// Sums N numbers over a warp, half as many exchanges as N sums would take: at each step a lane keeps half of the numbers and gives its partner the
// others. Afterwards lane l has the sum of number index_of(l); of lanes with the same number, one is `first`.
template <int N> struct TransposedSum {
  int index;
  bool first;
  __device__ explicit TransposedSum(int lane) : index(0), first(true) {
    int count[6] = {N};
    for (int s = 0; s < 5; s++) count[s + 1] = (count[s] + 1) / 2;
    for (int s = 4; s >= 0; s--) {   // backwards: from the one number that is left to its place among N
      const bool upper = lane & (16 >> s), alone = (count[s] & 1) && index == count[s + 1] - 1;
      if (alone)
        first = first && !upper;     // a number without a partner is kept on both sides
      else if (upper)
        index += count[s + 1];
    }
  }
  __device__ static float of(float (&v)[N], int lane) {
    int count = N;
#pragma unroll
    for (int bit = 16; bit; bit >>= 1) {
      const int half = (count + 1) / 2;
      const bool upper = lane & bit;
#pragma unroll
      for (int j = 0; j < N; j++) {
        if (j >= half) continue;
        if (j + half < count) {
          const float give = upper ? v[j] : v[j + half], keep = upper ? v[j + half] : v[j];
          v[j] = keep + __shfl_xor_sync(FULL, give, bit);
        } else {
          v[j] += __shfl_xor_sync(FULL, v[j], bit);
        }
      }
      count = half;
    }
    return v[0];
  }
};
#endif

}  // namespace sk
