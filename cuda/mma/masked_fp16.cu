// FP16 PV with masks.
#include "mma/attention.cuh"

namespace jax_sage::mma {

template <class Acc, int kHeadDim>
static cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  return params.masks.bias != nullptr
             ? Launch<Traits<PvFp16, Acc, kHeadDim, 8, Masking::kBiased>>(params, stream)
             : Launch<Traits<PvFp16, Acc, kHeadDim, 8, Masking::kMasked>>(params, stream);
}

cudaError_t LaunchMaskedFp16(const AttentionParams& params, bool fp16_accumulator,
                            cudaStream_t stream) {
  if (params.padded_head_dim == 64) {
    return fp16_accumulator ? LaunchFor<AccF16, 64>(params, stream)
                            : LaunchFor<AccF32, 64>(params, stream);
  }
  return fp16_accumulator ? LaunchFor<AccF16, 128>(params, stream)
                          : LaunchFor<AccF32, 128>(params, stream);
}

}  // namespace jax_sage::mma
