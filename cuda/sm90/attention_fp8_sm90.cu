// E4M3 PV with FP16 partial sums, and what the launches of both types share.
#include <cuda.h>

#include <atomic>

#include "sm90/attention.cuh"

namespace jax_sage::sm90 {

cudaError_t Encode(CUtensorMap* map, const Tensor& tensor) {
  // Through the runtime, so that nothing links against libcuda. Found once: it takes a while.
  static std::atomic<void*> found{nullptr};
  void* function = found.load();
  if (function == nullptr) {
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    found.store(function);
  }
  const auto encode = reinterpret_cast<CUresult (*)(
      CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
      const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
      CUtensorMapL2promotion, CUtensorMapFloatOOBfill)>(function);
  const cuuint64_t dims[3] = {tensor.inner, tensor.middle, tensor.outer};
  const cuuint64_t strides[2] = {tensor.inner, tensor.inner * tensor.middle};
  const cuuint32_t box[3] = {tensor.box_inner, tensor.box_middle, tensor.box_outer};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult encoded =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(tensor.data), dims, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             tensor.box_inner == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return encoded == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The output does not depend on whether lse is asked for: both run the same tiles.
template <class Pv, int kMost = 4>
static cudaError_t LaunchPv(const AttentionParams& params, cudaStream_t stream) {
  return params.with_lse ? Launch<Traits<Pv, true, Masking::kPlain, kMost>>(params, stream)
                         : Launch<Traits<Pv, false, Masking::kPlain, kMost>>(params, stream);
}

cudaError_t LaunchAttentionFp8(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 256) return LaunchPv<PvFp8<256, 64>>(params, stream);
  if (params.padded_head_dim == 192) return LaunchPv<PvFp8<192, 64>>(params, stream);
  if (params.padded_head_dim == 128) return LaunchPv<PvFp8<128, 64>>(params, stream);
  // There are registers for five warpgroups, but items of five times 64 queries are few.
  return params.length_kv <= kShort ? LaunchPv<PvFp8<64, 64>>(params, stream)
                                    : LaunchPv<PvFp8<64, 64>, 5>(params, stream);
}

}  // namespace jax_sage::sm90
