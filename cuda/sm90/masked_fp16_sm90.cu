// FP16 PV with FP32 sums, with a mask, segments or a bias.
#include "sm90/attention.cuh"

namespace jax_sage::sm90 {

template <int kHeadDim>
static cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  using Pv = PvFp16<kHeadDim>;
  if (params.masks.bias == nullptr) {
    return Launch<Traits<Pv, true, Masking::kMasked>>(params, stream);
  }
  return params.masks.AreIntervals()
             ? Launch<Traits<Pv, true, Masking::kPlainBiased>>(params, stream)
             : Launch<Traits<Pv, true, Masking::kMaskedBiased>>(params, stream);
}

cudaError_t LaunchMaskedFp16(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) return LaunchFor<64>(params, stream);
  if (params.padded_head_dim == 128) return LaunchFor<128>(params, stream);
  if (params.padded_head_dim == 192) return LaunchFor<192>(params, stream);
  return LaunchFor<256>(params, stream);
}

}  // namespace jax_sage::sm90
