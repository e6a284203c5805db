// Runs triplane_decode.cuh on the emulated device. Inputs: bytes of a number (4 or 8), N, K, H, W, C, P, J, colours, axes, planes, points, w0, b0,
// w1, b1, grad_features, grad_sigma. Outputs: features, sigma, grad_planes, grad_w0, grad_b0, grad_w1, grad_b1.
#include "exchange.h"
#include "triplane_decode.cuh"

template <typename T> void run(Exchange& io) {
  using namespace eg3d;
  const int64_t n = io.number<int64_t>(), k = io.number<int64_t>(), h = io.number<int64_t>(), w = io.number<int64_t>();
  const int64_t c = io.number<int64_t>(), count = io.number<int64_t>(), j = io.number<int64_t>(), colours = io.number<int64_t>();
  const int64_t* axes = io.tensor<int64_t>();
  Planes<T> p{};
  p.values = io.tensor<T>();
  p.points = io.tensor<T>();
  p.planes = k; p.height = h; p.width = w; p.channels = c; p.per_image = count; p.points_total = n * count;
  p.vectors = sizeof(T) == 4 && c % 4 == 0;
  for (int64_t i = 0; i < k; ++i) { p.width_axis[i] = axes[2 * i]; p.height_axis[i] = axes[2 * i + 1]; }
  Decoder<T> d{};
  d.w0 = io.tensor<T>(); d.b0 = io.tensor<T>(); d.w1 = io.tensor<T>(); d.b1 = io.tensor<T>();
  d.units = j; d.colours = colours;
  const T *grad_features = io.tensor<T>(), *grad_sigma = io.tensor<T>();
  if (!decoder_fits<T>(d.units, c, colours, true)) emulated::fail("the decoder does not fit into shared memory");
  const int64_t rows = 1 + colours, blocks = decode_backward_blocks(p);
  T *features = io.allocate<T>(n * count * colours), *sigma = io.allocate<T>(n * count);
  decode_forward(p, d, features, sigma, Stream{});
  io.result(features, n * count * colours);
  io.result(sigma, n * count);
  T* grad_planes = io.allocate<T>(n * k * h * w * c, 0);
  const DecoderPartials<T> partial{
      io.allocate<T>(blocks * j * c), io.allocate<T>(blocks * j), io.allocate<T>(blocks * rows * j), io.allocate<T>(blocks * rows)};
  const DecoderPartials<T> grad{io.allocate<T>(j * c), io.allocate<T>(j), io.allocate<T>(rows * j), io.allocate<T>(rows)};
  decode_backward(p, d, grad_features, grad_sigma, grad_planes, partial, grad, Stream{});
  io.result(grad_planes, n * k * h * w * c);
  io.result(grad.w0, j * c);
  io.result(grad.b0, j);
  io.result(grad.w1, rows * j);
  io.result(grad.b1, rows);
}

int main(int count, char** words) {
  Exchange io(count, words);
  io.number<int64_t>() == 8 ? run<double>(io) : run<float>(io);
}
