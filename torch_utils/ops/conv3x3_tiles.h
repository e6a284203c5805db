// Transformations of Winograd's convolution between tiles of pixels and planes. A plane contains one element of the transformed tile, for all
// tiles and channels. Vector lanes run along channels. The template argument F is a filter of conv3x3_lines.h, which is applied along columns
// and rows.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "conv3x3_lines.h"

namespace minimal {

constexpr int kStep = 16;  // channels that are processed together; the numbers of channels are multiples of it
template <typename F> constexpr int planes = F::products * F::products;
template <typename F> constexpr int kernel_planes = F::kernels * F::kernels;
template <typename F> constexpr int kernel_plane(int plane) {
  return F::kernel_of(plane / F::products) * F::kernels + F::kernel_of(plane % F::products);
}

template <typename T> struct Image {  // channels-last image with c channels; neighbouring pixels are `step` elements apart
  T* data;
  int64_t n, h, w, c, step;
  T* pixel(int64_t image, int64_t y, int64_t x) const { return data + ((image * h + y) * w + x) * step; }
  Image channels(int64_t first, int64_t count) const { return {data + first, n, h, w, count, step}; }
};

template <typename T> Image<T> view(const torch::stable::Tensor& x) {
  return {static_cast<T*>(const_cast<void*>(x.const_data_ptr())), x.size(0), x.size(2), x.size(3), x.size(1), x.size(1)};
}

template <typename T> struct Kernels {  // [O][I][3][3]; if transposed, [I][O][3][3] with the taps in reverse order
  T* data;
  int64_t in, out;
  bool transposed;
  T* at(int64_t i, int64_t o) const { return data + 9 * (transposed ? i * out + o : o * in + i); }
};

struct Range {
  int64_t first, count;
};

struct Place {  // first pixel of a tile
  int64_t image, y, x;
};

struct Tiles {
  int64_t n, rows, columns;
  template <typename T> Tiles(const Image<T>& y, int out) : n(y.n), rows((y.h + out - 1) / out), columns((y.w + out - 1) / out) {}
  int64_t count() const { return n * rows * columns; }
  Place place(int64_t tile, int step) const { return {tile / (rows * columns), tile / columns % rows * step, tile % columns * step}; }
};

// Access to squares of size x size pixels. A square inside the image is not copied; its rows are `step` elements apart. A square that crosses
// the border is copied, with zeros outside the image.
template <int size, typename T> class Squares {
 public:
  explicit Squares(const Image<const T>& x) : x_(x), copy_(size * size * x.c) {}
  struct Square {
    const T* first;
    int64_t step;
  };
  Square at(const Place& place) {
    if (place.y >= 0 && place.x >= 0 && place.y + size <= x_.h && place.x + size <= x_.w)
      return {x_.pixel(place.image, place.y, place.x), x_.w * x_.c};
    const int64_t left = std::clamp<int64_t>(-place.x, 0, size), right = std::clamp<int64_t>(x_.w - place.x, left, size);
    T* to = copy_.data();
    for (int64_t y = place.y; y < place.y + size; ++y, to += size * x_.c) {
      std::fill_n(to, size * x_.c, T(0));
      if (y < 0 || y >= x_.h || right == left) continue;
      std::copy_n(x_.pixel(place.image, y, place.x + left), (right - left) * x_.c, to + left * x_.c);
    }
    return {copy_.data(), size * x_.c};
  }

 private:
  Image<const T> x_;
  std::vector<T> copy_;
};

// Write B^T d B of the patch d of each tile to v [planes][stride]. Each plane is [tiles][C].
template <typename F, typename T = typename F::value>
void transform_patches(const Image<const T>& x, const Tiles& tiles, int64_t padding, int64_t first, int64_t count, T* v, int64_t stride) {
  using P = Pack<T>;
#pragma omp parallel num_threads(torch::stable::get_num_threads())
  {
    Squares<F::in, T> squares(x);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      const Place place = tiles.place(first + t, F::in_step);
      const auto from = squares.at({place.image, place.y - padding, place.x - padding});
      T* to = v + t * x.c;
      for (int64_t i = 0; i < x.c; i += P::width)
        both_ways(
            F::patch, [&](int r, int c) { return P::load(from.first + r * from.step + c * x.c + i); },
            [&](int r, int c, auto value) { P::store(to + (F::products * r + c) * stride + i, value); });
    }
  }
}

// Compute the results A^T p A of each tile from its products p [planes][stride]. Each plane is [tiles][C].
template <typename F, typename T = typename F::value>
void transform_products(const T* p, int64_t stride, const Tiles& tiles, int64_t first, int64_t count, const Image<T>& y) {
  using P = Pack<T>;
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t t = 0; t < count; ++t) {
    const Place place = tiles.place(first + t, F::out);
    const int64_t height = y.h - place.y, width = y.w - place.x;
    const T* from = p + t * y.c;
    T* to = y.pixel(place.image, place.y, place.x);
    for (int64_t i = 0; i < y.c; i += P::width)
      both_ways(
          F::result, [&](int r, int c) { return P::load(from + (F::products * r + c) * stride + i); },
          [&](int r, int c, auto value) {
            if (r < height && c < width) P::store(to + (r * y.w + c) * y.step + i, value);
          });
  }
}

// Write A dY A^T of the gradients dY of each tile's results to g [planes][stride]. Each plane is [tiles][C].
template <typename F, typename T = typename F::value>
void transform_gradients(const Image<const T>& grad, const Tiles& tiles, int64_t first, int64_t count, T* g, int64_t stride) {
  using P = Pack<T>;
#pragma omp parallel num_threads(torch::stable::get_num_threads())
  {
    Squares<F::out, T> squares(grad);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      const auto from = squares.at(tiles.place(first + t, F::out));
      T* to = g + t * grad.c;
      for (int64_t i = 0; i < grad.c; i += P::width)
        both_ways(
            F::gradient, [&](int r, int c) { return P::load(from.first + r * from.step + c * grad.c + i); },
            [&](int r, int c, auto value) { P::store(to + (F::products * r + c) * stride + i, value); });
    }
  }
}

// Write G g G^T of the kernels g of a range of output channels to u [kernel planes][stride]. Each plane is [I][outputs].
template <typename F, typename T = typename F::value>
void transform_kernels(const Kernels<const T>& w, Range outputs, T* u, int64_t stride) {
  using P = Pack<T>;
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t block = 0; block < w.in; block += kStep)
    for (int64_t o = 0; o < outputs.count; o += kStep)
      for (int64_t i = block; i < block + kStep; ++i) {
        T taps[9][kStep];
        for (int lane = 0; lane < kStep; ++lane) {
          const T* from = w.at(i, outputs.first + o + lane);
          for (int k = 0; k < 9; ++k) taps[k][lane] = from[w.transposed ? 8 - k : k];
        }
        for (int lane = 0; lane < kStep; lane += P::width)
          both_ways(
              F::kernel, [&](int r, int c) { return P::load(taps[3 * r + c] + lane); },
              [&](int r, int c, auto value) { P::store(u + (F::kernels * r + c) * stride + i * outputs.count + o + lane, value); });
      }
}

// Compute the gradients G^T u G of the kernels of a range of output channels from sums u [kernel planes][stride]. Each plane is
// [I][outputs].
template <typename F, typename T = typename F::value>
void transform_kernel_gradients(const T* u, int64_t stride, Range outputs, const Kernels<T>& w) {
  using P = Pack<T>;
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t block = 0; block < w.in; block += kStep)
    for (int64_t o = 0; o < outputs.count; o += kStep)
      for (int64_t i = block; i < block + kStep; ++i) {
        T taps[9][kStep];
        for (int lane = 0; lane < kStep; lane += P::width)
          both_ways(
              F::kernel_gradient,
              [&](int r, int c) { return P::load(u + (F::kernels * r + c) * stride + i * outputs.count + o + lane); },
              [&](int r, int c, auto value) { P::store(taps[3 * r + c] + lane, value); });
        for (int lane = 0; lane < kStep; ++lane)
          for (int k = 0; k < 9; ++k) w.at(i, outputs.first + o + lane)[k] = taps[k][lane];
      }
}

}  // namespace minimal
