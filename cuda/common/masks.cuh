// What queries see of a tile of keys: in whole, for the plan of a query tile, and key by key.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/attention.h"
#include "common/layout.h"
#include "common/ptx.cuh"

namespace jax_sage {

// What a query sees by plans, or as an interval of keys: on Hopper any, elsewhere that of a causal
// mask, and there is kPlain alone. kPlainSegments: the keys of segments lie one behind the other.
enum class Masking { kPlain, kPlainBiased, kMasked, kMaskedBiased, kPlainSegments };

// What queries see of a tile: nothing, or what these bits leave to be looked at key by key.
enum TileView : unsigned {
  kNone = 0,
  kAll = 1,  // set whenever anything may be seen
  kByInterval = 2,
  kByMask = 4,
  kBySegment = 8,
};
constexpr int kViewBits = 4;

// What the kMaskRows queries of `group` see of the keys [first, end), which lie in one tile of
// kMaskKeys and may be more than there are.
__device__ __forceinline__ unsigned ViewOfTile(const MaskParams& masks, int batch, int head,
                                               int group, int first, int end) {
  const int4 bounds = __ldg(masks.groups + batch * masks.group_stride + group);
  if (end <= bounds.x || first >= bounds.y) return kNone;
  unsigned view = first >= bounds.z && end <= bounds.w ? kAll : kAll | kByInterval;
  const int tile = first / kMaskKeys;
  if (masks.words != nullptr) {
    const unsigned of_mask = __ldg(
        masks.views + batch * masks.view_batch_stride + head * masks.view_head_stride +
        static_cast<int64_t>(group) * masks.view_group_stride + tile * masks.view_tile_stride);
    if (of_mask == kNone) return kNone;
    view |= of_mask;
  }
  if (masks.query_ids != nullptr) {
    const int2 query = __ldg(masks.query_ranges + batch * masks.query_range_stride + group);
    const int2 key = __ldg(masks.key_ranges + batch * masks.key_range_stride + tile);
    if (query.y < key.x || key.y < query.x) return kNone;
    if (query.x != query.y || key.x != key.y) view |= kBySegment;
  }
  return view;
}

// Of a thread's 32 keys of a tile, 16i + 8h + 2(lane % 4) + e, bit 8(2h + e) + 7 - i. After a shift
// by i the signs of the four bytes are the four keys of an A fragment's register, in order.
__device__ __forceinline__ constexpr int BitOfColumn(int column) {  // less 2(lane % 4)
  return 8 * (column / 8 % 2 * 2 + column % 2) + 7 - column / 16;
}

// Those of the columns, of kKeys, that are less than `end`.
template <int kKeys>
__device__ __forceinline__ uint32_t ColumnsBelow(int end) {
  const int columns = min(max(end, 0), kKeys);
  const int i = columns / 16, rest = columns % 16;
  // Whole sixteens, and in the next those bytes whose key is less than the rest: 0, 1, 8 and 9.
  const int bytes = min(rest, 2) + min(max(rest - 8, 0), 2);
  const uint32_t first_bytes = bytes == 4 ? ~0u : (1u << (8 * bytes)) - 1;
  return (0xff00u >> i & 0xff) * 0x01010101u | ((0x80u >> i) * 0x01010101u & first_bytes);
}
template <int kKeys>
__device__ __forceinline__ uint32_t ColumnsOf(int2 interval, int column) {
  return ColumnsBelow<kKeys>(interval.y - column) & ~ColumnsBelow<kKeys>(interval.x - column);
}

// Words of the boolean mask: of all tiles from `row` on.
__device__ __forceinline__ const uint32_t* MaskRow(const MaskParams& masks, int batch, int head,
                                                   int row) {
  return masks.words + batch * masks.word_batch_stride + head * masks.word_head_stride +
         static_cast<int64_t>(row) * masks.word_row_stride;
}
// The `further`-th row after it: a thread's keys of the tile that has the key `first`, from there.
__device__ __forceinline__ uint32_t MaskWord(const MaskParams& masks, const uint32_t* mask_row,
                                             int further, int first, int lane) {
  const uint32_t word = __ldg(mask_row + first / kMaskKeys * masks.word_tile_stride +
                              further * masks.word_row_stride + (lane & 3));
  return word << (first % kMaskKeys / 16);
}

// Those of the columns of the kKeys keys from `first` on that are of the segment `id`.
template <int kKeys>
__device__ __forceinline__ uint32_t ColumnsOfSegment(const MaskParams& masks, int batch, int id,
                                                     int first, int lane) {
  const int* ids = masks.key_ids + batch * masks.key_id_stride + first + 2 * (lane & 3);
  uint32_t seen = 0;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const int2 pair = __ldg(reinterpret_cast<const int2*>(ids + 8 * n));
    if (pair.x == id) seen |= 1u << BitOfColumn(8 * n);
    if (pair.y == id) seen |= 1u << BitOfColumn(8 * n + 1);
  }
  return seen;
}
__device__ __forceinline__ int SegmentOf(const MaskParams& masks, int batch, int row) {
  return __ldg(masks.query_ids + batch * masks.query_id_stride + row);
}

// What a thread's two rows see of its columns 8n + e, e < 2, of a tile.
struct Everything {
  static constexpr bool kMasked = false;
  __device__ __forceinline__ bool operator()(int, int) const { return true; }
  __device__ __forceinline__ Everything Opaque(int) const { return {}; }
  // Keys of the row, in the first kColumns.
  template <int kColumns>
  __device__ __forceinline__ int Count(int) const {
    return kColumns;
  }
};
template <int kKeys>
struct SeenKeys {
  static constexpr bool kMasked = true;
  uint32_t bits[2];  // BitOfColumn, and anything for columns past the last
  __device__ __forceinline__ bool operator()(int half, int column) const {
    return (bits[half] >> BitOfColumn(column) & 1) != 0;
  }
  // The same as a word of ones or zeros, an instruction for each column.
  __device__ __forceinline__ int32_t Spread(int half, int column) const {
    const int byte = column / 8 % 2 * 2 + column % 2;
    return ptx::SpreadSign(bits[half] << (column / 16), byte);
  }
  __device__ __forceinline__ SeenKeys Opaque(int zero) const {
    return {{bits[0] + zero, bits[1] + zero}};
  }
  template <int kColumns>
  __device__ __forceinline__ int Count(int half) const {
    static_assert(kColumns % 16 == 0);
    const uint32_t columns = (0xff00u >> (kColumns / 16) & 0xffu) * 0x01010101u;
    int count = __popc(bits[half] & columns);
    count += __shfl_xor_sync(0xffffffffu, count, 1);
    return count + __shfl_xor_sync(0xffffffffu, count, 2);
  }
};

// The bias of two neighbouring keys.
__device__ __forceinline__ float2 BiasPair(float2 x) { return x; }
__device__ __forceinline__ float2 BiasPair(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 BiasPair(__nv_bfloat162 x) {  // an instruction less than its own
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(&x);
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}

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

  // Of both rows: element 4n + 2 * half + e is that of key 8n + 2(lane % 4) + e from `first` on.
  __device__ __forceinline__ void Load(float (&bias)[kBlockKv / 2], int first, int lane) const {
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

  // The same where all keys have one bias.
  __device__ __forceinline__ void Spread(float (&bias)[kBlockKv / 2]) const {
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
      for (int i = 0; i < kBlockKv / 4; ++i) bias[i / 2 * 4 + 2 * half + i % 2] = x;
    }
  }

 private:
  template <class P>
  __device__ __forceinline__ void LoadAs(float (&bias)[kBlockKv / 2], int column) const {
    P loaded[2][kBlockKv / 8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const P* pairs = reinterpret_cast<const P*>(rows_[half]) + column / 2;
#pragma unroll
      for (int n = 0; n < kBlockKv / 8; ++n) loaded[half][n] = __ldg(pairs + 4 * n);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kBlockKv / 8; ++n) {
        const float2 x = BiasPair(loaded[half][n]);
        bias[4 * n + 2 * half] = x.x;
        bias[4 * n + 2 * half + 1] = x.y;
      }
    }
  }

  DType type_;
  bool shared_by_keys_;
  const uint8_t* rows_[2];
};

// Whether an element of a bias hides its key.
__device__ __forceinline__ bool Hides(const void* bias, DType type, int64_t index) {
  float x;
  if (type == DType::kF32) {
    x = __ldg(static_cast<const float*>(bias) + index);
  } else if (type == DType::kBf16) {
    x = __bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(bias) + index));
  } else {
    x = __half2float(__ldg(static_cast<const __half*>(bias) + index));
  }
  return x * kLog2E <= kHidingBias;  // NaN does not
}

// Whether a query sees a key.
__device__ __forceinline__ bool Sees(const MaskParams& masks, int batch, int head, int row,
                                     int key) {
  const int2 interval = __ldg(masks.rows + batch * masks.row_stride + row);
  if (key < interval.x || key >= interval.y) return false;
  if (masks.words != nullptr) {
    const int column = key % kMaskKeys, lane = column % 8 / 2;
    const uint32_t word = MaskWord(masks, MaskRow(masks, batch, head, row), 0, key - column, lane);
    if (!(word >> BitOfColumn(column - 2 * lane) & 1)) return false;
  }
  if (masks.query_ids != nullptr &&
      SegmentOf(masks, batch, row) != __ldg(masks.key_ids + batch * masks.key_id_stride + key)) {
    return false;
  }
  if (masks.bias == nullptr) return true;
  return !Hides(masks.bias, masks.bias_type,
                batch * masks.bias_batch_stride + head * masks.bias_head_stride +
                    row * masks.bias_row_stride + key * masks.bias_column_stride);
}

}  // namespace jax_sage
