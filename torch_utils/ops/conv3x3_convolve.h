// Convolution of channels-last images by minimal filtering on a CPU. The formulas are in conv3x3.py.
//
// Tiles are processed in chunks that fit into the cache. For each chunk, the patches are transformed, one matrix product is computed for each
// plane (each element of the transformed tile), and the products are transformed back. Torch computes the matrix products in float64.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "conv3x3_tiles.h"
#include "tile_products.h"

namespace minimal {
namespace {

using torch::stable::Tensor;

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {  // product of batches of matrices
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

constexpr int64_t kFewTiles = 32;  // tiles of a chunk for few channels: 36 planes of 64 float32 channels take 288 KiB, 49 planes 392 KiB

template <typename T> T* data(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// Matrices [planes][rows][columns]. Unused memory of a cache line follows each plane, so that the same elements of different planes do not lie
// in the same cache set.
struct Matrices {
  Tensor memory;
  int64_t rows, columns, stride;
  Matrices(const Tensor& like, int64_t planes, int64_t rows, int64_t columns)
      : rows(rows), columns(columns), stride(rows * columns + kStep) {
    memory = torch::stable::new_empty(like, {planes, stride});
  }
  Tensor first(int64_t count) const {  // the first `count` rows of each matrix
    Tensor all = memory;
    return torch::stable::view(torch::stable::narrow(all, 1, 0, count * columns), {all.size(0), count, columns});
  }
};

// Compute out = v u for the first `count` rows of each plane.
template <typename F> void multiply(const Matrices& v, const Matrices& u, int64_t count, const Matrices& out) {
  if constexpr (std::is_same_v<typename F::value, double>) return multiply(v.first(count), u.first(u.rows), out.first(count));
  const tile::Panels<float> panels{u.columns};
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t task = 0; task < planes<F> * panels.count; ++task) {
    const int plane = static_cast<int>(task / panels.count);
    const float* const right = data<float>(u.memory) + kernel_plane<F>(plane) * u.stride;
    panels.product(
        task % panels.count, {data<float>(v.memory) + plane * v.stride, v.columns}, count, [&](int64_t k) { return right + k * u.columns; },
        v.columns, {data<float>(out.memory) + plane * out.stride, out.columns}, false);
  }
}

// Return the number of tiles of a chunk. Its transformed patches take 1 or 2 MiB in float32. There are at least F::least tiles, because all
// transformed kernels are read for each chunk, which would take too long for fewer tiles.
template <typename F> int64_t chunk_size(const Tiles& tiles, int64_t channels) {
  return std::min(tiles.count(), std::max<int64_t>(F::elements / (planes<F> * channels), F::least));
}

// Divide the output channels into ranges of about equal size, whose transformed kernels take at most 20 MiB. glibc returns freed blocks of
// 32 MiB or more to the system immediately. Mapping the pages again took as long as the matrix products (20 ms in each call with 512 channels,
// 32x32 pixels and F(4x4, 3x3)).
template <typename F> std::vector<Range> ranges(int64_t in, int64_t out) {
  const int64_t most = (20 << 20) / static_cast<int64_t>(sizeof(typename F::value));
  const int64_t parts = (kernel_planes<F> * in * out + most - 1) / most;
  const int64_t size = (out / kStep + parts - 1) / parts * kStep;
  std::vector<Range> all;
  for (int64_t first = 0; first < out; first += size) all.push_back({first, std::min(size, out - first)});
  return all;
}

bool few(int64_t in, int64_t out) { return std::max(in, out) <= 64; }  // then a plane of transformed kernels takes at most 16 KiB in float32

// Convolve images with few channels. Each thread processes complete chunks, from patches to results, in its own cache.
template <typename F, typename T = typename F::value>
void convolve_few(const Tensor& x, const Kernels<const T>& kernels, const Image<const T>& in, int64_t padding, const Image<T>& out) {
  const Tiles tiles(out, F::out);
  const Matrices u(x, kernel_planes<F>, in.c, out.c);
  transform_kernels<F>(kernels, {0, out.c}, data<T>(u.memory), u.stride);
  const T* const right = data<T>(u.memory);
  const int64_t size = kFewTiles, v_stride = size * in.c + kStep, p_stride = size * out.c + kStep;
#pragma omp parallel num_threads(torch::stable::get_num_threads())
  {
    tile::Array<T> v(planes<F> * v_stride), p(planes<F> * p_stride);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < tiles.count(); first += size) {
      const int64_t count = std::min(size, tiles.count() - first);
      transform_patches<F>(in, tiles, padding, first, count, v.data(), v_stride);
      for (int plane = 0; plane < planes<F>; ++plane)
        tile::product(v.data() + plane * v_stride, in.c, right + kernel_plane<F>(plane) * u.stride, out.c, in.c, static_cast<int>(count),
                      p.data() + plane * p_stride, [](auto sum, int, int64_t) { return sum; });
      transform_products<F>(p.data(), p_stride, tiles, first, count, out);
    }
  }
}

template <typename F, typename T = typename F::value>
void convolve(const Tensor& x, const Tensor& w, int64_t padding, bool transposed, const Tensor& y) {
  const Image<const T> in = view<const T>(x);
  const Image<T> out = view<T>(y);
  const Kernels<const T> kernels{static_cast<const T*>(w.const_data_ptr()), in.c, out.c, transposed};
  if (few(in.c, out.c)) return convolve_few<F>(x, kernels, in, padding, out);
  const Tiles tiles(out, F::out);
  const int64_t size = chunk_size<F>(tiles, std::max(in.c, out.c));
  const Matrices v(x, planes<F>, size, in.c);
  for (const Range outputs : ranges<F>(in.c, out.c)) {
    const Matrices u(x, kernel_planes<F>, in.c, outputs.count), p(x, planes<F>, size, outputs.count);
    transform_kernels<F>(kernels, outputs, data<T>(u.memory), u.stride);
    for (int64_t first = 0; first < tiles.count(); first += size) {
      const int64_t count = std::min(size, tiles.count() - first);
      transform_patches<F>(in, tiles, padding, first, count, data<T>(v.memory), v.stride);
      multiply<F>(v, u, count, p);
      transform_products<F>(data<T>(p.memory), p.stride, tiles, first, count, out.channels(outputs.first, outputs.count));
    }
  }
}

template <typename T> void add(const Matrices& part, const Matrices& sum) {
  const T* from = data<T>(part.memory);
  T* to = data<T>(sum.memory);
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t plane = 0; plane < sum.memory.size(0); ++plane)
    for (int64_t i = plane * sum.stride; i < plane * sum.stride + sum.rows * sum.columns; ++i) to[i] += from[i];
}

// Add the products v^T g of the first `count` rows to sum [kernel planes][I][outputs]; if `first` is true, overwrite `sum` by them.
template <typename F>
void add_products(const Matrices& v, const Matrices& g, Range outputs, int64_t count, const Matrices& sum, bool first) {
  if constexpr (std::is_same_v<typename F::value, double>) {
    const Matrices part(sum.memory, first ? 0 : sum.memory.size(0), sum.rows, sum.columns);
    Tensor patches = v.first(count), gradients = g.first(count);
    patches = torch::stable::transpose(patches, 1, 2), gradients = torch::stable::narrow(gradients, 2, outputs.first, outputs.count);
    multiply(patches, gradients, (first ? sum : part).first(sum.rows));
    if (!first) add<double>(part, sum);
    return;
  }
  const tile::Panels<float> panels{outputs.count};
#pragma omp parallel for schedule(dynamic) num_threads(torch::stable::get_num_threads())
  for (int64_t task = 0; task < kernel_planes<F> * panels.count; ++task) {
    const int64_t kernel = task / panels.count;
    bool more = !first;
    for (int plane = 0; plane < planes<F>; ++plane) {
      if (kernel_plane<F>(plane) != kernel) continue;
      const float* const right = data<float>(g.memory) + plane * g.stride + outputs.first;
      panels.product(
          task % panels.count, {data<float>(v.memory) + plane * v.stride, 1, v.columns}, v.columns,
          [&](int64_t k) { return right + k * g.columns; }, count, {data<float>(sum.memory) + kernel * sum.stride, sum.columns}, more);
      more = true;
    }
  }
}

template <typename F, typename T = typename F::value>
void weight_gradient(const Tensor& x, const Tensor& grad, int64_t padding, const Tensor& w) {
  const Image<const T> in = view<const T>(x), out = view<const T>(grad);
  const Tiles tiles(out, F::out);
  const int64_t size = chunk_size<F>(tiles, std::max(in.c, out.c));
  const Matrices v(x, planes<F>, size, in.c), g(x, planes<F>, size, out.c);
  for (const Range outputs : ranges<F>(in.c, out.c)) {
    const Matrices sum(x, kernel_planes<F>, in.c, outputs.count);
    for (int64_t first = 0; first < tiles.count(); first += size) {
      const int64_t count = std::min(size, tiles.count() - first);
      transform_patches<F>(in, tiles, padding, first, count, data<T>(v.memory), v.stride);
      transform_gradients<F>(out, tiles, first, count, data<T>(g.memory), g.stride);
      add_products<F>(v, g, outputs, count, sum, first == 0);
    }
    transform_kernel_gradients<F>(data<T>(sum.memory), sum.stride, outputs, Kernels<T>{data<T>(w), in.c, out.c, false});
  }
}

}  // namespace
}  // namespace minimal
