// How the queries are cut into items of work, so that short sequences and few heads fill the GPU.
//
// An item has up to kConsumers groups of 64 queries of one head, one for each consumer warpgroup.
// With all of them an SM gets most done; with fewer, an item is done sooner. CTAs stay on their
// SMs and take an item of each round of as many items as there are CTAs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/layout.h"

namespace jax_sage::sm90 {

// Items of each head: `whole` with all groups, then those of `groups`, of which the last may have
// fewer. Those of all heads are ordered likewise: the smallest fill the end.
struct Cut {
  unsigned items;  // of all heads
  unsigned heads;  // of all batch entries
  unsigned whole;
  unsigned groups;
  bool longest_first;  // later queries see more: those of all heads, the last first
};

// Groups of a head.
struct Place {
  unsigned head, first_group, groups;  // the last groups of a head may not exist
};

// The number of a CTA's item of a round. Where each round's items are shorter than those before,
// rounds go forth and back: going forth alone, the first CTA would work longer than the last by a
// whole item, a tenth of all at 8 rounds.
JAX_SAGE_HOST_DEVICE unsigned IndexOf(const Cut& cut, unsigned cta, unsigned ctas, unsigned round) {
  return round * ctas + (cut.longest_first && round % 2 != 0 ? ctas - 1 - cta : cta);
}

// Where an item is.
JAX_SAGE_HOST_DEVICE Place FindPlace(const Cut& cut, unsigned consumers, unsigned index) {
  const unsigned whole_items = cut.whole * cut.heads;
  if (index < whole_items) {  // head by head, for the sake of the L2 cache
    return {index / cut.whole, index % cut.whole * consumers, consumers};
  }
  // Over all heads. Masks: heads that share one read the same part of it at the same time.
  index -= whole_items;
  unsigned tile = index / cut.heads;
  if (cut.longest_first) tile = (cut.items - whole_items) / cut.heads - 1 - tile;
  return {index % cut.heads, cut.whole * consumers + tile * cut.groups, cut.groups};
}

// How long an item takes with so many groups in use, by the number of consumers; see DESIGN.md.
constexpr int kMaxConsumers = 5;
constexpr float kItemTimes[kMaxConsumers + 1][kMaxConsumers + 1] = {
    {},
    {},
    {0, 0.9f, 1},
    {0, 0.65f, 0.83f, 1},
    {0, 0.6f, 0.75f, 0.86f, 1},
    {0, 0.53f, 0.63f, 0.73f, 0.85f, 1}};

// How long the busiest CTA takes, if items of three kinds follow each other.
inline float TimeOf(unsigned ctas, const int64_t (&counts)[3], const float (&times)[3]) {
  const int64_t ends[3] = {counts[0], counts[0] + counts[1], counts[0] + counts[1] + counts[2]};
  const auto time_of = [&](int64_t cta) {
    float time = 0;
    int64_t before = 0;
    for (int i = 0; i < 3; ++i) {
      const int64_t until = ends[i] > cta ? (ends[i] - cta - 1) / ctas + 1 : 0;  // of this CTA
      time += static_cast<float>(until - before) * times[i];
      before = until;
    }
    return time;
  };
  // From one of these CTAs to the next all take equally long.
  float longest = time_of(0);
  for (int64_t end : ends) longest = std::max(longest, time_of(end % ctas));
  return longest;
}

// `alike`: all items with as many groups take equally long. Otherwise, with a causal mask or
// others, they are all cut alike, as their order is one of lengths.
inline Cut CutQueries(int64_t heads, int64_t length_q, int consumers, unsigned sms, bool alike) {
  const auto& times = kItemTimes[consumers];
  const int64_t groups = (length_q + 63) / 64;  // of a head
  Cut best{};
  float best_time = 0;
  const auto consider = [&](int64_t whole, int size) {
    const int64_t rest = groups - whole * consumers;
    const int64_t counts[3] = {heads * whole, heads * (rest / size), rest % size == 0 ? 0 : heads};
    const float time = TimeOf(sms, counts, {times[consumers], times[size], times[rest % size]});
    if (best.groups != 0 && time >= best_time) return;
    best_time = time;
    best = {static_cast<unsigned>(counts[0] + counts[1] + counts[2]), static_cast<unsigned>(heads),
            static_cast<unsigned>(whole), static_cast<unsigned>(size), !alike};
  };
  const int64_t most = alike ? groups / consumers : 0;
  consider(most, consumers);
  for (int size = consumers - 1; size > 0; --size) {
    consider(0, size);
    for (int64_t whole = std::max<int64_t>(1, most - 3); whole <= most; ++whole) {
      consider(whole, size);
    }
  }
  return best;
}

}  // namespace jax_sage::sm90
