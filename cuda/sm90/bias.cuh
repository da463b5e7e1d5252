// The bias on its way to the scores: each consumer warp has that of its own 16 rows copied by TMA
// as soon as it knows which tile is next, and waits for it beneath PV of the tile before or, with
// plans, that tile's QK^T. No warp waits for another.
//
// To TMA the bias is a tensor of rows, those of all heads one behind the other, of lines of 128
// bytes, of which a tile of keys has two (float32) or one. The swizzle exchanges 16-byte units of a
// line by the line's number modulo 8, and so a warp reads without bank conflicts.
#pragma once

#include "common/attention.h"
#include "common/layout.h"
#include "common/masks.cuh"
#include "common/ptx.cuh"
#include "sm90/attention.h"
#include "sm90/barrier.cuh"

namespace jax_sage::sm90 {

constexpr int kBiasRows = 16;  // of a warp
constexpr int kBiasTile = 64;  // keys
constexpr int kBiasLine = 128;
constexpr int kBiasBytes = kBiasRows * kBiasTile * 4;  // of a warp's buffer

// Prepares the copies; none where all keys have the same.
inline cudaError_t EncodeBias(TensorMaps& maps, const AttentionParams& params) {
  const MaskParams& masks = params.masks;
  maps.bias_bytes = 0;
  if (masks.bias_column_stride == 0) return cudaSuccess;
  const int lines = masks.bias_type == DType::kF32 ? 2 : 1;
  const bool one_row = masks.bias_row_stride == 0;
  const int tiles = (params.length_kv + kMaskKeys - 1) / kMaskKeys * (kMaskKeys / kBiasTile);
  const int64_t heads = (masks.bias_batch_stride != 0 ? params.batch : 1) *
                        (masks.bias_head_stride != 0 ? params.heads : 1);
  // One row that stands for all is copied twice, for both rows of a thread.
  maps.bias_bytes = (one_row ? 2 : kBiasRows) * lines * kBiasLine;
  return Encode(&maps.bias, {masks.bias, kBiasLine, static_cast<uint64_t>(tiles) * lines,
                             static_cast<uint64_t>(heads * (one_row ? 1 : params.length_q)),
                             kBiasLine, static_cast<uint32_t>(lines), one_row ? 1u : kBiasRows});
}

// The number among the tensor's rows of what query `row` of a head adds.
__device__ __forceinline__ int RowOfBias(const AttentionParams& params, int batch, int head,
                                         int row) {
  const MaskParams& masks = params.masks;
  int heads = masks.bias_batch_stride != 0 ? batch : 0;
  if (masks.bias_head_stride != 0) heads = heads * params.heads + head;
  return masks.bias_row_stride != 0 ? heads * params.length_q + row : heads;
}

// A warp's buffer, aligned to 1024 bytes. Each Copy() is followed by one Read(). kEmpty: from the
// barrier that the bytes complete to that which all lanes do.
template <int kEmpty>
class BiasBuffer {
 public:
  __device__ __forceinline__ BiasBuffer(uint32_t buffer, uint32_t full, const TensorMaps& maps,
                                        DType type, uint32_t lane)
      : buffer_(buffer), full_(full), bytes_(maps.bias_bytes), type_(type) {
    // Units are exchanged by the number of the line: of the first of row `row` by lines * row % 8,
    // and in the second by 1 more.
    const uint32_t row = IsOneRow() ? 0 : lane / 4, quad = lane & 3;
    const uint32_t lines = type == DType::kF32 ? 2 : 1;
    pair_ = buffer + row * (lines * kBiasLine) + ((4 * lines * quad) ^ (row * lines % 8 * 16));
    // Computed anew for each tile otherwise, one instruction after the other.
    asm volatile("" : "+r"(pair_));
  }

  // Otherwise all keys have the same, and there is nothing to copy.
  __device__ __forceinline__ bool IsCopied() const { return bytes_ != 0; }
  // What a warp adds to its warpgroup's row of the tensor.
  __device__ __forceinline__ int FirstRow(int warp) const {
    return IsOneRow() ? 0 : kBiasRows * warp;
  }
  // All lanes. Rows behind a head's last are another head's, or zeros.
  __device__ __forceinline__ void Copy(const TensorMaps& maps, int tile, int row) const {
    const int lines = type_ == DType::kF32 ? 2 : 1;  // of a tile and a row
    const int line = tile * lines;
    ptx::BarrierWait(full_ + kEmpty, parity_ ^ 1);
    ptx::BarrierExpectOfWarp(full_, bytes_);
    ptx::CopyBoxOfWarp(buffer_, &maps.bias, full_, 0, line, row);
    if (IsOneRow()) {
      ptx::CopyBoxOfWarp(buffer_ + 8 * kBiasLine * lines, &maps.bias, full_, 0, line, row);
    }
  }

  // All lanes. Element 4n + 2 * half + e is that of key 8n + 2(lane % 4) + e.
  __device__ __forceinline__ void Read(float (&bias)[kBlockKv / 2]) {
    ptx::BarrierWait(full_, parity_);
    parity_ ^= 1;
    if (type_ == DType::kF32) {
      ReadAs<float2>(bias);
    } else if (type_ == DType::kBf16) {
      ReadAs<__nv_bfloat162>(bias);
    } else {
      ReadAs<__half2>(bias);
    }
    ptx::BarrierArrive(full_ + kEmpty);
  }

 private:
  __device__ __forceinline__ bool IsOneRow() const { return bytes_ < kBiasRows * kBiasLine; }
  template <class P>
  __device__ __forceinline__ void ReadAs(float (&bias)[kBlockKv / 2]) const {
    constexpr uint32_t kPair = sizeof(P), kLines = kPair / 4;
#pragma unroll
    for (uint32_t n = 0; n < kBlockKv / 8; ++n) {
      const uint32_t byte = 4 * n * kPair;
      const uint32_t at = pair_ ^ byte ^ (byte / kBiasLine * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 x = BiasPair(ptx::LoadSharedAs<P>(at + half * (8 * kLines * kBiasLine)));
        bias[4 * n + 2 * half] = x.x;
        bias[4 * n + 2 * half + 1] = x.y;
      }
    }
  }

  uint32_t buffer_, full_;  // address of the buffer, and of the barrier that bytes complete
  int bytes_;               // that are copied of a tile
  DType type_;
  uint32_t pair_;        // address of the lane's first pair of its first row
  uint32_t parity_ = 0;  // of the barrier's phase that the next Read waits for
};

}  // namespace jax_sage::sm90
