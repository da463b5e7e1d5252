#include "emulator.h"

#include <fenv.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

namespace emulator {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kThreadsOfWarpgroup = 128;
constexpr size_t kStackBytes = 256 * 1024;

struct AsyncCopy {
  uint32_t shared;
  const void* global;  // null: the end of a group
  int bytes;
};

// A tensor and its boxes, as cuTensorMapEncodeTiled was given them.
struct Map {
  uint8_t* data;
  uint64_t dims[3], strides[2];
  uint32_t box[3];
  int swizzle;  // the bytes that are swizzled
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

// A box of a tensor and where it is, or is to be, in shared memory.
struct Box {
  uint32_t shared;
  Map map;
  int at[3];
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool is_started, is_done;
  bool (*ready)(void*);
  void* argument;
  std::vector<AsyncCopy> copies;
  std::vector<Box> stores;    // that have not read shared memory yet
  std::vector<Wgmma> wgmmas;  // one of no columns: the end of a group
};

struct Warpgroup : Group {
  std::vector<uint64_t> checksums;  // of its wgmmas, when the first warp issued them
};

struct BulkCopy {
  Box box;
  uint32_t barrier;
  const void* global;  // null: the box
  int bytes;
};

// All of a launch, of which there is one at a time.
struct Machine {
  std::unique_ptr<Fiber[]> fibers{new Fiber[kMaxThreads]};
  uint8_t* stacks = nullptr;
  jmp_buf scheduler;
  int current = 0;
  size_t shared_bytes = 0;
  Warp warps[kMaxThreads / kLanes];
  Warpgroup warpgroups[kMaxThreads / kThreadsOfWarpgroup];
  int sleeps;  // of the CTA's threads
  Group cta;
  std::deque<BulkCopy> bulk_copies;
  void (*run)(void*);
  void* argument;
  std::mt19937 random{1};
  // Of a CTA, at random: what one order of events hides, another shows.
  enum { kAtOnce, kLate, kAtRandomTimes } copies;  // when bulk copies are done
  bool by_priority;                                // or else all warps by turns
  bool is_interrupted;                             // threads, where they arrive at a barrier
  std::string error;
};
Machine machine;
std::mutex mutex;
// By thread of the caller: of the last launch, and what cudaGetErrorString says.
thread_local std::string error_of_launch, told_error;

Fiber& ThisFiber() { return machine.fibers[machine.current]; }

void Yield() {
  if (_setjmp(ThisFiber().at) == 0) _longjmp(machine.scheduler, 1);
}

void Leave(Group& group) {
  if (--group.living > 0 && group.arrived == group.living) group.Open();
}

void RunFiber() {
  machine.run(machine.argument);
  ThisFiber().is_done = true;
  for (const AsyncCopy& x : ThisFiber().copies) {
    if (x.global != nullptr) Fail("a thread ends with copies that it has not waited for");
  }
  if (!ThisFiber().wgmmas.empty()) Fail("a thread ends with wgmmas that it has not waited for");
  Leave(ThisWarp());
  Leave(ThisWarpgroup());
  Leave(ThisCta());
  _longjmp(machine.scheduler, 1);
}

// Until it waits, or is done.
void Continue(int thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.at, 1);
  fiber.is_started = true;
  setcontext(&fiber.start);
}

CUresult EncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                     const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                     const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  Map encoded{};
  encoded.data = static_cast<uint8_t*>(data);
  bool right = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 && rank == 3 &&
               reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < 3; ++i) {
    encoded.dims[i] = dims[i];
    encoded.box[i] = box[i];
    right = right && dims[i] > 0 && dims[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 &&
            steps[i] == 1;
  }
  for (int i = 0; i < 2; ++i) {
    encoded.strides[i] = strides[i];
    right = right && strides[i] % 16 == 0;
  }
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B) encoded.swizzle = 128;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_64B) encoded.swizzle = 64;
  if (!right || encoded.swizzle == 0 || box[0] > static_cast<unsigned>(encoded.swizzle)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memcpy(map, &encoded, sizeof(encoded));
  return CUDA_SUCCESS;
}

// Units of 16 bytes are exchanged by the number of the 128 bytes that they are in.
uint32_t Swizzled(uint32_t address, int swizzle) {
  return address ^ (address / 128 % (swizzle / 16) * 16);
}

struct Barrier {
  uint16_t arrivals;  // of a phase
  uint16_t missing;
  uint32_t bytes : 31;  // modulo 2^31: those that have come less those that are expected
  uint32_t parity : 1;
};
static_assert(sizeof(Barrier) == 8);

template <class Change>
void ChangeBarrier(uint32_t address, Change change) {
  auto barrier = LoadSharedAs<Barrier>(address);
  change(barrier);
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.parity ^= 1;
    barrier.missing = barrier.arrivals;
  }
  StoreSharedAs(address, barrier);
}

// Calls function(byte in shared memory, byte of the tensor, or null outside) for each of a box.
template <class Function>
void ForEach(const Box& box, Function function) {
  const Map& map = box.map;
  const auto inside = [&](int i, int x) {
    return x >= 0 && static_cast<uint64_t>(x) < map.dims[i];
  };
  uint32_t shared = box.shared;
  for (int z = box.at[2]; z < box.at[2] + static_cast<int>(map.box[2]); ++z) {
    for (int y = box.at[1]; y < box.at[1] + static_cast<int>(map.box[1]); ++y) {
      for (int x = box.at[0]; x < box.at[0] + static_cast<int>(map.box[0]); ++x, ++shared) {
        const bool is_inside = inside(0, x) && inside(1, y) && inside(2, z);
        function(*Shared(Swizzled(shared, map.swizzle), 1),
                 is_inside ? map.data + x + y * map.strides[0] + z * map.strides[1] : nullptr);
      }
    }
  }
}

Box MakeBox(uint32_t shared, const CUtensorMap* map, int c0, int c1, int c2) {
  Box box{shared, {}, {c0, c1, c2}};
  std::memcpy(&box.map, map, sizeof(box.map));
  if (shared % 128 != 0) Fail("a box is at an address that is not aligned to 128 bytes");
  return box;
}

void Store(const Box& box) {
  ForEach(box, [](uint8_t shared, uint8_t* global) {
    if (global != nullptr) *global = shared;
  });
}

void Run(const BulkCopy& copy) {
  if (copy.global != nullptr) {
    std::memcpy(Shared(copy.box.shared, copy.bytes), copy.global, copy.bytes);
  } else {
    ForEach(copy.box, [](uint8_t& shared, const uint8_t* global) {
      shared = global != nullptr ? *global : 0;
    });
  }
  ChangeBarrier(copy.barrier, [&](Barrier& barrier) { barrier.bytes += copy.bytes; });
}

void RunOneBulkCopy() {
  // They come in any order.
  const size_t i = machine.random() % machine.bulk_copies.size();
  const BulkCopy copy = machine.bulk_copies[i];
  machine.bulk_copies.erase(machine.bulk_copies.begin() + i);
  Run(copy);
}

void StartBulkCopy(const BulkCopy& copy) {
  if (machine.copies == Machine::kAtOnce) {
    Run(copy);
  } else {
    machine.bulk_copies.push_back(copy);
  }
}

void RunCta(int threads) {
  Poison(shared_memory, kSharedBytes);
  machine.bulk_copies.clear();
  machine.sleeps = 0;
  const auto restart = [](Group& group, int living) { group = Group{living}; };
  for (Warpgroup& warpgroup : machine.warpgroups) warpgroup.checksums.clear();
  for (int i = 0; i * kLanes < threads; ++i) {
    restart(machine.warps[i], std::min(kLanes, threads - i * kLanes));
  }
  for (int i = 0; i * kThreadsOfWarpgroup < threads; ++i) {
    restart(machine.warpgroups[i],
            std::min(kThreadsOfWarpgroup, threads - i * kThreadsOfWarpgroup));
  }
  restart(machine.cta, threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.is_started = fiber.is_done = false;
    fiber.ready = [](void*) { return true; };
    fiber.copies.clear();
    fiber.stores.clear();
    fiber.wgmmas.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = machine.stacks + i * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, RunFiber, 0);
  }
  machine.copies = static_cast<decltype(machine.copies)>(machine.random() % 3);
  machine.by_priority = machine.random() % 2 != 0;
  machine.is_interrupted = machine.random() % 2 != 0;
  std::vector<int> warps;
  for (int i = 0; i * kLanes < threads; ++i) warps.push_back(i);
  std::shuffle(warps.begin(), warps.end(), machine.random);
  int left = threads;
  while (left > 0) {
    bool any = false;
    if (machine.copies == Machine::kAtRandomTimes) {
      while (!machine.bulk_copies.empty() && machine.random() % 2 == 0) {
        RunOneBulkCopy();
        any = true;
      }
    }
    if (!machine.by_priority) std::shuffle(warps.begin(), warps.end(), machine.random);
    for (int warp : warps) {
      if (machine.by_priority && any) break;
      for (int i = warp * kLanes; i < std::min(threads, (warp + 1) * kLanes); ++i) {
        Fiber& fiber = machine.fibers[i];
        if (fiber.is_done || !fiber.ready(fiber.argument)) continue;
        Continue(i);
        if (!machine.error.empty()) return;
        left -= fiber.is_done;
        any = true;
      }
    }
    if (any) continue;
    if (!machine.bulk_copies.empty()) {
      RunOneBulkCopy();
    } else if (left > 0) {
      machine.error = "deadlock: " + std::to_string(left) + " of " + std::to_string(threads) +
                      " threads wait, the first of them is thread ";
      int first = 0;
      while (machine.fibers[first].is_done) ++first;
      machine.error += std::to_string(first);
      return;
    }
  }
  bool some_left = !machine.bulk_copies.empty();
  for (int i = 0; i < threads; ++i) some_left |= !machine.fibers[i].stores.empty();
  if (some_left) machine.error = "a CTA ends before its bulk copies";
}

// Elements of 32 bytes of a row of A or B.
void ReadElements(Type type, const uint32_t (&words)[8], float (&x)[32]) {
  static const auto e4m3 = [] {
    std::array<float, 256> all;
    for (int i = 0; i < 256; ++i) {
      all[i] = __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<uint8_t>(i), __NV_E4M3)));
    }
    return all;
  }();
  const auto* bytes = reinterpret_cast<const uint8_t*>(words);
  for (int i = 0; i < (type == Type::kF16 ? 16 : 32); ++i) {
    if (type == Type::kS8) {
      x[i] = static_cast<int8_t>(bytes[i]);
    } else if (type == Type::kE4m3) {
      x[i] = e4m3[bytes[i]];
    } else {
      x[i] = __half2float(reinterpret_cast<const __half*>(words)[i]);
    }
  }
}

// One element of C or D. Sums of INT8 products are exact in FP32, as 32 of them are below 2^19.
struct Accumulator {
  Type type;
  bool to_f16;
  float Load(uint32_t word, int half) const {
    if (to_f16) {
      const float2 pair = __half22float2(EmulatorBits<__half2>(word));
      return half != 0 ? pair.y : pair.x;
    }
    return EmulatorBits<float>(word);
  }
  void Add(uint32_t& word, int half, float sum, bool accumulate) const {
    if (type == Type::kS8) {
      word = (accumulate ? word : 0) + static_cast<uint32_t>(static_cast<int32_t>(sum));
      return;
    }
    if (accumulate) sum += Load(word, half);
    if (!to_f16) {
      word = EmulatorBits<uint32_t>(sum);
      return;
    }
    const uint32_t bits = EmulatorBits<uint16_t>(__float2half_rn(sum));
    word = half != 0 ? (word & 0xffff) | bits << 16 : (word & 0xffff0000) | bits;
  }
};

float Dot(Type type, const float (&x)[32], const float (&y)[32]) {
  float sum = 0;
  for (int i = 0; i < (type == Type::kF16 ? 16 : 32); ++i) sum += x[i] * y[i];
  return sum;
}

// Of the words of a row of A, as fragments have them: the lane's of its four, and which of a[].
int LaneOfWord(int row, int word) { return row % 8 * 4 + word % 4; }
int RegisterOfWord(int row, int word) { return row / 8 % 2 + word / 4 * 2; }

// 32 bytes of a row, of a K-major operand or a transposed one of FP16.
void ReadRow(uint64_t descriptor, bool is_transposed, int row, uint32_t (&words)[8]) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const int swizzle = descriptor >> 62 == 1 ? 128 : 64;
  if (descriptor >> 62 != 1 && descriptor >> 62 != 2) Fail("a descriptor of another swizzle");
  if (!is_transposed) {
    const uint32_t address = start + row / 8 * stride + row % 8 * swizzle;
    for (int i = 0; i < 8; ++i) {
      words[i] = LoadSharedAs<uint32_t>(Swizzled(address + 4 * i, swizzle));
    }
    return;
  }
  uint16_t halves[16];
  for (int k = 0; k < 16; ++k) {
    const uint32_t address =
        start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2;
    halves[k] = LoadSharedAs<uint16_t>(Swizzled(address, swizzle));
  }
  std::memcpy(words, halves, sizeof(words));
}

// Of what a wgmma reads from shared memory.
uint64_t Checksum(const Wgmma& wgmma) {
  uint64_t sum = 0;
  const auto add = [&](uint64_t descriptor, bool is_transposed, int rows) {
    for (int row = 0; row < rows; ++row) {
      uint32_t words[8];
      ReadRow(descriptor, is_transposed, row, words);
      for (uint32_t word : words) sum = (sum ^ word) * 0x9e3779b97f4a7c15;
    }
  };
  if (wgmma.a == nullptr) add(wgmma.a_descriptor, false, 64);
  add(wgmma.b_descriptor, wgmma.type == Type::kF16, wgmma.columns);
  return sum;
}

// The index-th wgmma of a warpgroup's threads.
void RunWgmma(int first_thread, size_t index) {
  const auto of_thread = [&](int thread) -> const Wgmma& {
    const auto& wgmmas = machine.fibers[first_thread + thread].wgmmas;
    if (index >= wgmmas.size()) Fail("the threads of a warpgroup have issued different wgmmas");
    return wgmmas[index];
  };
  const Wgmma first = of_thread(0);
  if (Checksum(first) != machine.warpgroups[first_thread / kThreadsOfWarpgroup].checksums[index]) {
    Fail("shared memory that a wgmma reads has changed before it was waited for");
  }
  static float a[64][32], b[264][32];
  for (int row = 0; row < 64; ++row) {
    uint32_t words[8];
    if (first.a == nullptr) {
      ReadRow(first.a_descriptor, false, row, words);
    } else {
      for (int word = 0; word < 8; ++word) {
        const int thread = row / 16 * kLanes + LaneOfWord(row, word);
        words[word] = of_thread(thread).a[RegisterOfWord(row, word)];
      }
    }
    ReadElements(first.type, words, a[row]);
  }
  for (int column = 0; column < first.columns; ++column) {
    uint32_t words[8];
    ReadRow(first.b_descriptor, first.type == Type::kF16, column, words);
    ReadElements(first.type, words, b[column]);
  }
  for (int thread = 0; thread < kThreadsOfWarpgroup; ++thread) {
    const Wgmma& of_this = of_thread(thread);
    if (of_this.type != first.type || of_this.columns != first.columns ||
        of_this.b_descriptor != first.b_descriptor || of_this.a_descriptor != first.a_descriptor ||
        of_this.accumulate != first.accumulate) {
      Fail("the threads of a warpgroup have issued different wgmmas");
    }
    const Accumulator accumulator{first.type, first.to_f16};
    for (int i = 0; i < first.columns / 2; ++i) {
      const int row = thread / kLanes * 16 + thread % kLanes / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      accumulator.Add(of_this.d[first.to_f16 ? i / 2 : i], i % 2,
                      Dot(first.type, a[row], b[column]), first.accumulate);
    }
  }
}

size_t EndOfGroups(const std::vector<Wgmma>& wgmmas, int pending) {
  int groups = 0;
  for (const Wgmma& x : wgmmas) groups += x.columns == 0;
  size_t end = 0;
  for (size_t i = 0; i < wgmmas.size() && groups > pending; ++i) {
    if (wgmmas[i].columns == 0) {
      --groups;
      end = i + 1;
    }
  }
  return end;
}

}  // namespace

void Fail(const std::string& message) {
  machine.error = "thread " + std::to_string(machine.current) + ": " + message;
  _longjmp(machine.scheduler, 1);
}

void WaitUntil(bool (*ready)(void*), void* argument) {
  ThisFiber().ready = ready;
  ThisFiber().argument = argument;
  Yield();
  ThisFiber().ready = [](void*) { return true; };
}

Warp& WholeWarp() {
  if (ThisWarp().living != kLanes) Fail("an instruction of a warp, some lanes of which have ended");
  return ThisWarp();
}
Warp& ThisWarp() { return machine.warps[machine.current / kLanes]; }
Group& ThisWarpgroup() { return machine.warpgroups[machine.current / kThreadsOfWarpgroup]; }
Group& ThisCta() { return machine.cta; }

void Sleep() {
  if (++machine.sleeps > 1 << 20) Fail("a thread waits for another CTA, in vain");
  // Other threads of the CTA run. Those of other CTAs are done, or come later.
  bool again = false;
  WaitUntil([&again] { return std::exchange(again, true); });
}

uint8_t* Shared(uint32_t address, size_t bytes) {
  if (address + bytes > machine.shared_bytes) {
    Fail("shared memory has " + std::to_string(machine.shared_bytes) + " bytes, and " +
         std::to_string(bytes) + " from " + std::to_string(address) + " on were asked for");
  }
  return shared_memory + address;
}

void RunGrid(dim3 grid, dim3 block, size_t shared_bytes, void (*run)(void*), void* argument) {
  const std::lock_guard lock(mutex);
  fenv_t environment;  // XLA has subnormal numbers flushed, the kernels have them
  fegetenv(&environment);
  fesetenv(FE_DFL_ENV);
  if (machine.stacks == nullptr) {
    machine.stacks =
        static_cast<uint8_t*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  if (grid.x == 0 || grid.y * grid.z * block.y * block.z != 1 || block.x % kLanes != 0 ||
      block.x > kMaxThreads || shared_bytes > kMaxSharedBytes) {
    error_of_launch = "a launch of a shape that there is not";
    fesetenv(&environment);
    return;
  }
  gridDim = grid;
  blockDim = block;
  machine.shared_bytes = shared_bytes;
  machine.run = run;
  machine.argument = argument;
  machine.error.clear();
  for (unsigned x = 0; x < grid.x && machine.error.empty(); ++x) {
    blockIdx = {x, 0, 0};
    RunCta(static_cast<int>(block.x));
    if (!machine.error.empty()) machine.error = "CTA " + std::to_string(x) + ": " + machine.error;
  }
  if (!machine.error.empty()) error_of_launch = machine.error;
  fesetenv(&environment);
}

void CopyAsync(uint32_t shared, const void* global, int bytes) {
  if (shared % 16 != 0 || (bytes != 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    Fail("cp.async of 16 bytes that are not aligned");
  }
  static const uint8_t zeros[16] = {};
  const void* from = bytes == 0 ? zeros : global;
  if (machine.random() % 2 == 0) {  // as soon as it may be, or as late
    std::memcpy(Shared(shared, 16), from, 16);
  } else {
    ThisFiber().copies.push_back({shared, from, 16});
  }
}
void CopyAsyncCommit() { ThisFiber().copies.push_back({0, nullptr, 0}); }
void WaitForCopies(int pending) {
  auto& copies = ThisFiber().copies;
  int groups = 0;
  for (const AsyncCopy& x : copies) groups += x.global == nullptr;
  size_t end = 0;
  for (; end < copies.size() && groups > pending; ++end) {
    const AsyncCopy& x = copies[end];
    if (x.global == nullptr) {
      --groups;
    } else {
      std::memcpy(Shared(x.shared, x.bytes), x.global, x.bytes);
    }
  }
  copies.erase(copies.begin(), copies.begin() + end);
}

void BarrierInit(uint32_t barrier, int arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  StoreSharedAs(barrier, Barrier{count, count, 0, 0});
}
void BarrierArrive(uint32_t barrier) {
  BarrierExpect(barrier, 0);
  if (machine.is_interrupted && machine.random() % 8 == 0) Yield();
}
void BarrierExpect(uint32_t barrier, int bytes) {
  ChangeBarrier(barrier, [&](Barrier& x) {
    if (x.missing == 0) Fail("a barrier has more arrivals than it was made for");
    --x.missing;
    x.bytes -= bytes;
  });
}
bool BarrierTest(uint32_t barrier, uint32_t parity) {
  return LoadSharedAs<Barrier>(barrier).parity != parity;
}
void BarrierWait(uint32_t barrier, uint32_t parity) {
  if (!BarrierTest(barrier, parity)) {
    WaitUntil([barrier, parity] { return BarrierTest(barrier, parity); });
  }
}
void CopyBox(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  const Box box = MakeBox(shared, map, c0, c1, c2);
  const int bytes = static_cast<int>(box.map.box[0] * box.map.box[1] * box.map.box[2]);
  Shared(shared, bytes);
  Shared(barrier, sizeof(Barrier));
  StartBulkCopy({box, barrier, nullptr, bytes});
}
void StoreBox(const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2) {
  const Box box = MakeBox(shared, map, c0, c1, c2);
  if (machine.random() % 2 == 0) {  // as soon as it may be, or as late
    Store(box);
  } else {
    ThisFiber().stores.push_back(box);
  }
}
void WaitForStores() {
  for (const Box& box : ThisFiber().stores) Store(box);
  ThisFiber().stores.clear();
}
void CopyBulk(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  if (shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) {
    Fail("a bulk copy that is not aligned to 16 bytes");
  }
  Shared(shared, bytes);
  Shared(barrier, sizeof(Barrier));
  StartBulkCopy({{shared, {}, {}}, barrier, global, bytes});
}

void Mma(Type type, bool to_f16, uint32_t* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  Warp& warp = WholeWarp();
  const unsigned parity = warp.generation % 2;
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  std::memcpy(warp.values[parity][Lane()], &mine, sizeof(mine));
  warp.Meet(false, [&] {
    float rows[16][32], columns[8][32];
    for (int row = 0; row < 16; ++row) {
      uint32_t of_a[8], of_b[8];
      for (int word = 0; word < 8; ++word) {
        Fragments from;
        std::memcpy(&from, warp.values[parity][LaneOfWord(row, word)], sizeof(from));
        of_a[word] = from.a[RegisterOfWord(row, word)];
        of_b[word] = from.b[word / 4];
      }
      ReadElements(type, of_a, rows[row]);
      if (row < 8) ReadElements(type, of_b, columns[row]);
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        warp.products[parity][row][column] = Dot(type, rows[row], columns[column]);
      }
    }
  });
  const Accumulator accumulator{type, to_f16};
  for (int i = 0; i < 4; ++i) {
    const float product = warp.products[parity][Lane() / 4 + i / 2 * 8][Lane() % 4 * 2 + i % 2];
    accumulator.Add(c[to_f16 ? i / 2 : i], i % 2, product, true);
  }
}

void Issue(const Wgmma& wgmma) {
  ThisFiber().wgmmas.push_back(wgmma);
  // By the first of the warps that issues it.
  auto& checksums = machine.warpgroups[machine.current / kThreadsOfWarpgroup].checksums;
  if (checksums.size() < ThisFiber().wgmmas.size()) checksums.push_back(Checksum(wgmma));
}
void WgmmaCommit() {
  ThisFiber().wgmmas.push_back({});
  auto& checksums = machine.warpgroups[machine.current / kThreadsOfWarpgroup].checksums;
  if (checksums.size() < ThisFiber().wgmmas.size()) checksums.push_back(0);
}
void WaitForWgmmas(int pending) {
  const int first = machine.current / kThreadsOfWarpgroup * kThreadsOfWarpgroup;
  ThisWarpgroup().Meet(false, [&] {
    const size_t end = EndOfGroups(machine.fibers[first].wgmmas, pending);
    for (size_t i = 0; i < end; ++i) {
      if (machine.fibers[first].wgmmas[i].columns != 0) RunWgmma(first, i);
    }
    for (int thread = first; thread < first + kThreadsOfWarpgroup; ++thread) {
      auto& wgmmas = machine.fibers[thread].wgmmas;
      if (wgmmas.size() < end) Fail("the threads of a warpgroup have issued different wgmmas");
      wgmmas.erase(wgmmas.begin(), wgmmas.begin() + end);
    }
    auto& checksums = machine.warpgroups[first / kThreadsOfWarpgroup].checksums;
    checksums.erase(checksums.begin(), checksums.begin() + end);
  });
}

}  // namespace emulator

int emulator::Capability() {
  const char* capability = std::getenv("JAX_SAGE_EMULATED_CAPABILITY");
  return capability != nullptr ? std::atoi(capability) : 90;
}

// The CUDA runtime, as far as the launches use it.
extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrComputeCapabilityMajor) {
    *value = emulator::Capability() / 10;
  } else if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = emulator::kMultiprocessors;
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= emulator::kMaxSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  if (emulator::error_of_launch.empty()) return cudaSuccess;
  emulator::told_error = std::exchange(emulator::error_of_launch, {});
  return cudaErrorLaunchFailure;
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error != cudaErrorLaunchFailure) emulator::told_error = "CUDA error " + std::to_string(error);
  return emulator::told_error.c_str();
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&emulator::EncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
