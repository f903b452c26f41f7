// Finds accesses of two threads to the same bytes, one of them a write, that no barrier orders. The kernels are compiled with -fsanitize=thread; this page
// answers the compiler's calls instead of libtsan, which knows neither fibers nor the meeting points of warps and blocks.
//
// A thread comes to a meeting's end only when all members have arrived, so accesses of a warp or a block are seen in the order of its meetings, and two of
// them are unordered when no meeting was in between. Between blocks nothing orders, but shared memory belongs to one block at a time.
#include <dlfcn.h>
#include <stdio.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "cuda_runtime.h"

namespace emulator {

unsigned block_number();
uint64_t block_epoch(), warp_epoch();
bool in_kernel(), on_own_stack(const void* p), shared(const void* p);

namespace {

struct Thread {
  uint32_t block, thread;
  const char* code;
};

// Accesses of one kind to one place that are not all ordered before another: by one thread, or by several of a warp, a block, the grid.
enum Span : uint32_t { NOBODY, THREAD, WARP, BLOCK, GRID };
struct Accesses {
  Span span;
  uint32_t block_epoch, warp_epoch;
  Thread one, other;   // other: where there are several
};
enum Kind { READ, WRITE, ATOMIC };
struct Cell {
  Accesses by[3];   // by kind
  bool split;       // into bytes, since something smaller than a word was accessed here
};
constexpr uintptr_t PAGE = 256;   // words
struct Page {
  uint64_t kernel = 0;
  Cell cells[PAGE];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::unordered_map<uintptr_t, Cell> bytes_of_split;
Page* recent[1024];
uintptr_t recent_key[1024];
uint64_t kernels;
std::string found;

struct Now {
  Thread thread;
  uint32_t block_epoch, warp_epoch;
  bool shared;
};

bool before(const Accesses& a, const Now& now) {
  if (a.span == NOBODY || (now.shared && a.one.block != now.thread.block)) return true;
  if (a.span == GRID || a.one.block != now.thread.block) return false;
  if (a.block_epoch < now.block_epoch) return true;
  if (a.span == BLOCK || a.one.thread / 32 != now.thread.thread / 32) return false;
  if (a.warp_epoch < now.warp_epoch) return true;
  return a.span == THREAD && a.one.thread == now.thread.thread;
}

void add(Accesses& a, const Now& now) {
  if (before(a, now)) {
    a = {THREAD, now.block_epoch, now.warp_epoch, now.thread, {}};
    return;
  }
  const Span span = a.one.block != now.thread.block ? GRID : a.one.thread / 32 != now.thread.thread / 32 ? BLOCK : a.one.thread != now.thread.thread ? WARP : THREAD;
  if (span > a.span) a.span = span, a.other = now.thread;
}

std::string place(const char* code) {
  Dl_info info = {};
  char text[32];
  dladdr(code, &info);
  snprintf(text, sizeof text, "+0x%zx", (size_t)(code - (const char*)info.dli_fbase));
  return std::string(info.dli_fname ? info.dli_fname : "?") + text;
}

void report(Kind kind, const Now& now, Kind earlier_kind, const Accesses& a) {
  static const char* const names[] = {"read", "write", "atomic operation"};
  const Thread& t = now.thread;
  const Thread& u = a.span > THREAD && a.one.block == t.block && a.one.thread == t.thread ? a.other : a.one;
  auto who = [](Kind k, const Thread& x) { return std::string(names[k]) + " by thread " + std::to_string(x.thread) + " of block " + std::to_string(x.block) + " (" + place(x.code) + ")"; };
  found = "race: " + who(kind, t) + " and " + who(earlier_kind, u) + " in " + (now.shared ? "shared" : "global") + " memory";
}

void access(Cell& cell, Kind kind, const Now& now) {
  for (int k = 0; k < 3; k++) {
    if ((kind == READ && k == READ) || (kind == ATOMIC && k == ATOMIC) || before(cell.by[k], now)) continue;
    if (found.empty()) report(kind, now, (Kind)k, cell.by[k]);
    return;
  }
  add(cell.by[kind], now);
}

Cell& cell_of(uintptr_t word) {
  const uintptr_t key = word / PAGE, slot = key % 1024;
  if (recent_key[slot] != key || !recent[slot]) {
    auto& page = pages[key];
    if (!page) page.reset(new Page);
    recent_key[slot] = key;
    recent[slot] = page.get();
  }
  Page& page = *recent[slot];
  if (page.kernel != kernels) {
    memset(page.cells, 0, sizeof page.cells);
    page.kernel = kernels;
  }
  return page.cells[word % PAGE];
}

void access(const void* p, size_t bytes, Kind kind, const void* code) {
  if (!in_kernel() || !found.empty() || on_own_stack(p)) return;
  const Now now = {{block_number(), thread_index(), (const char*)code - 1}, (uint32_t)block_epoch(), (uint32_t)warp_epoch(), shared(p)};
  for (uintptr_t at = (uintptr_t)p, end = at + bytes; at < end;) {
    Cell& cell = cell_of(at / 4);
    const bool whole = at % 4 == 0 && at + 4 <= end;
    if (whole && !cell.split) {
      access(cell, kind, now);
      at += 4;
      continue;
    }
    if (!cell.split) {
      for (uintptr_t b = 0; b < 4; b++) bytes_of_split[at / 4 * 4 + b] = cell;
      cell.split = true;
    }
    for (const uintptr_t next = at / 4 * 4 + 4; at < next && at < end; at++) access(bytes_of_split[at], kind, now);
  }
}

}  // namespace

void atomic(const void* p, size_t bytes) { access(p, bytes, ATOMIC, __builtin_return_address(0)); }

void start_kernel() {
  kernels++;
  found.clear();
  bytes_of_split.clear();
}

void finish_kernel() {
  if (!found.empty()) throw std::runtime_error(found);
}

}  // namespace emulator

// What -fsanitize=thread has the compiler call.
using namespace emulator;
#define CODE __builtin_return_address(0)
#define SIZED(bytes)                                                                \
  void __tsan_read##bytes(void* p) { access(p, bytes, READ, CODE); }                \
  void __tsan_write##bytes(void* p) { access(p, bytes, WRITE, CODE); }              \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, READ, CODE); }      \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, WRITE, CODE); }
extern "C" {
SIZED(1) SIZED(2) SIZED(4) SIZED(8) SIZED(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, READ, CODE); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, WRITE, CODE); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
