// Compiled op for a CPU: 3x3 convolution with stride 2 of channels-last images, its transpose, and the gradient of the kernels. See
// conv3x3.py.
#include "conv3x3_convolve.h"

namespace {

using minimal::Down;
using minimal::Up;
using torch::stable::Tensor;

Tensor conv3x3_strided(Tensor x, Tensor w, bool up) {
  const int64_t height = up ? 2 * x.size(2) + 1 : (x.size(2) - 1) / 2, width = up ? 2 * x.size(3) + 1 : (x.size(3) - 1) / 2;
  Tensor y = torch::stable::new_empty(x, {x.size(0), height, width, w.size(up ? 1 : 0)});
  y = torch::stable::transpose(torch::stable::transpose(y, 1, 3), 2, 3);
  up ? minimal::convolve<Up<float>>(x, w, 1, true, y) : minimal::convolve<Down<float>>(x, w, 0, false, y);
  return y;
}

Tensor conv3x3_strided_weight(Tensor x, Tensor grad) {
  Tensor w = torch::stable::new_empty(x, {grad.size(1), x.size(1), 3, 3});
  minimal::weight_gradient<Down<float>>(x, grad, 0, w);
  return w;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("conv3x3_strided", TORCH_BOX(&conv3x3_strided));
  m.impl("conv3x3_strided_weight", TORCH_BOX(&conv3x3_strided_weight));
}
