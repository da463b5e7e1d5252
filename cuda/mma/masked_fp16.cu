// FP16 PV with masks.
#include "mma/attention.cuh"

namespace jax_sage::mma {

cudaError_t LaunchMaskedFp16(const AttentionParams& params, bool fp16_accumulator,
                             cudaStream_t stream) {
  return LaunchMasked<PvFp16>(params, fp16_accumulator, stream);
}

}  // namespace jax_sage::mma
