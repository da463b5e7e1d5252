// The producers: what loads K and V, Q, and what the end of each item needs.
#pragma once

#include "common/epilogue.cuh"
#include "common/layout.h"
#include "common/masks.cuh"
#include "common/ptx.cuh"
#include "sm90/attention.h"
#include "sm90/barrier.cuh"
#include "sm90/traits.cuh"

namespace jax_sage::sm90 {

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
    const Extent extent =
        FindExtent<T::kTile>(params, item.head, item.first_row, item.groups * kRows);
#pragma unroll 1
    for (int tile = extent.first; tile < extent.end; ++tile, ring.Next()) {
      LoadStage<T>(params, maps, static_cast<int>(item.kv_head), tile, 0, shared, barriers, ring);
    }
  }
}
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
    [[maybe_unused]] Extent of_item;
    if constexpr (!T::kMasked) {
      of_item =
          FindExtent<T::kTile>(params, position.head, position.first_row, position.groups * kRows);
    }
#pragma unroll 1
    for (int group = 0; group < T::kConsumers; ++group) {
      const int row =
          group < position.groups ? position.first_row + group * kRows : params.length_q;
      const int batch = static_cast<int>(position.head) / params.heads;
      ptx::BarrierWait(barriers.QEmpty(group), ~turn & 1);
      const uint32_t rows = shared + T::Rows(group, turn);
      ptx::StoreSharedAs(rows + T::kRowAt, row);
      if constexpr (!T::kMasked) {
        ptx::StoreSharedAs(rows + T::kItemAt, of_item.first);
        ptx::StoreSharedAs(rows + T::kItemAt + 4, of_item.end);
      }
      if constexpr (T::kMasked || T::kBiased) {
        const int head = static_cast<int>(position.head) % params.heads;
        ptx::StoreSharedAs(rows + T::kBatchAt, batch);
        ptx::StoreSharedAs(rows + T::kHeadAt, head);
        if constexpr (T::kCopiesBias) {
          ptx::StoreSharedAs(rows + T::kBiasRowAt, RowOfBias(params, batch, head, row));
        }
        if constexpr (T::kMasked) {
          ptx::StoreSharedAs(rows + T::kMaskAt, MaskRow(params.masks, batch, head, row));
        }
      }
      if constexpr (T::kQInRegisters) {
        ptx::StoreSharedAs(rows + T::kQAt,
                           params.q + (position.head * params.padded_q + row) * T::kHeadDim);
      }
      if (row >= params.length_q) {  // nothing to load, nothing to do
        ptx::BarrierArrive(barriers.QFull(group));
        continue;
      }
      const bool with_intervals = T::kMasked || params.masks.rows != nullptr;
      constexpr int kBoundsBytes = T::kMasked ? 0 : sizeof(int4);
      ptx::BarrierExpect(
          barriers.QFull(group),
          T::kQBytes + T::kQScaleBytes + (with_intervals ? T::kIntervalBytes + kBoundsBytes : 0));
      if constexpr (!T::kQInRegisters) {
        CopyChannels<T::kHeadDim, kRows>(shared + T::kQ + group * T::kQBytes, &maps.q,
                                         barriers.QFull(group), row,
                                         static_cast<int>(position.head));
      }
      ptx::CopyBulk(shared + T::kQScales + group * T::kQScaleBytes,
                    params.q_scale + position.head * params.padded_q + row, T::kQScaleBytes,
                    barriers.QFull(group));
      if (with_intervals) {
        ptx::CopyBulk(shared + T::kIntervals + group * T::kIntervalBytes,
                      params.masks.rows + batch * params.masks.row_stride + row, T::kIntervalBytes,
                      barriers.QFull(group));
        if constexpr (!T::kMasked) {
          ptx::CopyBulk(rows + T::kBoundsAt,
                        params.masks.groups + batch * params.masks.group_stride + row / kRows,
                        kBoundsBytes, barriers.QFull(group));
        }
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
    PrepareOutput<T::kBySlot>(table, params, work.Find(params, turn), thread, 64);
    ptx::BarrierArrive(barriers.TableFull());
  }
}

}  // namespace jax_sage::sm90
