// torch's side of the CUDA ops, on the stable ABI: the current stream and checks of tensors.
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

// torch's current stream on a device. The function is looked up when first needed: torch without CUDA, which loads these libraries too
// (and can then say what they contain), does not have it.
// `static` is essential: of an inline function's static variable the loader unites the guard over all libraries of the process, but not
// the variable, which is hidden. The second library would take its own null pointer for initialised, and call it.
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
  STD_TORCH_CHECK(function != nullptr, "this build of torch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

// Makes a tensor's device current, and holds its stream.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;
  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()), stream(current_stream(tensor)) {}
};

// Kernels index dense memory of one type on one device.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " differs in dtype from the other tensors");
  const bool together = tensor.is_cuda() && tensor.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(together, op, ": ", name, " is not on the device of the other tensors");
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

// work(T{}) with the C++ type of a tensor: float or double.
template <typename Work> auto with_real(const char* op, const Tensor& tensor, Work work) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": float32 or float64 is needed");
  return type == ScalarType::Double ? work(double{}) : work(float{});
}

// The same for images: float16 and bfloat16 too.
template <typename Work> auto with_stored(const char* op, const Tensor& tensor, Work work) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Half) return work(__half{});
  if (type == ScalarType::BFloat16) return work(__nv_bfloat16{});
  return with_real(op, tensor, work);
}

}  // namespace eg3d
