// Which queries an item has.
#pragma once

#include "common/epilogue.cuh"
#include "sm90/items.h"

namespace jax_sage::sm90 {

struct Item : Position {
  int groups;  // of 64 queries: of the warpgroups that have work
};

template <int kConsumers>
__device__ __forceinline__ Item FindItem(const AttentionParams& params, const Cut& cut,
                                         unsigned index) {
  const Place place = FindPlace(cut, kConsumers, index);
  // Query heads are in the order of their key/value heads, so the group divides both at once.
  const unsigned kv_head = place.head / (params.heads / params.kv_heads);
  return {{static_cast<int>(place.first_group) * 64, place.head, kv_head},
          static_cast<int>(place.groups)};
}

}  // namespace jax_sage::sm90
