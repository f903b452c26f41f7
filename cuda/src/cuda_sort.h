// Sorting and prefix sums on the card: the part that cuda_sort.cu takes from CUB, and that the emulator does without.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace sk {

// Bytes of temporary memory for up to n items.
size_t sort_bytes(int64_t n, int key_bytes);
size_t sum_bytes(int64_t n);

// Stable, ascending by the lowest `bits` bits of the keys.
void sort_pairs(void* temporary, size_t bytes, const uint32_t* keys, uint32_t* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits, cudaStream_t stream);
void sort_pairs(void* temporary, size_t bytes, const uint16_t* keys, uint16_t* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits, cudaStream_t stream);

// out[i] = in[0] + ... + in[i - 1].
void exclusive_sum(void* temporary, size_t bytes, const int32_t* in, int64_t* out, int64_t n, cudaStream_t stream);

}  // namespace sk
