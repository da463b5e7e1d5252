#include "common/layout.h"
#include "common/masks.cuh"
#include "mask/pack.h"

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

// A warp packs kMaskRows queries and kMaskKeys keys, two rows at a time. Lane l loads the keys 4l
// to 4l + 3 of both, and makes byte l % 4 of word l / 4 % 4 of the first row or, from lane 16 on,
// the second: with 2h + e and j in their place, of the keys 16i + 8h + 2j + e. Ballot b has key 4l
// + b at bit l, hence these at bits 4i + 2h + j / 2 of ballot 2(j % 2) + e.
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
  uint8_t* words =
      reinterpret_cast<uint8_t*>(params.words + (head * tiles + tile) * params.padded_q * 4);
  const int h = lane / 2 % 2, e = lane % 2, j = lane / 4 % 4;
  uint32_t any = 0, all = ~0u;
#pragma unroll 4
  for (int row = first_row; row < end_row; row += 2) {
    uint32_t ballot = 0;  // of this lane's row and keys
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const bool is_query = row + second < params.length_q;
      uint32_t four = 0;
      if (is_query) {
        four = LoadFour<kAligned>(mask + static_cast<int64_t>(row + second) * params.length_kv,
                                  tile * kMaskKeys + 4 * lane, params.length_kv);
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const uint32_t ballot_b = __ballot_sync(kAllLanes, (four >> (8 * b) & 0xff) != 0);
        any |= ballot_b;
        if (is_query) all &= ballot_b;  // padding sees nothing, and does not matter
        if (lane / 16 == second && b == 2 * (j % 2) + e) ballot = ballot_b;
      }
    }
    // Bit 4i to bit 7 - i.
    uint32_t bits = __brev(ballot >> (2 * h + j / 2) & 0x11111111u) >> 3;
    bits = (bits | bits >> 3) & 0x03030303u;
    bits = (bits | bits >> 6) & 0x000f000fu;
    bits |= bits >> 12;
    if (row + lane / 16 < end_row) words[row * int64_t{16} + lane] = static_cast<uint8_t>(bits);
  }
  if (lane == 0) {
    params.views[(head * groups + group) * tiles + tile] =
        static_cast<uint8_t>(all == ~0u ? kAll
                             : any != 0 ? kAll | kByMask
                                        : kNone);
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
