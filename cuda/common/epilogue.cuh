// What the attention kernels share: which queries a CTA owns, and how their outputs are finished.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

#include <limits>
#include <type_traits>

#include "common/attention.h"
#include "common/layout.h"

namespace jax_sage {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Position {
  int first_row;    // of this CTA's queries
  int64_t head;     // batch * N + query head
  int64_t kv_head;  // batch * K + key/value head
};

// Of tile `block` of `blocks`, each of kQueries queries.
template <int kQueries>
__device__ __forceinline__ Position FindPosition(const AttentionParams& params, unsigned block,
                                                 unsigned blocks) {
  const unsigned q_tiles = (params.length_q + kQueries - 1) / kQueries;
  const unsigned all_heads = blocks / q_tiles;
  unsigned head, q_index;
  if (params.is_causal || params.masks.rows != nullptr) {
    // Over all heads; causal: the longest first, so that the short ones fill the end; masks: heads
    // that share one read the same part of it at the same time.
    q_index = q_tiles - 1 - block / all_heads;
    head = block % all_heads;
  } else {
    // Head by head, for the sake of the L2 cache; but tiles with few queries last, for the same
    // reason as above, and because every n-th of them all might be work for the same CTA.
    const unsigned full_tiles = params.length_q / kQueries;
    if (block < full_tiles * all_heads) {
      head = block / full_tiles;
      q_index = block % full_tiles;
    } else {
      head = block - full_tiles * all_heads;
      q_index = full_tiles;
    }
  }
  const unsigned group = params.heads / params.kv_heads;
  // Query heads are in the order of their key/value heads, so the group divides both at once.
  return {static_cast<int>(q_index) * kQueries, head, head / group};
}

template <class Out>
__device__ __forceinline__ Out Convert(float x) {
  if constexpr (sizeof(Out) == 4) {
    return x;
  } else if constexpr (std::is_same_v<Out, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <class Out>
struct alignas(2 * sizeof(Out)) Pair {
  Out x, y;
};

// What the outputs of a query tile need, in shared memory.
template <int kHeadDim>
struct alignas(16) OutputTable {
  // Per channel of the head:
  float scale[kHeadDim];        // of V
  float offset[kHeadDim];       // what smoothing took from V
  int32_t first_bad[kHeadDim];  // first key that makes this channel NaN
  int32_t first_bad_key;        // first key that makes lse NaN
  int32_t first_query;          // of the tile
  int64_t query_row;            // of the head's first query, in q_dot_mean
  int64_t output_row;           // the same in out and lse, where rows are `heads` apart
  int32_t first_token;          // the head's first query among those of all batch entries
  int32_t head;                 // of the batch entry
  int32_t batch;                // with masks
  int32_t slot;                 // with segments: whose scale and offset these are
};

// Of a slot, the rows of slot_channels.
template <int kHeadDim>
__device__ __forceinline__ const float* SlotChannels(const AttentionParams& params, int64_t kv_head,
                                                     int slot) {
  // A query without keys may have those of any: its output is 0.
  return params.slot_channels +
         (kv_head * params.length_kv + max(slot, 0)) * (kSlotRows * TableChannels(kHeadDim));
}

// kBySlot: there may be segments; what is not finite is marked later then, and with intervals
// (masks.rows), as who sees it is not a matter of the first key.

// Fills the table with `threads` threads; the caller synchronizes.
template <bool kBySlot, int kHeadDim>
__device__ __forceinline__ void PrepareOutput(OutputTable<kHeadDim>& table,
                                              const AttentionParams& params,
                                              const Position& position, int thread, int threads) {
  const bool is_marked = kBySlot || params.masks.rows != nullptr;
  constexpr int kChannels = TableChannels(kHeadDim);
  const int32_t* first_bad = params.first_bad + position.kv_head * kBadRows * kChannels;
  if (thread == 0) {
    if constexpr (!kBySlot) {
      table.first_bad_key = is_marked ? kNever : first_bad[kBadKey * kChannels];
    }
    table.first_query = position.first_row;
    table.query_row = position.head * params.padded_q;
    table.output_row = position.head / params.heads * params.length_q * params.heads +
                       position.head % params.heads;
    table.first_token = static_cast<int32_t>(position.head / params.heads * params.length_q);
    table.head = static_cast<int32_t>(position.head % params.heads);
  }
  if constexpr (kBySlot) {
    const int batch = static_cast<int>(position.head) / params.heads;
    if (thread == 0) table.batch = batch;
    if (params.query_slots != nullptr) {
      const int slot = __ldg(params.query_slots + batch * static_cast<int64_t>(params.padded_q) +
                             position.first_row);
      if (thread == 0) table.slot = slot;
      const float* slot_channels = SlotChannels<kHeadDim>(params, position.kv_head, slot);
#pragma unroll 1
      for (int c = thread; c < kHeadDim; c += threads) {
        table.scale[c] = __ldg(slot_channels + kSlotScale * kChannels + c);
        table.offset[c] = __ldg(slot_channels + kSlotOffset * kChannels + c);
      }
      return;
    }
  }
  const float* channels = params.channels + position.kv_head * kChannelRows * kChannels;
  const long long* code_sum = params.value_code_sum + position.kv_head * kChannels;
  const float per_key =
      params.per_counted_key != nullptr ? params.per_counted_key[position.kv_head] : params.per_key;
#pragma unroll 1
  for (int c = thread; c < kHeadDim; c += threads) {
    const float scale = channels[kValueScale * kChannels + c];
    const float average = channels[kValueAverage * kChannels + c];
    const float code_mean =
        static_cast<float>(static_cast<double>(code_sum[c]) * kCodeUnit) * per_key;
    table.scale[c] = scale;
    // 0: nothing was taken from V, and nothing is given back.
    table.offset[c] = average == 0 ? 0 : average - scale * code_mean;
    if constexpr (!kBySlot) {
      table.first_bad[c] =
          is_marked ? kNever
                    : min(first_bad[kBadKey * kChannels], first_bad[kBadValue * kChannels + c]);
    }
  }
}

// The ends of two rows, `row` and `row + 8`, of which a thread holds some channels.
struct RowEnds {
  float norm[2];     // sums of P; 0: nothing is seen
  float inverse[2];  // 1 / norm, or 0
  int last_key[2];   // of those seen, where what is not finite is not marked later
  bool is_plain;     // all channels are finite, and something is seen; the same in the warp
  // With segments: whose scale and offset are theirs, and whether these are not the table's.
  int slot[2];
  bool other_slots;
};

// quantized_sum: of P, as V is multiplied by it.
template <bool kBySlot, int kHeadDim>
__device__ __forceinline__ RowEnds EndsOf(const AttentionParams& params,
                                          const OutputTable<kHeadDim>& table, int row, int lane,
                                          const float (&max)[2], const float (&quantized_sum)[2]) {
  RowEnds ends;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    ends.last_key[half] = kBySlot            ? -1
                          : params.is_causal ? min(row + 8 * half, params.length_kv - 1)
                                             : params.length_kv - 1;
    const bool too_large = fabsf(max[half]) >= kScoreMax && max[half] != -kInf;
    ends.norm[half] = too_large ? kNan : quantized_sum[half];
    ends.inverse[half] = ends.norm[half] == 0 ? 0 : 1.0f / ends.norm[half];
  }
  ends.other_slots = false;
  if constexpr (kBySlot) {
    if (params.query_slots != nullptr) {
      const int32_t* slots =
          params.query_slots + table.batch * static_cast<int64_t>(params.padded_q) + row;
      ends.slot[0] = __ldg(slots);
      ends.slot[1] = __ldg(slots + 8);
      ends.other_slots =
          __any_sync(0xffffffffu, ends.slot[0] != table.slot || ends.slot[1] != table.slot);
    }
  }
  bool some_bad = ends.norm[0] == 0 || ends.norm[1] == 0;
  if constexpr (!kBySlot) {
#pragma unroll
    for (int c = lane; c < kHeadDim; c += 32) some_bad |= table.first_bad[c] < params.length_kv;
  }
  ends.is_plain = !__any_sync(0xffffffffu, some_bad);
  return ends;
}

// Finishes the outputs of two rows, of which this thread holds the channels kFirst + 8n +
// 2(lane % 4) + {0, 1}: divides by the row sum, undoes V's scale and mean, and marks what is not
// finite.
template <bool kBySlot, int kFirst = 0, int kHeadDim, int kTiles>
__device__ __forceinline__ void FinishChannels(const AttentionParams& params,
                                               const OutputTable<kHeadDim>& table,
                                               const RowEnds& ends, int lane,
                                               float (&o)[kTiles][4]) {
  if (kBySlot && ends.other_slots) {
    const int head = static_cast<int>(table.query_row / params.padded_q);
    const int64_t kv_head = head / (params.heads / params.kv_heads);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* channels =
          SlotChannels<kHeadDim>(params, kv_head, ends.slot[half]) + kFirst + 2 * (lane & 3);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        // A branch, so that not all is loaded at once: there are no registers for that.
        if (n % 2 == 0 && kFirst + 8 * n >= params.head_dim) break;
        const auto load = [&](int slot_row) {
          return *reinterpret_cast<const float2*>(channels + slot_row * TableChannels(kHeadDim) +
                                                  8 * n);
        };
        const float2 scale = load(kSlotScale), offset = load(kSlotOffset);
        float& x = o[n][2 * half];
        float& y = o[n][2 * half + 1];
        x = x * ends.inverse[half] * scale.x + offset.x;
        y = y * ends.inverse[half] * scale.y + offset.y;
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int channel = kFirst + 8 * n + 2 * (lane & 3);
      const float2 scale = *reinterpret_cast<const float2*>(&table.scale[channel]);
      const float2 offset = *reinterpret_cast<const float2*>(&table.offset[channel]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& x = o[n][2 * half];
        float& y = o[n][2 * half + 1];
        x = x * ends.inverse[half] * scale.x + offset.x;
        y = y * ends.inverse[half] * scale.y + offset.y;
      }
    }
  }
  if (ends.is_plain) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int channel = kFirst + 8 * n + 2 * (lane & 3);
    int2 bad = make_int2(kNever, kNever);
    if constexpr (!kBySlot) bad = *reinterpret_cast<const int2*>(&table.first_bad[channel]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& x = o[n][2 * half];
      float& y = o[n][2 * half + 1];
      if (ends.norm[half] == 0) x = y = 0;  // nothing seen
      if (bad.x <= ends.last_key[half]) x = kNan;
      if (bad.y <= ends.last_key[half]) y = kNan;
    }
  }
}

// `sum`: this thread's part of the sum of P before rounding.
template <bool kBySlot, int kHeadDim>
__device__ __forceinline__ void StoreLse(const AttentionParams& params,
                                         const OutputTable<kHeadDim>& table, const RowEnds& ends,
                                         int row, int lane, const float (&max)[2],
                                         const float (&sum)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = sum[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int this_row = row + 8 * half;
    if ((lane & 3) == 0 && this_row < params.length_q) {
      float lse = CUDART_LN2_F * (max[half] + log2f(total) - kLog2PMax +
                                  params.q_dot_mean[table.query_row + this_row]);
      if ((!kBySlot && table.first_bad_key <= ends.last_key[half]) || isnan(ends.norm[half])) {
        lse = kNan;
      }
      if (ends.norm[half] == 0) lse = -kInf;  // nothing seen, whatever the query
      params.lse[table.output_row + static_cast<int64_t>(this_row) * params.heads] = lse;
    }
  }
}

// Stores what FinishChannels has finished.
template <class Out, int kHeadDim>
__device__ __forceinline__ void StoreRows(const AttentionParams& params,
                                          const OutputTable<kHeadDim>& table, int row, int lane,
                                          const float (&o)[kHeadDim / 8][4]) {
  const bool pairs = params.head_dim % 2 == 0;  // then every pair is aligned
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= params.length_q) continue;
    const int64_t output_row =
        table.output_row + static_cast<int64_t>(row + 8 * half) * params.heads;
    Out* out = static_cast<Out*>(params.out) + output_row * params.head_dim;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const int channel = 8 * n + 2 * (lane & 3);
      const Out x = Convert<Out>(o[n][2 * half]), y = Convert<Out>(o[n][2 * half + 1]);
      if (pairs && channel < params.head_dim) {
        *reinterpret_cast<Pair<Out>*>(out + channel) = {x, y};
      } else {
        if (channel < params.head_dim) out[channel] = x;
        if (channel + 1 < params.head_dim) out[channel + 1] = y;
      }
    }
  }
}

// Calls function(Out()) with the type of the output.
template <class F>
__device__ __forceinline__ void WithOutputType(DType type, F&& function) {
  switch (type) {
    case DType::kF16:
      return function(__half());
    case DType::kBf16:
      return function(__nv_bfloat16());
    case DType::kF32:
      return function(float());
  }
}

}  // namespace jax_sage
