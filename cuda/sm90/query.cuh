// Q of a warpgroup, which quantizes it for itself: scales, and codes of rows that are finite, are
// those of quantize/codes.cuh, to the bit. That would read Q once more, and write its codes.
#pragma once

#include "common/attention.h"
#include "common/epilogue.cuh"
#include "common/inputs.cuh"
#include "common/layout.h"
#include "common/ptx.cuh"
#include "sm90/barrier.cuh"

namespace jax_sage::sm90 {

// Q and K of more than 128 channels are boxes of as many, one behind the other.
constexpr int kBoxChannels = 128;

// Bytes of a number of Q, and of a query of all heads.
__device__ __forceinline__ int QuerySize(const AttentionParams& params) {
  return params.out_type == DType::kF32 ? 4 : 2;
}
__device__ __forceinline__ int64_t QueryStride(const AttentionParams& params) {
  return static_cast<int64_t>(params.heads) * (QuerySize(params) * params.head_dim);
}
// Where a query lies. all_heads: batch * N + head.
__device__ __forceinline__ const uint8_t* FindQuery(const AttentionParams& params, int all_heads,
                                                    int row) {
  const int batch = all_heads / params.heads, head = all_heads - batch * params.heads;
  return static_cast<const uint8_t*>(params.query) +
         (static_cast<int64_t>(batch) * params.length_q + row) * QueryStride(params) +
         head * static_cast<int64_t>(QuerySize(params) * params.head_dim);
}

// Four channels.
template <class In>
struct alignas(4 * sizeof(In)) Four {
  typename PairOf<In>::Type pairs[2];
};

// The queries of a warpgroup as they are given: `rows` of them, the others are zeros. Four channels
// are aligned to their size.
template <class In>
struct Queries {
  const In* first;
  int64_t stride;  // from one to the next
  int rows, head_dim;

  __device__ __forceinline__ Four<In> Load(int row, int channel) const {
    Four<In> x{};
    if (row < rows && channel < head_dim) {
      using Word = std::conditional_t<sizeof(In) == 4, uint4, uint2>;
      // Not __ldg, which the compiler would move up to those of another row; so with `mean`.
      *reinterpret_cast<Word*>(&x) = *reinterpret_cast<const Word*>(first + row * stride + channel);
    }
    return x;
  }
};

// The first of the four channels of this thread that are the i-th in all of Q's rows, as A
// fragments have them.
__device__ __forceinline__ int ChannelOfFour(int i, int lane) { return 16 * i + 4 * (lane & 3); }

// A fragments of INT8 Q: of this thread's rows `row`, from the warpgroup's first, and `row` + 8.
template <int kHeadDim>
struct QueryFragments {
  uint32_t steps[kHeadDim / 32][4];

  // From codes in global memory.
  __device__ __forceinline__ void Load(const int8_t* first_row, int row, int lane) {
    const auto* from = first_row + row * kHeadDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        Put(half, i,
            __ldg(reinterpret_cast<const uint32_t*>(from + half * (8 * kHeadDim) +
                                                    ChannelOfFour(i, lane))));
      }
    }
  }
  // `half` of the rows, four channels.
  __device__ __forceinline__ void Put(int half, int i, uint32_t codes) {
    steps[i / 2][i % 2 * 2 + half] = codes;
  }
};

// The same in shared memory, a tile as TMA would write it: rows of kRowBytes, swizzled.
template <int kRowBytes>
class QueryTile {
 public:
  __device__ __forceinline__ QueryTile(uint32_t tile, int row, int lane)
      : row_(tile + row * kRowBytes),
        // Units of 16 bytes are exchanged by the number of the 128 bytes that they are in.
        swizzle_(row * kRowBytes / 128 % (kRowBytes / 16) * 16),
        lane_(lane) {}
  __device__ __forceinline__ void Put(int half, int i, uint32_t codes) const {
    const int channel = ChannelOfFour(i, lane_);
    const uint32_t box = channel / kBoxChannels * (kBlockKv * kBoxChannels);
    ptx::StoreSharedAs(row_ + half * (8 * kRowBytes) + box + (channel % kBoxChannels ^ swizzle_),
                       codes);
  }

 private:
  uint32_t row_, swizzle_;
  int lane_;
};

// Bits of the largest magnitude of a row, of which the threads of a quad have a part each; at least
// those of infinity where there is something not finite.
template <class In, int kFours>
__device__ __forceinline__ int LargestBitsOfRow(const Four<In> (&x)[kFours]) {
  int largest = 0;
  if constexpr (sizeof(In) == 4) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      largest = max(largest, max(LargestBits(x[i].pairs[0]), LargestBits(x[i].pairs[1])));
    }
  } else {
    // Without their signs, numbers of 16 bits are in the order of their bits.
    uint32_t words = 0;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const uint2 both = *reinterpret_cast<const uint2*>(&x[i]);
      words = __vimax3_u16x2(words, both.x & 0x7fff7fffu, both.y & 0x7fff7fffu);
    }
    largest = LargestBits(ToFloats(*reinterpret_cast<const typename PairOf<In>::Type*>(&words)));
  }
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  return largest;
}

// Quantizes this thread's two rows; all lanes of a warp. mean: of K, by channel. `codes` gets the
// codes, `scale` the rows' scales, and put_dot(half, x) their q·k̄ to base 2.
template <int kHeadDim, bool kInRegisters, class In, class Codes, class PutDot>
__device__ __forceinline__ void QuantizeQueries(const AttentionParams& params,
                                                const Queries<In>& queries, const float* mean,
                                                int row, int lane, Codes& codes, float (&scale)[2],
                                                PutDot put_dot) {
  constexpr int kFours = kHeadDim / 16, kInfBits = 0x7f800000;
  // In FP32 both rows at once would be too many registers.
  constexpr int kAtOnce = sizeof(In) == 4 && !kInRegisters ? 1 : 2;
#pragma unroll
  for (int first = 0; first < 2; first += kAtOnce) {
    Four<In> x[kAtOnce][kFours];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        x[j][i] = queries.Load(row + 8 * (first + j), ChannelOfFour(i, lane));
      }
    }
    float dot[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const auto m = *reinterpret_cast<const float4*>(mean + ChannelOfFour(i, lane));
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float2 low = ToFloats(x[j][i].pairs[0]), high = ToFloats(x[j][i].pairs[1]);
        dot[j] = fmaf(low.x, m.x, fmaf(low.y, m.y, dot[j]));
        dot[j] = fmaf(high.x, m.z, fmaf(high.y, m.w, dot[j]));
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      // Other values to the compiler: it would keep the converted ones until the codes are made.
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        ptx::Pin(reinterpret_cast<uint32_t (&)[sizeof(Four<In>) / 4]>(x[j][i]));
      }
      // Of a row that is not finite the scale is NaN, and its codes may be anything.
      const int largest = LargestBitsOfRow(x[j]);
      const float absmax = fmaxf(__int_as_float(largest), kAbsmaxFloor);
      const float inverse = __fdiv_rn(copysignf(kInt8Max, params.scale_log2), absmax);
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const float2 low = ToFloats(x[j][i].pairs[0]), high = ToFloats(x[j][i].pairs[1]);
        codes.Put(first + j, i, PackInt8(low.x, low.y, high.x, high.y, inverse));
      }
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        dot[j] += __shfl_xor_sync(0xffffffffu, dot[j], lanes);
      }
      scale[first + j] = largest >= kInfBits ? kNan : absmax * params.q_scale_factor;
      put_dot(first + j, dot[j] * params.scale_log2);
    }
  }
}

}  // namespace jax_sage::sm90
