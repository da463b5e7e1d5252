"""How Hopper's kernel cuts the queries into items: host code, compiled here and run."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each group of 64 queries of each head once, for a grid of shapes; and prints how some shapes are
# cut, and how even the work of the CTAs is.
PROGRAM = r"""
#include <cstdio>
#include <vector>

#include "sm90/items.h"

using namespace jax_sage::sm90;

bool Check(int64_t heads, int64_t length, int consumers, unsigned sms, bool alike) {
  const Cut cut = CutQueries(heads, length, consumers, sms, alike);
  const int64_t groups = (length + 63) / 64;
  std::vector<int> seen(heads * groups);
  const unsigned ctas = std::min(sms, cut.items);
  for (unsigned cta = 0; cta < ctas; ++cta) {
    for (unsigned turn = 0; IndexOf(cut, cta, ctas, turn) < cut.items; ++turn) {
      const Place place = FindPlace(cut, consumers, IndexOf(cut, cta, ctas, turn));
      if (place.head >= heads || place.first_group >= groups) return false;
      if (place.groups < 1 || place.groups > static_cast<unsigned>(consumers)) return false;
      for (unsigned group = 0; group < place.groups; ++group) {
        if (place.first_group + group < groups) {
          ++seen[place.head * groups + place.first_group + group];
        }
      }
    }
  }
  for (int times : seen) {
    if (times != 1) return false;
  }
  return true;
}

// Causal: how many tiles of 64 keys the busiest CTA has, in percent of what it might be.
double Busiest(int64_t heads, int64_t length, int consumers, unsigned sms) {
  const Cut cut = CutQueries(heads, length, consumers, sms, false);
  int64_t all = 0, most = 0;
  for (unsigned cta = 0; cta < sms; ++cta) {
    int64_t tiles = 0;
    for (unsigned turn = 0; IndexOf(cut, cta, sms, turn) < cut.items; ++turn) {
      const Place place = FindPlace(cut, consumers, IndexOf(cut, cta, sms, turn));
      tiles += place.first_group + place.groups;
    }
    all += tiles;
    most = std::max(most, tiles);
  }
  return 100.0 * most * sms / all;
}

int main() {
  for (int64_t heads : {1, 2, 3, 16, 131, 132, 133, 264}) {
    for (int64_t length : {1, 63, 64, 65, 128, 129, 500, 1024, 2049, 4096, 10000}) {
      for (int consumers : {2, 3, 4, 5}) {
        for (unsigned sms : {1u, 7u, 132u}) {
          for (bool alike : {false, true}) {
            if (!Check(heads, length, consumers, sms, alike)) {
              std::printf("wrong: %lld heads of %lld queries, %d consumers, %u SMs\n",
                          static_cast<long long>(heads), static_cast<long long>(length),
                          consumers, sms);
              return 1;
            }
          }
        }
      }
    }
  }
  for (auto [heads, length] : {std::pair{16, 512}, {16, 1024}, {64, 4096}}) {
    const Cut cut = CutQueries(heads, length, 3, 132, true);
    std::printf("%d x %d: %u items, %u whole ones a head, then of %u\n", heads, length, cut.items,
                cut.whole, cut.groups);
  }
  for (auto [heads, length] : {std::pair{64, 4096}, {32, 8192}, {16, 32768}}) {
    std::printf("%d x %d: %.0f %%\n", heads, length, Busiest(heads, length, 4, 132));
  }
}
"""


def test_items_are_all_queries_once(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source, program = tmp_path / "items.cc", tmp_path / "items"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", f"-I{ROOT / 'cuda'}"]
    subprocess.run([compiler, *flags, "-o", str(program), str(source)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    # 512 queries of 16 heads: 128 groups, one for each of 132 SMs. 1024: two for each of 128. 4096
    # of 64: in items of three alone, and one that is left over of each head, 11 rounds that end
    # with small items; as it is, 20 of 22 are cut like this, and two of two groups of each head
    # fill the end more evenly.
    assert result.stdout.splitlines() == [
        "16 x 512: 128 items, 0 whole ones a head, then of 1",
        "16 x 1024: 128 items, 0 whole ones a head, then of 2",
        "64 x 4096: 1408 items, 20 whole ones a head, then of 2",
        # Causal, rounds going forth and back. Going forth alone: 109, 112 and 106 %.
        "64 x 4096: 103 %",
        "32 x 8192: 100 %",
        "16 x 32768: 100 %",
    ]
