// 3x3 convolution of channels-last images by Winograd's F(2x2, 3x3) and F(4x4, 3x3) on a CPU. See conv3x3.py for the formulas.
//
// Tiles are worked on in chunks that stay in cache: transform the patches of a chunk, 16 or 36 matrix products, transform back. Products of
// float64 are torch's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "conv3x3_tiles.h"
#include "tile_products.h"

namespace {

using minimal::Image;
using minimal::Kernels;
using minimal::planes;
using minimal::Range;
using minimal::Tiles;
using minimal::transform_gradients;
using minimal::transform_kernel_gradients;
using minimal::transform_kernels;
using minimal::transform_patches;
using minimal::transform_products;
using minimal::view;
using torch::stable::Tensor;

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {  // batches of matrices
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

constexpr int64_t kFewTiles = 32;  // of a chunk where channels are few: 36 planes of 64 float32 channels are 288 KiB

template <typename T> T* data(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// Matrices [planes][rows][columns] whose planes lie one cache line further apart than they are long, so that they do not fall into the same
// cache sets.
struct Matrices {
  Tensor memory;
  int64_t rows, columns, stride;
  Matrices(const Tensor& like, int64_t planes, int64_t rows, int64_t columns)
      : rows(rows), columns(columns), stride(rows * columns + minimal::kStep) {
    memory = torch::stable::new_empty(like, {planes, stride});
  }
  Tensor first(int64_t count) const {  // rows of each
    Tensor all = memory;
    return torch::stable::view(torch::stable::narrow(all, 1, 0, count * columns), {all.size(0), count, columns});
  }
};

// out [rows][columns] = or += a b [depth][columns] for each plane.
void products(
    const Matrices& a, int64_t rows, int64_t row_step, int64_t step, const Matrices& b, int64_t depth, Range columns, const Matrices& out, bool more) {
  const tile::Panels<float> panels{columns.count};
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t task = 0; task < out.memory.size(0) * panels.count; ++task) {
    const int64_t plane = task / panels.count;
    const float *left = data<float>(a.memory) + plane * a.stride, *right = data<float>(b.memory) + plane * b.stride + columns.first;
    auto row = [&](int64_t k) { return right + k * b.columns; };
    panels.product(
        task % panels.count, {left, row_step, step}, rows, row, depth, {data<float>(out.memory) + plane * out.stride, out.columns}, more);
  }
}

// out = v u of `count` rows.
template <typename T> void multiply(const Matrices& v, const Matrices& u, int64_t count, const Matrices& out) {
  if constexpr (std::is_same_v<T, double>) multiply(v.first(count), u.first(u.rows), out.first(count));
  else products(v, count, v.columns, 1, u, v.columns, {0, u.columns}, out, false);
}

template <typename T> void add(const Matrices& part, const Matrices& sum) {
  const T* from = data<T>(part.memory);
  T* to = data<T>(sum.memory);
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t plane = 0; plane < sum.memory.size(0); ++plane)
    for (int64_t i = plane * sum.stride; i < plane * sum.stride + sum.rows * sum.columns; ++i) to[i] += from[i];
}

// Tiles of a chunk: elements of its transformed patches, 2 or 1 MiB of float32, and no fewer tiles than repay reading all the kernels.
template <int m> int64_t chunk_size(const Tiles<m>& tiles, int64_t channels) {
  constexpr int64_t elements = m == 2 ? 1 << 19 : 1 << 18, least = m == 2 ? 64 : 128;
  return std::min(tiles.count(), std::max<int64_t>(elements / (planes(m) * channels), least));
}

// The outputs in ranges of about equal size whose transformed kernels take no more than 20 MiB: glibc gives 32 MiB and more back to the
// system at once, and mapping the pages anew took as long as the products (20 ms a call, 512 channels at 32x32, F(4x4, 3x3)).
template <int m, typename T> std::vector<Range> ranges(int64_t in, int64_t out) {
  const int64_t most = (20 << 20) / static_cast<int64_t>(sizeof(T));
  const int64_t parts = (planes(m) * in * out + most - 1) / most;
  const int64_t size = (out / minimal::kStep + parts - 1) / parts * minimal::kStep;
  std::vector<Range> all;
  for (int64_t first = 0; first < out; first += size) all.push_back({first, std::min(size, out - first)});
  return all;
}

bool few(int64_t in, int64_t out) { return std::max(in, out) <= 64; }  // a plane of transformed kernels: 16 KiB of float32 at most

// Few channels: a thread takes a chunk from patches to results, in its own cache.
template <int m, typename T>
void convolve_few(const Tensor& x, const Kernels<const T>& kernels, const Image<const T>& in, int64_t padding, const Image<T>& out) {
  const Tiles<m> tiles(out);
  const Matrices u(x, planes(m), in.c, out.c);
  transform_kernels<m>(kernels, {0, out.c}, data<T>(u.memory), u.stride);
  const T* const right = data<T>(u.memory);
  const int64_t size = kFewTiles, v_stride = size * in.c + minimal::kStep, p_stride = size * out.c + minimal::kStep;
#pragma omp parallel num_threads(torch::stable::get_num_threads())
  {
    tile::Array<T> v(planes(m) * v_stride), p(planes(m) * p_stride);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < tiles.count(); first += size) {
      const int64_t count = std::min(size, tiles.count() - first);
      transform_patches(in, tiles, padding, first, count, v.data(), v_stride);
      for (int plane = 0; plane < planes(m); ++plane)
        tile::product(v.data() + plane * v_stride, in.c, right + plane * u.stride, out.c, in.c, static_cast<int>(count),
                      p.data() + plane * p_stride, [](auto sum, int, int64_t) { return sum; });
      transform_products(p.data(), p_stride, tiles, first, count, out);
    }
  }
}

template <int m, typename T> void convolve(const Tensor& x, const Tensor& w, int64_t padding, bool transposed, const Tensor& y) {
  const Image<const T> in = view<const T>(x);
  const Image<T> out = view<T>(y);
  const Kernels<const T> kernels{static_cast<const T*>(w.const_data_ptr()), in.c, out.c, transposed};
  if (few(in.c, out.c)) return convolve_few<m>(x, kernels, in, padding, out);
  const Tiles<m> tiles(out);
  const int64_t size = chunk_size(tiles, std::max(in.c, out.c));
  const Matrices v(x, planes(m), size, in.c);
  for (const Range outputs : ranges<m, T>(in.c, out.c)) {
    const Matrices u(x, planes(m), in.c, outputs.count), p(x, planes(m), size, outputs.count);
    transform_kernels<m>(kernels, outputs, data<T>(u.memory), u.stride);
    for (int64_t first = 0; first < tiles.count(); first += size) {
      const int64_t count = std::min(size, tiles.count() - first);
      transform_patches(in, tiles, padding, first, count, data<T>(v.memory), v.stride);
      multiply<T>(v, u, count, p);
      transform_products(data<T>(p.memory), p.stride, tiles, first, count, out.channels(outputs.first, outputs.count));
    }
  }
}

// sum [planes][I][outputs] += v^T g of `count` rows, or = where it is the first.
template <typename T> void add_products(const Matrices& v, const Matrices& g, Range outputs, int64_t count, const Matrices& sum, bool first) {
  if constexpr (std::is_same_v<T, double>) {
    const Matrices part(sum.memory, first ? 0 : sum.memory.size(0), sum.rows, sum.columns);
    Tensor patches = v.first(count), gradients = g.first(count);
    patches = torch::stable::transpose(patches, 1, 2), gradients = torch::stable::narrow(gradients, 2, outputs.first, outputs.count);
    multiply(patches, gradients, (first ? sum : part).first(sum.rows));
    if (!first) add<T>(part, sum);
  } else {
    products(v, v.columns, 1, v.columns, g, count, outputs, sum, !first);
  }
}

template <int m, typename T> void weight_gradient(const Tensor& x, const Tensor& grad, int64_t padding, const Tensor& w) {
  const Image<const T> in = view<const T>(x), out = view<const T>(grad);
  const Tiles<m> tiles(out);
  const int64_t size = chunk_size(tiles, std::max(in.c, out.c));
  const Matrices v(x, planes(m), size, in.c), g(x, planes(m), size, out.c);
  for (const Range outputs : ranges<m, T>(in.c, out.c)) {
    const Matrices sum(x, planes(m), in.c, outputs.count);
    for (int64_t first = 0; first < tiles.count(); first += size) {
      const int64_t count = std::min(size, tiles.count() - first);
      transform_patches(in, tiles, padding, first, count, data<T>(v.memory), v.stride);
      transform_gradients(out, tiles, first, count, data<T>(g.memory), g.stride);
      add_products<T>(v, g, outputs, count, sum, first == 0);
    }
    transform_kernel_gradients<m>(data<T>(sum.memory), sum.stride, outputs, Kernels<T>{data<T>(w), in.c, out.c, false});
  }
}

bool is_double(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Double; }

Tensor conv3x3(Tensor x, Tensor w, int64_t padding, bool transposed, int64_t tile) {
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(2) + 2 * padding - 2, x.size(3) + 2 * padding - 2, w.size(transposed ? 1 : 0)});
  y = torch::stable::transpose(torch::stable::transpose(y, 1, 3), 2, 3);
  if (tile == 2) is_double(x) ? convolve<2, double>(x, w, padding, transposed, y) : convolve<2, float>(x, w, padding, transposed, y);
  else is_double(x) ? convolve<4, double>(x, w, padding, transposed, y) : convolve<4, float>(x, w, padding, transposed, y);
  return y;
}

Tensor conv3x3_weight(Tensor x, Tensor grad, int64_t padding, int64_t tile) {
  Tensor w = torch::stable::new_empty(x, {grad.size(1), x.size(1), 3, 3});
  if (tile == 2) is_double(x) ? weight_gradient<2, double>(x, grad, padding, w) : weight_gradient<2, float>(x, grad, padding, w);
  else is_double(x) ? weight_gradient<4, double>(x, grad, padding, w) : weight_gradient<4, float>(x, grad, padding, w);
  return w;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_weight", TORCH_BOX(&conv3x3_weight));
}
