// Which keys any query sees.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/attention.h"

namespace jax_sage {

struct SeenParams {
  // As in MaskParams; rows of padding see nothing. The mask, or the bias, may be null. Dimensions
  // that are 1 for all alike have a stride of 0.
  const int2* rows;
  int64_t row_stride;
  const uint8_t* mask;  // [B, N, T, S], 0 or 1
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride;
  const void* bias;  // [B, N, T, S]
  DType bias_type;
  int64_t bias_batch_stride, bias_head_stride, bias_row_stride, bias_column_stride;
  uint8_t* seen;  // [B, K, S]
  int64_t batch;
  int kv_heads;
  int group;  // query heads of each that may differ
  int length_q;
  int length_kv;
};

cudaError_t LaunchSeen(const SeenParams& params, cudaStream_t stream);

}  // namespace jax_sage
