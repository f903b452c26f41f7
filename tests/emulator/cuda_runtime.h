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
void atomic(const void* address);   // the next write there is atomic: for the race detector

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
template <class T, class F> T atomically(T* p, F&& f) {
  atomic(p);
  const T old = __atomic_load_n((volatile T*)p, __ATOMIC_RELAXED);
  *(volatile T*)p = f(old);
  return old;
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
inline float atomicAdd(float* p, float x) {
  emulator::atomic(p);
  const float old = *p;
  *p = old + x;
  return old;
}
inline unsigned atomicMax(unsigned* p, unsigned x) { return emulator::atomically(p, [x](unsigned old) { return old > x ? old : x; }); }

typedef struct Stream* cudaStream_t;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return bytes ? (memset(p, value, bytes), cudaSuccess) : cudaSuccess; }
