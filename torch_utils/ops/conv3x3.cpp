// 3x3 convolution of channels-last images by Winograd's F(2x2, 3x3) on a CPU. See conv3x3.py for the formulas.
//
// Tiles are worked on in chunks that stay in cache: transform the patches of a chunk, 16 matrix products by torch, transform back.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <vector>

#include "simd.h"

namespace {

using simd::Pack;
using torch::stable::Tensor;

constexpr int64_t kChunk = 1 << 19;  // elements of a chunk's transformed patches: 2 MiB of float32
constexpr int kStep = 16;            // channels at a time; both counts are multiples of it

template <typename T> struct Image {  // channels-last
  T* data;
  int64_t n, h, w, c;
  T* pixel(int64_t image, int64_t y, int64_t x) const { return data + ((image * h + y) * w + x) * c; }
};

template <typename T> Image<T> view(const Tensor& x) {
  return {static_cast<T*>(const_cast<void*>(x.const_data_ptr())), x.size(0), x.size(2), x.size(3), x.size(1)};
}

struct Tiles {  // of 2x2 results
  int64_t n, rows, columns;
  int64_t count() const { return n * rows * columns; }
};

template <typename V> inline void input_line(V& a, V& b, V& c, V& d) {  // B^T of four values
  const V p = a - c, q = b + c, r = c - b, s = b - d;
  a = p, b = q, c = r, d = s;
}

// The 4x4 patch of each tile, transformed, to v [16][stride][C].
template <typename T>
void transform_input(const Image<const T>& x, const Tiles& tiles, int64_t padding, int64_t first, int64_t count, T* v, int64_t stride) {
  using P = Pack<T>;
  using V = typename P::type;
  const std::vector<T> outside(x.c, T(0));
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t t = 0; t < count; ++t) {
    const int64_t tile = first + t, image = tile / (tiles.rows * tiles.columns);
    const int64_t top = tile / tiles.columns % tiles.rows * 2 - padding, left = tile % tiles.columns * 2 - padding;
    const T* from[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t row = top + i / 4, column = left + i % 4;
      from[i] = row >= 0 && row < x.h && column >= 0 && column < x.w ? x.pixel(image, row, column) : outside.data();
    }
    T* to = v + t * x.c;
    for (int64_t c = 0; c < x.c; c += P::width) {
      V d[16];
      for (int i = 0; i < 16; ++i) d[i] = P::load(from[i] + c);
      for (int i = 0; i < 4; ++i) input_line(d[i], d[4 + i], d[8 + i], d[12 + i]);
      for (int i = 0; i < 16; i += 4) input_line(d[i], d[i + 1], d[i + 2], d[i + 3]);
      for (int i = 0; i < 16; ++i) P::store(to + i * stride * x.c + c, d[i]);
    }
  }
}

// A^T m A: products m [16][stride][C] of each tile to its 2x2 results.
template <typename T> void transform_output(const T* m, int64_t stride, const Tiles& tiles, int64_t first, int64_t count, const Image<T>& y) {
  using P = Pack<T>;
  using V = typename P::type;
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t t = 0; t < count; ++t) {
    const int64_t tile = first + t, image = tile / (tiles.rows * tiles.columns);
    const int64_t top = tile / tiles.columns % tiles.rows * 2, left = tile % tiles.columns * 2;
    const bool below = top + 1 < y.h, right = left + 1 < y.w;
    T* to = y.pixel(image, top, left);
    const T* from = m + t * y.c;
    for (int64_t c = 0; c < y.c; c += P::width) {
      V above[4], under[4];
      for (int i = 0; i < 4; ++i) {
        const V a = P::load(from + i * stride * y.c + c), b = P::load(from + (4 + i) * stride * y.c + c);
        const V d = P::load(from + (8 + i) * stride * y.c + c), e = P::load(from + (12 + i) * stride * y.c + c);
        above[i] = a + b + d;
        under[i] = b - d - e;
      }
      P::store(to + c, above[0] + above[1] + above[2]);
      if (right) P::store(to + y.c + c, above[1] - above[2] - above[3]);
      if (below) P::store(to + y.w * y.c + c, under[0] + under[1] + under[2]);
      if (below && right) P::store(to + (y.w + 1) * y.c + c, under[1] - under[2] - under[3]);
    }
  }
}

// A dY A^T: 2x2 gradients of each tile to g [16][stride][C].
template <typename T>
void transform_gradient(const Image<const T>& grad, const Tiles& tiles, int64_t first, int64_t count, T* g, int64_t stride) {
  using P = Pack<T>;
  using V = typename P::type;
  const std::vector<T> outside(grad.c, T(0));
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t t = 0; t < count; ++t) {
    const int64_t tile = first + t, image = tile / (tiles.rows * tiles.columns);
    const int64_t top = tile / tiles.columns % tiles.rows * 2, left = tile % tiles.columns * 2;
    const T* from[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t row = top + i / 2, column = left + i % 2;
      from[i] = row < grad.h && column < grad.w ? grad.pixel(image, row, column) : outside.data();
    }
    T* to = g + t * grad.c;
    for (int64_t c = 0; c < grad.c; c += P::width) {
      const V a = P::load(from[0] + c), b = P::load(from[1] + c), d = P::load(from[2] + c), e = P::load(from[3] + c);
      const V lines[4][2] = {{a, b}, {a + d, b + e}, {a - d, b - e}, {-d, -e}};
      for (int i = 0; i < 4; ++i) {
        const V p = lines[i][0], q = lines[i][1];
        const V values[4] = {p, p + q, p - q, -q};
        for (int j = 0; j < 4; ++j) P::store(to + (4 * i + j) * stride * grad.c + c, values[j]);
      }
    }
  }
}

// G g G^T: kernels w [O][I][3][3], or, transposed, [I][O][3][3] read back to front, to u [16][I][O].
template <typename T> void transform_kernel(const T* w, int64_t in, int64_t out, bool transposed, T* u) {
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t i0 = 0; i0 < in; i0 += kStep)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = i0; i < i0 + kStep; ++i) {
        T g[9], lines[4][3];
        if (transposed) std::reverse_copy(w + (i * out + o) * 9, w + (i * out + o) * 9 + 9, g);
        else std::copy_n(w + (o * in + i) * 9, 9, g);
        for (int c = 0; c < 3; ++c) {
          const T sum = (g[c] + g[6 + c]) / 2, middle = g[3 + c] / 2;
          lines[0][c] = g[c], lines[1][c] = sum + middle, lines[2][c] = sum - middle, lines[3][c] = g[6 + c];
        }
        for (int r = 0; r < 4; ++r) {
          const T* l = lines[r];
          const T sum = (l[0] + l[2]) / 2, middle = l[1] / 2;
          const T values[4] = {l[0], sum + middle, sum - middle, l[2]};
          for (int c = 0; c < 4; ++c) u[((4 * r + c) * in + i) * out + o] = values[c];
        }
      }
}

// G^T u G: sums u [16][I][O] to gradients of kernels w [O][I][3][3].
template <typename T> void transform_kernel_gradient(const T* u, int64_t in, int64_t out, T* w) {
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t i0 = 0; i0 < in; i0 += kStep)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = i0; i < i0 + kStep; ++i) {
        T lines[3][4];
        for (int c = 0; c < 4; ++c) {
          const auto at = [&](int r) { return u[((4 * r + c) * in + i) * out + o]; };
          const T sum = (at(1) + at(2)) / 2;
          lines[0][c] = at(0) + sum, lines[1][c] = (at(1) - at(2)) / 2, lines[2][c] = at(3) + sum;
        }
        T* g = w + (o * in + i) * 9;
        for (int r = 0; r < 3; ++r) {
          const T* l = lines[r];
          const T sum = (l[1] + l[2]) / 2;
          g[3 * r] = l[0] + sum, g[3 * r + 1] = (l[1] - l[2]) / 2, g[3 * r + 2] = l[3] + sum;
        }
      }
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {  // batches of matrices
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

struct Chunks {  // tiles of one chunk, and the distance of the 16 planes: one tile more, so that they do not fall into the same cache sets
  int64_t tiles, stride;
};
Chunks chunks(const Tiles& tiles, int64_t channels) {
  const int64_t size = std::min(tiles.count(), std::max<int64_t>(kChunk / (16 * channels), 64));
  return {size, size + 1};
}

template <typename T> T* data(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

template <typename T> void convolve(const Tensor& x, const Tensor& w, int64_t padding, bool transposed, const Tensor& y) {
  const Image<const T> in = view<const T>(x);
  const Image<T> out = view<T>(y);
  const Tiles tiles{out.n, (out.h + 1) / 2, (out.w + 1) / 2};
  const Chunks chunk = chunks(tiles, std::max(in.c, out.c));
  Tensor u = torch::stable::new_empty(x, {16, in.c, out.c});
  Tensor v = torch::stable::new_empty(x, {16, chunk.stride, in.c}), m = torch::stable::new_empty(x, {16, chunk.stride, out.c});
  transform_kernel(static_cast<const T*>(w.const_data_ptr()), in.c, out.c, transposed, data<T>(u));
  for (int64_t first = 0; first < tiles.count(); first += chunk.tiles) {
    const int64_t count = std::min(chunk.tiles, tiles.count() - first);
    transform_input(in, tiles, padding, first, count, data<T>(v), chunk.stride);
    Tensor part_v = v, part_m = m;
    multiply(torch::stable::narrow(part_v, 1, 0, count), u, torch::stable::narrow(part_m, 1, 0, count));
    transform_output(data<T>(m), chunk.stride, tiles, first, count, out);
  }
}

template <typename T> void weight_gradient(const Tensor& x, const Tensor& grad, int64_t padding, const Tensor& w) {
  const Image<const T> in = view<const T>(x), out = view<const T>(grad);
  const Tiles tiles{out.n, (out.h + 1) / 2, (out.w + 1) / 2};
  const Chunks chunk = chunks(tiles, std::max(in.c, out.c));
  Tensor sum = torch::stable::new_empty(x, {16, in.c, out.c}), part = torch::stable::new_empty(x, {16, in.c, out.c});
  Tensor v = torch::stable::new_empty(x, {16, chunk.stride, in.c}), g = torch::stable::new_empty(x, {16, chunk.stride, out.c});
  for (int64_t first = 0; first < tiles.count(); first += chunk.tiles) {
    const int64_t count = std::min(chunk.tiles, tiles.count() - first), elements = sum.numel();
    transform_input(in, tiles, padding, first, count, data<T>(v), chunk.stride);
    transform_gradient(out, tiles, first, count, data<T>(g), chunk.stride);
    Tensor part_v = v, part_g = g;
    part_v = torch::stable::transpose(torch::stable::narrow(part_v, 1, 0, count), 1, 2);
    multiply(part_v, torch::stable::narrow(part_g, 1, 0, count), first == 0 ? sum : part);
    if (first == 0) continue;
    T *to = data<T>(sum), *from = data<T>(part);
#pragma omp parallel for simd schedule(static) num_threads(torch::stable::get_num_threads())
    for (int64_t i = 0; i < elements; ++i) to[i] += from[i];
  }
  transform_kernel_gradient(data<T>(sum), in.c, out.c, data<T>(w));
}

bool is_double(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Double; }

Tensor conv3x3(Tensor x, Tensor w, int64_t padding, bool transposed) {
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(2) + 2 * padding - 2, x.size(3) + 2 * padding - 2, w.size(transposed ? 1 : 0)});
  y = torch::stable::transpose(torch::stable::transpose(y, 1, 3), 2, 3);
  is_double(x) ? convolve<double>(x, w, padding, transposed, y) : convolve<float>(x, w, padding, transposed, y);
  return y;
}

Tensor conv3x3_weight(Tensor x, Tensor grad, int64_t padding) {
  Tensor w = torch::stable::new_empty(x, {grad.size(1), x.size(1), 3, 3});
  is_double(x) ? weight_gradient<double>(x, grad, padding, w) : weight_gradient<float>(x, grad, padding, w);
  return w;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_weight", TORCH_BOX(&conv3x3_weight));
}
