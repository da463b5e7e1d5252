// Quantized attention on Hopper's wgmma. DESIGN.md beside this file has the roles, the budgets of
// registers and shared memory, and what else was tried.
//
// A CTA stays on its SM and works off query tiles: 192 queries of one head. A producer warp loads K
// and V by TMA, running ahead into the next query tile; three consumer warpgroups own 64 queries
// each and work for themselves: QK^T, softmax, PV, one after the other. While one waits for the
// matrix unit or for its exponentials, the other two use what it leaves.
#pragma once

#include "common/epilogue.cuh"
#include "common/layout.h"
#include "common/ptx.cuh"
#include "sm90/attention.h"
#include "sm90/barrier.cuh"
#include "sm90/softmax.cuh"
#include "sm90/store.cuh"
#include "sm90/sums.cuh"
#include "sm90/wgmma.cuh"

namespace jax_sage::sm90 {

constexpr int kConsumers = 3;  // warpgroups
constexpr int kRows = 64;      // queries of a warpgroup
constexpr int kQueries = kConsumers * kRows;
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
constexpr int kSharedLimit = 227 * 1024;
// setmaxnreg waits until the registers are there: the CTA has what it was launched with.
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
              65536 / kThreads / 8 * 8 * (kConsumers + 1));

// kExactSum: P is summed before it is rounded too, for lse.
template <class Pv_, bool kExactSum_>
struct Traits {
  using Pv = Pv_;
  static constexpr bool kExactSum = kExactSum_;
  static constexpr int kHeadDim = Pv::kHeadDim;
  static constexpr int kTile = Pv::kTile;  // keys
  static constexpr int kBlocks = kTile / kBlockKv;
  static constexpr int kQBytes = kRows * kHeadDim;  // of a warpgroup
  static constexpr int kKBytes = kTile * kHeadDim;
  static constexpr int kScaleBytes = kBlocks * kKeyScales * 4;
  static constexpr int kStageBytes = kKBytes + Pv::kStride + kScaleBytes;
  static constexpr int kQScaleBytes = kRows * 4;
  static constexpr int kOutputBytes = kRows * kHeadDim * 4;
  static constexpr int kMaxStages = 6;
  static constexpr int kFixedBytes = kConsumers * (kQBytes + kQScaleBytes + kOutputBytes) + 16 +
                                     int{sizeof(OutputTable<kHeadDim>)} +
                                     8 * (2 + 2 * kConsumers + 4 * kMaxStages) + 1024;
  static constexpr int kFitting = (kSharedLimit - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  // Shared memory; tiles first, they must be aligned to 1024 bytes for the swizzle.
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kConsumers * kQBytes;
  static constexpr int kV = kK + kStages * kKBytes;
  static constexpr int kOutput = kV + kStages * Pv::kStride;
  static constexpr int kQScales = kOutput + kConsumers * kOutputBytes;
  static constexpr int kScales = kQScales + kConsumers * kQScaleBytes;
  static constexpr int kFirstRows = kScales + kStages * kScaleBytes;
  static constexpr int kTable = kFirstRows + 16;
  static constexpr int kBarriers = kTable + int{sizeof(OutputTable<kHeadDim>)};
  static constexpr int kBarrierCount = 2 + 2 * kConsumers + 4 * kStages;
  static constexpr int kSharedBytes = kBarriers + kBarrierCount * 8 + 1024;  // to align
  static_assert(kStages >= 3, "the warpgroups drift apart by more than a tile");
  static_assert(kKBytes % 1024 == 0 && Pv::kStride % 1024 == 0 && kQBytes % 1024 == 0);
  static_assert(kSharedBytes <= kSharedLimit);
};

template <int kStages>
struct Barriers {
  uint32_t base;
  __device__ uint32_t TableFull() const { return base; }
  __device__ uint32_t TableEmpty() const { return base + 8; }
  __device__ uint32_t QFull(int group) const { return base + 8 * (2 + group); }
  __device__ uint32_t QEmpty(int group) const { return base + 8 * (2 + kConsumers + group); }
  __device__ uint32_t KFull(int stage) const { return base + 8 * (2 + 2 * kConsumers + stage); }
  __device__ uint32_t KEmpty(int stage) const { return KFull(kStages + stage); }
  __device__ uint32_t VFull(int stage) const { return KFull(2 * kStages + stage); }
  __device__ uint32_t VEmpty(int stage) const { return KFull(3 * kStages + stage); }

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

// The query tiles of this CTA, in turns: of all `items`, every gridDim.x-th.
struct Work {
  unsigned items;
  __device__ static unsigned Item(unsigned turn) { return blockIdx.x + turn * gridDim.x; }
  __device__ bool Any(unsigned turn) const { return Item(turn) < items; }
  __device__ Position Find(const AttentionParams& params, unsigned turn) const {
    return FindPosition<kQueries>(params, Item(turn), items);
  }
};

// One thread loads K and V.
template <class T>
__device__ __forceinline__ void ProduceKv(const AttentionParams& params, const TensorMaps& maps,
                                          Work work, uint32_t shared,
                                          Barriers<T::kStages> barriers) {
  const int blocks = params.padded_kv / kBlockKv;
  Ring<T::kStages> ring;
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    const Position position = work.Find(params, turn);
    const int kv_head = static_cast<int>(position.kv_head);
    const float* scales = params.k_scale + position.kv_head * blocks * kKeyScales;
    const int tiles = CountTiles<T::kTile>(params, position.first_row, kQueries);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile, ring.Next()) {
      const unsigned stage = ring.stage;
      // The last tile may have fewer blocks.
      const int tile_blocks = min(T::kBlocks, blocks - tile * T::kBlocks);
      const int scale_bytes = tile_blocks * kKeyScales * 4;
      // A barrier that was never used counts as completed for parity 1.
      ptx::BarrierWait(barriers.KEmpty(stage), ring.parity ^ 1);
      ptx::BarrierExpect(barriers.KFull(stage), T::kKBytes + scale_bytes);
      ptx::CopyBox(shared + T::kK + stage * T::kKBytes, &maps.k, barriers.KFull(stage), 0,
                   tile * T::kTile, kv_head);
      ptx::CopyBulk(shared + T::kScales + stage * T::kScaleBytes,
                    scales + tile * T::kBlocks * kKeyScales, scale_bytes, barriers.KFull(stage));
      ptx::BarrierWait(barriers.VEmpty(stage), ring.parity ^ 1);
      ptx::BarrierExpect(barriers.VFull(stage), T::Pv::kBytes);
      T::Pv::Load(shared + T::kV + stage * T::Pv::kStride, &maps.v, barriers.VFull(stage), tile,
                  kv_head);
    }
  }
}

// One thread loads Q, for each warpgroup as soon as that is done with the query tile before, and
// says which queries they are.
template <class T>
__device__ __forceinline__ void ProduceQ(const AttentionParams& params, const TensorMaps& maps,
                                         Work work, uint32_t shared,
                                         Barriers<T::kStages> barriers) {
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    const Position position = work.Find(params, turn);
#pragma unroll 1
    for (int group = 0; group < kConsumers; ++group) {
      const int row = position.first_row + group * kRows;
      ptx::BarrierWait(barriers.QEmpty(group), ~turn & 1);
      ptx::StoreSharedAs(shared + T::kFirstRows + group * 4, row);
      if (row >= params.length_q) {  // nothing to load, nothing to do
        ptx::BarrierArrive(barriers.QFull(group));
        continue;
      }
      ptx::BarrierExpect(barriers.QFull(group), T::kQBytes + T::kQScaleBytes);
      ptx::CopyBox(shared + T::kQ + group * T::kQBytes, &maps.q, barriers.QFull(group), 0, row,
                   static_cast<int>(position.head));
      ptx::CopyBulk(shared + T::kQScales + group * T::kQScaleBytes,
                    params.q_scale + position.head * params.padded_q + row, T::kQScaleBytes,
                    barriers.QFull(group));
    }
  }
}

// 64 threads prepare what the end of each query tile needs.
template <class T>
__device__ __forceinline__ void ProduceTable(const AttentionParams& params, Work work, int thread,
                                             OutputTable<T::kHeadDim>& table,
                                             Barriers<T::kStages> barriers) {
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    ptx::BarrierWait(barriers.TableEmpty(), ~turn & 1);
    PrepareOutput(table, params, work.Find(params, turn), thread, 64);
    ptx::BarrierArrive(barriers.TableFull());
  }
}

template <class T>
__device__ __forceinline__ void Consume(const AttentionParams& params, Work work,
                                        const OutputTable<T::kHeadDim>& table, uint32_t shared,
                                        Barriers<T::kStages> barriers) {
  using Pv = typename T::Pv;
  const int lane = threadIdx.x % 32;
  // The same in all lanes: the compiler keeps what follows from it in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
  const int warp = threadIdx.x % 128 / 32;
  const uint32_t output = shared + T::kOutput + warpgroup * T::kOutputBytes + warp * 512;
  const uint64_t q = ptx::Descriptor<T::kHeadDim>(shared + T::kQ + warpgroup * T::kQBytes);
  const uint64_t k_tiles = ptx::Descriptor<T::kHeadDim>(shared + T::kK);
  const uint64_t v_tiles = Pv::Descriptor(shared + T::kV);
  // For V, which only wgmma reads. What threads have read each of them releases:
  // compute-sanitizer's racecheck does not follow a warp's reads through __syncwarp to an arrival
  // of one lane.
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) ptx::BarrierArrive(barrier);
  };
  const uint32_t opaque_zero = work.items >> 31;
  Ring<T::kStages> ring;
  for (unsigned turn = 0; work.Any(turn); ++turn) {
    ptx::BarrierWait(barriers.QFull(warpgroup), turn & 1);
    const int group_row = ptx::LoadSharedAs<int>(shared + T::kFirstRows + warpgroup * 4);
    const int row = group_row + 16 * warp + lane / 4;
    const int tiles = CountTiles<T::kTile>(params, group_row - warpgroup * kRows, kQueries);
    const int my_tiles = CountTiles<T::kTile>(params, group_row, kRows);
    // Tiles that all rows of this warpgroup see in full.
    const int full_tiles =
        (params.is_causal ? min(params.length_kv, group_row + 1) : params.length_kv) / T::kTile;
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
    if (my_tiles > 0) load_scales();
#pragma unroll 1
    for (int tile = 0; tile < my_tiles; ++tile) {
      const unsigned stage = ring.stage;
      const uint32_t v_full = barriers.VFull(stage), v_parity = ring.parity;
      const uint64_t k = k_tiles + stage * (T::kKBytes / 16);
      const uint64_t v = v_tiles + stage * (Pv::kStride / 16);
      ptx::WgmmaFence();
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        IssueQk<T::kHeadDim>(scores.s[block], q, k + block * (kBlockKv * T::kHeadDim / 16));
      }
      uint32_t p[T::kBlocks][Pv::kRegisters];
      if (tile < full_tiles) {
        scores.template Softmax<false>(p, sums, tile == 0, {}, 0, opaque_zero);
      } else {
        const auto keys = [&](int row) {  // of this tile
          return (params.is_causal ? min(row + 1, params.length_kv) : params.length_kv) -
                 tile * T::kTile;
        };
        const int first_key = 2 * (lane & 3);
        const int visible[2] = {keys(row) - first_key, keys(row + 8) - first_key};
        scores.template Softmax<true>(p, sums, tile == 0, visible, keys(group_row + kRows - 1),
                                      opaque_zero);
      }
      ptx::BarrierArrive(barriers.KEmpty(stage));
      if (tile + 1 == my_tiles) ptx::BarrierArrive(barriers.QEmpty(warpgroup));
      ptx::BarrierWait(v_full, v_parity);
      sums.Issue(p, v, tile);
      // Beneath PV.
      ring.Next();
      if (tile + 1 < my_tiles) load_scales();
      ptx::WgmmaWait<0>();
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) ptx::Pin(p[block]);
      sums.Retire(tile);
      release(barriers.VEmpty(stage));
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
    float o[T::kHeadDim / 8][4], row_sum[2];
    sums.Finish(o, row_sum, scores.sum, my_tiles);
    if constexpr (!T::kExactSum && Pv::kSumsRows) {  // all four threads of a row add up theirs
      scores.sum[0] = row_sum[0] / 4;
      scores.sum[1] = row_sum[1] / 4;
    }
    ptx::BarrierWait(barriers.TableFull(), turn & 1);
    if (my_tiles > 0) {
      const int first_row = table.first_query + warpgroup * kRows + 16 * warp;
      FinishRows<T::kHeadDim>(params, table, first_row + lane / 4, lane, o, scores.max, scores.sum,
                              row_sum);
      WithOutputType(params.out_type, [&](auto type) {
        StoreTile<decltype(type)>(params, table, first_row, lane, output, o);
      });
    }
    ptx::BarrierArrive(barriers.TableEmpty());
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    AttentionKernel(const __grid_constant__ AttentionParams params,
                    const __grid_constant__ TensorMaps maps, unsigned items) {
  extern __shared__ uint8_t shared_memory[];
  const uint32_t shared = (ptx::SharedAddress(shared_memory) + 1023) & ~1023u;
  const Barriers<T::kStages> barriers{shared + T::kBarriers};
  auto& table = *reinterpret_cast<OutputTable<T::kHeadDim>*>(
      shared_memory + (shared - ptx::SharedAddress(shared_memory)) + T::kTable);
  const Work work{items};

  if (threadIdx.x == 0) barriers.Init();
  T::Pv::Prepare(shared + T::kV, T::kStages);
  ptx::FenceAsyncProxy();
  __syncthreads();

  if (threadIdx.x < 128) {
    ptx::RegistersDown<kProducerRegisters>();
    if (threadIdx.x == 0) ProduceKv<T>(params, maps, work, shared, barriers);
    if (threadIdx.x == 32) ProduceQ<T>(params, maps, work, shared, barriers);
    if (threadIdx.x >= 64) ProduceTable<T>(params, work, threadIdx.x - 64, table, barriers);
  } else {
    ptx::RegistersUp<kConsumerRegisters>();
    Consume<T>(params, work, table, shared, barriers);
  }
}

template <class T>
cudaError_t Launch(const AttentionParams& params, cudaStream_t stream) {
  const uint64_t heads = params.batch * params.heads, kv_heads = params.batch * params.kv_heads;
  const int64_t items = (params.length_q + kQueries - 1) / kQueries * static_cast<int64_t>(heads);
  if (items > INT32_MAX) return cudaErrorInvalidConfiguration;
  TensorMaps maps;
  cudaError_t error = Encode(
      &maps.q,
      {params.q, T::kHeadDim, static_cast<uint64_t>(params.padded_q), heads, T::kHeadDim, kRows});
  if (error != cudaSuccess) return error;
  error = Encode(&maps.k, {params.k, T::kHeadDim, static_cast<uint64_t>(params.padded_kv), kv_heads,
                           T::kHeadDim, T::kTile});
  if (error != cudaSuccess) return error;
  error = Encode(&maps.v, T::Pv::Map(params.v, params.padded_kv, kv_heads));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(AttentionKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               T::kSharedBytes);
  if (error != cudaSuccess) return error;
  int device = 0, sms = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const unsigned ctas = static_cast<unsigned>(items < sms ? items : sms);
  AttentionKernel<T>
      <<<ctas, kThreads, T::kSharedBytes, stream>>>(params, maps, static_cast<unsigned>(items));
  return cudaGetLastError();
}

}  // namespace jax_sage::sm90
