// Codes of V and their sums, of streams that were started before the wait for the statistics.
#pragma once

#include <cuda_fp8.h>

#include "quantize/codes.cuh"
#include "quantize/quantize.h"
#include "quantize/statistics.cuh"
#include "quantize/tokens.cuh"

namespace jax_sage::quantize {

template <int kHeadDim>
struct SharedValue {
  static constexpr int kQuads = kThreads<kHeadDim> * kVector / kHeadDim;  // one a row of threads
  union {
    alignas(16) uint32_t transposed[(kHeadDim + 1) * kQuads];  // FP8
    int2 sums[kWarps<kHeadDim>][kHeadDim / 2];                 // FP16
  };
  float2 mean[kHeadDim / 2];
  float2 inverse[kHeadDim / 2];
  int next_slot;  // with segments
};

// Where a thread's four codes of one of its channels are in SharedValue::transposed. Words of a
// channel are exchanged by its group's number: a warp writes to, and reads from, all banks at once.
// Where a channel has 16 words, those of the upper half of the channels move by 16 more, into the
// next row: hence one row more.
template <class T>
constexpr int kExchange = 32 / T::kThreadsPerRow;
template <class T>
__device__ __forceinline__ int WordOf(int channel) {
  return channel * T::kRows + (T::Row() ^ T::Channel() / kVector * kExchange<T>);
}

// Where codes are stored a thread has two channels, and a group of threads the same.
constexpr int kChannelsOfStore = kVector / 4;
template <int kHeadDim>
constexpr int kThreadsOfChannel = SharedValue<kHeadDim>::kQuads / 4;
template <int kHeadDim>
__device__ __forceinline__ int ChannelOfStore(int i) {
  return (i * kThreads<kHeadDim> + threadIdx.x) / kThreadsOfChannel<kHeadDim>;
}

// 1 / kCodeUnit times the sum of sixteen E4M3 codes up to kVMax: multiples of 2^-9.
__device__ __forceinline__ int SumOfCodes(const uint4& words) {
  const auto sum = [](uint32_t word) {
    const auto halves = [](uint32_t pair) {
      return __half2(
          __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
    };
    // The sum of two is exact in FP16, of more in FP32.
    const float2 x = __half22float2(__hadd2(halves(word & 0xffff), halves(word >> 16)));
    return x.x + x.y;
  };
  const float sum_of_all = (sum(words.x) + sum(words.y)) + (sum(words.z) + sum(words.w));
  return __float2int_rn(sum_of_all * (1 / kCodeUnit));
}

// How the codes of a chunk are stored: as they are.
struct AllAtOnce {
  __device__ __forceinline__ uint4 Merge(int, const uint4& words) { return words; }
  __device__ __forceinline__ bool Stores(bool) const { return true; }
};

// The codes of a chunk of V in FP8. Calls add(i, sum) for a thread's sixteen codes of the channel
// ChannelOfStore(i).
template <class T, int kHeadDim, class Turns, class Add>
__device__ __forceinline__ void StoreTransposed(const QuantizeParams& params,
                                                const SharedValue<kHeadDim>& shared, int head,
                                                int first, Turns& turns, Add add) {
  constexpr int kQuads = SharedValue<kHeadDim>::kQuads;
  const int channels = CodeChannels<kHeadDim>(params);
  uint8_t* out = static_cast<uint8_t*>(params.v) +
                 head * static_cast<int64_t>(channels) * params.padded_kv + first;
  const int sixteen = threadIdx.x % kThreadsOfChannel<kHeadDim>;
#pragma unroll
  for (int i = 0; i < kChannelsOfStore; ++i) {
    const int row = ChannelOfStore<kHeadDim>(i);
    const int row_exchange = row / kVector * kExchange<T>;
    uint4 words = *reinterpret_cast<const uint4*>(
        &shared.transposed[row * kQuads + (4 * sixteen ^ (row_exchange & ~3))]);
    static_assert(kQuads >= 16);
    if (row_exchange & 2) words = make_uint4(words.z, words.w, words.x, words.y);
    if (kExchange<T> % 2 != 0 && row_exchange & 1) {
      words = make_uint4(words.y, words.x, words.w, words.z);
    }
    add(i, SumOfCodes(words));
    words = turns.Merge(i, words);
    if (HasCodes<kHeadDim>(params, row) && first + 16 * sixteen < params.padded_kv) {
      StoreCodes(out + row * static_cast<int64_t>(params.padded_kv) + 16 * sixteen, words);
    }
  }
}

// The sums of the codes that a thread has seen, of one of its channels each.
template <bool kFp8, int kHeadDim>
class CodeSums {
 public:
  __device__ __forceinline__ void Add(int i, int sum) { sums_[i] += sum; }
  // Calls add(channel, sum) for all of the CTA, and begins again.
  template <class AddTo>
  __device__ __forceinline__ void Flush(AddTo add) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      long long sum = sums_[i];
      sums_[i] = 0;
      if constexpr (kFp8) {
        constexpr int kGroup = kThreadsOfChannel<kHeadDim>;
#pragma unroll
        for (int offset = 1; offset < kGroup; offset *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, offset);
        }
        if (threadIdx.x % kGroup == 0) add(ChannelOfStore<kHeadDim>(i), sum);
      } else if (threadIdx.x < kHeadDim) {
        add(threadIdx.x, sum);
      }
    }
  }

 private:
  static constexpr int kCount = kFp8 ? kChannelsOfStore : 1;
  long long sums_[kCount] = {};
};

// A chunk of V: codes and their sums, of those that count. Synchronizes once.
template <bool kFp8, class T, class Turns, int kHeadDim>
__device__ __forceinline__ void ValueCodesOfChunk(const QuantizeParams& params, const T& tokens,
                                                  SharedValue<kHeadDim>& shared, int head,
                                                  int first,
                                                  const Vector<typename T::Element> (&x)[kPasses],
                                                  CodeSums<kFp8, kHeadDim>& sums, Turns& turns) {
  const int channel = T::Channel(), lane = threadIdx.x % 32;
  const int channels = CodeChannels<kHeadDim>(params);
  alignas(16) __half2 halves[kPasses][kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const int pair = channel / 2 + i;
    const float2 mean = shared.mean[pair], inverse = shared.inverse[pair];
    const auto scaled = [&](int pass) {
      const float2 value = ToFloats(x[pass].pairs[i]);
      return make_float2((value.x - mean.x) * inverse.x, (value.y - mean.y) * inverse.y);
    };
    if constexpr (kFp8) {
      uint32_t is_key = 0;  // bytes of keys that count
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        if (tokens.Counts(first + T::template RowOfPass<kValue>(pass))) is_key |= 0xffu << 8 * pass;
      }
      const float2 x0 = scaled(0), x1 = scaled(1), x2 = scaled(2), x3 = scaled(3);
      const auto put = [&](int c, float4 values) {
        __nv_fp8x4_e4m3 codes(values);
        codes.__x &= is_key;
        shared.transposed[WordOf<T>(c)] = codes.__x;
      };
      put(2 * pair, make_float4(x0.x, x1.x, x2.x, x3.x));
      put(2 * pair + 1, make_float4(x0.y, x1.y, x2.y, x3.y));
    } else {
      int2 sum = make_int2(0, 0);  // with other threads', of 16 codes up to 1.875 * 2^24: fits
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const bool is_key = tokens.Counts(first + T::template RowOfPass<kValue>(pass));
        const float2 value = scaled(pass);
        halves[pass][i] = __floats2half2_rn(is_key ? value.x : 0, is_key ? value.y : 0);
        const float2 rounded = __half22float2(halves[pass][i]);
        sum.x += __float2int_rn(rounded.x * (1 / kCodeUnit));
        sum.y += __float2int_rn(rounded.y * (1 / kCodeUnit));
      }
#pragma unroll
      for (int offset = T::kThreadsPerRow; offset < 32; offset *= 2) {
        sum.x += __shfl_xor_sync(kAllLanes, sum.x, offset);
        sum.y += __shfl_xor_sync(kAllLanes, sum.y, offset);
      }
      if (lane < T::kThreadsPerRow) shared.sums[threadIdx.x / 32][pair] = sum;
    }
  }
  if constexpr (!kFp8) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = first + T::template RowOfPass<kValue>(pass);
      const int64_t index = head * static_cast<int64_t>(params.padded_kv) + row;
      if (HasCodes<kHeadDim>(params, channel) && row < params.padded_kv &&
          turns.Stores(tokens.Counts(row))) {
        StoreCodes(static_cast<__half*>(params.v) + index * channels + channel,
                   *reinterpret_cast<const uint4*>(halves[pass]));
      }
    }
  }
  __syncthreads();
  if constexpr (kFp8) {
    StoreTransposed<T>(params, shared, head, first, turns,
                       [&](int i, int sum) { sums.Add(i, sum); });
  } else if (threadIdx.x < kHeadDim) {
#pragma unroll
    for (int warp = 0; warp < kWarps<kHeadDim>; ++warp) {
      sums.Add(0, (&shared.sums[warp][0].x)[threadIdx.x]);
    }
  }
}

// Whether V has something that is not finite in a channel.
template <int kHeadDim>
__device__ __forceinline__ bool IsBad(const QuantizeParams& params, int head, int channel) {
  return __ldcg(params.first_bad + head * static_cast<int64_t>(kBadRows * kHeadDim) +
                kBadValue * kHeadDim + channel) != kNever;
}

// The codes of V of `count` keys of which none counts, a multiple of kBlockKv.
template <int kHeadDim>
__device__ __forceinline__ void ZeroValueCodes(const QuantizeParams& params, int head, int first,
                                               int count) {
  const int64_t index = head * static_cast<int64_t>(params.padded_kv);
  const int channels = CodeChannels<kHeadDim>(params);
  if (!params.fp8_value) {
    StoreZeros<kHeadDim>(static_cast<__half*>(params.v) + (index + first) * channels,
                         int64_t{count} * channels * static_cast<int>(sizeof(__half)));
    return;
  }
  uint8_t* out = static_cast<uint8_t*>(params.v) + index * channels + first;
  constexpr int kThreadsOfChannel = 16;
#pragma unroll 1
  for (int channel = threadIdx.x / kThreadsOfChannel; channel < channels;
       channel += kThreads<kHeadDim> / kThreadsOfChannel) {
#pragma unroll 1
    for (int i = threadIdx.x % kThreadsOfChannel; i < count / 16; i += kThreadsOfChannel) {
      reinterpret_cast<uint4*>(out + channel * static_cast<int64_t>(params.padded_kv))[i] =
          make_uint4(0, 0, 0, 0);
    }
  }
}

// How two channels of V become codes.
struct ValuePair {
  float2 mean, inverse;
};

// That of all keys of a head.
template <int kHeadDim>
struct OneValue {
  const QuantizeParams& params;
  int head;
  __device__ __forceinline__ ValuePair Load(int pair) const {
    const float* channels = params.channels + head * static_cast<int64_t>(kChannelRows * kHeadDim);
    const auto load = [&](ChannelRow row) {
      return __ldcg(reinterpret_cast<const float2*>(channels + row * kHeadDim) + pair);
    };
    return {load(kValueMean), load(kValueInverse)};
  }
  // Integers: the order of the additions does not show.
  __device__ __forceinline__ void AddSum(int channel, long long sum) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.value_code_sum) +
                  head * static_cast<int64_t>(kHeadDim) + channel,
              static_cast<unsigned long long>(sum));
  }
};

// Of a stream of the tokens `begin` to `end` - 1, when the statistics are there.
template <bool kFp8, class T, class Value, int kHeadDim>
__device__ __forceinline__ void MakeValueCodesAs(const QuantizeParams& params,
                                                 SharedValue<kHeadDim>& shared, const T& tokens,
                                                 Stream<kValue, T>& stream, int head, int begin,
                                                 int end, const Value& value) {
  const int c = threadIdx.x;
  if (c < kHeadDim / 2) {
    const ValuePair pair = value.Load(c);
    shared.mean[c] = pair.mean;
    shared.inverse[c] = pair.inverse;
  }
  const bool is_bad = __syncthreads_or(c < kHeadDim && IsBad<kHeadDim>(params, head, c));
  CodeSums<kFp8, kHeadDim> sums;
#pragma unroll 1
  for (int first = begin; first < end; first += T::kTokens) {
    Vector<typename T::Element> x[kPasses];
    stream.Next(x);
    if (ChunkCounts<kValue>(tokens, first)) {  // and all have read `shared`
      if (is_bad) MakeFinite(x);
      AllAtOnce turns;
      ValueCodesOfChunk<kFp8>(params, tokens, shared, head, first, x, sums, turns);
    } else {
      ZeroValueCodes<kHeadDim>(params, head, first, min(end - first, T::kTokens));
    }
  }
  if (!params.smooth_v) return;
  sums.Flush([&](int channel, long long sum) { value.AddSum(channel, sum); });
}
template <class T, class Value, int kHeadDim>
__device__ __forceinline__ void MakeValueCodes(const QuantizeParams& params,
                                               SharedValue<kHeadDim>& shared, const T& tokens,
                                               Stream<kValue, T>& stream, int head, int begin,
                                               int end, const Value& value) {
  if (params.fp8_value) {
    MakeValueCodesAs<true>(params, shared, tokens, stream, head, begin, end, value);
  } else {
    MakeValueCodesAs<false>(params, shared, tokens, stream, head, begin, end, value);
  }
}

}  // namespace jax_sage::quantize
