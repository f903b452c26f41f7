// Stands in for CUDA's header of this name when g++ compiles cuda/src/*.cu: a block's threads are fibers that take turns in shuffled order, blocks run one
// after the other. Blind to the memory model, to what blocks do to each other by order, and to speed.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static   // one block at a time
#define __launch_bounds__(...)
#define SK_DYNAMIC_SHARED(name) char* name = emulator::dynamic_shared

struct float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

extern dim3 block_index, grid_size, block_size;
extern char* dynamic_shared;
unsigned thread_index();

// Runs the kernel; throws std::runtime_error where threads wait for each other in vain, or what the race detector found.
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);

// Every thread of the block (or lane of the warp) gives a value and continues when all have; returns everybody's.
const uint64_t* meet_warp(uint64_t value);
bool meet_block(bool value);

// An asynchronous copy writes rubbish at once and the numbers when its thread waits for it, so that neither may disturb anybody in between.
struct Copy {
  char* to;
  const char* from;
  size_t bytes;
};
void later(const Copy& copy);
void commit();
bool due(int groups_left, Copy& copy);   // takes one copy that must be done so that at most so many groups are under way

void atomic(const void* address, size_t bytes);   // for the race detector: this thread reads and writes here in one piece

struct ThreadIndex {
  operator unsigned() const { return thread_index(); }
};

template <class T> uint64_t packed(T x) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T> T unpacked(uint64_t bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
// Out of the race detector's sight, which atomic() has told of them.
template <class T> __attribute__((noinline, no_sanitize_thread)) T loaded(const T* p) { return *p; }
template <class T> __attribute__((noinline, no_sanitize_thread)) void stored(T* p, T x) { *p = x; }
template <class T, class F> T atomically(T* p, F&& f) {
  atomic(p, sizeof *p);
  const T old = loaded(p);
  stored(p, f(old));
  return old;
}

// The matrix units' m16n8k8 product of tf32 numbers, fragment by fragment.
inline void multiply_add(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  auto pair = [](float x, float y) { return packed(x) | packed(y) << 32; };
  uint64_t all[3][32];
  const uint64_t mine[3] = {pair(a[0], a[1]), pair(a[2], a[3]), pair(b[0], b[1])};
  for (int i = 0; i < 3; i++) memcpy(all[i], meet_warp(mine[i]), sizeof all[i]);
  auto part = [&](int i, int lane, int half) { return unpacked<float>((all[i][lane] >> 32 * half) & 0xffffe000u); };
  const int lane = thread_index() % 32;
  for (int r = 0; r < 2; r++)
    for (int c = 0; c < 2; c++)
      for (int k = 0; k < 8; k++) d[2 * r + c] += part(k / 4, lane / 4 * 4 + k % 4, r) * part(2, (2 * (lane % 4) + c) * 4 + k % 4, k / 4);
}

}  // namespace emulator

struct EmulatedThread { emulator::ThreadIndex x; };
static EmulatedThread threadIdx;
#define blockIdx emulator::block_index
#define gridDim emulator::grid_size
#define blockDim emulator::block_size

inline void __syncthreads() { emulator::meet_block(false); }
inline int __syncthreads_or(int x) { return emulator::meet_block(x); }
inline void __syncwarp() { emulator::meet_warp(0); }
template <class T> T __shfl_sync(unsigned, T x, int lane) { return emulator::unpacked<T>(emulator::meet_warp(emulator::packed(x))[lane]); }
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits) { return __shfl_sync(mask, x, (int)(emulator::thread_index() % 32) ^ bits); }
inline unsigned __ballot_sync(unsigned, int x) {
  const uint64_t* all = emulator::meet_warp(x != 0);
  unsigned out = 0;
  for (int i = 0; i < 32; i++) out |= (unsigned)all[i] << i;
  return out;
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline long long __float2ll_rn(float x) { return llrintf(x); }

template <class T> T atomicAdd(T* p, T x) { return emulator::atomically(p, [x](T old) { return (T)(old + x); }); }
template <class T> T atomicMax(T* p, T x) { return emulator::atomically(p, [x](T old) { return old > x ? old : x; }); }

typedef struct Stream* cudaStream_t;
enum cudaError_t { cudaSuccess = 0 };
struct cudaFuncAttributes { int ptxVersion; };
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) { return a->ptxVersion = 90, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return bytes ? (memset(p, value, bytes), cudaSuccess) : cudaSuccess; }
