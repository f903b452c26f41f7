// The one file that includes CUB: it compiles slowly.
#include "cuda_sort.h"

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "cuda_core.h"

namespace sk {

namespace {

template <class K> size_t bytes_of_sort(int64_t n) {
  size_t bytes = 0;
  check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, (const K*)nullptr, (K*)nullptr, (const int32_t*)nullptr, (int32_t*)nullptr, n), "radix sort");
  return bytes;
}

template <class K> void sorted(void* temporary, size_t bytes, const K* keys, K* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits, cudaStream_t stream) {
  check(cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, keys_out, values, values_out, n, 0, bits, stream), "radix sort");
}


}  // namespace

size_t sort_bytes(int64_t n, int key_bytes) { return key_bytes == 2 ? bytes_of_sort<uint16_t>(n) : bytes_of_sort<uint32_t>(n); }

size_t sum_bytes(int64_t n) {
  size_t bytes = 0;
  check(cub::DeviceScan::ExclusiveScan(nullptr, bytes, (const int32_t*)nullptr, (int64_t*)nullptr, cuda::std::plus<>(), (int64_t)0, n), "prefix sum");
  return bytes;
}

void sort_pairs(void* temporary, size_t bytes, const uint32_t* keys, uint32_t* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits, cudaStream_t stream) {
  sorted(temporary, bytes, keys, keys_out, values, values_out, n, bits, stream);
}
void sort_pairs(void* temporary, size_t bytes, const uint16_t* keys, uint16_t* keys_out, const int32_t* values, int32_t* values_out, int64_t n, int bits, cudaStream_t stream) {
  sorted(temporary, bytes, keys, keys_out, values, values_out, n, bits, stream);
}

void exclusive_sum(void* temporary, size_t bytes, const int32_t* in, int64_t* out, int64_t n, cudaStream_t stream) {
  check(cub::DeviceScan::ExclusiveScan(temporary, bytes, in, out, cuda::std::plus<>(), (int64_t)0, n, stream), "prefix sum");
}

}  // namespace sk
