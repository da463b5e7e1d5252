// FP16 PV. Eight warps of 16 queries: P takes twice the registers of E4M3, and V twice the shared
// memory (64 KiB a CTA at head_dim 128), so the warps of an SM come from one CTA.
#include "mma/attention.cuh"

namespace jax_sage::mma {

cudaError_t LaunchAttentionFp16(const AttentionParams& params, bool fp16_accumulator,
                                cudaStream_t stream) {
  if (params.masks.rows != nullptr) return LaunchMaskedFp16(params, fp16_accumulator, stream);
  if (params.padded_head_dim == 64) {
    return fp16_accumulator ? Launch<Traits<PvFp16, AccF16, 64, 8>>(params, stream)
                            : Launch<Traits<PvFp16, AccF32, 64, 8>>(params, stream);
  }
  return fp16_accumulator ? Launch<Traits<PvFp16, AccF16, 128, 8>>(params, stream)
                          : Launch<Traits<PvFp16, AccF32, 128, 8>>(params, stream);
}

}  // namespace jax_sage::mma
