// What queries see of a tile of keys: in whole, for the plan of a query tile, and key by key.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/attention.h"
#include "common/layout.h"

namespace jax_sage {

enum class Masking { kPlain, kMasked, kBiased };  // kPlain may be causal, kBiased is masked too

enum TileView : unsigned { kNone = 0, kSome = 1, kAll = 2 };

// What the kMaskRows queries of `group` see of the keys [first, end), which lie in one tile of
// kMaskKeys and may be more than there are. kSome may be all, or none.
__device__ __forceinline__ TileView ViewOfTile(const MaskParams& masks, int batch, int head,
                                               int group, int first, int end) {
  const int4 bounds = __ldg(masks.groups + batch * masks.group_stride + group);
  if (end <= bounds.x || first >= bounds.y) return kNone;
  bool all = first >= bounds.z && end <= bounds.w;
  const int tile = first / kMaskKeys;
  if (masks.words != nullptr) {
    const unsigned view =
        __ldg(masks.views + batch * masks.view_batch_stride + head * masks.view_head_stride +
              static_cast<int64_t>(group) * masks.view_group_stride +
              tile * masks.view_tile_stride);
    if (view == kNone) return kNone;
    all = all && view == kAll;
  }
  if (masks.query_ids != nullptr) {
    const int2 query = __ldg(masks.query_ranges + batch * masks.query_range_stride + group);
    const int2 key = __ldg(masks.key_ranges + batch * masks.key_range_stride + tile);
    if (query.y < key.x || key.y < query.x) return kNone;
    all = all && query.x == query.y && key.x == key.y;
  }
  return all ? kAll : kSome;
}

// Bits 2n + e, n < 8, of those of a thread's columns 8n + e that are less than `end`.
__device__ __forceinline__ uint32_t ColumnsBelow(int end) {
  const int columns = min(max(end, 0), kBlockKv);
  return (1u << (columns / 8 * 2 + min(columns % 8, 2))) - 1;
}

// Bit 2n + e: whether a query sees key 8n + 2(lane % 4) + e of the kBlockKv keys from `first` on.
// `interval`: its element of rows.
__device__ __forceinline__ uint32_t SeenOfBlock(const MaskParams& masks, int batch, int head,
                                                int row, int2 interval, int first, int lane) {
  const int column = first + 2 * (lane & 3);
  uint32_t seen = ColumnsBelow(interval.y - column) & ~ColumnsBelow(interval.x - column);
  if (masks.words != nullptr) {
    const uint32_t word =
        __ldg(masks.words + batch * masks.word_batch_stride + head * masks.word_head_stride +
              first / kMaskKeys * masks.word_tile_stride + static_cast<int64_t>(row) * masks.word_row_stride +
              (lane & 3));
    seen &= word >> (first % kMaskKeys / kBlockKv * 16);
  }
  if (masks.query_ids != nullptr) {
    const int id = __ldg(masks.query_ids + batch * masks.query_id_stride + row);
    const int* ids = masks.key_ids + batch * masks.key_id_stride + column;
#pragma unroll
    for (int n = 0; n < kBlockKv / 8; ++n) {
      const int2 pair = __ldg(reinterpret_cast<const int2*>(ids + 8 * n));
      if (pair.x != id) seen &= ~(1u << (2 * n));
      if (pair.y != id) seen &= ~(2u << (2 * n));
    }
  }
  return seen;
}

// What a thread's two rows see of its columns 8n + e, e < 2, of a tile.
struct Everything {
  static constexpr bool kMasked = false, kBits = false;
  __device__ __forceinline__ bool operator()(int, int) const { return true; }
  __device__ __forceinline__ Everything Opaque(int) const { return {}; }
  template <int kTile>
  __device__ __forceinline__ int Count(int) const {  // keys of the row
    return kTile;
  }
};
struct KeysBelow {
  static constexpr bool kMasked = true, kBits = false;
  int end[2];
  __device__ __forceinline__ bool operator()(int half, int column) const {
    return column < end[half];
  }
  __device__ __forceinline__ KeysBelow Opaque(int zero) const {
    return {{end[0] + zero, end[1] + zero}};
  }
  template <int kTile>
  __device__ __forceinline__ int Count(int half) const {
    return ::min(end[half] + 2 * static_cast<int>(threadIdx.x & 3), kTile);
  }
};
struct SeenKeys {
  static constexpr bool kMasked = true, kBits = true;
  uint32_t bits[2];  // 2n + e
  __device__ __forceinline__ bool operator()(int half, int column) const {
    return (bits[half] >> (column / 8 * 2 + column % 2) & 1) != 0;
  }
  __device__ __forceinline__ SeenKeys Opaque(int zero) const {
    return {{bits[0] + zero, bits[1] + zero}};
  }
  template <int kTile>
  __device__ __forceinline__ int Count(int half) const {
    int count = __popc(bits[half]);
    count += __shfl_xor_sync(0xffffffffu, count, 1);
    return count + __shfl_xor_sync(0xffffffffu, count, 2);
  }
};

// Rows of the bias that a thread adds to the scores of its rows, and how it loads from them.
class BiasRows {
 public:
  __device__ __forceinline__ BiasRows(const AttentionParams& params, int batch, int head, int row)
      : type_(params.masks.bias_type), shared_by_keys_(params.masks.bias_column_stride == 0) {
    const MaskParams& masks = params.masks;
    const int64_t first = batch * masks.bias_batch_stride + head * masks.bias_head_stride;
    const int bytes = type_ == DType::kF32 ? 4 : 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Queries beyond the last have no bias, and no outputs.
      const int64_t this_row = min(row + 8 * half, params.length_q - 1);
      rows_[half] = static_cast<const uint8_t*>(masks.bias) +
                    (first + this_row * masks.bias_row_stride) * bytes;
    }
  }

  // Of both rows: element 4n + 2 * half + e of a block is that of key 8n + 2(lane % 4) + e, the
  // first block of which begins with key `first`.
  template <int kBlocks>
  __device__ __forceinline__ void Load(float (&bias)[kBlocks][kBlockKv / 2], int first,
                                       int lane) const {
    // One branch around all loads: they are in flight together.
    const int column = first + 2 * (lane & 3);
    if (shared_by_keys_) {
      Spread(bias);
    } else if (type_ == DType::kF32) {
      LoadAs<float2>(bias, column);
    } else if (type_ == DType::kBf16) {
      LoadAs<__nv_bfloat162>(bias, column);
    } else {
      LoadAs<__half2>(bias, column);
    }
  }

 private:
  __device__ static float2 ToFloats(float2 x) { return x; }
  __device__ static float2 ToFloats(__half2 x) { return __half22float2(x); }
  __device__ static float2 ToFloats(__nv_bfloat162 x) { return __bfloat1622float2(x); }

  template <class P, int kBlocks>
  __device__ __forceinline__ void LoadAs(float (&bias)[kBlocks][kBlockKv / 2], int column) const {
    constexpr int kPairs = kBlocks * kBlockKv / 8;
    P loaded[2][kPairs];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const P* pairs = reinterpret_cast<const P*>(rows_[half]) + column / 2;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) loaded[half][n] = __ldg(pairs + 4 * n);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        const float2 x = ToFloats(loaded[half][n]);
        float* to = &bias[n / (kBlockKv / 8)][n % (kBlockKv / 8) * 4 + 2 * half];
        to[0] = x.x;
        to[1] = x.y;
      }
    }
  }
  template <int kBlocks>
  __device__ __forceinline__ void Spread(float (&bias)[kBlocks][kBlockKv / 2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x;
      if (type_ == DType::kF32) {
        x = __ldg(reinterpret_cast<const float*>(rows_[half]));
      } else if (type_ == DType::kBf16) {
        x = __bfloat162float(__ldg(reinterpret_cast<const __nv_bfloat16*>(rows_[half])));
      } else {
        x = __half2float(__ldg(reinterpret_cast<const __half*>(rows_[half])));
      }
#pragma unroll
      for (int i = 0; i < kBlocks * kBlockKv / 4; ++i) {
        bias[i / (kBlockKv / 4)][i % (kBlockKv / 4) / 2 * 4 + 2 * half + i % 2] = x;
      }
    }
  }

  DType type_;
  bool shared_by_keys_;
  const uint8_t* rows_[2];
};

// Whether a query sees a key: the same, one at a time.
__device__ __forceinline__ bool Sees(const MaskParams& masks, int batch, int head, int row,
                                     int key) {
  const int2 interval = __ldg(masks.rows + batch * masks.row_stride + row);
  const int first = key / kBlockKv * kBlockKv, column = key % kBlockKv;
  const uint32_t seen =
      SeenOfBlock(masks, batch, head, row, interval, first, column % 8 / 2);
  if (!(seen >> (column / 8 * 2 + column % 2) & 1)) return false;
  if (masks.bias == nullptr) return true;
  const int64_t index = batch * masks.bias_batch_stride + head * masks.bias_head_stride +
                        row * masks.bias_row_stride + key * masks.bias_column_stride;
  float bias;
  if (masks.bias_type == DType::kF32) {
    bias = static_cast<const float*>(masks.bias)[index];
  } else if (masks.bias_type == DType::kBf16) {
    bias = __bfloat162float(static_cast<const __nv_bfloat16*>(masks.bias)[index]);
  } else {
    bias = __half2float(static_cast<const __half*>(masks.bias)[index]);
  }
  return !(bias * kLog2E <= kHidingBias);  // NaN is seen
}

}  // namespace jax_sage
