// Asynchronous copies, done as late as they may be.
#pragma once
#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) ((uint32_t*)to)[i / 4] = 0xffffffffu;
  emulator::later({(char*)to, (const char*)from, bytes});
}
inline void __pipeline_commit() { emulator::commit(); }
inline void __pipeline_wait_prior(int groups_left) {
  for (emulator::Copy c; emulator::due(groups_left, c);)
    for (size_t i = 0; i < c.bytes; i += 4) *(uint32_t*)(c.to + i) = *(const uint32_t*)(c.from + i);
}
