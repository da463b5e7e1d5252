// FP16 PV with FP32 sums.
#include "sm90/attention.cuh"

namespace jax_sage::sm90 {

// P is summed before it is rounded in any case.
cudaError_t LaunchAttentionFp16(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) return Launch<Traits<PvFp16<64>, true>>(params, stream);
  if (params.padded_head_dim == 128) return Launch<Traits<PvFp16<128>, true>>(params, stream);
  return Launch<Traits<PvFp16<256>, true>>(params, stream);
}

}  // namespace jax_sage::sm90
