// Quantized attention on Hopper's wgmma: INT8 QK^T, E4M3 PV with FP16 partial sums.
//
// A CTA stays on its SM and works off query tiles: 128 queries of one head. A producer warp loads
// by TMA, running ahead into the next query tile; two consumer warpgroups own 64 queries each and
// take turns at the matrix unit. Per tile of 128 keys a consumer issues PV of the tile before
// together with QK^T of this one, waits, and hands the unit over; its softmax, and the addition of
// the FP16 sums to the FP32 output, run while the other warpgroup's matrix instructions do.
//
// The row maximum is not computed for most tiles. P = 2^(S c - m + 8) is computed with the m of the
// tiles before; that no P has reached 256 is read off the packed codes, four at a time (E4M3 codes
// of positive numbers are ordered like integers: code + 8 has its top bit set from 256 on). Where
// it has, the tile is done again after raising m, with a power of two to spare. m is an integer, so
// P's mantissas do not depend on it; only what is subnormal in E4M3 does (below 2^-12 of the row's
// largest P, where an exact running maximum reaches 2^-13).
#include <cuda.h>

#include "common/epilogue.cuh"
#include "common/layout.h"
#include "common/ptx.cuh"
#include "sm90/attention.h"
#include "sm90/barrier.cuh"
#include "sm90/wgmma.cuh"

namespace jax_sage::sm90 {
namespace {

constexpr int kTile = 128;     // keys
constexpr int kConsumers = 2;  // warpgroups
constexpr int kRows = kBlockQ / kConsumers;
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kTableFull = 3, kTableEmpty = 4;  // named barriers; 1 and 2 are the turns
constexpr int kSumRows = 8;  // rows of ones behind V^T: PV's extra columns are row sums
// An FP16 sum runs over one tile.
static_assert(kPMax * kVMax * kTile <= 65504.0f, "an FP16 sum may not overflow");
// Powers of two by which a row's maximum may grow before its tile must be done again. Each costs
// as much of the range of P below the maximum: small weights behind a large score need that.
constexpr float kHeadroom = 1;
constexpr uint32_t kLimitOffset = 0x08080808;  // 0x80 - code of 256
constexpr uint32_t kLimitMask = 0x80808080;
constexpr uint32_t kOnes = 0x38383838;

template <int kHeadDim_, bool kExactSum_>
struct Traits {
  static constexpr bool kExactSum = kExactSum_;  // sum P before rounding too, for lse
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStages = 4;
  static constexpr int kQBytes = kBlockQ * kHeadDim;
  static constexpr int kKBytes = kTile * kHeadDim;
  static constexpr int kVBytes = kHeadDim * kTile;
  static constexpr int kVStride = (kHeadDim + kSumRows) * kTile;  // with the ones
  static constexpr int kScaleBytes = kTile / kBlockKv * kKeyScales * 4;
  static constexpr int kSums = (kHeadDim + kSumRows) / 4;  // registers of the FP16 sums
  // Shared memory; tiles first, they must be aligned to 1024 bytes for the swizzle.
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kQBytes;
  static constexpr int kV = kK + kStages * kKBytes;
  static constexpr int kScales = kV + kStages * kVStride;
  static constexpr int kTable = kScales + kStages * kScaleBytes;
  static constexpr int kBarriers = kTable + sizeof(ChannelTable<kHeadDim>);
  static constexpr int kBarrierCount = 2 + 4 * kStages;
  static constexpr int kSharedBytes = kBarriers + kBarrierCount * 8 + 1024;  // to align
  static_assert(kKBytes % 1024 == 0 && kVStride % 1024 == 0 && kQBytes % 1024 == 0, "alignment");
  static_assert(kSharedBytes <= 227 * 1024, "a CTA of sm_90 has 227 KiB of shared memory");
};

struct Barriers {
  uint32_t base;
  int stages;
  __device__ uint32_t QFull() const { return base; }
  __device__ uint32_t QEmpty() const { return base + 8; }
  __device__ uint32_t KFull(int stage) const { return base + 8 * (2 + stage); }
  __device__ uint32_t KEmpty(int stage) const { return base + 8 * (2 + stages + stage); }
  __device__ uint32_t VFull(int stage) const { return base + 8 * (2 + 2 * stages + stage); }
  __device__ uint32_t VEmpty(int stage) const { return base + 8 * (2 + 3 * stages + stage); }
};

// The query tiles of this CTA.
struct Work {
  unsigned item, items;
  __device__ bool Any() const { return item < items; }
  __device__ void Next() { item += gridDim.x; }
};

template <class T>
__device__ __forceinline__ void Produce(const AttentionParams& params, const TensorMaps& maps,
                                        Work work, uint32_t shared, const Barriers& barriers) {
  const int blocks = params.padded_kv / kBlockKv;
  // A barrier that was never used counts as completed for parity 1.
  uint32_t q_parity = 1;
  unsigned step = 0;  // tiles of keys so far, over all query tiles
  for (; work.Any(); work.Next(), q_parity ^= 1) {
    const Position position = FindPosition(params, work.item, work.items);
    const int kv_head = static_cast<int>(position.kv_head);
    const float* scales = params.k_scale + position.kv_head * blocks * kKeyScales;
    ptx::BarrierWait(barriers.QEmpty(), q_parity);
    ptx::BarrierExpect(barriers.QFull(), T::kQBytes);
    ptx::CopyBox(shared + T::kQ, &maps.q, barriers.QFull(), 0, position.first_row,
                 static_cast<int>(position.head));
    const int tiles = CountTiles<kTile>(params, position);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile, ++step) {
      const unsigned stage = step % T::kStages;
      const uint32_t parity = (step / T::kStages + 1) & 1;
      // The last tile may be one block of 64 keys.
      const int tile_blocks = min(kTile / kBlockKv, blocks - tile * (kTile / kBlockKv));
      const int scale_bytes = tile_blocks * kKeyScales * 4;
      ptx::BarrierWait(barriers.KEmpty(stage), parity);
      ptx::BarrierExpect(barriers.KFull(stage), T::kKBytes + scale_bytes);
      ptx::CopyBox(shared + T::kK + stage * T::kKBytes, &maps.k, barriers.KFull(stage), 0,
                   tile * kTile, kv_head);
      ptx::CopyBulk(shared + T::kScales + stage * T::kScaleBytes,
                    scales + tile * (kTile / kBlockKv) * kKeyScales, scale_bytes,
                    barriers.KFull(stage));
      ptx::BarrierWait(barriers.VEmpty(stage), parity);
      ptx::BarrierExpect(barriers.VFull(stage), T::kVBytes);
      ptx::CopyBox(shared + T::kV + stage * T::kVStride, &maps.v, barriers.VFull(stage),
                   tile * kTile, 0, kv_head);
    }
  }
}

// State of this thread's two rows (lane / 4 and lane / 4 + 8 of its warp's 16).
template <class T>
struct Rows {
  float o[T::kHeadDim / 8][4] = {};
  uint32_t partial[T::kSums] = {};  // FP16 pairs: the channels, then the row sums
  float max[2] = {-kInf, -kInf};
  float sum[2] = {0, 0};  // P before rounding, of this thread's columns
  float quantized_sum[2] = {0, 0};

  // Adds a quarter of the FP16 sums to the output.
  __device__ void PromoteQuarter(int quarter) {
    constexpr int kTiles = T::kHeadDim / 8 / 4;
#pragma unroll
    for (int i = quarter * kTiles; i < (quarter + 1) * kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 x = ptx::UnpackF16(partial[2 * i + half]);
        o[i][2 * half] += x.x;
        o[i][2 * half + 1] += x.y;
      }
    }
    if (quarter < 2) {
      quantized_sum[quarter] += ptx::UnpackF16(partial[T::kHeadDim / 4 + quarter]).x;
    }
  }
  __device__ void Promote() {
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) PromoteQuarter(quarter);
  }

  // The maximum has grown: what was summed so far counts less. Exact, alpha is a power of two. The
  // FP16 sums are promoted by then.
  __device__ void Rescale(const float (&alpha)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < T::kHeadDim / 8; ++i) {
        o[i][2 * half] *= alpha[half];
        o[i][2 * half + 1] *= alpha[half];
      }
      sum[half] *= alpha[half];
      quantized_sum[half] *= alpha[half];
    }
  }
};

// P from the scores with the present maximum, packed as A fragments; returns whether any P has
// reached 256, in the bits of kLimitMask. kPromote: adds the FP16 sums to the output on the way.
// Between the exponentials that costs the matrix unit nothing; a run of additions halves its rate.
template <bool kMasked, bool kPromote, class T>
__device__ __forceinline__ uint32_t ComputeP(const int32_t (&s)[kTile / 2], uint32_t (&p)[16],
                                             Rows<T>& rows, const float (&scale)[2][2],
                                             float (&sum)[2], const int (&visible)[2]) {
  const float offset[2] = {kLog2PMax - rows.max[0], kLog2PMax - rows.max[1]};
  uint32_t limit = 0;
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int ks = 0; ks < 4; ++ks) {
    float x[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 4 * ks + i;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        x[i][e] =
            ptx::Exp2(fmaf(static_cast<float>(s[4 * n + e]), scale[half][n / 8], offset[half]));
        if (kMasked && 8 * n + e % 2 >= visible[half]) x[i][e] = 0;
        if constexpr (T::kExactSum) sum[half] += x[i][e];
      }
    }
    p[4 * ks] = ptx::PackE4m3(x[0][0], x[0][1], x[1][0], x[1][1]);
    p[4 * ks + 1] = ptx::PackE4m3(x[0][2], x[0][3], x[1][2], x[1][3]);
    p[4 * ks + 2] = ptx::PackE4m3(x[2][0], x[2][1], x[3][0], x[3][1]);
    p[4 * ks + 3] = ptx::PackE4m3(x[2][2], x[2][3], x[3][2], x[3][3]);
    if constexpr (kPromote) rows.PromoteQuarter(ks);
    limit |= (p[4 * ks] + kLimitOffset) | (p[4 * ks + 1] + kLimitOffset);
    limit |= (p[4 * ks + 2] + kLimitOffset) | (p[4 * ks + 3] + kLimitOffset);
  }
  return limit & kLimitMask;
}

// `first`: there is no maximum to compute P with yet, and nothing to promote.
template <bool kMasked, class T>
__device__ __forceinline__ void Softmax(int32_t (&s)[kTile / 2], uint32_t (&p)[16], Rows<T>& rows,
                                        const float (&scale)[2][2], const int (&visible)[2],
                                        bool first, int opaque_zero) {
  float sum[2];
  uint32_t limit = 1;
  if (!first) limit = ComputeP<kMasked, true>(s, p, rows, scale, sum, visible);
  if (__any_sync(0xffffffffu, limit != 0)) {
    // Other values to the compiler: it would keep the 64 converted scores of above for here.
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) s[i] += opaque_zero;
    float alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = -kInf;
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        int32_t best = INT32_MIN;
#pragma unroll
        for (int n = 8 * block; n < 8 * block + 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (!kMasked || 8 * n + e < visible[half]) best = max(best, s[4 * n + 2 * half + e]);
          }
        }
        if (!kMasked || best != INT32_MIN) {
          tile_max = fmaxf(tile_max, static_cast<float>(best) * scale[half][block]);
        }
      }
      tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
      tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
      const float old = rows.max[half];
      // A score up to 1/16 below m is a P up to 245, which E4M3 rounds to 240: under the limit.
      if (tile_max > old - 0.0625f) rows.max[half] = ceilf(tile_max) + kHeadroom;
      alpha[half] = rows.max[half] == old ? 1.0f : ptx::Exp2(old - rows.max[half]);
    }
    rows.Rescale(alpha);
    ComputeP<kMasked, false>(s, p, rows, scale, sum, visible);
  }
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
}

template <class T>
__device__ __forceinline__ void IssueQk(int32_t (&s)[kTile / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int ks = 0; ks < T::kHeadDim / 32; ++ks) ptx::WgmmaS8(s, q + 2 * ks, k + 2 * ks, ks != 0);
  ptx::WgmmaCommit();
}
template <class T>
__device__ __forceinline__ void IssuePv(uint32_t (&partial)[T::kSums], const uint32_t (&p)[16],
                                        uint64_t v) {
#pragma unroll
  for (int ks = 0; ks < kTile / 32; ++ks) {
    ptx::WgmmaE4m3(partial, p + 4 * ks, v + 2 * ks, ks != 0);
  }
  ptx::WgmmaCommit();
}

template <class T>
__device__ __forceinline__ void Consume(const AttentionParams& params, Work work,
                                        const ChannelTable<T::kHeadDim>& table, uint32_t shared,
                                        const Barriers& barriers) {
  const int lane = threadIdx.x % 32;
  const int warpgroup = threadIdx.x / 128 - 1;
  const int warp_row = warpgroup * kRows + threadIdx.x % 128 / 32 * 16;  // in the query tile
  const uint64_t q = ptx::Descriptor<T::kHeadDim>(shared + T::kQ + warpgroup * kRows * T::kHeadDim);
  const uint64_t k = ptx::Descriptor<T::kHeadDim>(shared + T::kK);
  const uint64_t v = ptx::Descriptor<kTile>(shared + T::kV);
  const auto parity = [](unsigned step) -> uint32_t { return (step / T::kStages) & 1; };
  const auto release = [&](uint32_t barrier) {
    __syncwarp();  // all lanes have read
    if (lane == 0) ptx::BarrierArrive(barrier);
  };
  const int opaque_zero = static_cast<int>(work.items >> 31);

  // The warpgroups take turns at the matrix unit. Left alone they fall into step: both then wait
  // for it, and both for the exponentials.
  const int my_turn = 1 + warpgroup, other_turn = 2 - warpgroup;
  if (warpgroup == 1) ptx::NamedArrive(other_turn, 128 * kConsumers);

  uint32_t q_parity = 0;
  unsigned step = 0;
  for (; work.Any(); work.Next(), q_parity ^= 1) {
    const Position position = FindPosition(params, work.item, work.items);
    const int tiles = CountTiles<kTile>(params, position);
    const int first_row = position.first_row + warp_row;
    float q_scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      q_scale[half] =
          params.q_scale[position.head * params.padded_q + first_row + lane / 4 + 8 * half];
    }
    Rows<T> rows;
    int32_t s[kTile / 2];
    uint32_t p[16];

    // Softmax of `tile`, whose scores are in s.
    const auto softmax = [&](int tile) {
      const unsigned stage = (step + tile) % T::kStages;
      const uint32_t scales = shared + T::kScales + stage * T::kScaleBytes;
      float scale[2][2];
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const float k_scale = ptx::LoadShared(scales + (block * kKeyScales + (lane & 3)) * 4);
        scale[0][block] = q_scale[0] * k_scale;
        scale[1][block] = q_scale[1] * k_scale;
      }
      release(barriers.KEmpty(stage));
      const int first_key = tile * kTile;
      int visible[2] = {};
      if (first_key + kTile > params.length_kv ||
          (params.is_causal && first_key + kTile - 1 > first_row)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int end = params.is_causal
                              ? min(first_row + lane / 4 + 8 * half + 1, params.length_kv)
                              : params.length_kv;
          visible[half] = end - first_key - 2 * (lane & 3);
        }
        Softmax<true>(s, p, rows, scale, visible, tile == 0, opaque_zero);
      } else {
        Softmax<false>(s, p, rows, scale, visible, tile == 0, opaque_zero);
      }
    };

    ptx::BarrierWait(barriers.QFull(), q_parity);
    ptx::BarrierWait(barriers.KFull(step % T::kStages), parity(step));
    ptx::NamedSync(my_turn, 128 * kConsumers);
    ptx::WgmmaFence();
    IssueQk<T>(s, q, k + step % T::kStages * (T::kKBytes / 16));
    ptx::WgmmaWait<0>();
    ptx::Pin(s);
    ptx::NamedArrive(other_turn, 128 * kConsumers);
    softmax(0);

#pragma unroll 1
    for (int tile = 0; tile + 1 < tiles; ++tile) {
      const unsigned stage = (step + tile) % T::kStages, next = (step + tile + 1) % T::kStages;
      ptx::BarrierWait(barriers.VFull(stage), parity(step + tile));
      ptx::BarrierWait(barriers.KFull(next), parity(step + tile + 1));
      ptx::NamedSync(my_turn, 128 * kConsumers);
      ptx::Pin(p);
      ptx::Pin(rows.partial);
      ptx::WgmmaFence();
      IssuePv<T>(rows.partial, p, v + stage * (T::kVStride / 16));
      IssueQk<T>(s, q, k + next * (T::kKBytes / 16));
      ptx::WgmmaWait<0>();
      ptx::Pin(p);
      ptx::Pin(rows.partial);
      ptx::Pin(s);
      ptx::NamedArrive(other_turn, 128 * kConsumers);
      release(barriers.VEmpty(stage));
      softmax(tile + 1);
    }
    release(barriers.QEmpty());
    const int last = tiles - 1;
    const unsigned stage = (step + last) % T::kStages;
    ptx::BarrierWait(barriers.VFull(stage), parity(step + last));
    ptx::Pin(p);
    ptx::Pin(rows.partial);
    ptx::WgmmaFence();
    IssuePv<T>(rows.partial, p, v + stage * (T::kVStride / 16));
    ptx::WgmmaWait<0>();
    ptx::Pin(rows.partial);
    release(barriers.VEmpty(stage));
    rows.Promote();
    step += tiles;

    if constexpr (!T::kExactSum) {  // all four threads of a row add up theirs
      rows.sum[0] = rows.quantized_sum[0] / 4;
      rows.sum[1] = rows.quantized_sum[1] / 4;
    }
    ptx::NamedSync(kTableFull, kThreads - 32);
    FinishRows<T::kHeadDim>(params, position, table, first_row + lane / 4, lane, rows.o, rows.max,
                            rows.sum, rows.quantized_sum);
    if (work.item + gridDim.x < work.items) ptx::NamedArrive(kTableEmpty, kThreads - 32);
  }
  if (warpgroup == 0) ptx::NamedSync(my_turn, 128 * kConsumers);  // takes the last arrival
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    AttentionKernel(const __grid_constant__ AttentionParams params,
                    const __grid_constant__ TensorMaps maps, unsigned items) {
  extern __shared__ uint8_t shared_memory[];
  const uint32_t shared = (ptx::SharedAddress(shared_memory) + 1023) & ~1023u;
  const Barriers barriers{shared + T::kBarriers, T::kStages};
  auto& table = *reinterpret_cast<ChannelTable<T::kHeadDim>*>(
      shared_memory + (shared - ptx::SharedAddress(shared_memory)) + T::kTable);
  Work work{blockIdx.x, items};

  if (threadIdx.x == 0) {
    ptx::BarrierInit(barriers.QFull(), 1);
    ptx::BarrierInit(barriers.QEmpty(), 4 * kConsumers);  // one lane of each warp
    for (int stage = 0; stage < T::kStages; ++stage) {
      ptx::BarrierInit(barriers.KFull(stage), 1);
      ptx::BarrierInit(barriers.VFull(stage), 1);
      ptx::BarrierInit(barriers.KEmpty(stage), 4 * kConsumers);
      ptx::BarrierInit(barriers.VEmpty(stage), 4 * kConsumers);
    }
    ptx::FenceBarrierInit();
  }
  // The rows of ones behind each stage of V.
  constexpr int kWords = T::kStages * kSumRows * kTile / 4;
  for (int i = threadIdx.x; i < kWords; i += kThreads) {
    const int stage = i / (kSumRows * kTile / 4), word = i % (kSumRows * kTile / 4);
    const uint32_t address = shared + T::kV + stage * T::kVStride + T::kVBytes + word * 4;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(kOnes) : "memory");
  }
  ptx::FenceAsyncProxy();
  __syncthreads();

  // setmaxnreg waits until the registers are there: the CTA has what it was launched with.
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                65536 / kThreads / 8 * 8 * (kConsumers + 1));
  if (threadIdx.x < 128) {
    ptx::RegistersDown<kProducerRegisters>();
    if (threadIdx.x == 0) Produce<T>(params, maps, work, shared, barriers);
    if (threadIdx.x >= 32) {  // the other warps prepare what the end of each query tile needs
      for (bool first = true; work.Any(); work.Next(), first = false) {
        if (!first) ptx::NamedSync(kTableEmpty, kThreads - 32);
        PrepareChannels(table, params, FindPosition(params, work.item, work.items),
                        threadIdx.x - 32, 96);
        __threadfence_block();
        ptx::NamedArrive(kTableFull, kThreads - 32);
      }
    }
  } else {
    ptx::RegistersUp<kConsumerRegisters>();
    Consume<T>(params, work, table, shared, barriers);
  }
}

// A 3-dimensional tensor of bytes, and the box that one copy takes from it.
cudaError_t Encode(CUtensorMap* map, const void* data, uint64_t inner, uint64_t middle,
                   uint64_t outer, uint32_t box_inner, uint32_t box_middle) {
  // Through the runtime, so that nothing links against libcuda.
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const auto encode = reinterpret_cast<CUresult (*)(
      CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
      const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
      CUtensorMapL2promotion, CUtensorMapFloatOOBfill)>(function);
  const cuuint64_t dims[3] = {inner, middle, outer};
  const cuuint64_t strides[2] = {inner, inner * middle};
  const cuuint32_t box[3] = {box_inner, box_middle, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult encoded =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(data), dims, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_inner == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return encoded == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class T>
cudaError_t Launch(const AttentionParams& params, cudaStream_t stream) {
  const uint64_t heads = params.batch * params.heads, kv_heads = params.batch * params.kv_heads;
  const int64_t blocks = (params.length_q + kBlockQ - 1) / kBlockQ * static_cast<int64_t>(heads);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  TensorMaps maps;
  cudaError_t error =
      Encode(&maps.q, params.q, T::kHeadDim, params.padded_q, heads, T::kHeadDim, kBlockQ);
  if (error != cudaSuccess) return error;
  error = Encode(&maps.k, params.k, T::kHeadDim, params.padded_kv, kv_heads, T::kHeadDim, kTile);
  if (error != cudaSuccess) return error;
  error = Encode(&maps.v, params.v, params.padded_kv, T::kHeadDim, kv_heads, kTile, T::kHeadDim);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(AttentionKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               T::kSharedBytes);
  if (error != cudaSuccess) return error;
  int device = 0, sms = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const unsigned ctas = static_cast<unsigned>(blocks < sms ? blocks : sms);
  AttentionKernel<T>
      <<<ctas, kThreads, T::kSharedBytes, stream>>>(params, maps, static_cast<unsigned>(blocks));
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchAttentionFp8(const AttentionParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) {
    return params.exact_lse ? Launch<Traits<64, true>>(params, stream)
                            : Launch<Traits<64, false>>(params, stream);
  }
  return params.exact_lse ? Launch<Traits<128, true>>(params, stream)
                          : Launch<Traits<128, false>>(params, stream);
}

}  // namespace jax_sage::sm90
