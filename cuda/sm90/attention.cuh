// Quantized attention on Hopper's wgmma. DESIGN.md beside this file has the roles, the budgets of
// registers and shared memory, and what else was tried.
//
// A CTA stays on its SM and works off items: up to 64 queries of one head for each of two to four
// consumer warpgroups, which work for themselves: QK^T, softmax, PV, one after the other. While one
// waits for the matrix unit or for its exponentials, the others use what it leaves. A producer warp
// loads K and V by TMA, running ahead into the next item.
//
// With masks the producer warp finds the tiles that any of the queries may see, loads these alone,
// and says with each what each warpgroup sees of it. A bias is loaded by the consumer warps.
#pragma once

#include "common/epilogue.cuh"
#include "common/layout.h"
#include "common/masks.cuh"
#include "common/ptx.cuh"
#include "sm90/attention.h"
#include "sm90/barrier.cuh"
#include "sm90/bias.cuh"
#include "sm90/items.cuh"
#include "sm90/softmax.cuh"
#include "sm90/store.cuh"
#include "sm90/sums.cuh"
#include "sm90/wgmma.cuh"

namespace jax_sage::sm90 {

constexpr int kRows = 64;  // queries of a warpgroup
constexpr int kSharedLimit = 227 * 1024;
static_assert(kRows == kMaskRows);

// kExactSum: P is summed before it is rounded too, for lse.
template <class Pv_, bool kExactSum_, Masking kMasking = Masking::kPlain>
struct Traits {
  using Pv = Pv_;
  static constexpr bool kExactSum = kExactSum_;
  static constexpr bool kMasked = kMasking != Masking::kPlain;
  static constexpr bool kBiased = kMasking == Masking::kBiased;
  static constexpr int kHeadDim = Pv::kHeadDim;
  // Warpgroups. FP32 sums in registers leave none for a bias, or the scores of 128 keys, beside two
  // others; with those of 64 keys and FP16 sums there is room for four.
  static constexpr bool kIsLarge = !Pv::kSumsRows && kHeadDim > 64 && (kBiased || Pv::kTile > 64);
  static constexpr bool kIsSmall = Pv::kSumsRows && Pv::kTile == 64 && !kMasked;
  static constexpr int kConsumers = kHeadDim > 128 || kIsLarge ? 2 : kIsSmall ? 4 : 3;
  // Channels of the output that are finished at once.
  static constexpr int kTurn = kHeadDim == 64 || kConsumers == 4 ? 64 : 128;
  static_assert(kHeadDim <= 2 * kTurn);
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // The producer of masked kernels plans. Where the consumers need all that there is, it has 32
  // registers all the same, and spills some.
  static constexpr bool kFullConsumers =
      !kMasked || (!kBiased && Pv::kSumsRows && (kExactSum || Pv::kHeadDim > 64));
  static constexpr int kProducerRegisters = kConsumers >= 3 && kFullConsumers ? 32 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 2   ? 224
                                            : kConsumers == 4 ? 112
                                            : kFullConsumers  ? 160
                                                              : 152;
  // setmaxnreg waits until the registers are there: the CTA has what it was launched with.
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                65536 / kThreads / 8 * 8 * (kConsumers + 1));
  static constexpr int kTile = Pv::kTile;  // keys
  static constexpr int kBlocks = kTile / kBlockKv;
  // Q of 256 channels does not fit beside their FP32 output; two consumers have registers for it.
  static constexpr bool kQInRegisters = Pv::kSumsRows && kHeadDim > 128;
  // A row of a box of Q or K, as it is swizzled.
  static constexpr int kBoxRow = kHeadDim < kBoxChannels ? kHeadDim : kBoxChannels;
  static constexpr int kQBytes = kQInRegisters ? 0 : kRows * kHeadDim;  // of a warpgroup
  static constexpr int kKBytes = kTile * kHeadDim;
  static constexpr int kScaleBytes = kBlocks * kKeyScales * 4;
  static constexpr int kStageBytes = kKBytes + Pv::kStride + kScaleBytes;
  static constexpr int kQScaleBytes = kRows * 4;
  static constexpr int kIntervalBytes = kMasked ? kRows * 8 : 0;
  static constexpr int kRowsBytes = kMasked || kQInRegisters ? 32 : 16;
  // Where it only serves the stores, these go by turns of 128 channels.
  static constexpr int kOutputBytes =
      kRows * (Pv::kSumsRows || kHeadDim < 128 ? kHeadDim : 128) * 4;
  static constexpr int kOutputOfWarp = kOutputBytes / 4;
  // Where the output needs its buffer at the end of an item only, a bias has it until then. The
  // FP32 output of 256 channels leaves no room: there the threads load their bias for themselves.
  static constexpr bool kCopiesBias = kBiased && (!Pv::kSumsRows || kHeadDim <= 128);
  static constexpr bool kBiasInOutput = kCopiesBias && !Pv::kSumsRows;
  static constexpr int kBiasOfWarp = kBiasInOutput ? kOutputOfWarp : kBiasBytes;
  static constexpr int kBiasOfGroup = kCopiesBias && !kBiasInOutput ? 4 * kBiasBytes : 0;
  static constexpr int kBiasBarriers = kCopiesBias ? 8 * kConsumers : 0;
  static constexpr int kMaxStages = 6;
  static constexpr int kFixedBytes =
      kConsumers *
          (kQBytes + kBiasOfGroup + kQScaleBytes + kIntervalBytes + kOutputBytes + kRowsBytes) +
      4 * kMaxStages + 16 + int{sizeof(OutputTable<kHeadDim>)} +
      8 * (2 + 2 * kConsumers + 4 * kMaxStages + kBiasBarriers) + 1024;
  static constexpr int kFitting = (kSharedLimit - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  // Shared memory; tiles first, they must be aligned to 8 rows of up to 128 bytes for the swizzle.
  static constexpr int kQ = 0;
  static constexpr int kOwnBias = kQ + kConsumers * kQBytes;
  static constexpr int kK = kOwnBias + kConsumers * kBiasOfGroup;
  static constexpr int kV = kK + kStages * kKBytes;
  static constexpr int kOutput = kV + kStages * Pv::kStride;
  static constexpr int kBias = kBiasInOutput ? kOutput : kOwnBias;
  static constexpr int kQScales = kOutput + kConsumers * kOutputBytes;
  static constexpr int kIntervals = kQScales + kConsumers * kQScaleBytes;
  static constexpr int kScales = kIntervals + kConsumers * kIntervalBytes;
  // First row; with masks batch, head, the first row's bias, the address of its words of the mask,
  // otherwise the tiles of the item; the address of its Q.
  static constexpr int kFirstRows = kScales + kStages * kScaleBytes;
  static constexpr int kPlans = kFirstRows + kConsumers * kRowsBytes;
  static constexpr int kTable = (kPlans + kStages * 4 + 15) / 16 * 16;
  static constexpr int kBarriers = kTable + int{sizeof(OutputTable<kHeadDim>)};
  static constexpr int kBarrierCount = 2 + 2 * kConsumers + 4 * kStages + kBiasBarriers;
  static constexpr int kSharedBytes = kBarriers + kBarrierCount * 8 + 1024;  // to align
  static_assert(kStages >= (kConsumers > 2 ? 3 : 2), "the warpgroups drift apart");
  static_assert(kKBytes % 1024 == 0 && Pv::kStride % Pv::kAlignment == 0 && kQBytes % 1024 == 0);
  static_assert(!kCopiesBias || (kTile == kBiasTile && kBias % 1024 == 0 &&
                                 kBiasOfWarp >= kBiasBytes && kBiasOfWarp % 1024 == 0));
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

// The items of this CTA, in turns: of all of them every gridDim.x-th.
template <class T>
struct Work {
  const Cut& cut;
  __device__ static unsigned Index(unsigned turn) { return blockIdx.x + turn * gridDim.x; }
  __device__ bool Any(unsigned turn) const { return Index(turn) < cut.items; }
  __device__ Item Find(const AttentionParams& params, unsigned turn) const {
    return FindItem<T::kConsumers>(params, cut, Index(turn));
  }
};

// kTokens of Q or K, in boxes of channels.
template <int kHeadDim, int kTokens>
__device__ __forceinline__ void CopyChannels(uint32_t shared, const CUtensorMap* map,
                                             uint32_t barrier, int token, int head) {
#pragma unroll
  for (int first = 0; first < kHeadDim; first += kBoxChannels) {
    ptx::CopyBox(shared + first * kTokens, map, barrier, first, token, head);
  }
}

// Loads a tile of K and V into a stage that is free, or soon will be. One thread.
template <class T>
__device__ __forceinline__ void LoadStage(const AttentionParams& params, const TensorMaps& maps,
                                          int kv_head, int tile, uint32_t plan, uint32_t shared,
                                          Barriers<T> barriers, Ring<T::kStages> ring) {
  const unsigned stage = ring.stage;
  const int blocks = params.padded_kv / kBlockKv;
  const float* scales = params.k_scale + static_cast<int64_t>(kv_head) * blocks * kKeyScales;
  // The last tile may have fewer blocks.
  const int tile_blocks = min(T::kBlocks, blocks - tile * T::kBlocks);
  const int scale_bytes = tile_blocks * kKeyScales * 4;
  // A barrier that was never used counts as completed for parity 1.
  ptx::BarrierWait(barriers.KEmpty(stage), ring.parity ^ 1);
  if constexpr (T::kMasked) ptx::StoreSharedAs(shared + T::kPlans + stage * 4, plan);
  ptx::BarrierExpect(barriers.KFull(stage), T::kKBytes + scale_bytes);
  CopyChannels<T::kHeadDim, T::kTile>(shared + T::kK + stage * T::kKBytes, &maps.k,
                                      barriers.KFull(stage), tile * T::kTile, kv_head);
  ptx::CopyBulk(shared + T::kScales + stage * T::kScaleBytes,
                scales + tile * T::kBlocks * kKeyScales, scale_bytes, barriers.KFull(stage));
  ptx::BarrierWait(barriers.VEmpty(stage), ring.parity ^ 1);
  ptx::BarrierExpect(barriers.VFull(stage), T::Pv::kBytes);
  T::Pv::Load(shared + T::kV + stage * T::Pv::kStride, &maps.v, barriers.VFull(stage), tile,
              kv_head);
}

// One thread loads K and V.
template <class T>
__device__ __forceinline__ void ProduceKv(const AttentionParams& params, const TensorMaps& maps,
                                          Work<T> work, uint32_t shared, Barriers<T> barriers) {
  Ring<T::kStages> ring;
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    const Item item = work.Find(params, turn);
    const int tiles = CountTiles<T::kTile>(params, item.first_row, item.groups * kRows);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile, ring.Next()) {
      LoadStage<T>(params, maps, static_cast<int>(item.kv_head), tile, 0, shared, barriers, ring);
    }
  }
}

// A plan of a tile: from bit kViewBits * g on, what warpgroup g sees of it.
constexpr uint32_t kLastOfItem = 1 << 12;
constexpr int kTileShift = 13;

// A warp loads the tiles of K and V that any warpgroup may see, with a plan of each.
template <class T>
__device__ __forceinline__ void ProduceSeenKv(const AttentionParams& params, const TensorMaps& maps,
                                              Work<T> work, uint32_t shared, Barriers<T> barriers) {
  const int lane = threadIdx.x % 32;
  const MaskParams& masks = params.masks;
  // Found anew where it is needed: the producer has few registers.
  struct Groups {
    int kv_head, batch, head, first, count;
  };
  const auto find = [&](unsigned turn) {
    asm volatile("" : "+r"(turn));
    const Item item = work.Find(params, turn);
    const int all_heads = static_cast<int>(item.head);
    return Groups{static_cast<int>(item.kv_head), all_heads / params.heads,
                  all_heads % params.heads, item.first_row / kRows,
                  min(item.groups, (params.length_q - item.first_row + kRows - 1) / kRows)};
  };
  Ring<T::kStages> ring;
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    int first_key = params.length_kv, end_key = 0;
    const Groups groups = find(turn);
#pragma unroll 1
    for (int group = 0; group < groups.count; ++group) {
      const int4 bounds =
          __ldg(masks.groups + groups.batch * masks.group_stride + groups.first + group);
      first_key = min(first_key, bounds.x);
      end_key = max(end_key, bounds.y);
    }
    const int end_tile = (end_key + T::kTile - 1) / T::kTile;
    // The last tile must be known as such: a tile is loaded when the next has been found, or none.
    constexpr uint32_t kNoPlan = ~0u;
    uint32_t plan = kNoPlan, found = 0, views = 0;
    int base = first_key / T::kTile - 32;
    bool is_last = false;
#pragma unroll 1
    while (!is_last) {
      uint32_t next = kNoPlan;
#pragma unroll 1
      while (found == 0 && base + 32 < end_tile) {
        base += 32;
        views = 0;
        if (base + lane < end_tile) {
          const Groups groups = find(turn);
          const int first = (base + lane) * T::kTile;
#pragma unroll 1
          for (int group = 0; group < groups.count; ++group) {
            views |= ViewOfTile(masks, groups.batch, groups.head, groups.first + group, first,
                                first + T::kTile)
                     << (kViewBits * group);
          }
        }
        found = __ballot_sync(0xffffffffu, views != 0);
      }
      if (found != 0) {
        const int source = __ffs(found) - 1;
        found &= found - 1;
        next = static_cast<uint32_t>(base + source) << kTileShift |
               __shfl_sync(0xffffffffu, views, source);
        if (plan == kNoPlan) {  // the first
          plan = next;
          continue;
        }
      } else {
        is_last = true;
        // Nothing is seen at all: a tile that nobody looks at.
        plan = (plan == kNoPlan ? 0 : plan) | kLastOfItem;
      }
      if (lane == 0) {
        LoadStage<T>(params, maps, find(turn).kv_head, static_cast<int>(plan >> kTileShift), plan,
                     shared, barriers, ring);
      }
      __syncwarp();
      ring.Next();
      plan = next;
    }
  }
}

// One thread loads Q, for each warpgroup as soon as that is done with the item before, and
// says which queries they are.
template <class T>
__device__ __forceinline__ void ProduceQ(const AttentionParams& params, const TensorMaps& maps,
                                         Work<T> work, uint32_t shared, Barriers<T> barriers) {
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    const Item position = work.Find(params, turn);
#pragma unroll 1
    for (int group = 0; group < T::kConsumers; ++group) {
      const int row =
          group < position.groups ? position.first_row + group * kRows : params.length_q;
      const int batch = static_cast<int>(position.head) / params.heads;
      ptx::BarrierWait(barriers.QEmpty(group), ~turn & 1);
      const uint32_t first_row = shared + T::kFirstRows + group * T::kRowsBytes;
      ptx::StoreSharedAs(first_row, row);
      if constexpr (!T::kMasked) {
        ptx::StoreSharedAs(first_row + 4, CountTiles<T::kTile>(params, position.first_row,
                                                               position.groups * kRows));
      }
      if constexpr (T::kMasked) {
        const int head = static_cast<int>(position.head) % params.heads;
        ptx::StoreSharedAs(first_row + 4, batch);
        ptx::StoreSharedAs(first_row + 8, head);
        if constexpr (T::kCopiesBias) {
          ptx::StoreSharedAs(first_row + 12, RowOfBias(params, batch, head, row));
        }
        ptx::StoreSharedAs(first_row + 16, MaskRow(params.masks, batch, head, row));
      }
      if constexpr (T::kQInRegisters) {
        ptx::StoreSharedAs(first_row + 24,
                           params.q + (position.head * params.padded_q + row) * T::kHeadDim);
      }
      if (row >= params.length_q) {  // nothing to load, nothing to do
        ptx::BarrierArrive(barriers.QFull(group));
        continue;
      }
      ptx::BarrierExpect(barriers.QFull(group), T::kQBytes + T::kQScaleBytes + T::kIntervalBytes);
      if constexpr (!T::kQInRegisters) {
        CopyChannels<T::kHeadDim, kRows>(shared + T::kQ + group * T::kQBytes, &maps.q,
                                         barriers.QFull(group), row,
                                         static_cast<int>(position.head));
      }
      ptx::CopyBulk(shared + T::kQScales + group * T::kQScaleBytes,
                    params.q_scale + position.head * params.padded_q + row, T::kQScaleBytes,
                    barriers.QFull(group));
      if constexpr (T::kMasked) {
        ptx::CopyBulk(shared + T::kIntervals + group * T::kIntervalBytes,
                      params.masks.rows + batch * params.masks.row_stride + row, T::kIntervalBytes,
                      barriers.QFull(group));
      }
    }
  }
}

// 64 threads prepare what the end of each item needs.
template <class T>
__device__ __forceinline__ void ProduceTable(const AttentionParams& params, Work<T> work,
                                             int thread, OutputTable<T::kHeadDim>& table,
                                             Barriers<T> barriers) {
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    ptx::BarrierWait(barriers.TableEmpty(), ~turn & 1);
    PrepareOutput<T::kMasked>(table, params, work.Find(params, turn), thread, 64);
    ptx::BarrierArrive(barriers.TableFull());
  }
}

template <class T>
__device__ __forceinline__ void Consume(const AttentionParams& params, const TensorMaps& maps,
                                        Work<T> work, const OutputTable<T::kHeadDim>& table,
                                        uint32_t shared, Barriers<T> barriers) {
  using Pv = typename T::Pv;
  const int lane = threadIdx.x % 32;
  // The same in all lanes: the compiler keeps what follows from it in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
  const int warp = threadIdx.x % 128 / 32;
  const uint32_t output =
      shared + T::kOutput + warpgroup * T::kOutputBytes + warp * T::kOutputOfWarp;
  uint64_t k_tiles = ptx::Descriptor<T::kBoxRow>(shared + T::kK);
  uint64_t v_tiles = Pv::Descriptor(shared + T::kV);
  if constexpr (T::kBiased) {  // computed anew for each tile otherwise: 15 instructions
    k_tiles = ptx::Uniform(k_tiles);
    v_tiles = ptx::Uniform(v_tiles);
  }
  // For V, which only wgmma reads. What threads have read each of them releases:
  // compute-sanitizer's racecheck does not follow a warp's reads through __syncwarp to an arrival
  // of one lane.
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) ptx::BarrierArrive(barrier);
  };
  const uint32_t opaque_zero = work.cut.items >> 31;
  const int bias_warp = 4 * warpgroup + __shfl_sync(0xffffffffu, warp, 0);
  BiasBuffer<Barriers<T>::kBiasEmpty> bias(shared + T::kBias + bias_warp * T::kBiasOfWarp,
                                           barriers.BiasFull(bias_warp));
  Ring<T::kStages> ring;
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    ptx::BarrierWait(barriers.QFull(warpgroup), turn & 1);
    const uint32_t first_row_slot = shared + T::kFirstRows + warpgroup * T::kRowsBytes;
    const int group_row = ptx::LoadSharedAs<int>(first_row_slot);
    std::conditional_t<T::kQInRegisters, QueryFragments<T::kHeadDim>, uint64_t> q;
    if constexpr (!T::kQInRegisters) {
      q = ptx::Descriptor<T::kBoxRow>(shared + T::kQ + warpgroup * T::kQBytes);
    } else if (group_row < params.length_q) {
      q.Load(ptx::LoadSharedAs<const int8_t*>(first_row_slot + 24), 16 * warp + lane / 4, lane);
    }
    Scores<T> scores;
    Pv sums(output + lane * 16);
    const auto load_scales = [&] {
      ptx::BarrierWait(barriers.KFull(ring.stage), ring.parity);
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        scores.k_scale[block] =
            ptx::LoadSharedAs<float>(shared + T::kScales + ring.stage * T::kScaleBytes +
                                     (block * kKeyScales + (lane & 3)) * 4);
      }
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scores.q_scale[half] =
          ptx::LoadSharedAs<float>(shared + T::kQScales + warpgroup * T::kQScaleBytes +
                                   (16 * warp + lane / 4 + 8 * half) * 4);
    }
    // The tile in the ring's stage, the count-th of this warpgroup. `softmax` makes P of the scores
    // of some blocks; `next` moves the ring on, beneath PV.
    const auto compute = [&](int count, bool is_last, auto softmax, auto next) {
      const unsigned stage = ring.stage;
      const uint32_t v_full = barriers.VFull(stage), v_parity = ring.parity;
      const uint64_t k = k_tiles + stage * (T::kKBytes / 16);
      const uint64_t v = v_tiles + stage * (Pv::kStride / 16);
      ptx::WgmmaFence();
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        static_assert(T::kBlocks == 1 || T::kHeadDim <= kBoxChannels);
        IssueQk<T::kHeadDim>(scores.s[block], q, k + block * (kBlockKv * T::kHeadDim / 16));
      }
      uint32_t p[T::kBlocks][Pv::kRegisters];
      constexpr int kFirstBlocks = Pv::kByBlocks ? 1 : T::kBlocks;
      softmax(Blocks<0, kFirstBlocks>(), p);
      if constexpr (Pv::kByBlocks) {
        ptx::BarrierWait(v_full, v_parity);
        sums.Issue(Blocks<0, 1>(), p, v, count);
        softmax(Blocks<1, T::kBlocks>(), p);
      }
      ptx::BarrierArrive(barriers.KEmpty(stage));
      if (is_last) ptx::BarrierArrive(barriers.QEmpty(warpgroup));
      if constexpr (Pv::kByBlocks) {
        sums.Issue(Blocks<1, T::kBlocks>(), p, v, count);
      } else {
        ptx::BarrierWait(v_full, v_parity);
        sums.Issue(Blocks<0, T::kBlocks>(), p, v, count);
      }
      next();
      ptx::WgmmaWait<0>();
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) ptx::Pin(p[block]);
      sums.Retire(count);
      release(barriers.VEmpty(stage));
    };
    int my_tiles;
    if constexpr (T::kMasked) {
      my_tiles = 0;
      const int row = group_row + 16 * warp + lane / 4;
      const auto batch = [&] { return ptx::LoadSharedAs<int>(first_row_slot + 4); };
      const auto head = [&] { return ptx::LoadSharedAs<int>(first_row_slot + 8); };
      uint32_t plan, words[2];
      [[maybe_unused]] int bias_row = 0;
      if constexpr (T::kCopiesBias) {
        bias_row = ptx::LoadSharedAs<int>(first_row_slot + 12) + bias.FirstRow(maps, bias_warp % 4);
        bias_row = __shfl_sync(0xffffffffu, bias_row, 0);
      }
      const auto load_plan = [&] {
        load_scales();
        plan = ptx::LoadSharedAs<uint32_t>(shared + T::kPlans + ring.stage * 4);
        if constexpr (T::kCopiesBias) {
          if ((plan >> (kViewBits * warpgroup) & kAll) && maps.bias_bytes != 0) {
            bias.Copy(maps, static_cast<int>(plan >> kTileShift), bias_row);
          }
        }
        // Far away: needed after the next QK^T.
        if (plan >> (kViewBits * warpgroup) & kByMask) {
          const auto* mask_row = ptx::LoadSharedAs<const uint32_t*>(first_row_slot + 16);
          const int first = static_cast<int>(plan >> kTileShift) * T::kTile;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            words[half] =
                MaskWord(params.masks, mask_row, 16 * warp + lane / 4 + 8 * half, first, lane);
          }
        }
      };
      load_plan();
      bool is_last;
      do {
        is_last = (plan & kLastOfItem) != 0;
        const unsigned view = plan >> (kViewBits * warpgroup) & ((1 << kViewBits) - 1);
        if (view == kNone) {
          ptx::BarrierArrive(barriers.KEmpty(ring.stage));
          if (is_last) ptx::BarrierArrive(barriers.QEmpty(warpgroup));
          ptx::BarrierWait(barriers.VFull(ring.stage), ring.parity);
          release(barriers.VEmpty(ring.stage));
          ring.Next();
          if (!is_last) load_plan();
          continue;
        }
        const auto softmax = [&](auto blocks, uint32_t (&p)[T::kBlocks][Pv::kRegisters]) {
          const int first = static_cast<int>(plan >> kTileShift) * T::kTile;
          if constexpr (T::kCopiesBias) {
            if (maps.bias_bytes != 0) {
              bias.Read(scores.bias[0], maps, params.masks.bias_type, lane);
            } else {
              BiasRows(params, batch(), head(), row).Spread(scores.bias[0]);
            }
          } else if constexpr (T::kBiased) {
            BiasRows(params, batch(), head(), row).Load(scores.bias[0], first, lane);
          }
          if (view == kAll) {
            scores.Softmax(blocks, p, sums, my_tiles == 0, Everything(), T::kTile, opaque_zero);
            return;
          }
          SeenKeys<T::kTile> seen;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            seen.bits[half] = view & kByMask ? words[half] : ~0u;
            if (view & kByInterval) {
              const int2 interval =
                  ptx::LoadSharedAs<int2>(shared + T::kIntervals + warpgroup * T::kIntervalBytes +
                                          (16 * warp + lane / 4 + 8 * half) * 8);
              seen.bits[half] &= ColumnsOf<T::kTile>(interval, first + 2 * (lane & 3));
            }
            if (view & kBySegment) {
              const int id = SegmentOf(params.masks, batch(), row + 8 * half);
              seen.bits[half] &= ColumnsOfSegment<T::kTile>(params.masks, batch(), id, first, lane);
            }
          }
          scores.Softmax(blocks, p, sums, my_tiles == 0, seen, T::kTile, opaque_zero);
        };
        compute(my_tiles, is_last, softmax, [&] {
          ring.Next();
          if (!is_last) load_plan();
        });
        ++my_tiles;
      } while (!is_last);
    } else {
      const int tiles = ptx::LoadSharedAs<int>(first_row_slot + 4);  // of the item
      my_tiles = CountTiles<T::kTile>(params, group_row, kRows);
      // Tiles that all rows of this warpgroup see in full.
      const int full_tiles =
          (params.is_causal ? min(params.length_kv, group_row + 1) : params.length_kv) / T::kTile;
      const int row = group_row + 16 * warp + lane / 4;
      if (my_tiles > 0) load_scales();
#pragma unroll 1
      for (int tile = 0; tile < my_tiles; ++tile) {
        const auto softmax = [&](auto blocks, uint32_t (&p)[T::kBlocks][Pv::kRegisters]) {
          if (tile < full_tiles) {
            scores.Softmax(blocks, p, sums, tile == 0, Everything(), T::kTile, opaque_zero);
            return;
          }
          const auto keys = [&](int row) {  // of this tile
            return (params.is_causal ? min(row + 1, params.length_kv) : params.length_kv) -
                   tile * T::kTile;
          };
          const int first_key = 2 * (lane & 3);
          const KeysBelow seen{{keys(row) - first_key, keys(row + 8) - first_key}};
          scores.Softmax(blocks, p, sums, tile == 0, seen, keys(group_row + kRows - 1),
                         opaque_zero);
        };
        compute(tile, tile + 1 == my_tiles, softmax, [&] {
          ring.Next();
          if (tile + 1 < my_tiles) load_scales();
        });
      }
      if (my_tiles == 0) ptx::BarrierArrive(barriers.QEmpty(warpgroup));
      // Tiles that only the other warpgroups see.
#pragma unroll 1
      for (int tile = my_tiles; tile < tiles; ++tile, ring.Next()) {
        ptx::BarrierWait(barriers.KFull(ring.stage), ring.parity);
        ptx::BarrierArrive(barriers.KEmpty(ring.stage));
        ptx::BarrierWait(barriers.VFull(ring.stage), ring.parity);
        release(barriers.VEmpty(ring.stage));
      }
    }
    float row_sum[2];
    sums.FinishRowSums(row_sum, scores.sum, my_tiles);
    if constexpr (!T::kExactSum && Pv::kSumsRows) {  // all four threads of a row add up theirs
      scores.sum[0] = row_sum[0] / 4;
      scores.sum[1] = row_sum[1] / 4;
    }
    ptx::BarrierWait(barriers.TableFull(), turn & 1);
    if (group_row < params.length_q) {
      const int first_row = table.first_query + warpgroup * kRows + 16 * warp;
      // By turns, where all channels at once would be too many registers.
      const auto finish = [&](auto first) {
        constexpr int kFirst = decltype(first)::value;
        float o[T::kTurn / 8][4];
        sums.template Finish<kFirst>(o, my_tiles);
        FinishRows<T::kMasked, kFirst>(params, table, first_row + lane / 4, lane, o, scores.max,
                                       scores.sum, row_sum);
        WithOutputType(params.out_type, [&](auto type) {
          StoreTile<decltype(type), kFirst>(params, table, first_row, lane, output, o);
        });
      };
      finish(std::integral_constant<int, 0>());
      if constexpr (T::kHeadDim > T::kTurn) finish(std::integral_constant<int, T::kTurn>());
      // What comes next there is a copy of the bias.
      if constexpr (T::kBiasInOutput) ptx::FenceAsyncProxy();
    }
    ptx::BarrierArrive(barriers.TableEmpty());
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    AttentionKernel(const __grid_constant__ AttentionParams params,
                    const __grid_constant__ TensorMaps maps, const __grid_constant__ Cut cut) {
  extern __shared__ uint8_t shared_memory[];
  const uint32_t shared = (ptx::SharedAddress(shared_memory) + 1023) & ~1023u;
  const Barriers<T> barriers{shared + T::kBarriers};
  auto& table = *reinterpret_cast<OutputTable<T::kHeadDim>*>(
      shared_memory + (shared - ptx::SharedAddress(shared_memory)) + T::kTable);
  const Work<T> work{cut};

  if (threadIdx.x == 0) barriers.Init();
  T::Pv::Prepare(shared + T::kV, T::kStages);
  ptx::FenceAsyncProxy();
  __syncthreads();
  cudaGridDependencySynchronize();  // see Launch

  if (threadIdx.x < 128) {
    ptx::RegistersDown<T::kProducerRegisters>();
    if constexpr (T::kMasked) {
      if (threadIdx.x < 32) ProduceSeenKv<T>(params, maps, work, shared, barriers);
    } else {
      if (threadIdx.x == 0) ProduceKv<T>(params, maps, work, shared, barriers);
    }
    if (threadIdx.x == 32) ProduceQ<T>(params, maps, work, shared, barriers);
    if (threadIdx.x >= 64) ProduceTable<T>(params, work, threadIdx.x - 64, table, barriers);
  } else {
    ptx::RegistersUp<T::kConsumerRegisters>();
    Consume<T>(params, maps, work, table, shared, barriers);
  }
}

template <class T>
cudaError_t Launch(const AttentionParams& params, cudaStream_t stream) {
  const uint64_t heads = params.batch * params.heads, kv_heads = params.batch * params.kv_heads;
  const int64_t groups = (params.length_q + kRows - 1) / kRows * static_cast<int64_t>(heads);
  // A plan has so many bits for the number of a tile.
  const int tiles = params.padded_kv / T::kTile;
  if (groups > INT32_MAX || (T::kMasked && tiles >= (1 << (32 - kTileShift)) - 1)) {
    return cudaErrorInvalidConfiguration;
  }
  TensorMaps maps{};
  cudaError_t error = Encode(
      &maps.q,
      {params.q, T::kHeadDim, static_cast<uint64_t>(params.padded_q), heads, T::kBoxRow, kRows});
  if (error != cudaSuccess) return error;
  error = Encode(&maps.k, {params.k, T::kHeadDim, static_cast<uint64_t>(params.padded_kv), kv_heads,
                           T::kBoxRow, T::kTile});
  if (error != cudaSuccess) return error;
  error = Encode(&maps.v, T::Pv::Map(params.v, params.padded_kv, kv_heads));
  if (error != cudaSuccess) return error;
  if constexpr (T::kCopiesBias) {
    error = EncodeBias(maps, params);
    if (error != cudaSuccess) return error;
  }
  error = cudaFuncSetAttribute(AttentionKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               T::kSharedBytes);
  if (error != cudaSuccess) return error;
  int device = 0, sms = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const Cut cut = CutQueries(static_cast<int64_t>(heads), params.length_q, T::kConsumers, sms,
                             !T::kMasked && !params.is_causal);
  const unsigned ctas = std::min(cut.items, static_cast<unsigned>(sms));
  // CTAs may start while the last of the quantization run, and wait for them: launch and prologue
  // take no time of their own then. Graphs are captured a custom call at a time, where there is
  // nothing to wait for, and some drivers capture no such launches.
  cudaStreamCaptureStatus capturing;
  error = cudaStreamIsCapturing(stream, &capturing);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = ctas;
  config.blockDim = T::kThreads;
  config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = capturing == cudaStreamCaptureStatusNone ? 1 : 0;
  return cudaLaunchKernelEx(&config, AttentionKernel<T>, params, maps, cut);
}

}  // namespace jax_sage::sm90
