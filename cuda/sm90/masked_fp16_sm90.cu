// FP16 PV with FP32 sums, with masks.
#include "sm90/attention.cuh"

namespace jax_sage::sm90 {

template <int kHeadDim>
static cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  return params.masks.bias != nullptr
             ? Launch<Traits<PvFp16<kHeadDim>, true, Masking::kBiased>>(params, stream)
             : Launch<Traits<PvFp16<kHeadDim>, true, Masking::kMasked>>(params, stream);
}

cudaError_t LaunchMaskedFp16(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) return LaunchFor<64>(params, stream);
  if (params.padded_head_dim == 128) return LaunchFor<128>(params, stream);
  return LaunchFor<256>(params, stream);
}

}  // namespace jax_sage::sm90
