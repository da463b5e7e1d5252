// FP16 PV with FP32 sums, by the intervals of segments.
#include "sm90/attention.cuh"

namespace jax_sage::sm90 {

// Of 64 channels four warpgroups have too few registers for rows of several segments.
template <int kHeadDim>
static cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  return Launch<Traits<PvFp16<kHeadDim>, true, Masking::kPlainSegments, 3>>(params, stream);
}

cudaError_t LaunchSegmentsFp16(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) return LaunchFor<64>(params, stream);
  if (params.padded_head_dim == 128) return LaunchFor<128>(params, stream);
  if (params.padded_head_dim == 192) return LaunchFor<192>(params, stream);
  return LaunchFor<256>(params, stream);
}

}  // namespace jax_sage::sm90
