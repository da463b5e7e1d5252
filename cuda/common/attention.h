// What every attention kernel is given.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/layout.h"

namespace jax_sage {

// What each query sees. Dimensions that are 1 for all alike have a stride of 0.
struct MaskParams {
  // Query t sees keys of rows[t].x to rows[t].y - 1 only: [B, Tp]. Of each kMaskRows queries
  // [B, Tp / kMaskRows]: least first, greatest end, greatest first, least end.
  const int2* rows;  // null: plain attention, nothing of this struct is read
  const int4* groups;
  int64_t row_stride, group_stride;  // of batch entries

  // Boolean mask, or null. Bit 8(2h + e) + 7 - i of word [B, N, S / kMaskKeys, Tp, 4], index j of
  // the last: whether the query sees key 16i + 8h + 2j + e of the tile. Of each group and tile
  // [B, N, Tp / kMaskRows, S / kMaskKeys] kNone, kAll or kAll | kByMask.
  const uint32_t* words;
  const uint8_t* views;
  int64_t word_batch_stride, word_head_stride, view_batch_stride, view_head_stride;
  int64_t word_tile_stride;
  int word_row_stride, view_group_stride, view_tile_stride;

  // Segment ids [B, Tp] and [B, S], or null, and the least and greatest of each group and tile.
  const int* query_ids;
  const int* key_ids;
  const int2* query_ranges;
  const int2* key_ranges;
  int64_t query_id_stride, key_id_stride, query_range_stride, key_range_stride;

  // Bias [B, N, T, S or 2], or null; S is padded to a multiple of kMaskKeys. With a column stride
  // of 0 all keys have the same.
  const void* bias;
  DType bias_type;
  int64_t bias_batch_stride, bias_head_stride, bias_row_stride, bias_column_stride;

  // Whether a query's interval says all about what it sees.
  bool AreIntervals() const { return words == nullptr && query_ids == nullptr; }
};

// Tp and Sp are the padded lengths, Hp the padded head dimension (64, 128, 192 or 256), Hc
// TableChannels(Hp).
struct AttentionParams {
  const int8_t* q;                  // [B, N, Tp, Hp]
  const float* q_scale;             // [B, N, Tp]
  const float* q_dot_mean;          // [B, N, Tp]
  const int8_t* k;                  // [B, K, Sp, Hp]
  const float* k_scale;             // [B, K, Sp/64, 4]
  const void* v;                    // E4M3 [B, K, Hp, Sp], permuted; or FP16 [B, K, Sp, Hp]
  const float* channels;            // [B, K, kChannelRows, Hc]
  const int32_t* first_bad;         // [B, K, 2, Hc]
  const long long* value_code_sum;  // [B, K, Hc], in units of kCodeUnit
  void* out;                        // [B, T, N, H]
  float* lse;                       // [B, T, N]
  int64_t batch;
  int heads;
  int kv_heads;
  int length_q;
  int length_kv;
  float per_key;  // 1 / length_kv
  int padded_q;
  int padded_kv;
  int head_dim;
  int padded_head_dim;
  bool is_causal;
  bool with_lse;  // if not, nobody reads lse, and it is not written
  DType out_type;
  const float* per_counted_key;  // where some do not count, else null: per_key of the others [B, K]
  MaskParams masks;
  // With segments, else null; channels, value_code_sum and per_counted_key are null then. Slots as
  // in layout.h.
  const float* slot_channels;  // [B, K, S, kSlotRows, Hc]
  const int32_t* query_slots;  // [B, Tp]; -1: no key has the query's id
  bool alike;                  // by their positions, queries see about as many keys each
  // Null, but with segments by intervals: what queries see, as rows and groups of MaskParams, where
  // the keys of a segment lie one behind the other; and of which batch entries they do not,
  // [B or 1].
  const int2* segment_rows;
  const int4* segment_groups;
  const int32_t* scattered;
  int64_t scattered_stride;
};

}  // namespace jax_sage
