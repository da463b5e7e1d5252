// Outputs from registers to global memory, by way of shared memory: 128 bytes of 16 rows at a time,
// by TMA, or number by number where rows are not aligned or not all there. Straight from the
// fragments, 16 bytes of 8 rows per instruction, the stores took as long as two tiles.
#pragma once

#include "common/epilogue.cuh"
#include "common/ptx.cuh"
#include "sm90/attention.h"
#include "sm90/barrier.cuh"

namespace jax_sage::sm90 {

constexpr int kRowsOfWarp = 16;
constexpr int kBoxOfOutput = 128;  // bytes of a row
constexpr int kBoxesBytes = kRowsOfWarp * kBoxOfOutput;

// Where a warp puts its outputs: boxes of 128 bytes of its 16 rows, as TMA takes them, swizzled.
// Neither direction has bank conflicts.
__device__ __forceinline__ uint32_t AddressOfOutput(uint32_t shared, int row, int byte) {
  return shared + byte / kBoxOfOutput * kBoxesBytes + row * kBoxOfOutput +
         (byte % kBoxOfOutput ^ row % 8 * 16);
}

// Four tiles of 8 x 8 at once, or two numbers of FP32.
template <class Out, int kTiles>
__device__ __forceinline__ void PutOutputs(uint32_t shared, int lane, const float (&o)[kTiles][4]) {
  if constexpr (sizeof(Out) == 2) {
    // Of these lanes' addresses, 8 rows each: two tiles of two times 8 rows.
    const int row = lane % 16, unit = lane / 16;
    const auto bits = [](const float* pair) {
      const Pair<Out> x{Convert<Out>(pair[0]), Convert<Out>(pair[1])};
      return *reinterpret_cast<const uint32_t*>(&x);
    };
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const uint32_t words[4] = {bits(&o[n][0]), bits(&o[n][2]), bits(&o[n + 1][0]),
                                 bits(&o[n + 1][2])};
      ptx::StoreMatrix4(AddressOfOutput(shared, row, 16 * (n + unit)), words);
    }
  } else {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* pair = &o[n][2 * half];
        const int byte = (8 * n + 2 * (lane & 3)) * static_cast<int>(sizeof(Out));
        ptx::StoreSharedAs(AddressOfOutput(shared, lane / 4 + 8 * half, byte),
                           Pair<Out>{Convert<Out>(pair[0]), Convert<Out>(pair[1])});
      }
    }
  }
}

// A warp stores its 16 rows from `first_row` on; of each thread the two rows that FinishChannels
// finished, of kTiles times 8 channels from kFirst on. `shared`: aligned to 1024 bytes, room for
// them in FP32, which is read until ptx::WaitForStores.
template <class Out, int kFirst, int kHeadDim, int kTiles>
__device__ __forceinline__ void StoreTile(const AttentionParams& params, const TensorMaps& maps,
                                          const OutputTable<kHeadDim>& table, int first_row,
                                          int lane, uint32_t shared, const float (&o)[kTiles][4]) {
  ptx::WaitForStores();
  __syncwarp();  // the buffer has been read
  PutOutputs<Out>(shared, lane, o);
  const int rows = min(kRowsOfWarp, params.length_q - first_row);
  const int bytes = min(params.head_dim - kFirst, 8 * kTiles) * static_cast<int>(sizeof(Out));
  const bool in_boxes = maps.stores_boxes && rows == kRowsOfWarp;
  if (in_boxes) ptx::FenceAsyncProxy();
  __syncwarp();
  if (in_boxes) {
#pragma unroll
    for (int byte = 0; byte < 8 * kTiles * static_cast<int>(sizeof(Out)); byte += kBoxOfOutput) {
      if (byte < bytes) {
        ptx::StoreBoxOfWarp(&maps.out, shared + byte / kBoxOfOutput * kBoxesBytes,
                            kFirst * static_cast<int>(sizeof(Out)) + byte, table.head,
                            table.first_token + first_row);
      }
    }
  } else {
    const int64_t pitch = static_cast<int64_t>(params.heads) * params.head_dim;
    Out* out =
        static_cast<Out*>(params.out) + kFirst +
        (table.output_row + static_cast<int64_t>(first_row) * params.heads) * params.head_dim;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
#pragma unroll 1
      for (int byte = lane * static_cast<int>(sizeof(Out)); byte < bytes;
           byte += 32 * static_cast<int>(sizeof(Out))) {
        out[row * pitch + byte / static_cast<int>(sizeof(Out))] =
            ptx::LoadSharedAs<Out>(AddressOfOutput(shared, row, byte));
      }
    }
  }
  __syncwarp();  // before the buffer is written again
}

}  // namespace jax_sage::sm90
