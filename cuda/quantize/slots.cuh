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
  float mean[kVector];

  __device__ __forceinline__ SlotMeans(const SegmentedParams& params, int kv_head) {
    constexpr int kHeadDim = T::kThreadsPerRow * kVector;
    const int64_t first_slot = kv_head * static_cast<int64_t>(params.length_kv);
    const int64_t batch = kv_head / params.kv_heads;
    table_ = params.slot_codes + first_slot * (kSlotCodeRows * kHeadDim) + kSlotKeyMean * kHeadDim +
             T::Channel();
    factors_ = params.slot_factors + first_slot;
    last_ = (kTensor == kKey ? params.length_kv : params.padded_q) - 1;
    slots_ = (kTensor == kKey ? params.key_slots : params.query_slots) + batch * (last_ + 1);
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
    return slot < 0 ? 1 : __ldg(&factors_[slot].x);
  }

 private:
  __device__ __forceinline__ int SlotOf(int token) const {
    return __ldg(slots_ + min(token, last_));
  }
  __device__ __forceinline__ void Load(int slot) {
    if (slot < 0) {
#pragma unroll
      for (float& x : mean) x = 0;
      inverse_size_ = 1;
      return;
    }
    constexpr int kHeadDim = T::kThreadsPerRow * kVector;
    LoadFloats(mean, table_ + slot * static_cast<int64_t>(kSlotCodeRows * kHeadDim));
    // A power of two: exact.
    if (kTensor == kKey) inverse_size_ = __frcp_rn(__ldg(&factors_[slot].x));
  }

  const float* table_;
  const float2* factors_;
  const int32_t* slots_;
  int last_;
  int slot_[kPasses];
  bool is_alike_;
  float inverse_size_;
};

// How two channels of V become codes.
struct ValuePair {
  float2 mean, down, inverse;
  __device__ __forceinline__ float2 Scale(float2 x) const {
    return make_float2((x.x - mean.x) * down.x * inverse.x, (x.y - mean.y) * down.y * inverse.y);
  }
};

// The slots of V's tokens, and what lies at them.
template <class T>
class SlotValues {
 public:
  static constexpr int kHeadDim = T::kThreadsPerRow * kVector;

  __device__ __forceinline__ SlotValues(const SegmentedParams& params, int head)
      : with_sums_(params.smooth_v), last_(params.length_kv - 1) {
    const int64_t first_slot = head * static_cast<int64_t>(params.length_kv);
    slots_ = params.key_slots + head / params.kv_heads * static_cast<int64_t>(params.length_kv);
    channels_ = params.slot_channels + first_slot * (kSlotRows * kHeadDim);
    codes_ = params.slot_codes + first_slot * (kSlotCodeRows * kHeadDim);
    sums_ = reinterpret_cast<unsigned long long*>(params.value_code_sum) + first_slot * kHeadDim;
  }

  __device__ __forceinline__ int SlotOf(int token) const {
    return __ldg(slots_ + min(token, last_));
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
    const float* channels = channels_ + slot * static_cast<int64_t>(kSlotRows * kHeadDim);
    const float* codes = codes_ + slot * static_cast<int64_t>(kSlotCodeRows * kHeadDim);
    const auto load = [&](const float* row) {
      return __ldg(reinterpret_cast<const float2*>(row) + pair);
    };
    const float2 scale = load(channels + kSlotScale * kHeadDim);
    const float2 average = load(channels + kSlotOffset * kHeadDim);
    return {make_float2(ValueMean(average.x), ValueMean(average.y)),
            make_float2(DownscaleOf(scale.x), DownscaleOf(scale.y)),
            load(codes + kSlotInverse * kHeadDim)};
  }

  // Integers: the order of the additions does not show.
  __device__ __forceinline__ void AddSum(int slot, int channel, long long sum) const {
    if (with_sums_ && sum != 0) {
      atomicAdd(sums_ + slot * static_cast<int64_t>(kHeadDim) + channel,
                static_cast<unsigned long long>(sum));
    }
  }

 private:
  bool with_sums_;
  int last_;
  const int32_t* slots_;
  const float* channels_;
  const float* codes_;
  unsigned long long* sums_;
};

}  // namespace jax_sage::quantize
