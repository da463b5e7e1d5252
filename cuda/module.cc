// The Python module jax_sage._cuda: the XLA custom calls, what they were built for, and their
// argument checks, which Python can call without a GPU.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "ffi.h"

namespace nb = nanobind;

namespace jax_sage {
namespace {

nb::capsule Target(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict FfiTargets() {
  nb::dict targets;
  targets["jax_sage_quantize"] = Target(JaxSageQuantize);
  targets["jax_sage_attention"] = Target(JaxSageAttention);
  targets["jax_sage_pack_mask"] = Target(JaxSagePackMask);
  targets["jax_sage_seen_keys"] = Target(JaxSageSeenKeys);
  targets["jax_sage_intervals"] = Target(JaxSageIntervals);
  targets["jax_sage_sort_ids"] = Target(JaxSageSortIds);
  return targets;
}

std::vector<int> Architectures() { return {JAX_SAGE_CUDA_ARCHS}; }

int DriverVersion() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) {
    cudaGetLastError();  // Leave no error behind for the next caller of the runtime.
    return 0;
  }
  return version;
}

using PyBuffers = std::vector<std::pair<std::string, std::vector<int64_t>>>;

std::vector<Buffer> ToBuffers(const PyBuffers& buffers) {
  std::vector<Buffer> result;
  for (const auto& [dtype, dims] : buffers) result.push_back({dtype, dims});
  return result;
}

// Wraps one of checks.h's functions for Python: None in place of its empty message.
template <std::string (*check)(const std::vector<Buffer>&, const std::vector<Buffer>&,
                               const Attrs&)>
std::optional<std::string> Check(const PyBuffers& args, const PyBuffers& results,
                                 const Attrs& attrs) {
  const std::string message = check(ToBuffers(args), ToBuffers(results), attrs);
  if (message.empty()) return std::nullopt;
  return message;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.def("ffi_targets", &FfiTargets,
        "The XLA FFI handlers by custom-call name, as capsules for jax.ffi.register_ffi_target.");
  m.def("architectures", &Architectures,
        "The compute capabilities that the kernels were built for, as 10 * major + minor.");
  m.def(
      "source_hash", [] { return JAX_SAGE_SOURCE_HASH; },
      "Hash of the sources that the module was built from, as jax_sage.record computes it.");
  m.def(
      "toolkit_version", [] { return CUDART_VERSION; },
      "The CUDA that the module was built with, as 1000 * major + 10 * minor.");
  m.def(
      "driver_version", &DriverVersion,
      "The CUDA that the machine's driver supports, as 1000 * major + 10 * minor; 0 without one.");
  m.def(
      "check_quantize", &Check<CheckQuantize>, nb::arg("args"), nb::arg("results"),
      nb::arg("attrs"),
      "What is wrong with a quantize call of these (dtype, dims) buffers and attributes, or None.");
  m.def("check_attention", &Check<CheckAttention>, nb::arg("args"), nb::arg("results"),
        nb::arg("attrs"),
        "What is wrong with an attention call of these (dtype, dims) buffers and attributes, or "
        "None.");
  m.def("check_pack_mask", &Check<CheckPackMask>, nb::arg("args"), nb::arg("results"),
        nb::arg("attrs"),
        "What is wrong with a pack_mask call of these (dtype, dims) buffers, or None.");
  m.def("check_seen_keys", &Check<CheckSeenKeys>, nb::arg("args"), nb::arg("results"),
        nb::arg("attrs"),
        "What is wrong with a seen_keys call of these (dtype, dims) buffers and attributes, or "
        "None.");
  m.def("check_intervals", &Check<CheckIntervals>, nb::arg("args"), nb::arg("results"),
        nb::arg("attrs"),
        "What is wrong with an intervals call of these (dtype, dims) buffers and attributes, or "
        "None.");
  m.def("check_sort_ids", &Check<CheckSortIds>, nb::arg("args"), nb::arg("results"),
        nb::arg("attrs"),
        "What is wrong with a sort_ids call of these (dtype, dims) buffers, or None.");
}

}  // namespace jax_sage
