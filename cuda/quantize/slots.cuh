// Codes where each segment has means and scales of its own: what belongs to a token's segment lies
// at its slot, see segments.cu.
#pragma once

#include "quantize/codes.cuh"
#include "quantize/quantize.h"
#include "quantize/statistics.cuh"
#include "quantize/tokens.cuh"
#include "quantize/value_codes.cuh"

namespace jax_sage::quantize {

// K's mean of a segment, whose size is taken off K and given to Q, as OneMean has that of all.
struct SlotMean {
  static constexpr bool kBySlot = true;
  float mean[kVector];
  float size, inverse_size;
  __device__ __forceinline__ void Next(int) {}
  __device__ __forceinline__ void Select(int) {}
  __device__ __forceinline__ float Mean(int i) const { return mean[i]; }
  __device__ __forceinline__ float Center(float x, int i) const {
    return (x - mean[i]) * inverse_size;
  }
  __device__ __forceinline__ float SizeOf(int) const { return size; }
};

// The slots of the tokens of K, V or Q of one batch entry, and what lies at those of a head.
template <Tensor kTensor, int kHeadDim>
class Slots {
 public:
  __device__ __forceinline__ Slots(const SegmentedParams& params, int kv_head)
      : params_(params),
        batch_(kv_head / params.kv_heads),
        first_slot_(kv_head * static_cast<int64_t>(params.length_kv)),
        query_slots_(params.query_slots + batch_ * static_cast<int64_t>(params.padded_q)),
        key_slots_(params.key_slots + batch_ * params.key_id_stride) {}

  // -1: no key has the query's id.
  __device__ __forceinline__ int Of(int token) const {
    if (kTensor == kQuery) return __ldg(query_slots_ + min(token, params_.padded_q - 1));
    return __ldg(&key_slots_[min(token, params_.length_kv - 1)].x);
  }
  // That of all queries `begin` to `end` - 1, or kMixedSlots. `begin`: a multiple of
  // kQueriesOfSlots.
  __device__ __forceinline__ int OfQueries(int begin, int end) const {
    const int blocks = (params_.padded_q + kQueriesOfSlots - 1) / kQueriesOfSlots;
    const int32_t* of_blocks = params_.block_slots + batch_ * static_cast<int64_t>(blocks);
    const int slot = __ldg(of_blocks + begin / kQueriesOfSlots);
    for (int next = begin + kQueriesOfSlots; next < end; next += kQueriesOfSlots) {
      if (__ldg(of_blocks + next / kQueriesOfSlots) != slot) return kMixedSlots;
    }
    return slot;
  }

  // The least slot of the tokens `begin` to `end` - 1, up to one a thread, that is greater than
  // `last`; kNever: there is none. Synchronizes, at the beginning too.
  __device__ __forceinline__ int NextInRange(int last, int begin, int end, int& shared) const {
    __syncthreads();
    if (threadIdx.x == 0) shared = kNever;
    __syncthreads();
    const int token = begin + threadIdx.x;
    if (token < end && Of(token) > last) atomicMin(&shared, Of(token));
    __syncthreads();
    return shared;
  }

  __device__ __forceinline__ SlotMean LoadMean(int slot, int channel) const {
    SlotMean result{{}, 1, 1};
    if (slot < 0) return result;
    const __nv_bfloat16* from = params_.slot_means + (first_slot_ + slot) * kHeadDim + channel;
    Vector<__nv_bfloat16> vector;
    *reinterpret_cast<uint4*>(vector.pairs) = __ldcg(reinterpret_cast<const uint4*>(from));
    ToFloats(result.mean, vector);
    result.size = LoadSize(slot);
    result.inverse_size = __frcp_rn(result.size);  // a power of two: exact
    return result;
  }
  __device__ __forceinline__ float LoadSize(int slot) const {
    return slot < 0 ? 1 : __ldcg(&params_.slot_factors[first_slot_ + slot].x);
  }

  __device__ __forceinline__ ValuePair LoadValue(int slot, int pair) const {
    const float* channels = params_.slot_channels + (first_slot_ + slot) * (kSlotRows * kHeadDim);
    const auto load = [&](SlotRow row) {
      return __ldcg(reinterpret_cast<const float2*>(channels + row * kHeadDim) + pair);
    };
    const float2 average = load(kSlotOffset), absmax = load(kSlotScale);
    const ValueChannel x(average.x, absmax.x), y(average.y, absmax.y);
    return {make_float2(x.mean, y.mean), make_float2(x.inverse, y.inverse)};
  }
  // Of codes of V. Integers: the order of the additions does not show.
  __device__ __forceinline__ void AddSum(int slot, int channel, long long sum) const {
    if (params_.smooth_v && sum != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(params_.value_code_sum) +
                    (first_slot_ + slot) * kHeadDim + channel,
                static_cast<unsigned long long>(sum));
    }
  }

 private:
  const SegmentedParams& params_;
  int batch_;
  int64_t first_slot_;
  const int32_t* query_slots_;
  const int2* key_slots_;
};

// The means of tokens that may be of several segments.
template <class T, Tensor kTensor>
class SlotMeans {
  static constexpr int kHeadDim = T::kThreadsPerRow * kVector;

 public:
  static constexpr bool kBySlot = true;

  __device__ __forceinline__ explicit SlotMeans(const Slots<kTensor, kHeadDim>& slots)
      : slots_(slots) {}
  // The chunk that begins with a token.
  __device__ __forceinline__ void Next(int first) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      slot_[pass] = slots_.Of(first + T::template RowOfPass<kTensor>(pass));
    }
    const int of_warp = __shfl_sync(kAllLanes, slot_[0], 0);
    bool alike = true;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) alike = alike && slot_[pass] == of_warp;
    is_alike_ = __all_sync(kAllLanes, alike);
    if (is_alike_) mean_ = slots_.LoadMean(of_warp, T::Channel());
  }
  // The token of a pass.
  __device__ __forceinline__ void Select(int pass) {
    if (!is_alike_) mean_ = slots_.LoadMean(slot_[pass], T::Channel());
  }
  __device__ __forceinline__ float Mean(int i) const { return mean_.Mean(i); }
  __device__ __forceinline__ float Center(float x, int i) const { return mean_.Center(x, i); }
  __device__ __forceinline__ float SizeOf(int token) const {
    return slots_.LoadSize(slots_.Of(token));
  }

 private:
  const Slots<kTensor, kHeadDim>& slots_;
  int slot_[kPasses];
  bool is_alike_;
  SlotMean mean_;
};

// How V of a segment becomes codes, as OneValue has that of all.
template <int kHeadDim>
struct SlotValue {
  const Slots<kValue, kHeadDim>& slots;
  int slot;
  __device__ __forceinline__ ValuePair Load(int pair) const { return slots.LoadValue(slot, pair); }
  __device__ __forceinline__ void AddSum(int channel, long long sum) const {
    slots.AddSum(slot, channel, sum);
  }
};

// The tokens of one of the segments: others do not count.
template <class T>
struct TokensOfSlot : T {
  using OfV = Slots<kValue, T::kThreadsPerRow * kVector>;
  const OfV& slots;
  int slot;
  __device__ __forceinline__ TokensOfSlot(const T& tokens, const OfV& slots, int slot)
      : T(tokens), slots(slots), slot(slot) {}
  __device__ __forceinline__ bool Counts(int token) const {
    return T::Counts(token) && slots.Of(token) == slot;
  }
};

// The codes of a chunk are made by turns, of a segment each: others have zeros then.
struct ByTurns {
  uint4 words[kChannelsOfStore] = {};
  bool is_first = true;
  __device__ __forceinline__ uint4 Merge(int i, const uint4& of_turn) {
    words[i].x |= of_turn.x;
    words[i].y |= of_turn.y;
    words[i].z |= of_turn.z;
    words[i].w |= of_turn.w;
    return words[i];
  }
  __device__ __forceinline__ bool Stores(bool counts) const { return is_first || counts; }
};

// Of a stream of the tokens `begin` to `end` - 1, which may be of several segments.
template <bool kFp8, class T, int kHeadDim>
__device__ __forceinline__ void MakeMixedValueCodes(const QuantizeParams& params,
                                                    SharedValue<kHeadDim>& shared, const T& tokens,
                                                    Stream<kValue, T>& stream, int head, int begin,
                                                    int end, const Slots<kValue, kHeadDim>& slots) {
  const int c = threadIdx.x;
  const bool is_bad = __syncthreads_or(c < kHeadDim && IsBad<kHeadDim>(params, head, c));
  CodeSums<kFp8, kHeadDim> sums;
  int shared_slot = -1;  // of what is in `shared`, and of the sums
  const auto flush = [&] {
    if (shared_slot < 0) return;
    sums.Flush([&](int channel, long long sum) { slots.AddSum(shared_slot, channel, sum); });
  };
#pragma unroll 1
  for (int first = begin; first < end; first += T::kTokens) {
    Vector<typename T::Element> x[kPasses];
    stream.Next(x);
    if (is_bad) MakeFinite(x);
    ByTurns turns;
    // Slot after slot, as there are tokens of them.
    int slot = slots.NextInRange(-1, first, first + T::kTokens, shared.next_slot);
#pragma unroll 1
    while (slot != kNever) {
      if (slot != shared_slot) {
        flush();
        shared_slot = slot;
        if (c < kHeadDim / 2) {
          const ValuePair pair = slots.LoadValue(slot, c);
          shared.mean[c] = pair.mean;
          shared.inverse[c] = pair.inverse;
        }
        __syncthreads();
      }
      ValueCodesOfChunk<kFp8>(params, TokensOfSlot<T>(tokens, slots, slot), shared, head, first, x,
                              sums, turns);
      turns.is_first = false;
      slot = slots.NextInRange(slot, first, first + T::kTokens, shared.next_slot);
    }
  }
  flush();
}

}  // namespace jax_sage::quantize
