// What a kernel is made of: its budgets of registers and shared memory, its barriers, its items.
#pragma once

#include "common/epilogue.cuh"
#include "common/layout.h"
#include "common/masks.cuh"
#include "sm90/attention.h"
#include "sm90/barrier.cuh"
#include "sm90/bias.cuh"
#include "sm90/items.cuh"
#include "sm90/softmax.cuh"

namespace jax_sage::sm90 {

constexpr int kRows = 64;  // queries of a warpgroup
// Up to so many keys an item is short: small tiles and few queries matter more than a fast loop.
constexpr int kShort = 1024;
constexpr int kSharedLimit = 227 * 1024;
static_assert(kRows == kMaskRows);

// kWithLse: lse may be asked for, and P is summed before it is rounded too. kMost: consumers, where
// there is room.
template <class Pv_, bool kWithLse_, Masking kMasking = Masking::kPlain, int kMost = 4>
struct Traits {
  using Pv = Pv_;
  static constexpr bool kWithLse = kWithLse_;
  // By plans. Otherwise queries see intervals of keys, and nothing is planned.
  static constexpr bool kMasked =
      kMasking == Masking::kMasked || kMasking == Masking::kMaskedBiased;
  // By the slots of segments: what ends an item.
  static constexpr bool kBySlot = kMasked || kMasking == Masking::kPlainSegments;
  static constexpr bool kBiased =
      kMasking == Masking::kPlainBiased || kMasking == Masking::kMaskedBiased;
  static constexpr int kHeadDim = Pv::kHeadDim;
  // Warpgroups. FP32 sums in registers leave none for a bias beside two others; with the scores of
  // 64 keys, and FP16 sums or 64 channels, there is room for four; with both for five.
  static constexpr bool kIsLarge = !Pv::kSumsRows && kHeadDim > 64 && kBiased;
  static constexpr bool kIsSmall =
      (Pv::kSumsRows || kHeadDim == 64) && Pv::kTile == 64 && !kMasked && !kBiased;
  static constexpr int kConsumers = kHeadDim > 128 || kIsLarge ? 2 : kIsSmall ? kMost : 3;
  // Channels of the output that are finished at once.
  static constexpr int kTurn = kHeadDim % 128 != 0 || kConsumers > 3 ? 64 : 128;
  static_assert(kHeadDim % kTurn == 0 && kHeadDim <= 3 * kTurn);
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // With masks the producer plans, and a bias is more to find. Where the consumers need all that
  // there is, it has 32 registers all the same, and spills some.
  static constexpr bool kFullConsumers =
      !kBiased && (!kMasked || (Pv::kSumsRows && (kWithLse || Pv::kHeadDim > 64)));
  static constexpr int kProducerRegisters = kConsumers == 5                     ? 40
                                            : kConsumers >= 3 && kFullConsumers ? 32
                                                                                : 56;
  static constexpr int kConsumerRegisters = kConsumers == 2   ? 224
                                            : kConsumers == 5 ? 88
                                            : kConsumers == 4 ? 112
                                            : kFullConsumers  ? 160
                                                              : 152;
  // setmaxnreg waits until the registers are there: the CTA has what it was launched with.
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                65536 / kThreads / 8 * 8 * (kConsumers + 1));
  static constexpr int kTile = Pv::kTile;  // keys
  static constexpr int kBlocks = kTile / kBlockKv;
  // QK^T of the next tile is issued behind PV of this one. Where it was tried it pays here alone;
  // see DESIGN.md.
  static constexpr bool kQkAhead =
      !Pv::kSumsRows && kBlocks == 1 && !kMasked && !kBiased && kConsumers > 2;
  // Sums are promoted while QK^T of their tile runs. Elsewhere that is 1 % slower.
  static constexpr bool kPromotesBeneathQk = Pv::kSumsRows && !kMasked && kConsumers > 2;
  // Q of 256 channels does not fit beside their FP32 output, that of 192 would take a stage; two
  // consumers have registers for it.
  static constexpr bool kQInRegisters = Pv::kSumsRows && kHeadDim > 128;
  // A row of a box of Q or K, as it is swizzled.
  static constexpr int kBoxRow = kHeadDim < kBoxChannels ? kHeadDim : kBoxChannels;
  // Of whole boxes: behind 192 channels TMA puts zeros, which nobody reads.
  static constexpr int kBoxed = (kHeadDim + kBoxRow - 1) / kBoxRow * kBoxRow;
  static constexpr int kQBytes = kQInRegisters ? 0 : kRows * kBoxed;  // of a warpgroup
  static constexpr int kKBytes = kTile * kBoxed;
  static constexpr int kScaleBytes = kBlocks * kKeyScales * 4;
  static constexpr int kStageBytes = kKBytes + Pv::kStride + kScaleBytes;
  static constexpr int kQScaleBytes = kRows * 4;
  static constexpr int kIntervalBytes = kRows * 8;
  // What ProduceQ says of a warpgroup's rows, in bytes: the first; the first row of their bias; the
  // address of their Q. With masks batch, head, and the address of their words of the mask,
  // otherwise the tiles of the item and what these rows see, as in MaskParams::groups.
  static constexpr int kRowAt = 0, kBiasRowAt = 12, kMaskAt = 16;
  static constexpr int kItemAt = 4, kBoundsAt = 16;
  static constexpr int kQAt = kMasked ? 24 : 32;
  static constexpr int kBatchAt = kMasked ? 4 : 40, kHeadAt = kMasked ? 8 : 44;
  static constexpr int kRowsBytes = !kMasked && (kQInRegisters || kBiased) ? 48 : 32;
  // Where it only serves the stores, these go by turns.
  static constexpr int kOutputBytes = kRows * (Pv::kSumsRows ? kHeadDim : kTurn) * 4;
  static constexpr int kOutputOfWarp = kOutputBytes / 4;
  // Where the output needs its buffer at the end of an item only, a bias has it until then. The
  // FP32 output of 256 channels leaves no room: there the threads load their bias for themselves.
  static constexpr bool kCopiesBias = kBiased && (!Pv::kSumsRows || kHeadDim <= 192);
  static constexpr bool kBiasInOutput = kCopiesBias && !Pv::kSumsRows;
  static constexpr int kBiasOfWarp = kBiasInOutput ? kOutputOfWarp : kBiasBytes;
  static constexpr int kBiasOfGroup = kCopiesBias && !kBiasInOutput ? 4 * kBiasBytes : 0;
  static constexpr int kBiasBarriers = kCopiesBias ? 8 * kConsumers : 0;
  static constexpr int kMaxStages = 6;
  static constexpr int kFixedBytes =
      kConsumers *
          (kQBytes + kBiasOfGroup + kQScaleBytes + kIntervalBytes + kOutputBytes + 2 * kRowsBytes) +
      4 * kMaxStages + 16 + int{sizeof(OutputTable<kHeadDim>)} +
      8 * (2 + 2 * kConsumers + 4 * kMaxStages + kBiasBarriers) + 1024 + 512;
  static constexpr int kFitting = (kSharedLimit - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  // Shared memory; tiles first, they must be aligned to 8 rows of up to 128 bytes for the swizzle.
  static constexpr int kQ = 0;
  static constexpr int kOwnBias = kQ + kConsumers * kQBytes;
  static constexpr int kK = kOwnBias + kConsumers * kBiasOfGroup;
  static constexpr int kV = kK + kStages * kKBytes;
  static constexpr int kOutput = (kV + kStages * Pv::kStride + 1023) / 1024 * 1024;
  static constexpr int kBias = kBiasInOutput ? kOutput : kOwnBias;
  static constexpr int kQScales = kOutput + kConsumers * kOutputBytes;
  static constexpr int kIntervals = kQScales + kConsumers * kQScaleBytes;
  static constexpr int kScales = kIntervals + kConsumers * kIntervalBytes;
  // By turns, so that what is said of rows lasts until the end of their item.
  static constexpr int kFirstRows = kScales + kStages * kScaleBytes;
  __host__ __device__ static constexpr int Rows(int group, unsigned turn) {
    return kFirstRows + ((kMasked ? 0 : turn % 2 * kConsumers) + group) * kRowsBytes;
  }
  static constexpr int kPlans = kFirstRows + 2 * kConsumers * kRowsBytes;
  static constexpr int kTable = (kPlans + kStages * 4 + 15) / 16 * 16;
  static constexpr int kBarriers = kTable + int{sizeof(OutputTable<kHeadDim>)};
  static constexpr int kBarrierCount = 2 + 2 * kConsumers + 4 * kStages + kBiasBarriers;
  static constexpr int kSharedBytes = kBarriers + kBarrierCount * 8 + 1024;  // to align
  static_assert(kStages >= (kConsumers > 2 ? 3 : 2), "the warpgroups drift apart");
  static_assert(kKBytes % 1024 == 0 && Pv::kStride % Pv::kAlignment == 0 && kQBytes % 1024 == 0);
  static_assert(!kCopiesBias || (kTile == kBiasTile && kBias % 1024 == 0 &&
                                 kBiasOfWarp >= kBiasBytes && kBiasOfWarp % 1024 == 0));
  static_assert(kOutputOfWarp % 1024 == 0, "it is stored in swizzled boxes");
  static_assert(kRows == kBlockKv, "boxes of Q and of K are alike, see IssueQk");
  static_assert(kSharedBytes <= kSharedLimit);
};

template <class T>
struct Barriers {
  static constexpr int kConsumers = T::kConsumers, kStages = T::kStages;
  uint32_t base;
  __device__ uint32_t TableFull() const { return base; }
  __device__ uint32_t TableEmpty() const { return base + 8; }
  __device__ uint32_t QFull(int group) const { return base + 8 * (2 + group); }
  __device__ uint32_t QEmpty(int group) const { return base + 8 * (2 + kConsumers + group); }
  __device__ uint32_t KFull(int stage) const { return base + 8 * (2 + 2 * kConsumers + stage); }
  __device__ uint32_t KEmpty(int stage) const { return KFull(kStages + stage); }
  __device__ uint32_t VFull(int stage) const { return KFull(2 * kStages + stage); }
  __device__ uint32_t VEmpty(int stage) const { return KFull(3 * kStages + stage); }
  __device__ uint32_t BiasFull(int warp) const { return KFull(4 * kStages + warp); }
  static constexpr int kBiasEmpty = 8 * 4 * kConsumers;  // behind BiasFull

  __device__ void Init() const {
    ptx::BarrierInit(TableFull(), 64);  // threads that prepare the table
    ptx::BarrierInit(TableEmpty(), 128 * kConsumers);
    for (int group = 0; group < kConsumers; ++group) {
      ptx::BarrierInit(QFull(group), 1);
      ptx::BarrierInit(QEmpty(group), 128);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::BarrierInit(KFull(stage), 1);
      ptx::BarrierInit(VFull(stage), 1);
      ptx::BarrierInit(KEmpty(stage), 128 * kConsumers);
      ptx::BarrierInit(VEmpty(stage), 4 * kConsumers);  // one lane of each warp
    }
    for (int warp = 0; warp < T::kBiasBarriers / 2; ++warp) {
      ptx::BarrierInit(BiasFull(warp), 1);
      ptx::BarrierInit(BiasFull(warp) + kBiasEmpty, 32);
    }
    ptx::FenceBarrierInit();
  }
};

// A stage of the ring of tiles, and the parity of its barriers' phase.
template <int kStages>
struct Ring {
  unsigned stage = 0, parity = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The items of this CTA, in turns: one of each round.
template <class T>
struct Work {
  const Cut& cut;
  __device__ unsigned Index(unsigned turn) const {
    return IndexOf(cut, blockIdx.x, gridDim.x, turn);
  }
  __device__ bool Any(unsigned turn) const { return Index(turn) < cut.items; }
  __device__ Item Find(const AttentionParams& params, unsigned turn) const {
    Item item = FindItem<T::kConsumers>(params, cut, Index(turn));
    if (T::kBySlot && !IsOurs(params, item.head / params.heads)) item.groups = 0;
    return item;
  }
  // A kernel with plans works on the batch entries whose segments are scattered, one by intervals
  // on the others.
  __device__ static bool IsOurs(const AttentionParams& params, int64_t batch) {
    if (params.scattered == nullptr) return true;
    return (__ldg(params.scattered + batch * params.scattered_stride) != 0) == T::kMasked;
  }
};

// Without masks but intervals: the tiles [first, end) that some of the queries see, and those
// [first_whole, end_whole) that all of them see in whole.
struct Extent {
  int first, end, first_whole, end_whole;
};
// bounds: as in MaskParams::groups.
template <int kTile>
__device__ __forceinline__ Extent ExtentOf(int4 bounds) {
  if (bounds.x >= bounds.y) return {};
  const auto ceil_div = [](int keys) { return (keys + kTile - 1) / kTile; };
  return {bounds.x / kTile, ceil_div(bounds.y), ceil_div(bounds.z), bounds.w / kTile};
}
// Without intervals in memory.
__device__ __forceinline__ int4 BoundsOf(const AttentionParams& params, int first_row, int rows) {
  if (!params.is_causal) return make_int4(0, params.length_kv, 0, params.length_kv);
  const int end_row = min(first_row + rows, params.length_q);
  return make_int4(0, min(end_row, params.length_kv), 0, min(first_row + 1, params.length_kv));
}
template <int kTile>
__device__ __forceinline__ Extent FindExtent(const AttentionParams& params, int64_t head,
                                             int first_row, int rows) {
  if (params.masks.rows == nullptr) return ExtentOf<kTile>(BoundsOf(params, first_row, rows));
  const int4* groups = params.masks.groups + head / params.heads * params.masks.group_stride;
  int4 bounds = make_int4(INT32_MAX, 0, 0, INT32_MAX);
#pragma unroll 1
  for (int row = first_row; row < min(first_row + rows, params.length_q); row += kRows) {
    const int4 more = __ldg(groups + row / kRows);
    bounds = make_int4(min(bounds.x, more.x), max(bounds.y, more.y), max(bounds.z, more.z),
                       min(bounds.w, more.w));
  }
  return ExtentOf<kTile>(bounds);
}

// A plan of a tile: from bit kViewBits * g on, what warpgroup g sees of it.
constexpr uint32_t kLastOfItem = 1 << 12;
constexpr int kTileShift = 13;

}  // namespace jax_sage::sm90
