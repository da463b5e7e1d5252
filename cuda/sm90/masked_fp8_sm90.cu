// E4M3 PV with FP16 partial sums, with masks.
#include "sm90/attention.cuh"

namespace jax_sage::sm90 {

template <int kHeadDim, bool kExactSum>
static cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  return params.masks.bias != nullptr
             ? Launch<Traits<PvFp8<kHeadDim>, kExactSum, Masking::kBiased>>(params, stream)
             : Launch<Traits<PvFp8<kHeadDim>, kExactSum, Masking::kMasked>>(params, stream);
}

cudaError_t LaunchMaskedFp8(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) {
    return params.exact_lse ? LaunchFor<64, true>(params, stream)
                            : LaunchFor<64, false>(params, stream);
  }
  return params.exact_lse ? LaunchFor<128, true>(params, stream)
                          : LaunchFor<128, false>(params, stream);
}

}  // namespace jax_sage::sm90
