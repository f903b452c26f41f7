// Fibers for the threads of a block, the meeting points of warps and blocks, and what stands in for CUB.
#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "cuda_sort.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// Around the variables of the kernels' pages, __shared__ ones all: build.py renames their .bss. Absent under AddressSanitizer, which has padding there.
extern "C" char __start_sk_shared[] __attribute__((weak, visibility("hidden"))), __stop_sk_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

dim3 block_index, grid_size, block_size;
char* dynamic_shared;

namespace {

constexpr size_t STACK = 256 << 10;

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  unsigned thread = 0;
  uint64_t warp_meetings = 0, block_meetings = 0;
  std::deque<std::vector<Copy>> groups;   // of copies under way; the last is not committed yet
  bool done = false;
};
struct Meeting {        // of a warp or a block; two slots, for the next may begin while the slow still read this one
  int arrived[2] = {};
  uint64_t finished[2] = {};
  uint64_t values[2][32] = {};
  bool any[2] = {};
};

void* scheduler_stack;
Fiber* current;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Meeting> warps;
Meeting block_meeting;
bool progress;
const std::function<void()>* kernel;
size_t dynamic_size;

// Saves the callee's registers on this stack and goes on where the other stack was left.
extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the emulator switches stacks on x86-64 only"
#endif

void yield() { emulator_switch(&current->stack_pointer, scheduler_stack); }

void body() {
  (*kernel)();
  current->done = true;
  progress = true;
  for (;;) yield();
}

void start(Fiber& f, unsigned thread) {
  if (!f.stack) f.stack.reset(new char[STACK]);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack.get(), STACK);   // a deadlock leaves frames behind
#endif
  f.thread = thread;
  f.warp_meetings = f.block_meetings = 0;
  f.groups.assign(1, {});
  f.done = false;
  void** top = (void**)((uintptr_t)(f.stack.get() + STACK) / 16 * 16);
  *--top = nullptr;            // so that the stack stands in body() as after a call
  *--top = (void*)body;
  top -= 6;                    // the registers of emulator_switch
  f.stack_pointer = top;
}

void meet(Meeting& m, uint64_t& count, int members) {
  const int slot = count & 1;
  const uint64_t mine = ++count;
  if (++m.arrived[slot] == members) m.arrived[slot] = 0, m.finished[slot] = mine;
  while (m.finished[slot] != mine) yield();
  progress = true;
}

void run_block(std::mt19937& random, unsigned threads) {
  warps.assign((threads + 31) / 32, Meeting());
  block_meeting = Meeting();
  while (fibers.size() < threads) fibers.emplace_back(new Fiber);
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; i++) order[i] = i, start(*fibers[i], i);
  for (unsigned left = threads; left;) {
    std::shuffle(order.begin(), order.begin() + left, random);
    progress = false;
    for (unsigned i = 0; i < left;) {
      current = fibers[order[i]].get();
      emulator_switch(&scheduler_stack, current->stack_pointer);
      if (current->done) std::swap(order[i], order[--left]);
      else i++;
    }
    if (!progress) {
      current = nullptr;
      throw std::runtime_error("deadlock: " + std::to_string(left) + " threads of a block wait for others");
    }
  }
}

}  // namespace

unsigned thread_index() { return current ? current->thread : 0; }

// For the race detector.
unsigned block_number() { return (block_index.z * grid_size.y + block_index.y) * grid_size.x + block_index.x; }
uint64_t block_epoch() { return current->block_meetings; }
uint64_t warp_epoch() { return current->warp_meetings; }
bool in_kernel() { return current != nullptr; }
bool on_own_stack(const void* p) { return (const char*)p >= current->stack.get() && (const char*)p < current->stack.get() + STACK; }
bool shared(const void* p) {
  return ((const char*)p >= __start_sk_shared && (const char*)p < __stop_sk_shared) || ((const char*)p >= dynamic_shared && (const char*)p < dynamic_shared + dynamic_size);
}

const uint64_t* meet_warp(uint64_t value) {
  Meeting& m = warps[current->thread / 32];
  const int slot = current->warp_meetings & 1;
  m.values[slot][current->thread % 32] = value;
  meet(m, current->warp_meetings, 32);
  return m.values[slot];
}

bool meet_block(bool value) {
  const int slot = current->block_meetings & 1;
  if (block_meeting.arrived[slot] == 0) block_meeting.any[slot] = false;
  block_meeting.any[slot] |= value;
  meet(block_meeting, current->block_meetings, (int)block_size.x);
  return block_meeting.any[slot];
}

void later(const Copy& copy) { current->groups.back().push_back(copy); }
void commit() { current->groups.emplace_back(); }
bool due(int groups_left, Copy& copy) {
  auto& groups = current->groups;
  while (groups.size() > (size_t)groups_left + 1 && groups.front().empty()) groups.pop_front();
  if (groups.size() <= (size_t)groups_left + 1) return false;
  copy = groups.front().back();
  groups.front().pop_back();
  return true;
}

void start_kernel();
void finish_kernel();   // throws what the race detector found

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body_of_kernel) {
  static std::mt19937 random(12345);
  if (block.x % 32 && block.x != 1) throw std::runtime_error("a block of " + std::to_string(block.x) + " threads is not made of whole warps");
  std::unique_ptr<char[]> memory(new char[shared]);   // aligned to 16
  dynamic_shared = memory.get();
  dynamic_size = shared;
  kernel = &body_of_kernel;
  grid_size = grid;
  block_size = block;
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) blocks.emplace_back(x, y, z);
  std::shuffle(blocks.begin(), blocks.end(), random);
  start_kernel();
  for (const dim3& index : blocks) {
    block_index = index;
    memset(dynamic_shared, 0xff, shared);   // NaN: what a block did not write must not be read
    std::fill(__start_sk_shared, __stop_sk_shared, (char)0xff);
    run_block(random, block.x);
    current = nullptr;
  }
  finish_kernel();
}

#if !defined(SK_RACES)
void atomic(const void*, size_t) {}
void start_kernel() {}
void finish_kernel() {}
#endif

}  // namespace emulator

namespace sk {

// Temporary memory is filled with rubbish, so that it is nobody else's.
size_t sort_bytes(int64_t n, int key_bytes) { return n * (key_bytes + 4) + 8; }
size_t sum_bytes(int64_t n) { return n / 64 + 8; }

template <class K> static void sorted(void* temporary, size_t bytes, const K* keys, K* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits) {
  if (bytes < sort_bytes(n, sizeof(K))) throw std::runtime_error("too little temporary memory for a sort");
  memset(temporary, 0xff, bytes);
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; i++) order[i] = i;
  const K mask = bits >= (int)sizeof(K) * 8 ? (K)~(K)0 : (K)(((K)1 << bits) - 1);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
  for (int64_t i = 0; i < n; i++) keys_out[i] = keys[order[i]], values_out[i] = values[order[i]];
}
void sort_pairs(void* temporary, size_t bytes, const uint32_t* keys, uint32_t* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits, cudaStream_t) {
  sorted(temporary, bytes, keys, keys_out, values, values_out, n, bits);
}
void sort_pairs(void* temporary, size_t bytes, const uint16_t* keys, uint16_t* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits, cudaStream_t) {
  sorted(temporary, bytes, keys, keys_out, values, values_out, n, bits);
}
void exclusive_sum(void* temporary, size_t bytes, const int32_t* in, int64_t* out, int64_t n, cudaStream_t) {
  if (bytes < sum_bytes(n)) throw std::runtime_error("too little temporary memory for a sum");
  memset(temporary, 0xff, bytes);
  int64_t sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t x = in[i];
    out[i] = sum;
    sum += x;
  }
}

}  // namespace sk
