// FP16 PV with FP32 sums.
#include "sm90/attention.cuh"

namespace jax_sage::sm90 {

template <class Pv>
static cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  // P is summed before it is rounded in any case.
  return Launch<Traits<Pv, true>>(params, stream);
}

cudaError_t LaunchAttentionFp16(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 256) return LaunchFor<PvFp16<256>>(params, stream);
  if (params.padded_head_dim == 192) return LaunchFor<PvFp16<192>>(params, stream);
  if (params.padded_head_dim == 128) return LaunchFor<PvFp16<128>>(params, stream);
  // Large tiles have the faster loop, but more of them are seen in part.
  return params.is_causal || params.masks.rows != nullptr || params.length_kv <= kShort
             ? LaunchFor<PvFp16<64>>(params, stream)
             : LaunchFor<PvFp16<64, 128>>(params, stream);
}

}  // namespace jax_sage::sm90
