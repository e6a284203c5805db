// Macros and functions with which the CUDA kernels are written. With nvcc, the macros are CUDA's keywords. With other compilers,
// tests/torch_utils/cuda/emulate/device.h emulates a CUDA device: it runs the same kernels thread by thread on the CPU, so that the tests
// check indices, barriers and formulas without a GPU. Kernels and their launches (grid, block, shared memory) are in <op>.cuh, which does not
// depend on torch. <op>.cu converts tensors to pointers.
#pragma once
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdexcept>
#include <string>

#define EG3D_DEVICE __device__ __forceinline__
#define EG3D_KERNEL static __global__
#define EG3D_BOTH __host__ __device__ __forceinline__
#define EG3D_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define EG3D_CONSTANT const __grid_constant__  // a kernel parameter that is indexed without being copied to registers
#define EG3D_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char shared_bytes_[];   \
  T* const name = reinterpret_cast<T*>(shared_bytes_)

using Stream = cudaStream_t;

namespace eg3d {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Launch a kernel. A kernel may use as much shared memory as the device allows. Raises: std::runtime_error if CUDA rejects the launch.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), "setting shared memory");
  }
  kernel<<<grid, block, shared, stream>>>(static_cast<P>(args)...);
  check(cudaGetLastError(), "launching a kernel");
}

// Return the number of blocks that the device can run at the same time, if each multiprocessor can run `per_processor` blocks.
inline int resident_blocks(int per_processor) {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "reading the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "reading the number of multiprocessors");
  return count * per_processor;
}

}  // namespace eg3d

#else
#include "device.h"
#endif

namespace eg3d {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

EG3D_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <typename T> EG3D_BOTH T smaller(T a, T b) { return b < a ? b : a; }
template <typename T> EG3D_BOTH T larger(T a, T b) { return a < b ? b : a; }

// Functions such as exp and log(1 + t) in the type of the argument. The float versions are CUDA's accurate functions (2 ulp). Faster and less
// accurate functions have names that begin with quick_.
EG3D_DEVICE float exp_of(float x) { return expf(x); }
EG3D_DEVICE double exp_of(double x) { return exp(x); }
EG3D_DEVICE float log1p_of(float x) { return log1pf(x); }
EG3D_DEVICE double log1p_of(double x) { return log1p(x); }
EG3D_DEVICE float expm1_of(float x) { return expm1f(x); }
EG3D_DEVICE double expm1_of(double x) { return expm1(x); }
EG3D_DEVICE float floor_of(float x) { return floorf(x); }
EG3D_DEVICE double floor_of(double x) { return floor(x); }
EG3D_DEVICE float abs_of(float x) { return fabsf(x); }
EG3D_DEVICE double abs_of(double x) { return fabs(x); }
EG3D_DEVICE float tanh_of(float x) { return tanhf(x); }
EG3D_DEVICE double tanh_of(double x) { return tanh(x); }

// Return log(1 + exp(h)), accurate for every h.
template <typename T> EG3D_DEVICE T softplus(T h) { return larger(h, T(0)) + log1p_of(exp_of(-abs_of(h))); }

// Return 1 / (1 + exp(-h)), without overflow.
template <typename T> EG3D_DEVICE T sigmoid(T h) {
  const T e = exp_of(-abs_of(h));
  return (h < T(0) ? e : T(1)) / (T(1) + e);
}

// Faster versions that use the GPU's special-function units. The absolute errors are below 3e-7 max(1, h) for softplus, and below 3e-7 for
// sigmoid. For float64, the accurate functions are used.
EG3D_DEVICE float quick_softplus(float h) { return larger(h, 0.0f) + 0.69314718056f * __log2f(1.0f + __expf(-fabsf(h))); }
EG3D_DEVICE double quick_softplus(double h) { return softplus(h); }
EG3D_DEVICE float quick_sigmoid(float h) {
  const float e = __expf(-fabsf(h));
  return __fdividef(h < 0.0f ? e : 1.0f, 1.0f + e);
}
EG3D_DEVICE double quick_sigmoid(double h) { return sigmoid(h); }

// Images may be stored in 16 bits. Arithmetic is in float64 for images in float64, and in float32 for all others.
template <typename S> struct ArithmeticOf { using Type = float; };
template <> struct ArithmeticOf<double> { using Type = double; };
template <typename S> using Arithmetic = typename ArithmeticOf<S>::Type;
EG3D_DEVICE float widen(float v) { return v; }
EG3D_DEVICE double widen(double v) { return v; }
EG3D_DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename S> EG3D_DEVICE S narrow(Arithmetic<S> v) { return S(v); }
template <> EG3D_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16(v); }
#ifdef __CUDACC__
EG3D_DEVICE float widen(__half v) { return __half2float(v); }
template <> EG3D_DEVICE __half narrow<__half>(float v) { return __float2half(v); }
#endif

// Return the sum over the 32 lanes of a warp, in every lane. The order of additions is fixed.
template <typename T> EG3D_DEVICE T warp_sum(T value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Compute out[i] = scale[i / inner % rows] * sum_t partial[t, i], in ascending order of t. This is the second stage of a reduction whose
// results are bitwise reproducible. If scale is null, the factor is 1.
template <typename T>
EG3D_KERNEL void sum_partials(const T* partial, int64_t parts, int64_t count, const T* scale, int64_t inner, int64_t rows, T* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  T total = 0;
  for (int64_t t = 0; t < parts; ++t) total += partial[t * count + i];
  out[i] = scale == nullptr ? total : scale[i / inner % rows] * total;
}

template <typename T>
void launch_sum_partials(
    const T* partial, int64_t parts, int64_t count, const T* scale, int64_t inner, int64_t rows, T* out, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(count, 256)));
  launch(sum_partials<T>, grid, dim3(256), 0, stream, partial, parts, count, scale, inner, rows, out);
}

}  // namespace eg3d
