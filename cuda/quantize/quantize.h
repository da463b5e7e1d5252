// Quantization of Q, K and V for the attention kernels: parameters and launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/layout.h"

namespace jax_sage {

// A positive number by which others, from 0 to 2^31 - 1, are divided: by a product and a shift.
class Divisor {
 public:
  JAX_SAGE_HOST_DEVICE constexpr Divisor() : Divisor(1) {}
  JAX_SAGE_HOST_DEVICE constexpr explicit Divisor(int value) : value_(value) {
    while (int64_t{1} << shift_ < value) ++shift_;
    // 2^(32 + shift) / value, rounded up, less 2^32: so it fits.
    const uint64_t excess = (uint64_t{1} << shift_) - static_cast<uint64_t>(value);
    factor_ = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(value) + 1);
  }
  JAX_SAGE_HOST_DEVICE constexpr operator int() const { return value_; }
  friend JAX_SAGE_HOST_DEVICE constexpr int operator/(int x, const Divisor& divisor) {
    const uint32_t n = static_cast<uint32_t>(x);
    const uint32_t high = static_cast<uint32_t>(uint64_t{n} * divisor.factor_ >> 32);
    return static_cast<int>((high + n) >> divisor.shift_);
  }
  friend JAX_SAGE_HOST_DEVICE constexpr int operator%(int x, const Divisor& divisor) {
    return x - x / divisor * divisor.value_;
  }

 private:
  int value_;
  int shift_ = 0;
  uint32_t factor_ = 0;
};

// Hp: the padded head dimension. Hc = TableChannels(Hp).
struct QuantizeParams {
  const void* query;  // [B, T, N, H]
  const void* key;    // [B, S, K, H]
  const void* value;  // [B, S, K, H]
  DType type;
  // Keys that do not count have zero as their code, and no influence. Null: all count.
  const uint8_t* seen;           // [B or 1, K or 1, S]
  const float* per_counted_key;  // [B, K], 1 / the keys that count
  int64_t seen_batch_stride, seen_head_stride;

  int8_t* q;                  // [B, N, Tp, Hp]
  float* q_scale;             // [B, N, Tp]
  float* q_dot_mean;          // [B, N, Tp]
  int8_t* k;                  // [B, K, Sp, Hp]
  float* k_scale;             // [B, K, Sp/64, 4]
  void* v;                    // E4M3 [B, K, Hp, Sp], permuted; or FP16 [B, K, Sp, Hp]
  float* channels;            // [B, K, kChannelRows, Hc]
  int32_t* first_bad;         // [B, K, 2, Hc]
  long long* value_code_sum;  // [B, K, Hc]
  float* partials;            // scratch [B, K, parts, kPartialRows, Hc]
  int32_t* arrivals;          // scratch [B, K, 2]: CTAs of K and V whose statistics are done

  int64_t batch;
  Divisor heads;
  Divisor kv_heads;
  int length_q;
  int length_kv;
  int padded_q;
  int padded_kv;
  int head_dim;
  int padded_head_dim;
  Divisor parts;         // the sequence of keys is cut into this many
  float scale_log2;      // softmax scale * log2(e)
  float q_scale_factor;  // |scale_log2| / 127
  bool smooth_k;
  bool smooth_v;
  bool fp8_value;
  bool skip_unseen;  // no codes of parts that nobody sees; otherwise zeros
};

// Rows of `partials`: per channel and part, sums of K and V, extrema of V, the first positions of V
// that are not finite, and the number of K's samples (bits of an int32); with segments extrema of K
// in place of these two.
constexpr int kPartialRows = 6;

// In place of a slot: not all have the same.
constexpr int kMixedSlots = -2;
// Queries of which it is known together.
constexpr int kQueriesOfSlots = 256;

// Keys of one segment that follow each other in the order of ids, in one of its parts.
struct alignas(16) SegmentRun {
  int32_t position;        // the first's, where all lie one behind the other, or else -1
  int32_t end;             // the place behind the last
  int32_t slot, slot_end;  // the places of the segment's first key, and behind its last
};

// With segments: means and scales of V by slot (layout.h). Of the fields above, per_counted_key and
// channels are null; value_code_sum is [B, K, S, Hc], and partials
// [B, K, kPieces, parts, kPartialRows, Hc].
struct SegmentedParams : QuantizeParams {
  const int32_t* query_ids;   // [B or 1, Tp]
  const int32_t* sorted_ids;  // [B or 1, S], of the keys
  const int32_t* order;       // the same: whose they are
  // [B or 1, S], by key: where its segment begins among the sorted keys, its slot, and where it
  // ends.
  const int2* key_slots;
  const int2* rows;                                    // [B or 1, Tp], as in MaskParams
  int64_t query_id_stride, key_id_stride, row_stride;  // of batch entries

  bool own_segments;  // queries have the ids of the keys

  int32_t* query_slots;  // [B, Tp]; -1: no key has the id
  float* slot_channels;  // [B, K, S, kSlotRows, Hc]
  // As in MaskParams, where keys of a segment lie one behind the other: what queries see of theirs.
  int2* segment_rows;         // [B, Tp]
  int4* segment_groups;       // [B, Tp / kMaskRows]
  __nv_bfloat16* slot_means;  // scratch [B, K, S, Hc], of K
  float2* slot_factors;       // scratch [B, K, S]: size of K, 1 / the keys that count
  int32_t* piece_counts;      // scratch [B, K, 2, kPieces, parts]: keys that count
  int32_t* piece_arrivals;    // scratch [B, K, 2, parts]: pieces that are done, by the first's part
  SegmentRun* runs;           // scratch [B, S], at the places where one begins
  int32_t* part_slots;        // scratch [B, parts]: of all keys of a part, as they are given
  int32_t* block_slots;       // scratch [B, Tp / kQueriesOfSlots]: of all these queries
};

// Pieces of segments that a part of the sorted keys shares with others: of a segment that began
// before it, and of one that begins in it.
enum Piece : int { kContinued = 0, kBegun = 1, kPieces = 2 };

cudaError_t LaunchQuantize(const QuantizeParams& params, cudaStream_t stream);
cudaError_t LaunchQuantizeSegments(const SegmentedParams& params, cudaStream_t stream);

}  // namespace jax_sage
