// The attention kernels on Hopper's wgmma.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/attention.h"

namespace jax_sage::sm90 {

struct TensorMaps {
  CUtensorMap q, k, v;
  CUtensorMap out;    // where outputs are stored in boxes
  CUtensorMap bias;   // read only where bias_bytes is not 0
  int bias_bytes;     // that a warp copies of a tile
  bool stores_boxes;  // rows of the output are aligned
};

// A 3-dimensional tensor, and the box that one copy takes from it; the innermost of both in bytes.
struct Tensor {
  const void* data;
  uint64_t inner, middle, outer;
  uint32_t box_inner, box_middle, box_outer = 1;
};
cudaError_t Encode(CUtensorMap* map, const Tensor& tensor);

// E4M3 PV with FP16 partial sums.
cudaError_t LaunchAttentionFp8(const AttentionParams& params, cudaStream_t stream);
// FP16 PV with FP32 sums.
cudaError_t LaunchAttentionFp16(const AttentionParams& params, cudaStream_t stream);
// The same with a mask, segments or a bias; of batch entries with scattered segments, where
// params.scattered is given.
cudaError_t LaunchMaskedFp8(const AttentionParams& params, cudaStream_t stream);
cudaError_t LaunchMaskedFp16(const AttentionParams& params, cudaStream_t stream);
// Of the other entries: masks.rows are the intervals of their segments.
cudaError_t LaunchSegmentsFp8(const AttentionParams& params, cudaStream_t stream);
cudaError_t LaunchSegmentsFp16(const AttentionParams& params, cudaStream_t stream);

}  // namespace jax_sage::sm90
