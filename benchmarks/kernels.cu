// Time of the quantization and of the attention kernel on Hopper, each alone and both in turn: what
// python -m jax_sage.bench measures as one. Without JAX, so that a profiler sees nothing else.
//
//   cd cuda && nvcc -std=c++17 -O3 -I. -gencode arch=compute_90a,code=sm_90a -o /tmp/kernels \
//       ../benchmarks/kernels.cu quantize/quantize.cu sm90/*.cu
//   /tmp/kernels                                   # all shapes, recipe 8+8
//   /tmp/kernels 16                                # recipe 8+16
//   ncu --set full -k regex:AttentionKernel /tmp/kernels 8 once
//
// The time of the attention alone is of bursts of some milliseconds: the clock is higher then than
// under a load that lasts.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/attention.h"
#include "quantize/quantize.h"
#include "sm90/attention.h"

namespace {

using namespace jax_sage;

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

struct Shape {
  int batch, length, heads, head_dim;
  bool causal;
  double Operations() const {
    return 4.0 * batch * heads * length * length * head_dim / (causal ? 2 : 1);
  }
};

constexpr int64_t kElements = int64_t{32768} * 2048;  // the most of Q, K or V
constexpr int64_t kTokens = int64_t{32768} * 32;      // of all heads

__global__ void FillNormal(__nv_bfloat16* x, int64_t size, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t bits = (i + 1) * 0x9E3779B97F4A7C15u + seed * 0xD1B54A32D192ED03u;
    for (int round = 0; round < 2; ++round) bits = (bits ^ (bits >> 32)) * 0xD6E8FEB86659FD93u;
    bits ^= bits >> 32;
    const float u = (static_cast<uint32_t>(bits) >> 8) * 0x1p-24f + 0x1p-25f;
    const float angle = (static_cast<uint32_t>(bits >> 32) >> 8) * 0x1p-23f;
    x[i] = __float2bfloat16(sqrtf(-2 * logf(u)) * cospif(angle));
  }
}

template <class T>
T* Allocate(int64_t count) {
  void* pointer;
  Check(cudaMalloc(&pointer, count * sizeof(T)));
  return static_cast<T*>(pointer);
}

struct Arrays {
  __nv_bfloat16* q = Allocate<__nv_bfloat16>(kElements);
  __nv_bfloat16* k = Allocate<__nv_bfloat16>(kElements);
  __nv_bfloat16* v = Allocate<__nv_bfloat16>(kElements);
  __nv_bfloat16* out = Allocate<__nv_bfloat16>(kElements);
  QuantizeParams quantize{};
  AttentionParams attention{};

  Arrays() {
    FillNormal<<<1024, 256>>>(q, kElements, 1);
    FillNormal<<<1024, 256>>>(k, kElements, 2);
    FillNormal<<<1024, 256>>>(v, kElements, 3);
    QuantizeParams& p = quantize;
    p.query = q, p.key = k, p.value = v, p.type = DType::kBf16;
    p.q = Allocate<int8_t>(2 * kElements);  // room for the padding
    p.k = Allocate<int8_t>(2 * kElements);
    p.v = Allocate<uint16_t>(2 * kElements);
    p.q_scale = Allocate<float>(2 * kTokens);
    p.q_dot_mean = Allocate<float>(2 * kTokens);
    p.k_scale = Allocate<float>(kTokens);
    p.channels = Allocate<float>(kTokens * kChannelRows);
    p.first_bad = Allocate<int32_t>(kTokens * 2);
    p.value_code_sum = Allocate<long long>(kTokens);
    p.partials = Allocate<float>(kTokens * kPartialRows * 4);
    p.arrivals = Allocate<int32_t>(kTokens);
    p.smooth_k = p.smooth_v = true;
  }

  void Set(const Shape& shape, bool fp8) {
    QuantizeParams& p = quantize;
    p.batch = shape.batch, p.heads = p.kv_heads = Divisor(shape.heads);
    p.length_q = p.length_kv = shape.length;
    p.padded_q = (shape.length + kBlockQ - 1) / kBlockQ * kBlockQ;
    p.padded_kv = (shape.length + kBlockKv - 1) / kBlockKv * kBlockKv;
    p.head_dim = p.padded_head_dim = shape.head_dim;
    // As in jax_sage/lowering_cuda.py.
    const int units = 2 * shape.batch * shape.heads;
    const int most = std::min(std::max(64, 1024 / units), 256);
    p.parts = Divisor(std::min((shape.length * shape.head_dim + 32767) / 32768, most));
    p.scale_log2 = static_cast<float>(M_LOG2E / std::sqrt(shape.head_dim));
    p.q_scale_factor = p.scale_log2 / kInt8Max;
    p.fp8_value = fp8;
    AttentionParams& a = attention;
    a.q = p.q, a.q_scale = p.q_scale, a.q_dot_mean = p.q_dot_mean, a.k = p.k, a.k_scale = p.k_scale;
    a.v = p.v, a.channels = p.channels, a.first_bad = p.first_bad;
    a.value_code_sum = p.value_code_sum, a.out = out;
    if (a.lse == nullptr) a.lse = Allocate<float>(kTokens);
    a.batch = p.batch, a.heads = p.heads, a.kv_heads = p.kv_heads;
    a.length_q = p.length_q, a.length_kv = p.length_kv, a.per_key = 1.0f / shape.length;
    a.padded_q = p.padded_q, a.padded_kv = p.padded_kv;
    a.head_dim = a.padded_head_dim = shape.head_dim;
    a.is_causal = shape.causal, a.alike = !shape.causal, a.with_lse = false,
    a.out_type = DType::kBf16;
  }
  void Quantize() { Check(LaunchQuantize(quantize, nullptr)); }
  void Attend() {
    Check(quantize.fp8_value ? sm90::LaunchAttentionFp8(attention, nullptr)
                             : sm90::LaunchAttentionFp16(attention, nullptr));
  }
};

// Microseconds of one of `calls` calls in a row: the median of three times.
template <class F>
float Time(int calls, F&& function) {
  cudaEvent_t start, end;
  Check(cudaEventCreate(&start));
  Check(cudaEventCreate(&end));
  float times[3];
  for (float& time : times) {
    Check(cudaEventRecord(start));
    for (int i = 0; i < calls; ++i) function();
    Check(cudaEventRecord(end));
    Check(cudaEventSynchronize(end));
    Check(cudaEventElapsedTime(&time, start, end));
  }
  std::sort(times, times + 3);
  return times[1] * 1000 / calls;
}

// Relative L1 error of some queries against float64.
double Error(const Arrays& arrays, const Shape& shape) {
  const auto row = [&](const __nv_bfloat16* x, int token, int head) {
    std::vector<__nv_bfloat16> values(shape.head_dim);
    const int64_t last_batch = shape.batch - 1;
    const int64_t index = (last_batch * shape.length + token) * shape.heads + head;
    Check(cudaMemcpy(values.data(), x + index * shape.head_dim, values.size() * 2,
                     cudaMemcpyDeviceToHost));
    return std::vector<double>(values.begin(), values.end());
  };
  double difference = 0, total = 0;
  for (int query : {0, shape.length / 3, shape.length - 1}) {
    const int head = query % shape.heads, seen = shape.causal ? query + 1 : shape.length;
    const std::vector<double> q = row(arrays.q, query, head), out = row(arrays.out, query, head);
    std::vector<double> exact(shape.head_dim);
    double sum = 0;
    for (int key = 0; key < seen; ++key) {
      const std::vector<double> k = row(arrays.k, key, head), v = row(arrays.v, key, head);
      double score = 0;
      for (int c = 0; c < shape.head_dim; ++c) score += q[c] * k[c];
      const double p = std::exp(score / std::sqrt(shape.head_dim));
      sum += p;
      for (int c = 0; c < shape.head_dim; ++c) exact[c] += p * v[c];
    }
    for (int c = 0; c < shape.head_dim; ++c) {
      difference += std::abs(out[c] - exact[c] / sum);
      total += std::abs(exact[c] / sum);
    }
  }
  return difference / total;
}

}  // namespace

int main(int argc, char** argv) {
  const bool fp8 = argc < 2 || std::strcmp(argv[1], "16") != 0;
  Arrays arrays;
  if (argc > 2) {
    arrays.Set({4, 4096, 16, 128, false}, fp8);
    arrays.Quantize();
    arrays.Attend();
    Check(cudaDeviceSynchronize());
    return 0;
  }
  std::printf("batch length heads head_dim causal | attention us  TOPS | both us  TOPS | error\n");
  for (int head_dim : {128, 64}) {
    for (bool causal : {false, true}) {
      for (int length : {1024, 4096, 8192, 32768}) {
        const Shape shape{std::max(16384 / length, 1), length, 2048 / head_dim, head_dim, causal};
        arrays.Set(shape, fp8);
        arrays.Quantize();
        arrays.Attend();
        Check(cudaDeviceSynchronize());
        const double operations = shape.Operations();
        const int calls = operations > 4e12 ? 3 : 12;
        const float attention = Time(calls, [&] { arrays.Attend(); });
        const float both = Time(calls, [&] {
          arrays.Quantize();
          arrays.Attend();
        });
        std::printf("%5d %6d %5d %8d %6s | %12.1f %5.0f | %7.1f %5.0f |", shape.batch, length,
                    shape.heads, head_dim, causal ? "yes" : "no", attention,
                    operations / attention * 1e-6, both, operations / both * 1e-6);
        if (length <= 4096) std::printf(" %.4f", Error(arrays, shape));
        std::printf("\n");
      }
    }
  }
}
