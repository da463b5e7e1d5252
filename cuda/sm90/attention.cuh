// Quantized attention on Hopper's wgmma. DESIGN.md beside this file has the roles, the budgets of
// registers and shared memory, and what else was tried.
//
// A CTA stays on its SM and works off items: up to 64 queries of one head for each of two to five
// consumer warpgroups, which work for themselves: QK^T, softmax, PV, one after the other (but for
// kQkAhead). While one waits for the matrix unit or for its exponentials, the others use what it
// leaves. A producer warp loads K and V by TMA, running ahead into the next item.
//
// With a mask, or segments that intervals do not describe, the producer warp finds the tiles that
// any of the queries may see, loads these alone, and says with each what each warpgroup sees of it.
// A bias is loaded by the consumer warps.
#pragma once

#include "common/epilogue.cuh"
#include "common/layout.h"
#include "common/masks.cuh"
#include "common/overlap.cuh"
#include "common/ptx.cuh"
#include "sm90/attention.h"
#include "sm90/barrier.cuh"
#include "sm90/bias.cuh"
#include "sm90/items.cuh"
#include "sm90/producer.cuh"
#include "sm90/softmax.cuh"
#include "sm90/store.cuh"
#include "sm90/traits.cuh"

namespace jax_sage::sm90 {

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
  // Computed anew for each tile otherwise: 15 instructions, one after the other.
  const uint64_t k_tiles = ptx::Uniform(ptx::Descriptor<T::kBoxRow>(shared + T::kK));
  const uint64_t v_tiles = ptx::Uniform(Pv::Descriptor(shared + T::kV));
  [[maybe_unused]] const uint64_t q_tile =
      ptx::Uniform(ptx::Descriptor<T::kBoxRow>(shared + T::kQ + warpgroup * T::kQBytes));
  // The same: otherwise five instructions.
  uint32_t scales = shared + T::kScales + (lane & 3) * 4;
  asm volatile("" : "+r"(scales));
  // For V, which only wgmma reads. What threads have read each of them releases:
  // compute-sanitizer's racecheck does not follow a warp's reads through __syncwarp to an arrival
  // of one lane.
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    ptx::BarrierArriveOfWarp(barrier);
  };
  const uint32_t opaque_zero = work.cut.items >> 31;
  const int bias_warp = 4 * warpgroup + __shfl_sync(0xffffffffu, warp, 0);
  BiasBuffer<Barriers<T>::kBiasEmpty> bias(shared + T::kBias + bias_warp * T::kBiasOfWarp,
                                           barriers.BiasFull(bias_warp), maps,
                                           params.masks.bias_type, lane);
  Ring<T::kStages> ring;
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    ptx::BarrierWait(barriers.QFull(warpgroup), turn & 1);
    const uint32_t rows = shared + T::Rows(warpgroup, turn);
    const int group_row = ptx::LoadSharedAs<int>(rows + T::kRowAt);
    std::conditional_t<T::kQInRegisters, QueryFragments<T::kHeadDim>, uint64_t> q;
    if constexpr (!T::kQInRegisters) {
      q = q_tile;
    } else if (group_row < params.length_q) {
      q.Load(ptx::LoadSharedAs<const int8_t*>(rows + T::kQAt), 16 * warp + lane / 4, lane);
    }
    Scores<T> scores;
    if constexpr (T::kMasked) {
      // With plans the compiler does not see that a warp agrees on when to promote: to wait there
      // would part the warp, for all that it knows, and take the loop its uniform registers.
      ptx::WaitForStores();
      __syncwarp();
    }
    Pv sums(output + lane * 16);
    const auto load_scales = [&] {
      ptx::BarrierWait(barriers.KFull(ring.stage), ring.parity);
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        scores.k_scale[block] =
            ptx::LoadSharedAs<float>(scales + ring.stage * T::kScaleBytes + block * kKeyScales * 4);
      }
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scores.q_scale[half] =
          ptx::LoadSharedAs<float>(shared + T::kQScales + warpgroup * T::kQScaleBytes +
                                   (16 * warp + lane / 4 + 8 * half) * 4);
    }
    // QK^T of the tile in the ring's stage.
    const auto issue_qk = [&] {
      const uint64_t k = k_tiles + ring.stage * (T::kKBytes / 16);
      ptx::WgmmaFence();
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        static_assert(T::kBlocks == 1 || T::kHeadDim <= kBoxChannels);
        IssueQk<T::kHeadDim>(scores.s[block], q, k + block * (kBlockKv * T::kHeadDim / 16));
      }
    };
    const auto wait_for_qk = [&] {
      ptx::WgmmaWait<0>();
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) ptx::Pin(scores.s[block]);
    };
    // The tile in the ring's stage, the count-th of this warpgroup. `softmax` makes P of the
    // scores; `next` moves the ring on, beneath PV, and says whether there is another tile.
    const auto compute = [&](int count, auto softmax, auto next) {
      const unsigned stage = ring.stage;
      const uint32_t v_full = barriers.VFull(stage), v_parity = ring.parity;
      const uint64_t v = v_tiles + stage * (Pv::kStride / 16);
      if constexpr (!T::kPromotesBeneathQk) sums.Begin(count, !T::kMasked);
      if constexpr (!T::kQkAhead) issue_qk();
      if constexpr (T::kPromotesBeneathQk) {
        // Of PV there is nothing left to wait for; ptxas wants to see that behind QK^T too.
        ptx::WgmmaWait<T::kBlocks>();
        sums.Retire();
        sums.Begin(count, !T::kMasked);
      }
      // V is there by now, as a rule.
      const bool has_v = ptx::BarrierTest(v_full, v_parity);
      uint32_t p[T::kBlocks][Pv::kRegisters];
      softmax(p);
      ptx::BarrierArrive(barriers.KEmpty(stage));
      if (!has_v) ptx::BarrierWait(v_full, v_parity);
      sums.Issue(p, v, count);
      const bool more = next();
      const auto retire = [&] {
#pragma unroll
        for (int block = 0; block < T::kBlocks; ++block) ptx::Pin(p[block]);
        sums.Retire();
        release(barriers.VEmpty(stage));
      };
      if (T::kQkAhead && more) {
        issue_qk();
        ptx::WgmmaWait<1>();
        retire();
      } else {
        ptx::WgmmaWait<0>();
        retire();
      }
      // QK^T is waited for as well, as ptxas follows no matrix instruction around the loop.
      if constexpr (T::kQkAhead) wait_for_qk();
    };
    // Of a row, `half` of this thread's two.
    const auto interval_of = [&](int half) {
      return ptx::LoadSharedAs<int2>(shared + T::kIntervals + warpgroup * T::kIntervalBytes +
                                     (16 * warp + lane / 4 + 8 * half) * 8);
    };
    const auto row = [&] {
      // Of five warpgroups each has a register less than it needs to keep this.
      const int first = T::kConsumers == 5 ? ptx::LoadSharedAs<int>(rows + T::kRowAt) : group_row;
      return first + 16 * warp + lane / 4;
    };
    const auto batch = [&] { return ptx::LoadSharedAs<int>(rows + T::kBatchAt); };
    [[maybe_unused]] const auto head = [&] { return ptx::LoadSharedAs<int>(rows + T::kHeadAt); };
    [[maybe_unused]] int bias_row = 0;
    if constexpr (T::kCopiesBias) {
      bias_row = ptx::LoadSharedAs<int>(rows + T::kBiasRowAt) + bias.FirstRow(bias_warp % 4);
      bias_row = __shfl_sync(0xffffffffu, bias_row, 0);
    }
    // Of each tile of keys that the warpgroup looks at, in order.
    const auto copy_bias = [&](int tile) {
      if constexpr (T::kCopiesBias) {
        if (bias.IsCopied()) bias.Copy(maps, tile, bias_row);
      }
    };
    const auto read_bias = [&](int tile) {
      if constexpr (T::kCopiesBias) {
        if (bias.IsCopied()) {
          bias.Read(scores.bias[0]);
        } else {
          BiasRows(params, batch(), head(), row()).Spread(scores.bias[0]);
        }
      } else if constexpr (T::kBiased) {
        BiasRows(params, batch(), head(), row()).Load(scores.bias[0], tile * T::kTile, lane);
      }
    };
    // Tiles of the item that only the other warpgroups see.
    [[maybe_unused]] const auto pass = [&](int tiles) {
#pragma unroll 1
      for (; tiles > 0; --tiles, ring.Next()) {
        ptx::BarrierWait(barriers.KFull(ring.stage), ring.parity);
        ptx::BarrierArrive(barriers.KEmpty(ring.stage));
        ptx::BarrierWait(barriers.VFull(ring.stage), ring.parity);
        release(barriers.VEmpty(ring.stage));
      }
    };
    [[maybe_unused]] const auto item_first = [&] {
      return ptx::LoadSharedAs<int>(rows + T::kItemAt);
    };
    [[maybe_unused]] const auto bounds = [&] {
      return params.masks.rows != nullptr ? ptx::LoadSharedAs<int4>(rows + T::kBoundsAt)
                                          : BoundsOf(params, group_row, kRows);
    };
    int my_tiles;
    if constexpr (T::kMasked) {
      my_tiles = 0;
      uint32_t plan, words[2];
      const auto load_plan = [&] {
        load_scales();
        plan = ptx::LoadSharedAs<uint32_t>(shared + T::kPlans + ring.stage * 4);
        if (plan >> (kViewBits * warpgroup) & kAll) copy_bias(static_cast<int>(plan >> kTileShift));
        // Far away: needed after the next QK^T.
        if (plan >> (kViewBits * warpgroup) & kByMask) {
          const auto* mask_row = ptx::LoadSharedAs<const uint32_t*>(rows + T::kMaskAt);
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
          ptx::BarrierWait(barriers.VFull(ring.stage), ring.parity);
          release(barriers.VEmpty(ring.stage));
          ring.Next();
          if (!is_last) load_plan();
          continue;
        }
        const auto softmax = [&](uint32_t (&p)[T::kBlocks][Pv::kRegisters]) {
          const int tile = static_cast<int>(plan >> kTileShift), first = tile * T::kTile;
          read_bias(tile);
          if (view == kAll) {
            scores.Softmax(p, sums, my_tiles == 0, Everything(), T::kTile, opaque_zero);
            return;
          }
          SeenKeys<T::kTile> seen;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            seen.bits[half] = view & kByMask ? words[half] : ~0u;
            if (view & kByInterval) {
              seen.bits[half] &= ColumnsOf<T::kTile>(interval_of(half), first + 2 * (lane & 3));
            }
            if (view & kBySegment) {
              const int id = SegmentOf(params.masks, batch(), row() + 8 * half);
              seen.bits[half] &= ColumnsOfSegment<T::kTile>(params.masks, batch(), id, first, lane);
            }
          }
          scores.Softmax(p, sums, my_tiles == 0, seen, T::kTile, opaque_zero);
        };
        compute(my_tiles, softmax, [&] {
          ring.Next();
          if (!is_last) load_plan();
          return !is_last;
        });
        ++my_tiles;
      } while (!is_last);
      ptx::BarrierArrive(barriers.QEmpty(warpgroup));
    } else {
      Extent mine{};
      if (group_row < params.length_q) mine = ExtentOf<T::kTile>(bounds());
      my_tiles = mine.end - mine.first;
      if (my_tiles == 0) mine.first = mine.end = item_first();
      pass(mine.first - item_first());
      if (my_tiles > 0) {
        load_scales();
        copy_bias(mine.first);
        read_bias(mine.first);
        if constexpr (T::kQkAhead) {
          issue_qk();
          wait_for_qk();
        }
      }
      const int first_whole = mine.first_whole - mine.first;
      const int end_whole = mine.end_whole - mine.first;
#pragma unroll 1
      for (int count = 0; count < my_tiles; ++count) {
        const auto softmax = [&](uint32_t (&p)[T::kBlocks][Pv::kRegisters]) {
          const int tile = mine.first + count;
          // Its buffer has been read, beneath PV of the tile before.
          if (count + 1 < my_tiles) copy_bias(tile + 1);
          if (count >= first_whole && count < end_whole) {
            scores.Softmax(p, sums, count == 0, Everything(), T::kTile, opaque_zero);
            return;
          }
          SeenKeys<T::kTile> seen;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int2 interval = make_int2(0, params.length_kv);
            if (params.is_causal) interval.y = min(row() + 8 * half + 1, interval.y);
            if (params.masks.rows != nullptr) interval = interval_of(half);
            seen.bits[half] = ColumnsOf<T::kTile>(interval, tile * T::kTile + 2 * (lane & 3));
          }
          int keys = T::kTile;  // of the tile that any of the rows may see
          if constexpr (T::kBlocks > 1) keys = bounds().y - tile * T::kTile;
          scores.Softmax(p, sums, count == 0, seen, keys, opaque_zero);
        };
        compute(count, softmax, [&] {
          ring.Next();
          if (count + 1 < my_tiles) {
            load_scales();
            read_bias(mine.first + count + 1);
          }
          return count + 1 < my_tiles;
        });
      }
      ptx::BarrierArrive(barriers.QEmpty(warpgroup));
      pass(ptx::LoadSharedAs<int>(rows + T::kItemAt + 4) - mine.end);
    }
    float row_sum[2];
    sums.FinishRowSums(row_sum, scores.sum);
    ptx::BarrierWait(barriers.TableFull(), turn & 1);
    if ((T::kMasked ? group_row : ptx::LoadSharedAs<int>(rows + T::kRowAt)) < params.length_q) {
      const int first_row =
          table.first_query + warpgroup * kRows + 16 * __shfl_sync(0xffffffffu, warp, 0);
      const RowEnds ends =
          EndsOf<T::kBySlot>(params, table, first_row + lane / 4, lane, scores.max, row_sum);
      // By turns, where all channels at once would be too many registers.
      const auto finish = [&](auto first) {
        constexpr int kFirst = decltype(first)::value;
        float o[T::kTurn / 8][4];
        sums.template Finish<kFirst>(o, my_tiles);
        FinishChannels<T::kBySlot, kFirst>(params, table, ends, lane, o);
        WithOutputType(params.out_type, [&](auto type) {
          // Sums that are still to be finished are there too, of other channels.
          constexpr int kOffset = Pv::kSumsRows ? kFirst * kRowsOfWarp * 4 : 0;
          // The lane anew, or what it makes of it stays in registers from item to item.
          StoreTile<decltype(type), kFirst>(params, maps, table, first_row, ptx::ThreadIndex() % 32,
                                            output + kOffset, o);
        });
      };
      if (T::kWithLse && params.with_lse) {
        StoreLse<T::kBySlot>(params, table, ends, first_row + lane / 4, lane, scores.max,
                             scores.sum);
      }
      finish(std::integral_constant<int, 0>());
      if constexpr (T::kHeadDim > T::kTurn) finish(std::integral_constant<int, T::kTurn>());
      if constexpr (T::kHeadDim > 2 * T::kTurn) finish(std::integral_constant<int, 2 * T::kTurn>());
      // What comes next there is a copy of the bias.
      if constexpr (T::kBiasInOutput) {
        ptx::WaitForStores();
        ptx::FenceAsyncProxy();
        __syncwarp();
      }
    }
    ptx::BarrierArrive(barriers.TableEmpty());
  }
  ptx::WaitForStores();
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
  WaitForPrevious();
  LetNextStart();
  if (T::kBySlot && params.scattered != nullptr) {
    bool some = false;
    for (int64_t batch = threadIdx.x; batch < params.batch; batch += T::kThreads) {
      some = some || Work<T>::IsOurs(params, batch);
    }
    if (!__syncthreads_or(some)) return;
  }

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
  static_assert(T::kMasked || KeysOfPart(T::kHeadDim) % T::kTile == 0,
                "without a plan a tile that somebody sees has codes only if it lies in one part");
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
  const uint64_t row = static_cast<uint64_t>(params.head_dim) * SizeOf(params.out_type);
  const uint64_t tokens = params.batch * params.length_q;
  maps.stores_boxes =
      row % 16 == 0 && reinterpret_cast<uintptr_t>(params.out) % 16 == 0 && tokens <= INT32_MAX;
  if (maps.stores_boxes) {
    error = Encode(&maps.out, {params.out, row, static_cast<uint64_t>(params.heads), tokens,
                               kBoxOfOutput, 1, kRowsOfWarp});
    if (error != cudaSuccess) return error;
  }
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
                             !T::kMasked && !T::kBiased && params.alike);
  const unsigned ctas = std::min(cut.items, static_cast<unsigned>(sms));
  return LaunchOverlapping(AttentionKernel<T>, ctas, T::kThreads, T::kSharedBytes, stream, params,
                           maps, cut);
}

}  // namespace jax_sage::sm90
