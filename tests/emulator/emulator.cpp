// Fibers for the threads of a block, the meeting points of warps and blocks, and what stands in for CUB.
#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "cuda_sort.h"

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
uint64_t blocks_run;

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
  f.thread = thread;
  f.warp_meetings = f.block_meetings = 0;
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
    if (!progress) throw std::runtime_error("deadlock: " + std::to_string(left) + " threads of a block wait for others");
  }
}

}  // namespace

unsigned thread_index() { return current ? current->thread : 0; }
uint64_t block_number() { return blocks_run; }
uint64_t block_epoch() { return current ? current->block_meetings : 0; }
uint64_t warp_epoch() { return current ? current->warp_meetings : 0; }
bool in_kernel() { return current != nullptr; }

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

void finish_kernel();   // throws what the race detector found

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body_of_kernel) {
  static std::mt19937 random(12345);
  if (block.x % 32 && block.x != 1) throw std::runtime_error("a block of " + std::to_string(block.x) + " threads is not made of whole warps");
  std::unique_ptr<char[]> memory(shared ? new char[shared + 16] : nullptr);
  dynamic_shared = (char*)(((uintptr_t)memory.get() + 15) / 16 * 16);
  kernel = &body_of_kernel;
  grid_size = grid;
  block_size = block;
  std::vector<unsigned> blocks(grid.x);
  for (unsigned i = 0; i < grid.x; i++) blocks[i] = i;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++) {
      std::shuffle(blocks.begin(), blocks.end(), random);
      for (unsigned x : blocks) {
        block_index = dim3(x, y, z);
        blocks_run++;
        if (shared) memset(dynamic_shared, 0xff, shared);   // NaN: what a kernel does not write must not be read
        run_block(random, block.x);
        current = nullptr;
      }
    }
  finish_kernel();
}

#if !defined(SK_RACES)
void atomic(const void*) {}
void finish_kernel() {}
#endif

}  // namespace emulator

namespace sk {

size_t sort_bytes(int64_t, int) { return 8; }
size_t sum_bytes(int64_t) { return 8; }

template <class K> static void sorted(const K* keys, K* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits) {
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; i++) order[i] = i;
  const K mask = bits >= (int)sizeof(K) * 8 ? (K)~(K)0 : (K)(((K)1 << bits) - 1);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
  for (int64_t i = 0; i < n; i++) keys_out[i] = keys[order[i]], values_out[i] = values[order[i]];
}
void sort_pairs(void*, size_t, const uint32_t* keys, uint32_t* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits, cudaStream_t) { sorted(keys, keys_out, values, values_out, n, bits); }
void sort_pairs(void*, size_t, const uint16_t* keys, uint16_t* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits, cudaStream_t) { sorted(keys, keys_out, values, values_out, n, bits); }
void exclusive_sum(void*, size_t, const int32_t* in, int64_t* out, int64_t n, cudaStream_t) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t x = in[i];
    out[i] = sum;
    sum += x;
  }
}

}  // namespace sk
