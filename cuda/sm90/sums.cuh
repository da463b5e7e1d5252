// PV and where its sums live: one class for each type of P and V.
//
// Of a warpgroup's tiles, in order: after Begin() Issue() starts PV and Retire() follows when it
// has completed. Rescale() may come before an Issue, when no PV is under way. FinishRowSums() gives
// these, and then Finish() the output, of kTiles times 8 channels from kFirst on.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "common/layout.h"
#include "common/ptx.cuh"
#include "sm90/attention.h"
#include "sm90/barrier.cuh"
#include "sm90/wgmma.cuh"

namespace jax_sage::sm90 {

// E4M3 P and V. FP16 sums run over kPromoteTiles tiles in registers and are then added to the FP32
// output, which lives in shared memory: the registers that it would take are worth more to the
// softmax than the additions cost. Row sums of the rounded P come from 8 more columns of PV, rows
// of ones behind V^T.
template <int kHeadDim_, int kTile_ = kHeadDim_ <= 128 ? 128 : 64>
struct PvFp8 {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTile = kTile_;
  static constexpr int kSumRows = 8;
  static constexpr int kPromoteTiles = 512 / kTile;
  static_assert(kPMax * kVMax * kTile * kPromoteTiles <= 65504.0f, "an FP16 sum may not overflow");
  static constexpr int kBytes = kHeadDim * kTile;
  static constexpr int kStride = (kHeadDim + kSumRows) * kTile;
  static constexpr int kAlignment = 8 * kTile;
  static constexpr int kRegisters = kBlockKv / 8;  // of P, a block
  static constexpr bool kSumsRows = true;
  static constexpr uint32_t kOnes = 0x38383838;
  // Codes of positive numbers are ordered like integers: adding this carries into the top bit from
  // the code of P_MAX on.
  static constexpr uint32_t kLimitOffset = (0x80 - (kLog2PMaxInt + 7) * 8) * 0x01010101;
  static constexpr uint32_t kLimitMask = 0x80808080;

  uint32_t output;  // address of this thread's part: 4 floats every 512 bytes
  uint32_t sums[(kHeadDim + kSumRows) / 4];  // FP16 pairs: the channels, then the row sums
  float row_sum[2] = {0, 0};
  float pending[2] = {1, 1};  // what the output is still to be multiplied by

  __device__ __forceinline__ explicit PvFp8(uint32_t address) : output(address) {
#pragma unroll
    for (uint32_t& x : sums) x = 0;
  }

  static Tensor Map(const void* v, uint64_t padded_kv, uint64_t kv_heads) {
    return {v, padded_kv, kHeadDim, kv_heads, kTile, kHeadDim};
  }
  static __device__ __forceinline__ void Load(uint32_t shared, const CUtensorMap* map,
                                              uint32_t barrier, int tile, int kv_head) {
    ptx::CopyBox(shared, map, barrier, tile * kTile, 0, kv_head);
  }
  static __device__ __forceinline__ uint64_t Descriptor(uint32_t shared) {
    return ptx::Descriptor<kTile>(shared);
  }
  // The rows of ones behind each stage of V.
  static __device__ __forceinline__ void Prepare(uint32_t shared, int stages) {
    constexpr int kWords = kSumRows * kTile / 4;
    for (int i = threadIdx.x; i < stages * kWords; i += blockDim.x) {
      ptx::StoreSharedAs(shared + i / kWords * kStride + kBytes + i % kWords * 4, uint32_t{kOnes});
    }
  }

  // x[i][e]: keys 8i + {0, 1} of rows 0 (e < 2) and 1, of this thread's columns.
  static __device__ __forceinline__ void Pack(uint32_t (&p)[kRegisters], int pair,
                                              const float (&x)[2][4]) {
    p[2 * pair] = ptx::PackE4m3(x[0][0], x[0][1], x[1][0], x[1][1]);
    p[2 * pair + 1] = ptx::PackE4m3(x[0][2], x[0][3], x[1][2], x[1][3]);
  }
  // Puts 0 where the signs of the rows' bytes, keys 0, 1, 8 and 9, are not set.
  static __device__ __forceinline__ void Hide(uint32_t (&p)[kRegisters], int pair, uint32_t seen0,
                                              uint32_t seen1) {
    p[2 * pair] &= ptx::SpreadSigns<0, 1, 2, 3>(seen0);
    p[2 * pair + 1] &= ptx::SpreadSigns<0, 1, 2, 3>(seen1);
  }
  // Powers of two that a row's maximum may grow by before a tile must be done again: `growth` if
  // they are to spare. They cost range at the other end: a key with an average score must keep a P
  // that is a normal number (2^-6 and more) with three powers to spare, or small weights behind a
  // few large scores vanish.
  static __device__ __forceinline__ float Room(float max_over_mean, float growth) {
    return fminf(growth, fmaxf(0, floorf(kLog2PMax + 6 - 3 - max_over_mean)));
  }

  __device__ __forceinline__ void Issue(uint32_t (&p)[kTile / kBlockKv][kRegisters], uint64_t v,
                                        int tile) {
    const bool accumulate = tile % kPromoteTiles != 0;
#pragma unroll
    for (auto& block : p) ptx::Pin(block);
    ptx::Pin(sums);
    ptx::WgmmaFence();
#pragma unroll
    for (int ks = 0; ks < kTile / 32; ++ks) {
      ptx::WgmmaE4m3(sums, p[ks / 2] + ks % 2 * 4, v + 2 * ks, accumulate || ks != 0);
    }
    ptx::WgmmaCommit();
  }
  // Before a tile: the sums make room where they have run over kPromoteTiles. `stores`: those of
  // the item before may still read the output.
  __device__ __forceinline__ void Begin(int tile, bool stores) {
    if (tile % kPromoteTiles != 0 || tile == 0) return;
    if (stores) {
      ptx::WaitForStores();
      __syncwarp();
    }
    const auto promote = [&](auto any) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        float o[4];
        Promoted<any>(o, i);
        ptx::StoreSharedAs(output + i * 512, make_float4(o[0], o[1], o[2], o[3]));
      }
    };
    if (tile > kPromoteTiles) {
      promote(std::true_type());
    } else {
      promote(std::false_type());
    }
    pending[0] = pending[1] = 1;
    AddRowSums();
  }
  // PV of the tile has completed.
  __device__ __forceinline__ void Retire() { ptx::Pin(sums); }
  __device__ __forceinline__ void Rescale(const float (&alpha)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pending[half] *= alpha[half];
      row_sum[half] *= alpha[half];
#pragma unroll
      for (int i = half; i < (kHeadDim + kSumRows) / 4; i += 2) {
        sums[i] = ptx::ScaleF16(sums[i], alpha[half]);
      }
    }
  }
  __device__ __forceinline__ void FinishRowSums(float (&total)[2], const float (&)[2]) {
    AddRowSums();
    total[0] = row_sum[0];
    total[1] = row_sum[1];
  }
  template <int kFirst, int kTiles>
  __device__ __forceinline__ void Finish(float (&o)[kTiles][4], int tiles) {
    if (tiles > kPromoteTiles) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) Promoted<true>(o[i], kFirst / 8 + i);
    } else {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) Promoted<false>(o[i], kFirst / 8 + i);
    }
  }

 private:
  // The output with the sums; kAny: there is an output already.
  template <bool kAny>
  __device__ __forceinline__ void Promoted(float (&o)[4], int i) const {
    const float2 x = ptx::UnpackF16(sums[2 * i]), y = ptx::UnpackF16(sums[2 * i + 1]);
    o[0] = x.x, o[1] = x.y, o[2] = y.x, o[3] = y.y;
    if constexpr (kAny) {
      const auto old = ptx::LoadSharedAs<float4>(output + i * 512);
      o[0] = fmaf(old.x, pending[0], o[0]);
      o[1] = fmaf(old.y, pending[0], o[1]);
      o[2] = fmaf(old.z, pending[1], o[2]);
      o[3] = fmaf(old.w, pending[1], o[3]);
    }
  }
  __device__ __forceinline__ void AddRowSums() {
    row_sum[0] += ptx::UnpackF16(sums[kHeadDim / 4]).x;
    row_sum[1] += ptx::UnpackF16(sums[kHeadDim / 4 + 1]).x;
  }
};

// FP16 P and V, FP32 sums in registers.
template <int kHeadDim_, int kTile_ = 64>
struct PvFp16 {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTile = kTile_;
  static constexpr int kBytes = kHeadDim * kTile * 2;
  static constexpr int kStride = kBytes;
  static constexpr int kAlignment = 1024;
  static constexpr int kBoxBytes = kTile * 128;  // 64 channels, the width of the swizzle
  static constexpr int kRegisters = kBlockKv / 4;
  // What FP16 rounds off P is too little to show in a row sum: that of P before rounding serves.
  static constexpr bool kSumsRows = false;
  static constexpr uint32_t kLimitOffset = 0x08000800;  // 0x8000 - the code of 2^15
  static constexpr uint32_t kLimitMask = 0x80008000;

  float sums[kHeadDim / 2] = {};

  __device__ __forceinline__ explicit PvFp16(uint32_t) {}
  static Tensor Map(const void* v, uint64_t padded_kv, uint64_t kv_heads) {
    return {v, 2 * kHeadDim, padded_kv, kv_heads, 128, kTile};
  }
  static __device__ __forceinline__ void Load(uint32_t shared, const CUtensorMap* map,
                                              uint32_t barrier, int tile, int kv_head) {
#pragma unroll
    for (int box = 0; box < kHeadDim / 64; ++box) {
      ptx::CopyBox(shared + box * kBoxBytes, map, barrier, box * 128, tile * kTile, kv_head);
    }
  }
  static __device__ __forceinline__ uint64_t Descriptor(uint32_t shared) {
    return ptx::TransposedDescriptor(shared, kBoxBytes);
  }
  static __device__ __forceinline__ void Prepare(uint32_t, int) {}
  static __device__ __forceinline__ void Pack(uint32_t (&p)[kRegisters], int pair,
                                              const float (&x)[2][4]) {
    p[4 * pair] = ptx::PackF16(x[0][0], x[0][1]);
    p[4 * pair + 1] = ptx::PackF16(x[0][2], x[0][3]);
    p[4 * pair + 2] = ptx::PackF16(x[1][0], x[1][1]);
    p[4 * pair + 3] = ptx::PackF16(x[1][2], x[1][3]);
  }
  static __device__ __forceinline__ void Hide(uint32_t (&p)[kRegisters], int pair, uint32_t seen0,
                                              uint32_t seen1) {
    p[4 * pair] &= ptx::SpreadSigns<0, 0, 1, 1>(seen0);
    p[4 * pair + 1] &= ptx::SpreadSigns<0, 0, 1, 1>(seen1);
    p[4 * pair + 2] &= ptx::SpreadSigns<2, 2, 3, 3>(seen0);
    p[4 * pair + 3] &= ptx::SpreadSigns<2, 2, 3, 3>(seen1);
  }
  // The limit is 2^(15 - log2 P_MAX) above what P starts with: room enough.
  static __device__ __forceinline__ float Room(float, float) { return 0; }

  __device__ __forceinline__ void Issue(uint32_t (&p)[kTile / kBlockKv][kRegisters], uint64_t v,
                                        int) {
#pragma unroll
    for (auto& block : p) ptx::Pin(block);
    ptx::Pin(sums);
    ptx::WgmmaFence();
#pragma unroll
    for (int ks = 0; ks < kTile / 16; ++ks) {
      ptx::WgmmaF16(sums, p[ks / 4] + 4 * (ks % 4), v + ks * (16 * 128 / 16), true);
    }
    ptx::WgmmaCommit();
  }
  __device__ __forceinline__ void Begin(int, bool) {}
  __device__ __forceinline__ void Retire() { ptx::Pin(sums); }
  __device__ __forceinline__ void Rescale(const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) sums[i] *= alpha[i / 2 % 2];
  }
  __device__ __forceinline__ void FinishRowSums(float (&total)[2], const float (&sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] = sum[half] + __shfl_xor_sync(0xffffffffu, sum[half], 1);
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    }
  }
  template <int kFirst, int kTiles>
  __device__ __forceinline__ void Finish(float (&o)[kTiles][4], int) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) o[i / 4][i % 4] = sums[kFirst / 2 + i];
  }
};

}  // namespace jax_sage::sm90
