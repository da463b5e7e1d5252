// P of a tile from its scores: the running maximum, the exponentials, the packing.
#pragma once

#include "common/layout.h"
#include "common/ptx.cuh"
#include "sm90/barrier.cuh"
#include "sm90/wgmma.cuh"

namespace jax_sage::sm90 {

// S[64 x 64] = Q K^T of a block of keys.
template <int kHeadDim>
__device__ __forceinline__ void IssueQk(int32_t (&s)[kBlockKv / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int ks = 0; ks < kHeadDim / 32; ++ks) ptx::WgmmaS8(s, q + 2 * ks, k + 2 * ks, ks != 0);
  ptx::WgmmaCommit();
}

// Scores and softmax state of this thread's two rows, lane / 4 and lane / 4 + 8 of its warp's 16.
//
// The maximum m is stale: P = P_MAX * 2^(S c - m) is computed with the m of the tiles before, and
// that no P has outgrown its type is read off the packed codes. Where one has, the warp does the
// tile again after raising m to the tile's maximum, rounded up, plus some room to grow. m is an
// integer, so P's mantissas do not depend on it; only what is subnormal in E4M3 does.
template <class T>
struct Scores {
  using Pv = typename T::Pv;
  int32_t s[T::kBlocks][kBlockKv / 2];
  float q_scale[2], k_scale[T::kBlocks];
  float max[2] = {-kInf, -kInf};
  float sum[2] = {0, 0};  // P before rounding, of this thread's columns

  // QK^T has been issued, a group a block. `first`: there is no maximum yet.
  template <bool kMasked>
  __device__ __forceinline__ void Softmax(uint32_t (&p)[T::kBlocks][Pv::kRegisters], Pv& sums,
                                          bool first, const int (&visible)[2], int opaque_zero) {
    float tile_sum[2] = {0, 0};
    uint32_t over = 1;
    if (!first) {
      over = 0;
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        if (block + 1 < T::kBlocks) {
          ptx::WgmmaWait<1>();
        } else {
          ptx::WgmmaWait<0>();
        }
        ptx::Pin(s[block]);
        over |= ComputeP<kMasked>(p[block], block, visible, tile_sum);
      }
    } else {
      ptx::WgmmaWait<0>();
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) ptx::Pin(s[block]);
    }
    if (__any_sync(0xffffffffu, over != 0)) {
      // Other values to the compiler: it would keep the converted scores and the 64 comparisons of
      // above for here.
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < kBlockKv / 2; ++i) s[block][i] += opaque_zero;
      }
      const int again_visible[2] = {visible[0] + opaque_zero, visible[1] + opaque_zero};
      Raise<kMasked>(sums, again_visible);
      tile_sum[0] = tile_sum[1] = 0;
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        ComputeP<kMasked>(p[block], block, again_visible, tile_sum);
      }
    }
    sum[0] += tile_sum[0];
    sum[1] += tile_sum[1];
  }

 private:
  // P of a block; returns whether one is beyond the limit.
  template <bool kMasked>
  __device__ __forceinline__ uint32_t ComputeP(uint32_t (&p)[Pv::kRegisters], int block,
                                               const int (&visible)[2], float (&tile_sum)[2]) {
    const float offset[2] = {kLog2PMax - max[0], kLog2PMax - max[1]};
    const float scale[2] = {q_scale[0] * k_scale[block], q_scale[1] * k_scale[block]};
#pragma unroll
    for (int pair = 0; pair < kBlockKv / 16; ++pair) {  // 16 keys
      float x[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = 2 * pair + i;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int half = e / 2;
          x[i][e] =
              ptx::Exp2(fmaf(static_cast<float>(s[block][4 * n + e]), scale[half], offset[half]));
          if (kMasked && kBlockKv * block + 8 * n + e % 2 >= visible[half]) x[i][e] = 0;
          if constexpr (T::kExactSum || !Pv::kSumsRows) tile_sum[half] += x[i][e];
        }
      }
      Pv::Pack(p, pair, x);
    }
    return Pv::OverLimit(p);
  }

  template <bool kMasked>
  __device__ __forceinline__ void Raise(Pv& sums, const int (&visible)[2]) {
    float alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = -kInf, total = 0;
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        int32_t best = INT32_MIN, block_total = 0;  // 16 scores of up to 2^21
#pragma unroll
        for (int n = 0; n < kBlockKv / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (kMasked && kBlockKv * block + 8 * n + e >= visible[half]) continue;
            best = ::max(best, s[block][4 * n + 2 * half + e]);
            block_total += s[block][4 * n + 2 * half + e];
          }
        }
        const float scale = q_scale[half] * k_scale[block];
        if (!kMasked || best != INT32_MIN) {
          tile_max = fmaxf(tile_max, static_cast<float>(best) * scale);
        }
        total += static_cast<float>(block_total) * scale;
      }
      tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
      tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int first = kMasked ? visible[half] + 2 * static_cast<int>(threadIdx.x & 3) : T::kTile;
      const float mean = total / static_cast<float>(::max(::min(first, T::kTile), 1));
      const float old = max[half];
      // A score up to 1/16 below the limit rounds to a P under the limit.
      if (tile_max > old + Pv::kSpare - 0.0625f) {
        max[half] = ceilf(tile_max) + Pv::Room(tile_max - mean);
      }
      alpha[half] = max[half] == old ? 1.0f : ptx::Exp2(old - max[half]);
      sum[half] *= alpha[half];
    }
    // What was summed so far counts less. Exact: alpha is a power of two.
    sums.Rescale(alpha);
  }
};

}  // namespace jax_sage::sm90
