// Launches that overlap: a kernel's CTAs start where SMs get free of the one before it, and wait
// until that has ended when they need its results. So a launch and a prologue take no time of their
// own (programmatic launches, from compute capability 9.0 on; elsewhere launches as ever).
#pragma once

#include <cuda_runtime_api.h>

namespace jax_sage {

// Early in a kernel: those of the next launch may start when all CTAs have come here, or ended.
__device__ __forceinline__ void LetNextStart() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
// Before anything is read that earlier launches have written, or written that they still read.
__device__ __forceinline__ void WaitForPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Of a kernel that calls WaitForPrevious. Graphs are captured a custom call at a time, and some
// drivers capture no such launches: there it is one as ever.
template <class... Params>
cudaError_t LaunchOverlapping(void (*kernel)(Params...), unsigned blocks, unsigned threads,
                              size_t shared_bytes, cudaStream_t stream, const Params&... params) {
  int device = 0, major = 0;
  cudaStreamCaptureStatus capturing;
  cudaError_t error = cudaStreamIsCapturing(stream, &capturing);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 && capturing == cudaStreamCaptureStatusNone ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace jax_sage
