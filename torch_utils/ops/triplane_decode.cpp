// Compiled op for a CPU: density and colour of points from tri-planes, and their gradients. See triplane_decode.py for the formula.
//
// Points are processed in tiles, whose intermediate values fit into the first-level cache: offsets and weights of texels, features [tile][C],
// hidden units [tile][J], outputs [tile][D]. Both layers are small matrix products whose vector lanes run along the outputs. Texels are
// therefore read, and colours written, in the order in which they are stored. The backward pass computes the values of each tile again, and
// skips tiles without a gradient.
//
// Results are deterministic. Points are divided into as many contiguous parts as there are threads. If a part begins inside a sample, the plane
// gradients of this sample are first added in a buffer of the part; all other plane gradients are added to the result directly. The buffers are
// added in the order of the parts. The number of parts is limited, so that all buffers together take at most kBufferBytes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "simd.h"
#include "tile_products.h"

namespace {

using simd::Pack;
using tile::Array, tile::add, tile::outer_product, tile::packed, tile::product;
using torch::stable::Tensor;

constexpr int kTile = 64;                      // number of points of a tile
constexpr int64_t kSerial = 1 << 11;           // number of points below which one thread is faster than several
constexpr int64_t kBufferBytes = 128 << 20;    // largest memory of all buffers of plane gradients
constexpr int kAhead = 6;                      // texels are prefetched this number of points before they are read
constexpr int64_t kLine = 64;                  // length of a cache line, bytes
constexpr double kScale = 1.002, kShift = 0.001;

template <typename T> const T* values(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <typename T> T* writable(const Tensor& t) { return static_cast<T*>(const_cast<void*>(t.const_data_ptr())); }

struct Sizes {
  int64_t n, planes, height, width, c, points, j, d;  // samples, merged planes, texels, channels, points, hidden units, colours
  int64_t cp, jp, dp;                                 // c, j and d rounded up to complete vectors
  int64_t texels() const { return planes * height * width * c; }
  int64_t tiles() const { return (points + kTile - 1) / kTile; }
};

template <typename T> Sizes sizes_of(const Tensor& planes, const Tensor& points, const Tensor& w0, const Tensor& w1) {
  constexpr int64_t width = Pack<T>::width;
  auto up = [](int64_t n) { return (n + width - 1) / width * width; };
  const int64_t c = planes.size(4), j = w0.size(0), d = w1.size(0) - 1;
  return {planes.size(0), planes.size(1), planes.size(2), planes.size(3), c, points.size(1), j, d, up(c), up(j), up(d)};
}

template <typename T> struct Weights {
  Array<T> w0t, b0;          // [c][jp], [jp]
  Array<T> w_sigma;          // [jp]
  Array<T> w1t, b1;          // [j][dp], [dp]
  Array<T> w0, w1;           // [j][cp], [d][jp], for the backward pass
  T b_sigma;
};

template <typename T> Weights<T> pack_weights(const Tensor& w0, const Tensor& b0, const Tensor& w1, const Tensor& b1, const Sizes& n) {
  const T *first = values<T>(w0), *last = values<T>(w1), *bias = values<T>(b1);
  Weights<T> out;
  out.w0t = packed(first, n.c, n.j, 1, n.c, n.jp);
  out.b0 = packed(values<T>(b0), 1, n.j, 0, 1, n.jp);
  out.w_sigma = packed(last, 1, n.j, 0, 1, n.jp);
  out.w1t = packed(last + n.j, n.j, n.d, 1, n.j, n.dp);
  out.b1 = packed(bias + 1, 1, n.d, 0, 1, n.dp);
  out.w0 = packed(first, n.j, n.c, n.c, 1, n.cp);
  out.w1 = packed(last + n.j, n.d, n.j, n.j, 1, n.jp);
  out.b_sigma = bias[0];
  return out;
}

// Weights of the two slices of the first plane, see `blend` in triplane_decode.py. At the depth z, the weight of a channel is
// base + slope clamp((z - low) scale, 0, 1). The slice in front has the base 0 and the slope 1, the slice at the back the base 1 and the slope -1.
template <typename T> struct Slices {
  Array<T> base, slope;  // [cp]
  T low, scale;

  Slices(const Sizes& n, double from, double to) : base(n.cp), slope(n.cp), low(static_cast<T>(from)), scale(static_cast<T>(1 / (to - from))) {
    for (int64_t i = 0; i < n.cp; ++i) {
      base[i] = i < n.c / 2 ? T(0) : T(1);
      slope[i] = i < n.c / 2 ? T(1) : T(-1);
    }
  }
  T front(const T* point) const { return std::min(std::max((point[2] - low) * scale, T(0)), T(1)); }
};

// The four texels around every point of a tile on every plane: offsets into the planes and bilinear weights, 0 outside.
template <typename T> struct Corners {
  std::vector<int64_t> offset;   // [plane][point][4]
  std::vector<T> weight;         // [plane][point][4]
  std::vector<unsigned char> in; // [plane][point]: true if a texel of the point lies on the plane
  bool any = false;              // true if `in` is true for some plane and point

  explicit Corners(const Sizes& n) : offset(n.planes * kTile * 4), weight(n.planes * kTile * 4), in(n.planes * kTile) {}

  void prefetch(int p, const T* planes, const Sizes& n) const {
    for (int64_t k = 0; k < n.planes; ++k)
      if (in[k * kTile + p])
        for (int q = 0; q < 4; ++q)
          for (int64_t i = 0; i < n.c; i += kLine / sizeof(T)) __builtin_prefetch(planes + offset[4 * (k * kTile + p) + q] + i);
  }

  void find(const T* points, int count, const std::vector<int64_t>& axes, const Sizes& n) {
    any = false;
    const T last_x = static_cast<T>(n.width), last_y = static_cast<T>(n.height);
    for (int64_t k = 0; k < n.planes; ++k) {
      const int64_t across = axes[2 * k], along = axes[2 * k + 1], base = k * n.height * n.width;
      for (int p = 0; p < count; ++p) {
        const T x = ((points[3 * p + across] + 1) * last_x - 1) / 2, y = ((points[3 * p + along] + 1) * last_y - 1) / 2;
        const int64_t at = k * kTile + p;
        in[at] = x > -1 && x < last_x && y > -1 && y < last_y;  // false for NaN
        if (!in[at]) continue;
        any = true;
        const int64_t x0 = static_cast<int64_t>(x + 1) - 1, y0 = static_cast<int64_t>(y + 1) - 1;  // floor, for x > -1
        const T right = x - static_cast<T>(x0), down = y - static_cast<T>(y0);
        const T wx[2] = {x0 >= 0 ? 1 - right : T(0), x0 + 1 < n.width ? right : T(0)};
        const T wy[2] = {y0 >= 0 ? 1 - down : T(0), y0 + 1 < n.height ? down : T(0)};
        const int64_t cx[2] = {std::max<int64_t>(x0, 0), std::min<int64_t>(x0 + 1, n.width - 1)};
        const int64_t cy[2] = {std::max<int64_t>(y0, 0), std::min<int64_t>(y0 + 1, n.height - 1)};
        for (int i = 0; i < 4; ++i) {
          offset[4 * at + i] = (base + cy[i / 2] * n.width + cx[i % 2]) * n.c;
          weight[4 * at + i] = wy[i / 2] * wx[i % 2];
        }
      }
    }
  }
};

// Compute the features [count][cp] of a tile. Texels of later points are prefetched, because they are not in the first-level cache.
// With slices, `front` holds the weight of the slice in front for each point of the tile.
template <bool sliced, typename T>
void gather(const Corners<T>& corners, const T* planes, int count, const Sizes& n, const Slices<T>* slices, const T* front, T* features) {
  using V = typename Pack<T>::type;
  constexpr int width = Pack<T>::width;
  for (int p = 0; p < count; ++p) {
    T* row = features + p * n.cp;
    if (p + kAhead < count) corners.prefetch(p + kAhead, planes, n);
    int64_t i = 0;
    for (; i + width <= n.c; i += width) {
      V sum{};
      for (int64_t k = 0; k < n.planes; ++k) {
        const int64_t at = k * kTile + p;
        if (corners.in[at]) {
          const int64_t* offset = &corners.offset[4 * at];
          const T* weight = &corners.weight[4 * at];
          for (int q = 0; q < 4; ++q) sum += weight[q] * Pack<T>::load(planes + offset[q] + i);
        }
        if constexpr (sliced)
          if (k == 0) sum = sum * (Pack<T>::load(slices->base.data() + i) + front[p] * Pack<T>::load(slices->slope.data() + i));
      }
      Pack<T>::store(row + i, sum);
    }
    for (; i < n.c; ++i) {
      T sum = 0;
      for (int64_t k = 0; k < n.planes; ++k) {
        const int64_t at = k * kTile + p;
        if (corners.in[at])
          for (int q = 0; q < 4; ++q) sum += corners.weight[4 * at + q] * planes[corners.offset[4 * at + q] + i];
        if constexpr (sliced)
          if (k == 0) sum = sum * (slices->base[i] + front[p] * slices->slope[i]);
      }
      row[i] = sum;
    }
  }
}

// Add the gradients of the points [from, to), which lie in the same cell, to the four texels of this cell.
template <typename T>
inline void scatter_cell(const Corners<T>& corners, int64_t at, int from, int to, const T* grad, const Sizes& n, T* grad_planes) {
  using V = typename Pack<T>::type;
  constexpr int width = Pack<T>::width;
  T* texel[4];
  for (int q = 0; q < 4; ++q) texel[q] = grad_planes + corners.offset[4 * (at + from) + q];
  const bool apart = texel[0] != texel[1] && texel[0] != texel[2];  // at an edge, two corners are the same texel, and one of them has the weight 0
  int64_t i = 0;
  for (; i + width <= n.c; i += width) {
    V sum[4] = {};
    for (int p = from; p < to; ++p) {
      const V g = Pack<T>::load(grad + p * n.cp + i);
      for (int q = 0; q < 4; ++q) sum[q] += corners.weight[4 * (at + p) + q] * g;
    }
    if (apart) {  // all loads come first: with rows a power of two apart, a load after a store to another row would wait for it
      for (int q = 0; q < 4; ++q) sum[q] += Pack<T>::load(texel[q] + i);
      for (int q = 0; q < 4; ++q) Pack<T>::store(texel[q] + i, sum[q]);
    } else {
      for (int q = 0; q < 4; ++q) add(texel[q] + i, sum[q]);
    }
  }
  for (; i < n.c; ++i)
    for (int p = from; p < to; ++p)
      for (int q = 0; q < 4; ++q) texel[q][i] += corners.weight[4 * (at + p) + q] * grad[p * n.cp + i];
}

// Transpose of `gather` for the plane k: add gradients of features [count][cp] to the gradients of texels. Neighbouring points often lie in the
// same cell.
template <typename T> void scatter_plane(const Corners<T>& corners, int64_t k, const T* grad, int count, const Sizes& n, T* grad_planes) {
  const int64_t at = k * kTile;
  for (int from = 0, to; from < count; from = to) {
    to = from + 1;
    if (!corners.in[at + from]) continue;
    const int64_t* cell = &corners.offset[4 * (at + from)];
    while (to < count && corners.in[at + to] && std::equal(cell, cell + 4, &corners.offset[4 * (at + to)])) ++to;
    scatter_cell(corners, at, from, to, grad, n, grad_planes);
  }
}

// Buffers of one thread for one tile, and the steps that fill them.
template <typename T> struct Tile {
  using V = typename Pack<T>::type;
  const Sizes& n;
  const Weights<T>& w;
  const Slices<T>* slices;             // nullptr: the first plane has no slices
  Corners<T> corners;
  Array<T> features, hidden, colours;  // [tile][cp], [tile][jp], [tile][dp]
  Array<T> front;                      // [tile]: weights of the slice in front

  Tile(const Sizes& sizes, const Weights<T>& weights, const Slices<T>* slices_of_plane)
      : n(sizes), w(weights), slices(slices_of_plane), corners(sizes), features(kTile * sizes.cp), hidden(kTile * sizes.jp),
        colours(kTile * sizes.dp), front(kTile) {}

  void look_up(const T* points, int count, const T* planes, const std::vector<int64_t>& axes) {
    corners.find(points, count, axes, n);
    if (slices)
      for (int p = 0; p < count; ++p) front[p] = slices->front(points + 3 * p);
    if (!corners.any) std::fill_n(features.data(), count * n.cp, T(0));
    else if (slices) gather<true>(corners, planes, count, n, slices, front.data(), features.data());
    else gather<false>(corners, planes, count, n, slices, front.data(), features.data());
  }

  // Compute out = activate(w0 features + b0).
  template <typename Activate> void hide(int count, T* out, Activate activate) const {
    product<T>(features.data(), n.cp, w.w0t.data(), n.jp, n.c, count, out,
               [&](V sum, int, int64_t i) { return activate(sum + Pack<T>::load(w.b0.data() + i)); });
  }

  T density(int p) const {
    V sum{};
    for (int64_t i = 0; i < n.jp; i += Pack<T>::width) sum += Pack<T>::load(hidden.data() + p * n.jp + i) * Pack<T>::load(w.w_sigma.data() + i);
    return Pack<T>::sum(sum) + w.b_sigma;
  }

  // Compute out = sigmoid(w1 hidden + b1) * scale - shift.
  void colour(int count, T* out, T scale, T shift) const {
    product<T>(hidden.data(), n.jp, w.w1t.data(), n.dp, n.j, count, out, [&](V sum, int, int64_t i) {
      return simd::sigmoid(sum + Pack<T>::load(w.b1.data() + i)) * scale - shift;
    });
  }
};

using Blend = std::optional<std::pair<double, double>>;  // z coordinates between the slices, in plane units; empty: no slices

template <typename T> std::optional<Slices<T>> slices_of(const Blend& blend, const Sizes& n) {
  if (!blend) return std::nullopt;
  return Slices<T>(n, blend->first, blend->second);
}

int parts_for(int64_t points) { return points < kSerial ? 1 : static_cast<int>(torch::stable::get_num_threads()); }

template <typename T> void decode_tile(Tile<T>& tile, int count, T* features, T* sigma) {
  const Sizes& n = tile.n;
  tile.hide(count, tile.hidden.data(), [](auto h) { return simd::softplus(h); });
  for (int p = 0; p < count; ++p) sigma[p] = tile.density(p);
  if (n.d == 0) return;
  const bool direct = n.dp == n.d;
  T* out = direct ? features : tile.colours.data();
  tile.colour(count, out, T(kScale), T(kShift));
  if (!direct)
    for (int p = 0; p < count; ++p) std::copy_n(out + p * n.dp, n.d, features + p * n.d);
}

template <typename T>
std::tuple<Tensor, Tensor> decode(const Tensor& planes, const std::vector<int64_t>& axes, const Tensor& points, const Tensor& w0,
                                  const Tensor& b0, const Tensor& w1, const Tensor& b1, const Blend& blend) {
  const Sizes n = sizes_of<T>(planes, points, w0, w1);
  const std::optional<Slices<T>> slices = slices_of<T>(blend, n);
  Tensor features = torch::stable::new_empty(points, {n.n, n.points, n.d});
  Tensor sigma = torch::stable::new_empty(points, {n.n, n.points, 1});
  const Weights<T> weights = pack_weights<T>(w0, b0, w1, b1, n);
  const T *texels = values<T>(planes), *where = values<T>(points);
  T *out = writable<T>(features), *density = writable<T>(sigma);
  const int64_t tiles = n.n * n.tiles();
#pragma omp parallel num_threads(parts_for(n.n * n.points))
  {
    Tile<T> tile(n, weights, slices ? &*slices : nullptr);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t sample = t / n.tiles(), first = t % n.tiles() * kTile, at = sample * n.points + first;
      const int count = static_cast<int>(std::min<int64_t>(kTile, n.points - first));
      tile.look_up(where + 3 * at, count, texels + sample * n.texels(), axes);
      decode_tile(tile, count, out + at * n.d, density + at);
    }
  }
  return {features, sigma};
}

// Sums of one part: gradients of the weights, and plane gradients of the sample inside which the part begins.
template <typename T> struct Sums {
  Array<T> w0t, b0, w_sigma, w1, b1;  // [c][jp], [jp], [jp], [d][jp], [dp]
  Array<T> planes;                    // [texels]; empty if the part begins at the start of a sample
  double b_sigma = 0;
  int64_t sample = -1;                // index of the sample to which `planes` belongs; -1: none

  explicit Sums(const Sizes& n) : w0t(n.c * n.jp), b0(n.jp), w_sigma(n.jp), w1(n.d * n.jp), b1(n.dp) {}
};

template <typename T> struct BackwardTile : Tile<T> {
  using V = typename Pack<T>::type;
  Array<T> slope, grad_hidden;  // [tile][jp]: sigmoid of the pre-activations; gradients of the pre-activations
  Array<T> grad_features, ones; // [tile][cp], [tile]

  BackwardTile(const Sizes& n, const Weights<T>& w, const Slices<T>* slices) : Tile<T>(n, w, slices), slope(kTile * n.jp), grad_hidden(kTile * n.jp), grad_features(kTile * n.cp), ones(kTile) {
    std::fill_n(ones.data(), kTile, T(1));
  }

  // Add the gradients of a tile to `sums` and `grad_planes`. `look_up` must have been called before.
  void add(int count, const T* grad_out, const T* grad_sigma, Sums<T>& sums, T* grad_planes) {
    constexpr int width = Pack<T>::width;
    const Sizes& n = this->n;
    this->hide(count, slope.data(), [](auto h) { return h; });
    for (int64_t i = 0; i < count * n.jp; i += width) {
      const V h = Pack<T>::load(slope.data() + i);
      const V t = Pack<T>::exp(h > V{} ? -h : h), share = T(1) / (t + T(1));  // one exponential for softplus and sigmoid
      Pack<T>::store(this->hidden.data() + i, (V{} > h ? V{} : h) + simd::log1p_unit(t));
      Pack<T>::store(slope.data() + i, h > V{} ? share : t * share);
    }
    T* grad_colours = this->colours.data();
    if (n.d > 0) {
      this->colour(count, grad_colours, T(1), T(0));
      for (int p = 0; p < count; ++p)
        for (int64_t i = 0; i < n.d; ++i) {
          T& s = grad_colours[p * n.dp + i];
          s = grad_out[p * n.d + i] * T(kScale) * s * (1 - s);
        }
      outer_product(ones.data(), 1, 1, grad_colours, n.dp, count, sums.b1.data());
      outer_product(grad_colours, n.dp, n.d, this->hidden.data(), n.jp, count, sums.w1.data());
    }
    outer_product(grad_sigma, 1, 1, this->hidden.data(), n.jp, count, sums.w_sigma.data());
    for (int p = 0; p < count; ++p) sums.b_sigma += grad_sigma[p];
    product<T>(grad_colours, n.dp, this->w.w1.data(), n.jp, n.d, count, grad_hidden.data(), [&](V sum, int p, int64_t i) {
      return (sum + grad_sigma[p] * Pack<T>::load(this->w.w_sigma.data() + i)) * Pack<T>::load(slope.data() + p * n.jp + i);
    });
    outer_product(ones.data(), 1, 1, grad_hidden.data(), n.jp, count, sums.b0.data());
    if (!this->corners.any) return;  // no point lies on a plane, so the features are 0 and have no gradient
    outer_product(this->features.data(), n.cp, n.c, grad_hidden.data(), n.jp, count, sums.w0t.data());
    product<T>(grad_hidden.data(), n.jp, this->w.w0.data(), n.cp, n.j, count, grad_features.data(), [](V sum, int, int64_t) { return sum; });
    for (int64_t k = 1; k < n.planes; ++k) scatter_plane(this->corners, k, grad_features.data(), count, n, grad_planes);
    if (this->slices)  // the other planes come first, because the gradients are weighed in place
      for (int p = 0; p < count; ++p)
        for (int64_t i = 0; i < n.c; ++i) grad_features[p * n.cp + i] *= this->slices->base[i] + this->front[p] * this->slices->slope[i];
    scatter_plane(this->corners, 0, grad_features.data(), count, n, grad_planes);
  }
};

template <typename T> bool all_zero(const T* p, int64_t count) {
  return std::all_of(p, p + count, [](T x) { return x == 0; });
}

// Compute the gradients of one part, the tiles [from, to) of the batch.
template <typename T>
void backward_part(int64_t from, int64_t to, const T* grad_out, const T* grad_sigma, const T* planes, const std::vector<int64_t>& axes,
                   const T* points, const Weights<T>& weights, const Slices<T>* slices, const Sizes& n, Sums<T>& sums, T* grad_planes) {
  BackwardTile<T> tile(n, weights, slices);
  if (from < to && from % n.tiles() != 0) {
    sums.sample = from / n.tiles();
    sums.planes = Array<T>(n.texels());
  }
  for (int64_t t = from; t < to; ++t) {
    const int64_t sample = t / n.tiles(), first = t % n.tiles() * kTile, at = sample * n.points + first;
    const int count = static_cast<int>(std::min<int64_t>(kTile, n.points - first));
    if (all_zero(grad_sigma + at, count) && all_zero(grad_out + at * n.d, count * n.d)) continue;
    tile.look_up(points + 3 * at, count, planes + sample * n.texels(), axes);
    T* target = sample == sums.sample ? sums.planes.data() : grad_planes + sample * n.texels();
    tile.add(count, grad_out + at * n.d, grad_sigma + at, sums, target);
  }
}

// Add the sums of all parts in order, and write the gradients of the weights.
template <typename T>
void write_weights(const std::vector<Sums<T>>& parts, const Sizes& n, T* grad_w0, T* grad_b0, T* grad_w1, T* grad_b1) {
  auto total = [&](auto member, int64_t i) {
    double sum = 0;
    for (const Sums<T>& part : parts) sum += (part.*member)[i];
    return static_cast<T>(sum);
  };
  double b_sigma = 0;
  for (const Sums<T>& part : parts) b_sigma += part.b_sigma;
  grad_b1[0] = static_cast<T>(b_sigma);
  for (int64_t j = 0; j < n.j; ++j) {
    for (int64_t c = 0; c < n.c; ++c) grad_w0[j * n.c + c] = total(&Sums<T>::w0t, c * n.jp + j);
    grad_b0[j] = total(&Sums<T>::b0, j);
    grad_w1[j] = total(&Sums<T>::w_sigma, j);
    for (int64_t d = 0; d < n.d; ++d) grad_w1[(1 + d) * n.j + j] = total(&Sums<T>::w1, d * n.jp + j);
  }
  for (int64_t d = 0; d < n.d; ++d) grad_b1[1 + d] = total(&Sums<T>::b1, d);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Tensor& grad_features, const Tensor& grad_sigma, const Tensor& planes, const std::vector<int64_t>& axes,
                   const Tensor& points, const Tensor& w0, const Tensor& b0, const Tensor& w1, const Tensor& b1, const Blend& blend) {
  const Sizes n = sizes_of<T>(planes, points, w0, w1);
  const std::optional<Slices<T>> slices = slices_of<T>(blend, n);
  const Weights<T> weights = pack_weights<T>(w0, b0, w1, b1, n);
  Tensor grad_planes = torch::stable::new_empty(planes, planes.sizes());
  Tensor grad_w0 = torch::stable::new_empty(w0, w0.sizes()), grad_b0 = torch::stable::new_empty(b0, b0.sizes());
  Tensor grad_w1 = torch::stable::new_empty(w1, w1.sizes()), grad_b1 = torch::stable::new_empty(b1, b1.sizes());
  T* texels = writable<T>(grad_planes);
  const int64_t tiles = n.n * n.tiles(), all = n.n * n.texels();
  const int64_t buffers = kBufferBytes / std::max<int64_t>(1, n.texels() * static_cast<int64_t>(sizeof(T)));
  const int count = static_cast<int>(std::min<int64_t>(parts_for(n.n * n.points), 1 + buffers));
  std::vector<Sums<T>> parts;
  for (int i = 0; i < count; ++i) parts.emplace_back(n);
#pragma omp parallel num_threads(count)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all; ++i) texels[i] = 0;
#pragma omp for schedule(static, 1)
    for (int i = 0; i < count; ++i)
      backward_part(tiles * i / count, tiles * (i + 1) / count, values<T>(grad_features), values<T>(grad_sigma), values<T>(planes), axes,
                    values<T>(points), weights, slices ? &*slices : nullptr, n, parts[i], texels);
    for (const Sums<T>& part : parts) {
      if (part.planes.size() == 0) continue;
      T* target = texels + part.sample * n.texels();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n.texels(); ++i) target[i] += part.planes[i];
    }
  }
  write_weights(parts, n, writable<T>(grad_w0), writable<T>(grad_b0), writable<T>(grad_w1), writable<T>(grad_b1));
  return {grad_planes, grad_w0, grad_b0, grad_w1, grad_b1};
}

bool is_double(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Double; }

std::tuple<Tensor, Tensor> decode_any(const Tensor& planes, const std::vector<int64_t>& axes, const Tensor& points, const Tensor& w0,
                                      const Tensor& b0, const Tensor& w1, const Tensor& b1, const Blend& blend) {
  return is_double(planes) ? decode<double>(planes, axes, points, w0, b0, w1, b1, blend)
                           : decode<float>(planes, axes, points, w0, b0, w1, b1, blend);
}

Gradients backward_any(const Tensor& grad_features, const Tensor& grad_sigma, const Tensor& planes, const std::vector<int64_t>& axes,
                       const Tensor& points, const Tensor& w0, const Tensor& b0, const Tensor& w1, const Tensor& b1, const Blend& blend) {
  return is_double(planes) ? backward<double>(grad_features, grad_sigma, planes, axes, points, w0, b0, w1, b1, blend)
                           : backward<float>(grad_features, grad_sigma, planes, axes, points, w0, b0, w1, b1, blend);
}

std::tuple<Tensor, Tensor> triplane_decode(Tensor planes, std::vector<int64_t> axes, Tensor points, Tensor w0, Tensor b0, Tensor w1, Tensor b1) {
  return decode_any(planes, axes, points, w0, b0, w1, b1, std::nullopt);
}

Gradients triplane_decode_backward(Tensor grad_features, Tensor grad_sigma, Tensor planes, std::vector<int64_t> axes, Tensor points, Tensor w0,
                                   Tensor b0, Tensor w1, Tensor b1) {
  return backward_any(grad_features, grad_sigma, planes, axes, points, w0, b0, w1, b1, std::nullopt);
}

std::tuple<Tensor, Tensor> triplane_decode_sliced(Tensor planes, std::vector<int64_t> axes, Tensor points, Tensor w0, Tensor b0, Tensor w1,
                                                  Tensor b1, double low, double high) {
  return decode_any(planes, axes, points, w0, b0, w1, b1, std::pair(low, high));
}

Gradients triplane_decode_sliced_backward(Tensor grad_features, Tensor grad_sigma, Tensor planes, std::vector<int64_t> axes, Tensor points,
                                          Tensor w0, Tensor b0, Tensor w1, Tensor b1, double low, double high) {
  return backward_any(grad_features, grad_sigma, planes, axes, points, w0, b0, w1, b1, std::pair(low, high));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("triplane_decode", TORCH_BOX(&triplane_decode));
  m.impl("triplane_decode_backward", TORCH_BOX(&triplane_decode_backward));
  m.impl("triplane_decode_sliced", TORCH_BOX(&triplane_decode_sliced));
  m.impl("triplane_decode_sliced_backward", TORCH_BOX(&triplane_decode_sliced_backward));
}
