// Functions for the interfaces of CUDA ops to torch, which use torch's stable ABI: the current stream, checks of tensors, and new tensors.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda_portable.cuh"

namespace eg3d {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Return torch's current stream on the device of a tensor. torch's function is looked up at the first call, because a build of torch without
// CUDA, which can load these libraries, too, does not have this function.
// `static` is essential. For a static variable of an inline function, the loader shares the initialisation guard between all libraries of the
// process, but not the variable, which is hidden. The second library would treat its null pointer as initialised, and call it.
static Stream current_stream(const Tensor& tensor) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    if (found == nullptr) {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      found = library == nullptr ? nullptr : dlsym(library, name);
    }
    return reinterpret_cast<Function>(found);
  }();
  STD_TORCH_CHECK(function != nullptr, "this build of torch does not support CUDA. Install a build of torch with CUDA.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

// Scope in which the device of a tensor is the current device. It also contains the current stream of this device.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;
  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()), stream(current_stream(tensor)) {}
};

// Check that a tensor is contiguous and has the dtype and device of `like`: kernels index dense memory of one type on one device.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of the other tensors");
  const bool together = tensor.is_cuda() && tensor.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(together, op, ": ", name, " must be on the device of the other tensors");
}

inline void check_size(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (int64_t length : shape) fits = fits && tensor.size(axis++) == length;
  STD_TORCH_CHECK(fits, op, ": ", name, " has an unexpected shape");
}

template <typename T> const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <typename T> T* mutable_data(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }
template <typename T> const T* data_or_null(const Optional& tensor) { return tensor ? data<T>(*tensor) : nullptr; }

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape) { return torch::stable::new_empty(like, shape); }
inline Tensor zeros(const Tensor& like, std::vector<int64_t> shape) { return torch::stable::new_zeros(like, shape); }

// Call work(T{}), where T is the C++ type of a tensor's elements (float or double), and return the result.
template <typename Work> auto with_real(const char* op, const Tensor& tensor, Work work) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": the tensors must be float32 or float64");
  return type == ScalarType::Double ? work(double{}) : work(float{});
}

// The same as `with_real`, but also for images in float16 and bfloat16.
template <typename Work> auto with_stored(const char* op, const Tensor& tensor, Work work) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Half) return work(__half{});
  if (type == ScalarType::BFloat16) return work(__nv_bfloat16{});
  return with_real(op, tensor, work);
}

}  // namespace eg3d
