// What the codes of a chunk need where each segment has means and scales of its own: that of each
// token lies at its slot, see segments.cu.
#pragma once

#include "quantize/quantize.h"
#include "quantize/statistics.cuh"
#include "quantize/tokens.cuh"

namespace jax_sage::quantize {

// K's mean of each token's segment, whose size is taken off K and given to Q, as OneMean has that
// of all. kTensor: whose tokens.
template <class T, Tensor kTensor>
class SlotMeans {
 public:
  static constexpr bool kBySlot = true;
  static constexpr int kHeadDim = T::kThreadsPerRow * kVector;
  float mean[kVector];

  __device__ __forceinline__ SlotMeans(const SegmentedParams& params, int kv_head)
      : params_(params),
        first_slot_(kv_head * static_cast<int64_t>(params.length_kv)),
        first_token_(kv_head / params.kv_heads * static_cast<int64_t>(Length())) {
    WaitForStatistics(params, kv_head, kKey);
  }

  // The chunk that begins with a token.
  __device__ __forceinline__ void Next(int first) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      slot_[pass] = SlotOf(first + T::template RowOfPass<kTensor>(pass));
    }
    const int of_warp = __shfl_sync(kAllLanes, slot_[0], 0);
    bool alike = true;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) alike = alike && slot_[pass] == of_warp;
    is_alike_ = __all_sync(kAllLanes, alike);
    if (is_alike_) Load(of_warp);
  }
  // The token of a pass.
  __device__ __forceinline__ void Select(int pass) {
    if (!is_alike_) Load(slot_[pass]);
  }
  __device__ __forceinline__ float Center(float x, int i) const {
    return (x - mean[i]) * inverse_size_;
  }
  __device__ __forceinline__ float SizeOf(int token) const {
    const int slot = SlotOf(token);
    return slot < 0 ? 1 : LoadSize(slot);
  }

 private:
  __device__ __forceinline__ int Length() const {
    return kTensor == kKey ? params_.length_kv : params_.padded_q;
  }
  __device__ __forceinline__ int SlotOf(int token) const {
    const int32_t* slots = kTensor == kKey ? params_.key_slots : params_.query_slots;
    return __ldg(slots + first_token_ + min(token, Length() - 1));
  }
  __device__ __forceinline__ float LoadSize(int slot) const {
    return __ldcg(&params_.slot_factors[first_slot_ + slot].x);
  }
  __device__ __forceinline__ void Load(int slot) {
    if (slot < 0) {
#pragma unroll
      for (float& x : mean) x = 0;
      inverse_size_ = 1;
      return;
    }
    const __nv_bfloat16* from = params_.slot_means + (first_slot_ + slot) * kHeadDim + T::Channel();
    Vector<__nv_bfloat16> vector;
    *reinterpret_cast<uint4*>(vector.pairs) = __ldcg(reinterpret_cast<const uint4*>(from));
    ToFloats(mean, vector);
    if (kTensor == kKey) inverse_size_ = __frcp_rn(LoadSize(slot));  // a power of two: exact
  }

  const SegmentedParams& params_;
  int64_t first_slot_, first_token_;
  int slot_[kPasses];
  bool is_alike_;
  float inverse_size_;
};

// How two channels of V become codes.
struct ValuePair {
  float2 mean, inverse;
  __device__ __forceinline__ float2 Scale(float2 x) const {
    return make_float2((x.x - mean.x) * inverse.x, (x.y - mean.y) * inverse.y);
  }
};

// The slots of V's tokens, and what lies at them.
template <class T>
class SlotValues {
 public:
  static constexpr int kHeadDim = T::kThreadsPerRow * kVector;

  __device__ __forceinline__ SlotValues(const SegmentedParams& params, int head)
      : params_(params),
        first_slot_(head * static_cast<int64_t>(params.length_kv)),
        first_key_(head / params.kv_heads * static_cast<int64_t>(params.length_kv)) {}

  __device__ __forceinline__ int SlotOf(int token) const {
    return __ldg(params_.key_slots + first_key_ + min(token, params_.length_kv - 1));
  }
  // The slot of all tokens of the chunk that begins with `first`, or -1. Synchronizes.
  __device__ __forceinline__ int SlotOfChunk(int first) const {
    const int slot = SlotOf(first);
    bool alike = true;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      alike = alike && SlotOf(first + T::template RowOfPass<kValue>(pass)) == slot;
    }
    return __syncthreads_and(alike) ? slot : -1;
  }

  __device__ __forceinline__ ValuePair Load(int slot, int pair) const {
    const float* channels = params_.slot_channels + (first_slot_ + slot) * (kSlotRows * kHeadDim);
    const auto load = [&](SlotRow row) {
      return __ldcg(reinterpret_cast<const float2*>(channels + row * kHeadDim) + pair);
    };
    const float2 average = load(kSlotOffset), absmax = load(kSlotScale);
    const ValueChannel x(average.x, absmax.x), y(average.y, absmax.y);
    return {make_float2(x.mean, y.mean), make_float2(x.inverse, y.inverse)};
  }

  // Integers: the order of the additions does not show.
  __device__ __forceinline__ void AddSum(int slot, int channel, long long sum) const {
    if (params_.smooth_v && sum != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(params_.value_code_sum) +
                    (first_slot_ + slot) * kHeadDim + channel,
                static_cast<unsigned long long>(sum));
    }
  }

 private:
  const SegmentedParams& params_;
  int64_t first_slot_, first_key_;
};

}  // namespace jax_sage::quantize
