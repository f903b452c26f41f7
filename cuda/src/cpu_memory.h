// Scratch memory of the CPU library's calls.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sk {

// Says that `bytes` at p will be written soon: with huge pages 512 times fewer faults. A hint; only whole pages inside are named.
inline void expect_large(void* p, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t HUGE_PAGE = 2u << 20;
  const size_t first = ((size_t)p + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, last = ((size_t)p + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (p && last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

// Blocks that calls have finished with, kept for the next one: a fresh page costs up to 3 us, 20 MB of them more than the blending.
struct Cache {
  static constexpr size_t LIMIT = 256u << 20;
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t held = 0;

#if defined(__SANITIZE_ADDRESS__)   // blocks of their exact size, never reused: an access beside one is seen
  static Cache& get() {
    static Cache cache;
    return cache;
  }
  void* take(size_t& bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, bytes)) throw std::bad_alloc();
    return p;
  }
  void give(void* data, size_t) { free(data); }
#else
  static Cache& get() {
    static Cache* cache = new Cache;   // never freed: calls may run while the process ends
    return *cache;
  }
  void* take(size_t& bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    {
      std::lock_guard<std::mutex> lock(mutex);
      int best = -1;
      for (int i = 0; i < (int)blocks.size(); i++)
        if (blocks[i].bytes >= bytes && blocks[i].bytes <= 2 * bytes + 65536 && (best < 0 || blocks[i].bytes < blocks[best].bytes)) best = i;
      if (best >= 0) {
        const Block b = blocks[best];
        blocks.erase(blocks.begin() + best);
        held -= b.bytes;
        bytes = b.bytes;
        return b.data;
      }
    }
    bytes += bytes / 8 / 4096 * 4096;   // the next call may need a little more
    // Large blocks are written all over the place: with 4 kB pages every write would miss the TLB too.
    const size_t huge = 2u << 20, align = bytes >= 2 * huge ? huge : 4096;
    bytes = (bytes + align - 1) / align * align;
    void* p = aligned_alloc(align, bytes);
    if (!p) throw std::bad_alloc();
    expect_large(p, bytes);
    return p;
  }
  void give(void* data, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    blocks.push_back({data, bytes});
    held += bytes;
    while (held > LIMIT || blocks.size() > 32) {   // oldest first
      held -= blocks.front().bytes;
      free(blocks.front().data);
      blocks.erase(blocks.begin());
    }
  }
#endif
};

// Scratch of one call: uninitialised, aligned.
template <class T> struct Buffer {
  size_t bytes;
  T* data;
  explicit Buffer(int64_t count) : bytes((size_t)(count > 0 ? count : 1) * sizeof(T)), data((T*)Cache::get().take(bytes)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { Cache::get().give(data, bytes); }
  T& operator[](int64_t i) { return data[i]; }
};

}  // namespace sk
