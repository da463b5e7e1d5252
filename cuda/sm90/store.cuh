// Outputs from registers to global memory, by way of shared memory: whole rows at a time. Straight
// from the fragments, 16 bytes of 8 rows per instruction, the stores took as long as two tiles.
#pragma once

#include "common/epilogue.cuh"
#include "common/ptx.cuh"

namespace jax_sage::sm90 {

// A warp stores its 16 rows from `first_row` on; of each thread the two rows that FinishChannels
// finished, of kTiles times 8 channels from kFirst on. `shared`: the warp's part of the output
// buffer, which has room for them in FP32.
template <class Out, int kFirst, int kHeadDim, int kTiles>
__device__ __forceinline__ void StoreTile(const AttentionParams& params,
                                          const OutputTable<kHeadDim>& table, int first_row,
                                          int lane, uint32_t shared, const float (&o)[kTiles][4]) {
  constexpr int kChannels = 8 * kTiles;
  constexpr int kRowBytes = kChannels * 4;  // of FP32; rows of smaller types leave a gap
  // Units of 16 bytes are exchanged by row, so that neither direction has bank conflicts.
  const auto address = [&](int row, int byte) {
    return shared + row * kRowBytes + (byte ^ (row % 8 * 16));
  };
  const int rows = min(16, params.length_q - first_row);
  const int64_t pitch = static_cast<int64_t>(params.heads) * params.head_dim;
  const bool wide =
      params.head_dim * sizeof(Out) % 16 == 0 && reinterpret_cast<uintptr_t>(params.out) % 16 == 0;
  __syncwarp();  // the buffer has been read
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int byte = (8 * n + 2 * (lane & 3)) * static_cast<int>(sizeof(Out));
      const float* pair = &o[n][2 * half];
      ptx::StoreSharedAs(address(lane / 4 + 8 * half, byte),
                         Pair<Out>{Convert<Out>(pair[0]), Convert<Out>(pair[1])});
    }
  }
  __syncwarp();
  const int channels = min(params.head_dim - kFirst, kChannels);
  Out* out = static_cast<Out*>(params.out) + kFirst +
             (table.output_row + static_cast<int64_t>(first_row) * params.heads) * params.head_dim;
  if (wide) {
    constexpr int kUnits = kChannels * sizeof(Out) / 16;  // of a row: at most 32
    const int byte = lane % kUnits * 16;
    if (byte < channels * static_cast<int>(sizeof(Out))) {
#pragma unroll
      for (int row = lane / kUnits; row < 16; row += 32 / kUnits) {
        if (row >= rows) break;
        const uint4 x = ptx::LoadSharedAs<uint4>(address(row, byte));
        *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(out + row * pitch) + byte) = x;
      }
    }
  } else {
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
#pragma unroll 1
      for (int c = lane; c < channels; c += 32) {
        out[row * pitch + c] =
            ptx::LoadSharedAs<Out>(address(row, c * static_cast<int>(sizeof(Out))));
      }
    }
  }
  __syncwarp();  // before the buffer is written again
}

}  // namespace jax_sage::sm90
