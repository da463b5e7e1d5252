// The attention kernels on Hopper's wgmma.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/attention.h"

namespace jax_sage::sm90 {

struct TensorMaps {
  CUtensorMap q, k, v;
};

// E4M3 PV with FP16 partial sums.
cudaError_t LaunchAttentionFp8(const AttentionParams& params, cudaStream_t stream);

}  // namespace jax_sage::sm90
