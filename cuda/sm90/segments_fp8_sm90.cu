// E4M3 PV with FP16 partial sums, by the intervals of segments.
#include "sm90/attention.cuh"

namespace jax_sage::sm90 {

template <int kHeadDim>
static cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  using Pv = PvFp8<kHeadDim, 64>;
  return params.with_lse ? Launch<Traits<Pv, true, Masking::kPlainSegments>>(params, stream)
                         : Launch<Traits<Pv, false, Masking::kPlainSegments>>(params, stream);
}

cudaError_t LaunchSegmentsFp8(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) return LaunchFor<64>(params, stream);
  if (params.padded_head_dim == 128) return LaunchFor<128>(params, stream);
  if (params.padded_head_dim == 192) return LaunchFor<192>(params, stream);
  return LaunchFor<256>(params, stream);
}

}  // namespace jax_sage::sm90
