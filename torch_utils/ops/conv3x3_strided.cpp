// The gradient of the kernels of a 3x3 convolution with stride 2 of channels-last images, on a CPU. See conv3x3_strided.py.
//
// For each of the nine taps it is a product of matrices of pixels and channels, whose panels are read from every second pixel: nothing else is
// gathered. `big` is the image with 2 h + 1 by 2 w + 1 pixels and I channels, `small` the one with h by w and O.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "tile_products.h"

namespace {

using tile::Panels;
using torch::stable::Tensor;

constexpr int64_t kPixels = 1024;  // of which the kernels' gradient is made at a time: 2 MB of 512 channels

struct Image {  // channels-last
  float* data;
  int64_t n, h, w, c;
  float* pixel(int64_t image, int64_t y, int64_t x) const { return data + ((image * h + y) * w + x) * c; }
};

Image view(const Tensor& x) { return {static_cast<float*>(const_cast<void*>(x.const_data_ptr())), x.size(0), x.size(2), x.size(3), x.size(1)}; }

Tensor conv3x3_strided_weight(Tensor x, Tensor grad) {
  const Image big = view(x), small = view(grad);
  Tensor w = torch::stable::new_empty(x, {3, 3, small.c, big.c});
  float* to = static_cast<float*>(w.mutable_data_ptr());
  const Panels<float> panels{big.c};
  const int64_t pixels = small.n * small.h * small.w;
#pragma omp parallel num_threads(torch::stable::get_num_threads())
  for (int64_t first = 0; first < pixels; first += kPixels) {
    const int64_t count = std::min(kPixels, pixels - first);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < 9 * panels.count; ++task) {
      const int64_t tap = task / panels.count;
      auto row = [&](int64_t k) {
        const int64_t pixel = first + k, y = pixel / small.w % small.h;
        return big.pixel(pixel / (small.w * small.h), 2 * y + tap / 3, 2 * (pixel % small.w) + tap % 3);
      };
      panels.product(
          task % panels.count, {small.data + first * small.c, 1, small.c}, small.c, row, count, {to + tap * small.c * big.c, big.c}, first > 0);
    }
  }
  return torch::stable::transpose(torch::stable::transpose(w, 0, 2), 1, 3);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("conv3x3_strided_weight", TORCH_BOX(&conv3x3_strided_weight));
}
