#include <utility>

#include "quantize/sort_ids.h"

namespace jax_sage {
namespace {

constexpr int kThreads = 1024;
// Ids and places in shared memory: all that the smallest GPU has for a CTA, less 3 KiB.
constexpr int kBytesOfToken = 6;
static_assert(kMostSorted <= 65536, "places have 16 bits");

// A CTA sorts the ids of a batch entry: by a bitonic network of `size` of them, a power of two,
// unless they are in order as they come.
__global__ void __launch_bounds__(kThreads) SortIds(const SortParams params, int size) {
  extern __shared__ int32_t ids[];
  uint16_t* places = reinterpret_cast<uint16_t*>(ids + size);
  const int64_t first = blockIdx.x * static_cast<int64_t>(params.length);
  bool in_order = true;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    // What is not there comes last, by its place.
    ids[i] = i < params.length ? params.ids[first + i] : INT32_MAX;
    places[i] = static_cast<uint16_t>(i);
  }
  __syncthreads();
  for (int i = threadIdx.x + 1; i < size; i += kThreads) in_order &= ids[i - 1] <= ids[i];
  if (!__syncthreads_and(in_order)) {
    for (int run = 2; run <= size; run *= 2) {
      for (int distance = run / 2; distance > 0; distance /= 2) {
        for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
          const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
          const int32_t id = ids[low], other_id = ids[high];
          const uint16_t place = places[low], other_place = places[high];
          const bool greater = id != other_id ? id > other_id : place > other_place;
          if (greater != ((low & run) == 0)) continue;
          ids[low] = other_id, ids[high] = id;
          places[low] = other_place, places[high] = place;
        }
        __syncthreads();
      }
    }
  }
  for (int i = threadIdx.x; i < params.length; i += kThreads) {
    params.sorted_ids[first + i] = ids[i];
    params.order[first + i] = places[i];
  }
}

}  // namespace

cudaError_t LaunchSortIds(const SortParams& params, cudaStream_t stream) {
  if (params.batch > INT32_MAX || params.length > kMostSorted) return cudaErrorInvalidConfiguration;
  int size = 2;
  while (size < params.length) size *= 2;
  const int bytes = size * kBytesOfToken;
  const cudaError_t error =
      cudaFuncSetAttribute(SortIds, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  SortIds<<<static_cast<unsigned>(params.batch), kThreads, bytes, stream>>>(params, size);
  return cudaGetLastError();
}

}  // namespace jax_sage
