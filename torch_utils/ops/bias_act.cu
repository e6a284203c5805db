// Interface of the CUDA op bias_act to torch. It checks the tensors and launches the kernel in bias_act.cuh.
#include <algorithm>

#include "bias_act.cuh"
#include "cuda_tensor.cuh"

namespace {

using namespace eg3d;
constexpr const char* kOp = "bias_act";

// Return true if the elements fill one range of memory without gaps, for any order of the axes (contiguous, channels-last, transposed).
bool is_dense(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, length
  for (int64_t i = 0; i < x.dim(); ++i)
    if (x.size(i) != 1) axes.emplace_back(x.stride(i), x.size(i));
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, length] : axes) {
    if (stride != expected) return false;
    expected *= length;
  }
  return true;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i) && (a.size(i) == 1 || a.stride(i) == b.stride(i));
  return same;
}

// Return x, or a copy if its memory is not aligned to 16 bytes. The kernel reads 16 bytes at a time, and a view can begin at any element.
Tensor aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x : torch::stable::clone(x); }

// Compute bias_act(x) or, if `result` is given, slope(result) * (x + b), where `result` is a result of bias_act.
Tensor run(const Optional& result, const Tensor& x, const Optional& b, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
  STD_TORCH_CHECK(is_dense(x), kOp, ": x must have no gaps between its elements");
  STD_TORCH_CHECK(
      act >= kLinear && act <= (result ? kLrelu : kSwish), kOp, ": act = ", act, " is not the number of an activation that this op supports");
  BiasAct o{x.numel(), 1, 1, int(act), alpha, gain, clamp};
  if (b) {
    STD_TORCH_CHECK(dim >= 0 && dim < x.dim(), kOp, ": dim must be an axis of x, got ", dim);
    check_size(kOp, "b", *b, {x.size(dim)});
    check_like(kOp, "b", *b, x);
    o.channels = x.size(dim);
    o.inner = o.channels == 1 ? 1 : x.stride(dim);
  }
  if (result) {
    STD_TORCH_CHECK(
        same_layout(*result, x) && result->scalar_type() == x.scalar_type() && result->get_device_index() == x.get_device_index(), kOp,
        ": the result must have the memory layout, dtype and device of x");
  }
  const OnDevice here(x);
  const Tensor from = aligned(x);
  const Optional known = result ? Optional(aligned(*result)) : std::nullopt;
  Tensor out = torch::stable::empty_like(x);
  STD_TORCH_CHECK(same_layout(out, x) && same_layout(from, x), kOp, ": torch allocated a tensor with another memory layout than x");
  if (o.count == 0) return out;
  return with_stored(kOp, x, [&](auto zero) {
    using S = decltype(zero);
    bias_act(o, data<S>(from), data_or_null<S>(b), data_or_null<S>(known), mutable_data<S>(out), here.stream);
    return out;
  });
}

Tensor forward(Tensor x, Optional b, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
  return run(std::nullopt, x, b, dim, act, alpha, gain, clamp);
}

// Return slope(out) * grad, and the sum of this product over all axes except dim.
std::tuple<Tensor, Tensor> backward(
    Tensor grad, Tensor out, int64_t dim, int64_t act, double alpha, double gain, double clamp, bool with_bias) {
  Tensor grad_x = run(out, grad, std::nullopt, dim, act, alpha, gain, clamp);
  if (!with_bias) return {grad_x, empty(grad, {0})};
  STD_TORCH_CHECK(dim >= 0 && dim < grad.dim(), kOp, ": dim must be an axis of the gradient, got ", dim);
  std::vector<int64_t> others;
  for (int64_t i = 0; i < grad.dim(); ++i)
    if (i != dim) others.push_back(i);
  return {grad_x, others.empty() ? torch::stable::clone(grad_x) : torch::stable::sum(grad_x, others)};
}

Tensor slope(Tensor x, Optional b, Tensor out, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
  return run(out, x, b, dim, act, alpha, gain, clamp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&forward));
  m.impl("bias_act_backward", TORCH_BOX(&backward));
  m.impl("bias_act_slope", TORCH_BOX(&slope));
}
