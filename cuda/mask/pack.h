// Boolean masks as the attention kernels read them: bits in the order of a thread's columns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_sage {

struct PackParams {
  const uint8_t* mask;  // [B, N, T, S], 0 or 1
  uint32_t* words;      // [B, N, S / kMaskKeys, Tp, 4], see MaskParams
  uint8_t* views;       // [B, N, Tp / kMaskRows, S / kMaskKeys]
  int64_t heads;        // B * N
  int length_q;
  int length_kv;
  int padded_q;  // 1 where length_q is: one row that stands for all
};

cudaError_t LaunchPack(const PackParams& params, cudaStream_t stream);

}  // namespace jax_sage
