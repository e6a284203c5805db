// bias_act on a GPU: tensors in, tensors out. Kernel: bias_act.cuh.
#include <algorithm>

#include "bias_act.cuh"
#include "cuda_tensor.cuh"

namespace {

using namespace eg3d;
constexpr const char* kOp = "bias_act";

// Whether the elements fill one stretch of memory, in whatever order of axes: contiguous, channels-last, transposed.
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

// The kernel reads 16 bytes at a time; a view into the middle of a storage may begin in between.
Tensor aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x : torch::stable::clone(x); }

// bias_act(x), or, given the op's result, slope(result) * (x + b).
Tensor run(const Optional& result, const Tensor& x, const Optional& b, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
  STD_TORCH_CHECK(is_dense(x), kOp, ": x has gaps between its elements");
  STD_TORCH_CHECK(act >= kLinear && act <= (result ? kLrelu : kSwish), kOp, ": activation ", act, " is not known here");
  BiasAct o{x.numel(), 1, 1, int(act), alpha, gain, clamp};
  if (b) {
    STD_TORCH_CHECK(dim >= 0 && dim < x.dim(), kOp, ": x has no axis ", dim);
    check_size(kOp, "b", *b, {x.size(dim)});
    check_like(kOp, "b", *b, x);
    o.channels = x.size(dim);
    o.inner = o.channels == 1 ? 1 : x.stride(dim);
  }
  if (result) {
    STD_TORCH_CHECK(
        same_layout(*result, x) && result->scalar_type() == x.scalar_type() && result->get_device_index() == x.get_device_index(), kOp,
        ": the result differs from x in layout, dtype or device");
  }
  const OnDevice here(x);
  const Tensor from = aligned(x);
  const Optional known = result ? Optional(aligned(*result)) : std::nullopt;
  Tensor out = torch::stable::empty_like(x);
  STD_TORCH_CHECK(same_layout(out, x) && same_layout(from, x), kOp, ": torch gave a tensor another layout than x");
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

// slope(out) * grad, and its sum over all axes but dim.
std::tuple<Tensor, Tensor> backward(
    Tensor grad, Tensor out, int64_t dim, int64_t act, double alpha, double gain, double clamp, bool with_bias) {
  Tensor grad_x = run(out, grad, std::nullopt, dim, act, alpha, gain, clamp);
  if (!with_bias) return {grad_x, empty(grad, {0})};
  STD_TORCH_CHECK(dim >= 0 && dim < grad.dim(), kOp, ": the gradient has no axis ", dim);
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
