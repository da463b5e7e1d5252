// NaN for the outputs that depend on a key or value that is not finite.
#pragma once

#include <cuda_runtime_api.h>

#include "common/attention.h"

namespace jax_sage {

struct MarkParams {
  const void* key;           // [B, S, K, H], as the caller gave it
  const void* value;         // [B, S, K, H]
  const int32_t* first_bad;  // [B, K, kBadRows, Hp]
};

// After masked attention, whose kernels take what is not finite for zero. Where everything is
// finite this costs a launch.
cudaError_t LaunchMark(const AttentionParams& attention, const MarkParams& params,
                       cudaStream_t stream);

}  // namespace jax_sage
