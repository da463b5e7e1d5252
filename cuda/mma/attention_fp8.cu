// E4M3 PV. Four warps of 32 queries: each fragment of K and V that ldmatrix reads feeds four matrix
// instructions, and two CTAs fit on an SM of sm_89 (48 KiB of shared memory at head_dim 128).
#include "mma/attention.cuh"

namespace jax_sage::mma {

cudaError_t LaunchAttentionFp8(const AttentionParams& params, bool fp16_accumulator,
                               cudaStream_t stream) {
  if (params.masks.rows != nullptr) return LaunchMaskedFp8(params, fp16_accumulator, stream);
  if (params.padded_head_dim == 64) {
    return fp16_accumulator ? Launch<Traits<PvFp8, AccF16, 64, 4>>(params, stream)
                            : Launch<Traits<PvFp8, AccF32, 64, 4>>(params, stream);
  }
  return fp16_accumulator ? Launch<Traits<PvFp8, AccF16, 128, 4>>(params, stream)
                          : Launch<Traits<PvFp8, AccF32, 128, 4>>(params, stream);
}

}  // namespace jax_sage::mma
