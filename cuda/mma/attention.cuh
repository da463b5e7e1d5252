// Quantized attention on mma.sync, one kernel for its family: INT8 QK^T, E4M3 or FP16 PV.
//
// A CTA owns kBlockQ queries of one head and walks over the keys in tiles of 64. Each warp owns
// 16 * kTilesM queries from QK^T to the output, so the softmax needs no shared memory. K and V
// tiles come by cp.async into two stages: tile j+1 is in flight while tile j is computed, one
// barrier a tile.
//
// Per tile: S = Q K^T in INT32; the row maximum on raw integers (a thread's columns share one K
// scale); P = 2^(S c - m + 6), m the running maximum rounded up to an integer; P rounded to E4M3 or
// FP16 in place as A fragments; PV per pair of 8-column tiles into a fresh accumulator, which is
// then added to the FP32 output as O = O alpha + partial. So the sum over 64 keys is all that an
// FP16 accumulator sees, it needs 2 registers per tile at a time, and rescaling costs nothing.
// The row sum of the rounded P is a column of ones that PV multiplies with: it has the same
// rounding as the output, so a row with one key returns that key's value. lse uses the sum of P
// before rounding.
#pragma once

#include <cuda_fp16.h>

#include "common/epilogue.cuh"
#include "common/layout.h"
#include "common/masks.cuh"
#include "common/ptx.cuh"
#include "mma/attention.h"

namespace jax_sage::mma {

// Byte offset in a tile of rows of kRowBytes, 16-byte chunks swizzled so that the eight rows that
// ldmatrix reads at once lie in different banks.
template <int kRowBytes>
__device__ __forceinline__ uint32_t Swizzled(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0, "a row is half or whole bank lines");
  // Rows of 64 bytes: two rows share the 128 bytes of a bank line.
  const int flip = kRowBytes == 64 ? (row >> 1) & 3 : row & 7;
  return row * kRowBytes + ((chunk ^ flip) << 4);
}

// E4M3 P and V: k32 instructions; V is [channel][key].
struct PvFp8 {
  static constexpr int kInstructionKeys = 32;
  static constexpr int kValueBytes = 1;
  static constexpr bool kTransposedV = true;
  static constexpr uint32_t kOnes = 0x38383838;

  // A fragment of step ks from the C fragments p[8][4] of one 16 x 64 tile.
  __device__ static void Pack(uint32_t (&a)[4], const float (&p)[kBlockKv / 8][4], int ks) {
    const int n = 4 * ks;
    a[0] = ptx::PackE4m3(p[n][0], p[n][1], p[n + 1][0], p[n + 1][1]);
    a[1] = ptx::PackE4m3(p[n][2], p[n][3], p[n + 1][2], p[n + 1][3]);
    a[2] = ptx::PackE4m3(p[n + 2][0], p[n + 2][1], p[n + 3][0], p[n + 3][1]);
    a[3] = ptx::PackE4m3(p[n + 2][2], p[n + 2][3], p[n + 3][2], p[n + 3][3]);
  }
  // B fragments of step ks for the 16 channels from 16 * pair: {b[0], b[1]} and {b[2], b[3]}.
  template <int kHeadDim>
  __device__ static void LoadV(uint32_t (&b)[4], uint32_t tile, int pair, int ks, int lane) {
    const int row = pair * 16 + (lane >> 4) * 8 + (lane & 7);
    ptx::LoadMatrix4(b, tile + Swizzled<kBlockKv>(row, 2 * ks + ((lane >> 3) & 1)));
  }
  template <class Acc>
  __device__ static void Mma(Acc& c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::MmaE4m3(c, a, b0, b1);
  }
};

// FP16 P and V: k16 instructions; V is [key][channel], transposed by ldmatrix.
struct PvFp16 {
  static constexpr int kInstructionKeys = 16;
  static constexpr int kValueBytes = 2;
  static constexpr bool kTransposedV = false;
  static constexpr uint32_t kOnes = 0x3C003C00;

  __device__ static void Pack(uint32_t (&a)[4], const float (&p)[kBlockKv / 8][4], int ks) {
    const int n = 2 * ks;
    a[0] = ptx::PackF16(p[n][0], p[n][1]);
    a[1] = ptx::PackF16(p[n][2], p[n][3]);
    a[2] = ptx::PackF16(p[n + 1][0], p[n + 1][1]);
    a[3] = ptx::PackF16(p[n + 1][2], p[n + 1][3]);
  }
  template <int kHeadDim>
  __device__ static void LoadV(uint32_t (&b)[4], uint32_t tile, int pair, int ks, int lane) {
    const int row = ks * 16 + (lane & 15);
    ptx::LoadMatrix4Transposed(b, tile + Swizzled<2 * kHeadDim>(row, 2 * pair + (lane >> 4)));
  }
  template <class Acc>
  __device__ static void Mma(Acc& c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::MmaF16(c, a, b0, b1);
  }
};

// Accumulator of one 16 x 8 tile of PV over 64 keys, and how to read it in FP32.
struct AccF16 {
  uint32_t c[2] = {0, 0};
  __device__ float2 Row(int half) const { return ptx::UnpackF16(c[half]); }
};
struct AccF32 {
  float c[4] = {0, 0, 0, 0};
  __device__ float2 Row(int half) const { return make_float2(c[2 * half], c[2 * half + 1]); }
};

template <class Pv_, class Acc_, int kHeadDim_, int kWarps_, Masking kMasking = Masking::kPlain>
struct Traits {
  using Pv = Pv_;
  static constexpr bool kMasked = kMasking != Masking::kPlain;
  static constexpr bool kBiased = kMasking == Masking::kMaskedBiased;
  using Acc = Acc_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTilesM = kBlockQ / (16 * kWarps);
  static constexpr int kTilesN = kBlockKv / 8;
  static constexpr int kSteps = kBlockKv / Pv::kInstructionKeys;
  static constexpr int kStages = 2;
  static constexpr int kCtasPerSm = 8 / kWarps;  // eight warps an SM leave 255 registers a thread
  static constexpr int kQBytes = kBlockQ * kHeadDim;
  static constexpr int kKBytes = kBlockKv * kHeadDim;
  static constexpr int kVRows = Pv::kTransposedV ? kHeadDim : kBlockKv;
  static constexpr int kVRowBytes = (Pv::kTransposedV ? kBlockKv : kHeadDim) * Pv::kValueBytes;
  static constexpr int kVBytes = kVRows * kVRowBytes;
  // A stage: K, V, the four scales of K. In front of them Q and its scales.
  static constexpr int kStageBytes = kKBytes + kVBytes + kKeyScales * 4;
  static constexpr int kQScaleBytes = kBlockQ * 4;
  static constexpr int kSharedBytes = kQBytes + kQScaleBytes + kStages * kStageBytes;
  static_assert(kTilesM * 16 * kWarps == kBlockQ, "warps divide the query tile evenly");
  static_assert(kHeadDim == 64 || kHeadDim == 128, "head dimensions are padded to 64 or 128");
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have 99 KiB of shared memory a CTA");
};

template <int kRows, int kRowBytes, int kThreads>
__device__ __forceinline__ void LoadTile(uint32_t shared, const uint8_t* global,
                                         int64_t global_row_bytes) {
  constexpr int kChunks = kRowBytes / 16;
  constexpr int kRowsPerPass = kThreads / kChunks;
  static_assert(kRows % kRowsPerPass == 0, "every thread copies the same number of chunks");
  static_assert(kRowsPerPass % 8 == 0, "the swizzle repeats every 8 rows: one address serves all");
  const unsigned row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  shared += Swizzled<kRowBytes>(row, chunk);
  global += row * global_row_bytes + chunk * 16;
#pragma unroll
  for (int i = 0; i < kRows / kRowsPerPass; ++i) {
    ptx::CopyAsync16(shared + i * kRowsPerPass * kRowBytes,
                     global + i * kRowsPerPass * global_row_bytes);
  }
}

// Tiles of keys that the queries of a CTA, from `first_row` on, see; without masks.
__device__ __forceinline__ int CountTiles(const AttentionParams& params, int first_row) {
  const int tiles = (params.length_kv + kBlockKv - 1) / kBlockKv;
  if (!params.is_causal) return tiles;
  const int last_row = min(first_row + kBlockQ, params.length_q) - 1;
  return min(tiles, last_row / kBlockKv + 1);
}

// As SeenKeys: what a thread's two rows see at a causal diagonal, or of a last tile.
struct KeysBelow {
  static constexpr bool kMasked = true;
  int end[2];
  __device__ __forceinline__ bool operator()(int half, int column) const {
    return column < end[half];
  }
};

// Turns the scores of one 16 x 64 tile into P (returned in p) and updates the rows' state.
// Rows are lane / 4 (half 0) and lane / 4 + 8 (half 1).
struct RowState {
  float max[2] = {-kInf, -kInf};  // an integer, base 2
  float sum[2] = {0, 0};          // of this thread's columns, P before rounding
  float quantized_sum[2] = {0, 0};
};

// With kBiased p holds the bias at first.
template <bool kBiased, class Seen>
__device__ __forceinline__ void Softmax(const int32_t (&s)[kBlockKv / 8][4],
                                        float (&p)[kBlockKv / 8][4], RowState& state,
                                        float (&alpha)[2], const float (&scale)[2],
                                        const Seen& seen) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int32_t best = INT32_MIN;
    float tile_max = -kInf;
#pragma unroll
    for (int n = 0; n < kBlockKv / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!seen(half, 8 * n + e)) continue;
        if constexpr (kBiased) {
          float& bias = p[n][2 * half + e];
          bias *= kLog2E;
          if (bias <= kHidingBias) bias = -kInf;
          tile_max =
              fmaxf(tile_max, fmaf(static_cast<float>(s[n][2 * half + e]), scale[half], bias));
        } else {
          best = max(best, s[n][2 * half + e]);
        }
      }
    }
    if constexpr (!kBiased) {
      if (!Seen::kMasked || best != INT32_MIN) tile_max = static_cast<float>(best) * scale[half];
    }
    tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
    tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
    const float new_max = fmaxf(state.max[half], ceilf(tile_max));
    const float shift = new_max == -kInf ? 0.0f : new_max;  // nothing seen yet
    alpha[half] = ptx::Exp2(state.max[half] - shift);
    state.max[half] = new_max;
    const float offset = kLog2PMax - shift;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kBlockKv / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float shift = kBiased ? offset + p[n][2 * half + e] : offset;
        float x = ptx::Exp2(fmaf(static_cast<float>(s[n][2 * half + e]), scale[half], shift));
        if (!seen(half, 8 * n + e)) x = 0;
        if constexpr (kBiased) {  // not NaN where the query is
          if (p[n][2 * half + e] == -kInf) x = 0;
        }
        p[n][2 * half + e] = x;
        sum += x;
      }
    }
    state.sum[half] = state.sum[half] * alpha[half] + sum;
  }
}

// What a thread's rows, `row` and `row + 8`, see of the tile from `first_key` on.
__device__ __forceinline__ SeenKeys<kBlockKv> FindSeen(const MaskParams& masks, unsigned view,
                                                       int batch, int head, int row, int first_key,
                                                       int lane) {
  SeenKeys<kBlockKv> seen;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int this_row = row + 8 * half;
    uint32_t bits = ~0u;
    if (view & kByInterval) {
      const int2 interval = __ldg(masks.rows + batch * masks.row_stride + this_row);
      bits &= ColumnsOf<kBlockKv>(interval, first_key + 2 * (lane & 3));
    }
    if (view & kByMask) {
      bits &= MaskWord(masks, MaskRow(masks, batch, head, this_row), 0, first_key, lane);
    }
    if (view & kBySegment) {
      bits &= ColumnsOfSegment<kBlockKv>(masks, batch, SegmentOf(masks, batch, this_row), first_key,
                                         lane);
    }
    seen.bits[half] = bits;
  }
  return seen;
}

// Volatile, so that the epilogue computes the position anew: registers for the main loop.
__device__ __forceinline__ unsigned BlockIndex() {
  unsigned block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kCtasPerSm)
    AttentionKernel(const __grid_constant__ AttentionParams params) {
  using Pv = typename T::Pv;
  using Acc = typename T::Acc;
  constexpr int kHeadDim = T::kHeadDim;
  constexpr int kTilesD = kHeadDim / 8;

  extern __shared__ __align__(128) uint8_t shared_memory[];
  const uint32_t q_tile = ptx::SharedAddress(shared_memory);
  const uint32_t q_scales = q_tile + T::kQBytes;
  const uint32_t stages = q_scales + T::kQScaleBytes;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  const Position position = FindPosition<kBlockQ>(params, BlockIndex(), gridDim.x);
  const int warp_row = position.first_row + warp * 16 * T::kTilesM;

  // The tiles that queries of this CTA may see: [first_tile, tiles), with masks not all of them.
  int tiles = CountTiles(params, position.first_row), first_tile = 0;
  const int first_group = position.first_row / kMaskRows;
  const int groups = min(kBlockQ, params.length_q - position.first_row + kMaskRows - 1) / kMaskRows;
  const auto batch = [&] { return static_cast<int>(position.head) / params.heads; };
  const auto head = [&] { return static_cast<int>(position.head) % params.heads; };
  const auto view_of = [&](int group, int tile) {
    return ViewOfTile(params.masks, batch(), head(), group, tile * kBlockKv, (tile + 1) * kBlockKv);
  };
  // The first from `tile` on that anyone may see.
  const auto find = [&](int tile) {
    if constexpr (T::kMasked) {
      for (; tile < tiles; ++tile) {
        for (int group = 0; group < groups; ++group) {
          if (view_of(first_group + group, tile) != kNone) return tile;
        }
      }
    }
    return tile;
  };
  if constexpr (T::kMasked) {
    int first_key = params.length_kv, end_key = 0;
    for (int group = 0; group < groups; ++group) {
      const int4 bounds =
          __ldg(params.masks.groups + batch() * params.masks.group_stride + first_group + group);
      first_key = min(first_key, bounds.x);
      end_key = max(end_key, bounds.y);
    }
    tiles = (end_key + kBlockKv - 1) / kBlockKv;
    first_tile = find(first_key / kBlockKv);
  }

  // In global memory the keys of a tile are a range of columns of V^T, or of rows of V.
  const int64_t v_row_bytes = Pv::kTransposedV ? params.padded_kv : T::kVRowBytes;
  const int64_t v_tile_bytes = Pv::kTransposedV ? T::kVRowBytes : T::kVBytes;
  const uint8_t* q_global = reinterpret_cast<const uint8_t*>(params.q) +
                            (position.head * params.padded_q + position.first_row) * kHeadDim;
  const uint8_t* k_global =
      reinterpret_cast<const uint8_t*>(params.k) + position.kv_head * params.padded_kv * kHeadDim;
  const uint8_t* v_global = static_cast<const uint8_t*>(params.v) +
                            position.kv_head * params.padded_kv * kHeadDim * Pv::kValueBytes;
  // 32 bits, a register less: 2^32 blocks of K would be 16 TiB.
  const unsigned first_block =
      static_cast<unsigned>(position.kv_head) * (params.padded_kv / kBlockKv);

  auto load_kv = [&](int tile, int step) {
    const uint32_t stage = stages + (step % T::kStages) * T::kStageBytes;
    LoadTile<kBlockKv, kHeadDim, T::kThreads>(
        stage, k_global + static_cast<int64_t>(tile) * kBlockKv * kHeadDim, kHeadDim);
    LoadTile<T::kVRows, T::kVRowBytes, T::kThreads>(stage + T::kKBytes,
                                                    v_global + tile * v_tile_bytes, v_row_bytes);
    if (threadIdx.x == 0) {
      ptx::CopyAsync16(stage + T::kKBytes + T::kVBytes,
                       params.k_scale + uint64_t{first_block + tile} * kKeyScales);
    }
    ptx::CopyAsyncCommit();
  };

  LoadTile<kBlockQ, kHeadDim, T::kThreads>(q_tile, q_global, kHeadDim);
  if (threadIdx.x < T::kQScaleBytes / 16) {
    ptx::CopyAsync16(q_scales + threadIdx.x * 16, params.q_scale + position.head * params.padded_q +
                                                      position.first_row + threadIdx.x * 4);
  }
  if (T::kMasked && first_tile >= tiles) {
    ptx::CopyAsyncCommit();
  } else {
    load_kv(first_tile, 0);
  }

  float o[T::kTilesM][kTilesD][4] = {};
  RowState state[T::kTilesM];

  int masked_next = 0, masked_step = 0;
  for (int tile = first_tile; tile < tiles;
       tile = T::kMasked ? masked_next : tile + 1, ++masked_step) {
    const int step = T::kMasked ? masked_step : tile;
    ptx::CopyAsyncWait<0>();
    __syncthreads();  // tile has arrived for all, and all are done with the other stage
    if constexpr (T::kMasked) {
      masked_next = find(tile + 1);
      if (masked_next < tiles) load_kv(masked_next, step + 1);
    } else {
      if (tile + 1 < tiles) load_kv(tile + 1, tile + 1);
    }
    const uint32_t k_tile = stages + (step % T::kStages) * T::kStageBytes;
    const uint32_t v_tile = k_tile + T::kKBytes;
    const int first_key = tile * kBlockKv;
    unsigned view = kAll;
    if constexpr (T::kMasked) {
      view = view_of(warp_row / kMaskRows, tile);
      if (view == kNone) continue;
    }
    // A whole warp above the diagonal has nothing to do with this tile.
    if (!T::kMasked && params.is_causal && first_key > warp_row + 16 * T::kTilesM - 1) continue;

    int32_t s[T::kTilesM][T::kTilesN][4] = {};
#pragma unroll
    for (int ks = 0; ks < kHeadDim / 32; ++ks) {
      uint32_t a[T::kTilesM][4];
#pragma unroll
      for (int m = 0; m < T::kTilesM; ++m) {
        const int row = warp * 16 * T::kTilesM + m * 16 + (lane & 15);
        ptx::LoadMatrix4(a[m], q_tile + Swizzled<kHeadDim>(row, 2 * ks + (lane >> 4)));
      }
#pragma unroll
      for (int pair = 0; pair < T::kTilesN / 2; ++pair) {
        uint32_t b[4];
        const int row = pair * 16 + (lane >> 4) * 8 + (lane & 7);
        ptx::LoadMatrix4(b, k_tile + Swizzled<kHeadDim>(row, 2 * ks + ((lane >> 3) & 1)));
#pragma unroll
        for (int m = 0; m < T::kTilesM; ++m) {
          ptx::MmaS8(s[m][2 * pair], a[m], b[0], b[1]);
          ptx::MmaS8(s[m][2 * pair + 1], a[m], b[2], b[3]);
        }
      }
    }

    const bool masked = first_key + kBlockKv > params.length_kv ||
                        (params.is_causal && first_key + kBlockKv - 1 > warp_row);
    float alpha[T::kTilesM][2];
    uint32_t a[T::kTilesM][T::kSteps][4];
#pragma unroll
    for (int m = 0; m < T::kTilesM; ++m) {
      float p[T::kTilesN][4];
      const uint32_t q_scale = q_scales + (warp * 16 * T::kTilesM + m * 16 + lane / 4) * 4;
      const float k_scale = ptx::LoadSharedAs<float>(v_tile + T::kVBytes + (lane & 3) * 4);
      const float scale[2] = {ptx::LoadSharedAs<float>(q_scale) * k_scale,
                              ptx::LoadSharedAs<float>(q_scale + 8 * 4) * k_scale};
      const int row = warp_row + m * 16 + lane / 4;
      if constexpr (T::kBiased) {
        float bias[kBlockKv / 2];
        BiasRows(params, batch(), head(), row).Load(bias, first_key, lane);
#pragma unroll
        for (int i = 0; i < kBlockKv / 2; ++i) p[i / 4][i % 4] = bias[i];
      }
      if (T::kMasked && view != kAll) {
        const SeenKeys<kBlockKv> seen =
            FindSeen(params.masks, view, batch(), head(), row, first_key, lane);
        Softmax<T::kBiased>(s[m], p, state[m], alpha[m], scale, seen);
      } else if (!T::kMasked && masked) {
        KeysBelow seen;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int this_row = warp_row + m * 16 + half * 8 + lane / 4;
          const int end = params.is_causal ? min(this_row + 1, params.length_kv) : params.length_kv;
          seen.end[half] = end - first_key - 2 * (lane & 3);
        }
        Softmax<T::kBiased>(s[m], p, state[m], alpha[m], scale, seen);
      } else {
        Softmax<T::kBiased>(s[m], p, state[m], alpha[m], scale, Everything());
      }
#pragma unroll
      for (int ks = 0; ks < T::kSteps; ++ks) Pv::Pack(a[m][ks], p, ks);
    }

#pragma unroll
    for (int m = 0; m < T::kTilesM; ++m) {
      Acc sum;
#pragma unroll
      for (int ks = 0; ks < T::kSteps; ++ks) Pv::Mma(sum.c, a[m][ks], Pv::kOnes, Pv::kOnes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& total = state[m].quantized_sum[half];
        total = fmaf(total, alpha[m][half], sum.Row(half).x);
      }
    }
#pragma unroll
    for (int pair = 0; pair < kTilesD / 2; ++pair) {
      Acc partial[T::kTilesM][2];
#pragma unroll
      for (int ks = 0; ks < T::kSteps; ++ks) {
        uint32_t b[4];
        Pv::template LoadV<kHeadDim>(b, v_tile, pair, ks, lane);
#pragma unroll
        for (int m = 0; m < T::kTilesM; ++m) {
          Pv::Mma(partial[m][0].c, a[m][ks], b[0], b[1]);
          Pv::Mma(partial[m][1].c, a[m][ks], b[2], b[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < T::kTilesM; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 x = partial[m][i].Row(half);
            float (&acc)[4] = o[m][2 * pair + i];
            acc[2 * half] = fmaf(acc[2 * half], alpha[m][half], x.x);
            acc[2 * half + 1] = fmaf(acc[2 * half + 1], alpha[m][half], x.y);
          }
        }
      }
    }
  }

  // Q is done with: its memory takes the table.
  using Table = OutputTable<kHeadDim>;
  static_assert(sizeof(Table) <= T::kQBytes);
  Table& table = *reinterpret_cast<Table*>(shared_memory);
  if constexpr (T::kMasked) ptx::CopyAsyncWait<0>();  // there may have been no tile to wait for
  __syncthreads();
  PrepareOutput<T::kMasked>(table, params, FindPosition<kBlockQ>(params, BlockIndex(), gridDim.x),
                            threadIdx.x, T::kThreads);
  __syncthreads();
#pragma unroll
  for (int m = 0; m < T::kTilesM; ++m) {
    const int row = table.first_query + (warp * T::kTilesM + m) * 16 + lane / 4;
    const RowEnds ends =
        EndsOf<T::kMasked>(params, table, row, lane, state[m].max, state[m].quantized_sum);
    FinishChannels<T::kMasked>(params, table, ends, lane, o[m]);
    if (params.with_lse) {
      StoreLse<T::kMasked>(params, table, ends, row, lane, state[m].max, state[m].sum);
    }
    WithOutputType(params.out_type,
                   [&](auto type) { StoreRows<decltype(type)>(params, table, row, lane, o[m]); });
  }
}

template <class T>
cudaError_t Launch(const AttentionParams& params, cudaStream_t stream) {
  const int64_t q_tiles = (params.length_q + kBlockQ - 1) / kBlockQ;
  const int64_t blocks = q_tiles * params.batch * params.heads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaFuncSetAttribute(
      AttentionKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  AttentionKernel<T>
      <<<static_cast<unsigned>(blocks), T::kThreads, T::kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

// The kernel with masks: eight warps of 16 queries, as masks and a bias take registers.
template <class Pv, class Acc, int kHeadDim>
cudaError_t LaunchMasked(const AttentionParams& params, cudaStream_t stream) {
  return params.masks.bias != nullptr
             ? Launch<Traits<Pv, Acc, kHeadDim, 8, Masking::kMaskedBiased>>(params, stream)
             : Launch<Traits<Pv, Acc, kHeadDim, 8, Masking::kMasked>>(params, stream);
}
template <class Pv>
cudaError_t LaunchMasked(const AttentionParams& params, bool fp16_accumulator,
                         cudaStream_t stream) {
  if (params.padded_head_dim == 64) {
    return fp16_accumulator ? LaunchMasked<Pv, AccF16, 64>(params, stream)
                            : LaunchMasked<Pv, AccF32, 64>(params, stream);
  }
  return fp16_accumulator ? LaunchMasked<Pv, AccF16, 128>(params, stream)
                          : LaunchMasked<Pv, AccF32, 128>(params, stream);
}

}  // namespace jax_sage::mma
