// P of a tile from its scores: the running maximum, the exponentials, the packing.
#pragma once

#include <type_traits>

#include "common/layout.h"
#include "common/masks.cuh"
#include "common/ptx.cuh"
#include "sm90/barrier.cuh"
#include "sm90/sums.cuh"
#include "sm90/wgmma.cuh"

namespace jax_sage::sm90 {

// Q and K of more than 128 channels are boxes of as many, one behind the other.
constexpr int kBoxChannels = 128;

// S[64 x 64] = Q K^T of a block of keys. q: descriptor of a tile in shared memory, or fragments.
template <int kHeadDim, class Q>
__device__ __forceinline__ void IssueQk(int32_t (&s)[kBlockKv / 2], const Q& q, uint64_t k) {
#pragma unroll
  for (int ks = 0; ks < kHeadDim / 32; ++ks) {
    const int step = 2 * (ks % 4) + ks / 4 * (kBlockKv * kBoxChannels / 16);
    if constexpr (std::is_integral_v<Q>) {
      ptx::WgmmaS8(s, q + step, k + step, ks != 0);
    } else {
      ptx::WgmmaS8(s, q.steps[ks], k + step, ks != 0);
    }
  }
  ptx::WgmmaCommit();
}

// Q of a warpgroup as A fragments: of this thread's rows `row`, from the warpgroup's first, and
// `row` + 8.
template <int kHeadDim>
struct QueryFragments {
  uint32_t steps[kHeadDim / 32][4];
  __device__ __forceinline__ void Load(const int8_t* first_row, int row, int lane) {
    const int8_t* from = first_row + row * kHeadDim + 4 * (lane & 3);
#pragma unroll
    for (int ks = 0; ks < kHeadDim / 32; ++ks) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        steps[ks][i] = __ldg(reinterpret_cast<const uint32_t*>(from + i % 2 * (8 * kHeadDim) +
                                                               i / 2 * 16 + ks * 32));
      }
    }
  }
};

// Scores and softmax state of this thread's two rows, lane / 4 and lane / 4 + 8 of its warp's 16.
//
// The maximum m is stale: P = P_MAX * 2^(S c - m) is computed with the m of the tiles before, and
// that no P has outgrown its type is read off the packed codes. Where one has, the warp does the
// tile again after raising m of that row to its maximum there, rounded up, plus some room to grow.
// m is an integer, so P's mantissas do not depend on it; only what is subnormal in E4M3 does. Each
// row decides for itself: its result does not depend on its neighbours.
template <class T>
struct Scores {
  using Pv = typename T::Pv;
  int32_t s[T::kBlocks][kBlockKv / 2];
  float q_scale[2], k_scale[T::kBlocks];
  float max[2] = {-kInf, -kInf};
  float sum[2] = {0, 0};  // P before rounding, of this thread's columns
  float bias[T::kBiased ? T::kBlocks : 1][T::kBiased ? kBlockKv / 2 : 1];  // as the scores

  // QK^T has been issued, a group a block, or has been waited for. `first`: there is no maximum
  // yet. `seen`: what the rows see; no row of the warpgroup sees more than the first `keys`.
  template <class Seen>
  __device__ __forceinline__ void Softmax(uint32_t (&p)[T::kBlocks][Pv::kRegisters], Pv& sums,
                                          bool first, const Seen& seen, int keys, int opaque_zero) {
    float tile_sum[2] = {0, 0};
    uint32_t over[2] = {first ? ~0u : 0, first ? ~0u : 0};
#pragma unroll
    for (int block = 0; block < T::kBlocks; ++block) {
      static_assert(T::kBlocks <= 2);
      if (block + 1 < T::kBlocks) {
        ptx::WgmmaWait<1>();
      } else {
        ptx::WgmmaWait<0>();
      }
      ptx::Pin(s[block]);
      if (!first) ComputeP<false>(p[block], block, seen, keys, over, tile_sum);
    }
    if (__any_sync(0xffffffffu, ((over[0] | over[1]) & Pv::kLimitMask) != 0)) {
      // Other values to the compiler: it would keep the converted scores and the 64 comparisons of
      // above for here.
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < kBlockKv / 2; ++i) s[block][i] += opaque_zero;
      }
      const Seen again_seen = seen.Opaque(opaque_zero);
      Raise(sums, first, again_seen, over);
      if constexpr (T::kBiased) {  // for the same reason
#pragma unroll
        for (int block = 0; block < T::kBlocks; ++block) ptx::Pin(bias[block]);
      }
      tile_sum[0] = tile_sum[1] = 0;
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        ComputeP<true>(p[block], block, again_seen, keys, over, tile_sum);
      }
    }
    sum[0] += tile_sum[0];
    sum[1] += tile_sum[1];
  }

 private:
  // P of a block; sets bits of kLimitMask in `over` where a row has one beyond the limit. A row
  // without a maximum has infinite P then, where it sees something.
  template <bool kAgain, class Seen>
  __device__ __forceinline__ void ComputeP(uint32_t (&p)[Pv::kRegisters], int block,
                                           const Seen& seen, int keys, uint32_t (&over)[2],
                                           float (&tile_sum)[2]) {
    if (Seen::kMasked && kBlockKv * block >= keys) {  // of the whole warpgroup
#pragma unroll
      for (uint32_t& x : p) x = 0;
      return;
    }
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
          float shift = offset[half];
          if constexpr (T::kBiased) shift = fmaf(bias[block][4 * n + e], kLog2E, shift);
          x[i][e] = ptx::Exp2(fmaf(static_cast<float>(s[block][4 * n + e]), scale[half], shift));
          const bool is_seen = seen(half, kBlockKv * block + 8 * n + e % 2);
          if constexpr (T::kBiased && kAgain) {
            // Not NaN where a row has no maximum, or its query is NaN: it does not see this key.
            // All such rows come here.
            if (bias[block][4 * n + e] * kLog2E <= kHidingBias) x[i][e] = 0;
          }
          if constexpr (T::kWithLse || !Pv::kSumsRows) {
            if (is_seen) tile_sum[half] += x[i][e];
          }
        }
      }
      Pv::Pack(p, pair, x);
      // Bits mask packed codes: a few instructions for a register of them.
      if constexpr (Seen::kMasked) {
        const int i = kBlockKv / 16 * block + pair;
        Pv::Hide(p, pair, seen.bits[0] << i, seen.bits[1] << i);
      }
    }
    // The two rows alternate in the registers of an A fragment.
#pragma unroll
    for (int i = 0; i < Pv::kRegisters; ++i) over[i % 2] |= p[i] + Pv::kLimitOffset;
  }

  // Raises m of the rows that are over the limit, by the scores.
  template <class Seen>
  __device__ __forceinline__ void Raise(Pv& sums, bool first, const Seen& seen,
                                        const uint32_t (&over)[2]) {
    float alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = -kInf, total = 0, biased_count = 0;
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        if constexpr (T::kBiased) {
          const float scale = q_scale[half] * k_scale[block];
#pragma unroll
          for (int n = 0; n < kBlockKv / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float x = bias[block][4 * n + 2 * half + e];
              if (!seen(half, kBlockKv * block + 8 * n + e) || x * kLog2E <= kHidingBias) continue;
              const float score = __fmaf_ru(static_cast<float>(s[block][4 * n + 2 * half + e]),
                                            scale, __fmul_ru(x, kLog2E));
              tile_max = fmaxf(tile_max, score);
              total += score;
              biased_count += 1;
            }
          }
          continue;
        }
        int32_t best = INT32_MIN, block_total = 0;  // 16 scores of up to 2^22
#pragma unroll
        for (int n = 0; n < kBlockKv / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = kBlockKv * block + 8 * n + e;
            const int32_t x = s[block][4 * n + 2 * half + e];
            if constexpr (Seen::kMasked) {
              const int32_t is_seen = seen.Spread(half, column);
              best = ::max(best, (x & is_seen) | (INT32_MIN & ~is_seen));
              block_total += x & is_seen;
            } else {
              best = ::max(best, x);
              block_total += x;
            }
          }
        }
        // A block without keys has no scale either.
        if (!Seen::kMasked || best != INT32_MIN) {
          const float scale = q_scale[half] * k_scale[block];
          // Up: P is computed from the exact product, and may not be beyond P_MAX.
          tile_max = fmaxf(tile_max, __fmul_ru(static_cast<float>(best), scale));
          total += static_cast<float>(block_total) * scale;
        }
      }
      uint32_t raise = over[half] & Pv::kLimitMask;
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        raise |= __shfl_xor_sync(0xffffffffu, raise, lanes);
        tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, lanes));
        total += __shfl_xor_sync(0xffffffffu, total, lanes);
        if constexpr (T::kBiased) biased_count += __shfl_xor_sync(0xffffffffu, biased_count, lanes);
      }
      const float count =
          T::kBiased ? biased_count : static_cast<float>(seen.template Count<T::kTile>(half));
      const float mean = total / fmaxf(count, 1);
      const float old = max[half];
      const float spread = tile_max - mean;
      // That of few keys, where a window begins within a tile, will grow by more; but of a single
      // key nothing tells whether it is far above all others. With a bias scores may spread widely
      // or hardly: as much as the maximum of normal ones would.
      const int few = (count < kBlockKv) + (count < kBlockKv / 2) + (count < kBlockKv / 8);
      float growth = static_cast<float>(count < 2 ? 3 : 3 + few);
      if (T::kBiased && few <= 1) growth = fmaxf(0, floorf(0.7f * spread + 2));
      if (raise != 0) max[half] = fmaxf(old, ceilf(tile_max) + Pv::Room(spread, growth));
      alpha[half] = max[half] == old ? 1.0f : ptx::Exp2(old - max[half]);
      sum[half] *= alpha[half];
    }
    // What was summed so far counts less. Exact, as alpha is a power of two, but for FP16 sums that
    // become subnormal: too small to matter by then.
    if (!first) sums.Rescale(alpha);
  }
};

}  // namespace jax_sage::sm90
