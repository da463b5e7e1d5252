// The attention kernels on mma.sync.
#pragma once

#include <cuda_runtime_api.h>

#include "common/attention.h"

namespace jax_sage::mma {

// `fp16_accumulator`: the FP16 partial sums of SageAttention2++, otherwise FP32 ones.
cudaError_t LaunchAttentionFp8(const AttentionParams& params, bool fp16_accumulator,
                               cudaStream_t stream);
cudaError_t LaunchAttentionFp16(const AttentionParams& params, bool fp16_accumulator,
                                cudaStream_t stream);
// The same with masks: where params has some, the above call these.
cudaError_t LaunchMaskedFp8(const AttentionParams& params, bool fp16_accumulator,
                            cudaStream_t stream);
cudaError_t LaunchMaskedFp16(const AttentionParams& params, bool fp16_accumulator,
                             cudaStream_t stream);

}  // namespace jax_sage::mma
