// E4M3 PV with FP16 partial sums, with a mask, segments or a bias.
#include "sm90/attention.cuh"

namespace jax_sage::sm90 {

template <int kHeadDim, bool kWithLse>
static cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  using WithBias = PvFp8<kHeadDim, kBiasTile>;
  if (params.masks.bias == nullptr) {
    return Launch<Traits<PvFp8<kHeadDim>, kWithLse, Masking::kMasked>>(params, stream);
  }
  return params.masks.AreIntervals()
             ? Launch<Traits<WithBias, kWithLse, Masking::kPlainBiased>>(params, stream)
             : Launch<Traits<WithBias, kWithLse, Masking::kMaskedBiased>>(params, stream);
}

template <int kHeadDim>
static cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  return params.with_lse ? LaunchFor<kHeadDim, true>(params, stream)
                         : LaunchFor<kHeadDim, false>(params, stream);
}

cudaError_t LaunchMaskedFp8(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) return LaunchFor<64>(params, stream);
  if (params.padded_head_dim == 128) return LaunchFor<128>(params, stream);
  if (params.padded_head_dim == 192) return LaunchFor<192>(params, stream);
  return LaunchFor<256>(params, stream);
}

}  // namespace jax_sage::sm90
