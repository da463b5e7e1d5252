// What lengths and a band leave each query to see: an interval of keys.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_sage {

struct IntervalParams {
  const int32_t* query_lengths;  // [B], of queries that see anything, or null: all
  const int32_t* key_lengths;    // [B], of keys that are seen, or null: all
  // Query t sees the keys t + offset - left to t + offset + right; negative: no limit. The offset
  // is 0, or the number of keys less that of queries.
  int64_t left, right;
  bool bottom_right;
  int length_q;
  int length_kv;
  int padded_q;
  int64_t batch;      // whose intervals may differ: B or 1
  int64_t all_heads;  // B * K

  // As in MaskParams, and which keys any query sees.
  int2* rows;              // [B or 1, Tp]
  int4* groups;            // [B or 1, Tp / kMaskRows]
  uint8_t* seen;           // [B or 1, 1, S]
  float* per_counted_key;  // [B, K], 1 / how many these are, or 1
};

cudaError_t LaunchIntervals(const IntervalParams& params, cudaStream_t stream);

}  // namespace jax_sage
