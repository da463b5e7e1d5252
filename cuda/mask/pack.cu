#include "mask/pack.h"

#include "common/layout.h"
#include "common/masks.cuh"

namespace jax_sage {
namespace {

constexpr int kWarps = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// Of four keys, 4 * lane and on, a byte each; zeros past the last.
template <bool kAligned>
__device__ __forceinline__ uint32_t LoadFour(const uint8_t* row, int key, int length) {
  if constexpr (kAligned) {
    return key < length ? __ldg(reinterpret_cast<const uint32_t*>(row + key)) : 0;
  } else {
    uint32_t four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (key + i < length) four |= static_cast<uint32_t>(__ldg(row + key + i)) << (8 * i);
    }
    return four;
  }
}

// A warp packs kMaskRows queries and kMaskKeys keys, a row at a time. Lane l has the keys 4l to
// 4l + 3: byte b of all lanes is the keys 8o + 2j + e with l = 2o + j / 2 and b = 2(j % 2) + e.
template <bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) Pack(const PackParams params) {
  const int tiles = (params.length_kv + kMaskKeys - 1) / kMaskKeys;
  const int groups = (params.padded_q + kMaskRows - 1) / kMaskRows;
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (item >= params.heads * groups * tiles) return;
  const int tile = static_cast<int>(item % tiles);
  const int group = static_cast<int>(item / tiles % groups);
  const int64_t head = item / tiles / groups;
  const int lane = threadIdx.x % 32;
  const int first_row = group * kMaskRows;
  const int end_row = min(first_row + kMaskRows, params.padded_q);
  const uint8_t* mask = params.mask + head * params.length_q * params.length_kv;
  uint32_t* words = params.words + (head * tiles + tile) * params.padded_q * 4;
  uint32_t any = 0, all = ~0u;
#pragma unroll 8
  for (int row = first_row; row < end_row; ++row) {
    uint32_t four = 0;
    if (row < params.length_q) {
      four = LoadFour<kAligned>(mask + static_cast<int64_t>(row) * params.length_kv,
                                tile * kMaskKeys + 4 * lane, params.length_kv);
    }
    uint32_t bytes[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      bytes[b] = __ballot_sync(kAllLanes, (four >> (8 * b) & 0xff) != 0);
      any |= bytes[b];
      if (row < params.length_q) all &= bytes[b];  // padding sees nothing, and does not matter
    }
    const bool odd = lane & 1;
    const uint32_t even_keys = (odd ? bytes[2] : bytes[0]) >> (lane / 2 & 1) & 0x55555555;
    const uint32_t odd_keys = (odd ? bytes[3] : bytes[1]) >> (lane / 2 & 1) & 0x55555555;
    if (lane < 4) words[row * int64_t{4} + lane] = even_keys | odd_keys << 1;
  }
  if (lane == 0) {
    params.views[(head * groups + group) * tiles + tile] =
        static_cast<uint8_t>(all == ~0u ? kAll : any != 0 ? kSome : kNone);
  }
}

}  // namespace

cudaError_t LaunchPack(const PackParams& params, cudaStream_t stream) {
  const int64_t tiles = (params.length_kv + kMaskKeys - 1) / kMaskKeys;
  const int64_t groups = (params.padded_q + kMaskRows - 1) / kMaskRows;
  const int64_t blocks = (params.heads * groups * tiles + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool aligned =
      params.length_kv % 4 == 0 && reinterpret_cast<uintptr_t>(params.mask) % 4 == 0;
  const auto kernel = aligned ? Pack<true> : Pack<false>;
  kernel<<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_sage
