// Compiled op for a CPU: 3x3 convolution of channels-last images by Winograd's F(2x2, 3x3) and F(4x4, 3x3), and the gradient of the kernels.
// See conv3x3.py.
#include "conv3x3_convolve.h"

namespace {

using namespace minimal;

bool is_double(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Double; }

Tensor conv3x3(Tensor x, Tensor w, int64_t padding, bool transposed, int64_t tile) {
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(2) + 2 * padding - 2, x.size(3) + 2 * padding - 2, w.size(transposed ? 1 : 0)});
  y = torch::stable::transpose(torch::stable::transpose(y, 1, 3), 2, 3);
  const auto run = tile == 2 ? (is_double(x) ? convolve<Filter<2, double>> : convolve<Filter<2, float>>)
                             : (is_double(x) ? convolve<Filter<4, double>> : convolve<Filter<4, float>>);
  run(x, w, padding, transposed, y);
  return y;
}

Tensor conv3x3_weight(Tensor x, Tensor grad, int64_t padding, int64_t tile) {
  Tensor w = torch::stable::new_empty(x, {grad.size(1), x.size(1), 3, 3});
  const auto run = tile == 2 ? (is_double(x) ? weight_gradient<Filter<2, double>> : weight_gradient<Filter<2, float>>)
                             : (is_double(x) ? weight_gradient<Filter<4, double>> : weight_gradient<Filter<4, float>>);
  run(x, grad, padding, w);
  return w;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_weight", TORCH_BOX(&conv3x3_weight));
}
