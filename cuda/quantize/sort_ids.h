// Segment ids in order, and whose they are.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_sage {

// Of a batch entry. More are XLA's to sort.
constexpr int kMostSorted = 8192;

struct SortParams {
  const int32_t* ids;   // [B, S]
  int32_t* sorted_ids;  // [B, S]
  int32_t* order;       // [B, S]: whose they are; of equal ids in the order of the tokens
  int2* slots;          // [B, S], by token: where those of its id begin and end in the order
  int32_t* scattered;   // [B]: whether the tokens of some id do not lie one behind the other
  // The least and greatest of kMaskRows ids and of kMaskKeys, as in MaskParams; the last stands for
  // what is behind it, up to a multiple of kMaskKeys.
  int2* group_ranges;
  int2* tile_ranges;
  int64_t batch;
  int length;
};

cudaError_t LaunchSortIds(const SortParams& params, cudaStream_t stream);

}  // namespace jax_sage
