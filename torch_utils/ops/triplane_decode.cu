// Interface of the CUDA op triplane_decode to torch. The kernels are in triplane_decode.cuh.
#include "cuda_tensor.cuh"
#include "triplane_decode.cuh"

namespace {

using namespace eg3d;
constexpr const char* kOp = "triplane_decode";

template <typename T> Planes<T> planes_of(const Tensor& planes, const std::vector<int64_t>& axes, const Tensor& points) {
  STD_TORCH_CHECK(planes.dim() == 5 && points.dim() == 3, kOp, ": expected planes [N, K, H, W, C] and points [N, P, 3]");
  const int64_t count = planes.size(1), channels = planes.size(4);
  check_size(kOp, "points", points, {planes.size(0), points.size(1), 3});
  check_like(kOp, "planes", planes, planes);
  check_like(kOp, "points", points, planes);
  STD_TORCH_CHECK(
      count <= kMaxPlanes && int64_t(axes.size()) == 2 * count, kOp, ": expected two axes for each of at most ", kMaxPlanes, " planes");
  Planes<T> p{};
  p.values = data<T>(planes);
  p.points = data<T>(points);
  p.planes = int(count);
  p.height = int(planes.size(2));
  p.width = int(planes.size(3));
  p.channels = int(channels);
  p.per_image = points.size(1);
  p.points_total = points.size(0) * points.size(1);
  p.vectors = sizeof(T) == 4 && channels % 4 == 0 && reinterpret_cast<uintptr_t>(p.values) % 16 == 0;
  for (int64_t k = 0; k < count; ++k) {
    STD_TORCH_CHECK(axes[2 * k] >= 0 && axes[2 * k] < 3 && axes[2 * k + 1] >= 0 && axes[2 * k + 1] < 3, kOp, ": expected axes 0, 1 or 2");
    p.width_axis[k] = int(axes[2 * k]);
    p.height_axis[k] = int(axes[2 * k + 1]);
  }
  return p;
}

template <typename T>
Decoder<T> decoder_of(const Tensor& planes, const Tensor& w0, const Tensor& b0, const Tensor& w1, const Tensor& b1, bool backward) {
  const int64_t channels = planes.size(4), units = w0.size(0), rows = w1.size(0);
  for (const auto* weight : {&w0, &b0, &w1, &b1}) check_like(kOp, "a weight", *weight, planes);
  check_size(kOp, "w0", w0, {units, channels});
  check_size(kOp, "b0", b0, {units});
  check_size(kOp, "w1", w1, {rows, units});
  check_size(kOp, "b1", b1, {rows});
  STD_TORCH_CHECK(
      rows >= 1 && decoder_fits<T>(int(units), int(channels), int(rows - 1), backward), kOp, ": the CUDA kernel supports at most ",
      kMaxChannels, " channels, ", kMaxColours, " colours, and as many hidden units as fit into shared memory (128 in float32)");
  return {data<T>(w0), data<T>(b0), data<T>(w1), data<T>(b1), int(units), int(rows - 1)};
}

std::tuple<Tensor, Tensor> forward(Tensor planes, std::vector<int64_t> axes, Tensor points, Tensor w0, Tensor b0, Tensor w1, Tensor b1) {
  const OnDevice here(planes);
  const int64_t n = points.size(0), count = points.size(1);
  Tensor features = empty(planes, {n, count, w1.size(0) - 1}), sigma = empty(planes, {n, count, 1});
  with_real(kOp, planes, [&](auto zero) {
    using T = decltype(zero);
    const Planes<T> p = planes_of<T>(planes, axes, points);
    decode_forward(p, decoder_of<T>(planes, w0, b0, w1, b1, false), mutable_data<T>(features), mutable_data<T>(sigma), here.stream);
    return 0;
  });
  return {features, sigma};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_features, Tensor grad_sigma, Tensor planes, std::vector<int64_t> axes, Tensor points, Tensor w0, Tensor b0, Tensor w1,
    Tensor b1) {
  const OnDevice here(planes);
  check_like(kOp, "grad_features", grad_features, planes);
  check_like(kOp, "grad_sigma", grad_sigma, planes);
  check_size(kOp, "grad_features", grad_features, {points.size(0), points.size(1), w1.size(0) - 1});
  check_size(kOp, "grad_sigma", grad_sigma, {points.size(0), points.size(1), 1});
  const int64_t j = w0.size(0), c = w0.size(1), rows = w1.size(0);
  Tensor grad_planes = zeros(planes, {planes.size(0), planes.size(1), planes.size(2), planes.size(3), planes.size(4)});
  Tensor grad_w0 = empty(w0, {j, c}), grad_b0 = empty(w0, {j}), grad_w1 = empty(w0, {rows, j}), grad_b1 = empty(w0, {rows});
  with_real(kOp, planes, [&](auto zero) {
    using T = decltype(zero);
    const Planes<T> p = planes_of<T>(planes, axes, points);
    const Decoder<T> d = decoder_of<T>(planes, w0, b0, w1, b1, true);
    const int64_t blocks = decode_backward_blocks(p);
    const Tensor part_w0 = empty(w0, {blocks, j, c}), part_b0 = empty(w0, {blocks, j});
    const Tensor part_w1 = empty(w0, {blocks, rows, j}), part_b1 = empty(w0, {blocks, rows});
    const DecoderPartials<T> partial{
        mutable_data<T>(part_w0), mutable_data<T>(part_b0), mutable_data<T>(part_w1), mutable_data<T>(part_b1)};
    const DecoderPartials<T> grad{mutable_data<T>(grad_w0), mutable_data<T>(grad_b0), mutable_data<T>(grad_w1), mutable_data<T>(grad_b1)};
    decode_backward(p, d, data<T>(grad_features), data<T>(grad_sigma), mutable_data<T>(grad_planes), partial, grad, here.stream);
    return 0;
  });
  return {grad_planes, grad_w0, grad_b0, grad_w1, grad_b1};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CUDA, m) {
  m.impl("triplane_decode", TORCH_BOX(&forward));
  m.impl("triplane_decode_backward", TORCH_BOX(&backward));
}
