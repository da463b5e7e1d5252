// What every attention kernel is given.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace jax_sage {

// Tp and Sp are the padded lengths, Hp the padded head dimension (64 or 128).
struct AttentionParams {
  const int8_t* q;                  // [B, N, Tp, Hp]
  const float* q_scale;             // [B, N, Tp]
  const float* q_dot_mean;          // [B, N, Tp]
  const int8_t* k;                  // [B, K, Sp, Hp]
  const float* k_scale;             // [B, K, Sp/64, 4]
  const void* v;                    // E4M3 [B, K, Hp, Sp], permuted; or FP16 [B, K, Sp, Hp]
  const float* channels;            // [B, K, kChannelRows, Hp]
  const int32_t* first_bad;         // [B, K, 2, Hp]
  const long long* value_code_sum;  // [B, K, Hp], in units of kCodeUnit
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
  bool exact_lse;  // if not, lse may come from the sum of the rounded P
  DType out_type;
};

}  // namespace jax_sage
