// Compiled op for a CPU: zero-insertion, padding, FIR filtering and decimation of images. See upfirdn2d.py for the formula.
//
// A pixel consists of P neighbouring numbers: 1 for one channel of a contiguous tensor, all C channels for a channels-last tensor. Each output
// row is computed in two steps. First, input rows are multiplied by their vertical taps and added in a buffer, which contains zeros outside the
// image. Then the horizontal taps are applied to this buffer. Inserted zeros are never processed. For a filter that is not an outer product,
// the second step is repeated for every input row. Wide rows are processed in tiles, so that the rows in use fit into the cache of a core.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int64_t kSerial = 1 << 15;  // number of output elements below which one thread is faster than several
constexpr int64_t kTile = 4096;       // number of elements of an output row that are processed together

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t modulo(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

// One axis: output n reads sum_m taps[m] u[n*down + m - before], u[i*up] = x[i].
struct Axis {
  int64_t in, out, up, down, before, k;
  int64_t first(int64_t n) const { return n * down - before; }                                   // position of the first tap in u
  int64_t lowest(int64_t n) const { return -floor_div(-first(n), up); }                          // smallest i that output n reads
  int64_t highest(int64_t n) const { return floor_div(first(n) + k - 1, up); }                   // largest i that output n reads
  int64_t tap(int64_t n) const { return modulo(-first(n), up); }                                 // tap that is multiplied by pixel `lowest`
};

template <typename T> struct Filter {
  bool separable;
  std::vector<T> y, x;  // [KH], [KW]; x is [KH, KW] if not separable. Taps of a correlation, with the gain.
};

// Split a filter into an outer product, if it is one up to rounding.
template <typename T> Filter<T> prepare(const Tensor& f, bool flip, double gain) {
  const T* p = static_cast<const T*>(f.const_data_ptr());
  const int64_t kh = f.size(0), kw = f.dim() == 1 ? kh : f.size(1);
  Filter<T> filter{true, std::vector<T>(kh), std::vector<T>(kw)};
  if (f.dim() == 1) {
    for (int64_t i = 0; i < kh; ++i) filter.x[i] = filter.y[i] = static_cast<T>(p[flip ? i : kh - 1 - i] * std::sqrt(gain));
    return filter;
  }
  std::vector<double> taps(kh * kw);
  int64_t largest = 0;
  for (int64_t i = 0; i < kh * kw; ++i) {
    taps[i] = p[flip ? i : kh * kw - 1 - i] * gain;
    if (std::abs(taps[i]) > std::abs(taps[largest])) largest = i;
  }
  const double peak = taps[largest], tolerance = std::abs(peak) * (sizeof(T) == 4 ? 2e-7 : 1e-15);
  for (int64_t r = 0; r < kh; ++r)
    for (int64_t c = 0; c < kw; ++c) {
      const double product = peak == 0 ? 0 : taps[r * kw + largest % kw] * taps[largest / kw * kw + c] / peak;
      filter.separable &= std::abs(product - taps[r * kw + c]) <= tolerance;  // false for NaN
    }
  if (filter.separable) {
    for (int64_t r = 0; r < kh; ++r) filter.y[r] = static_cast<T>(peak == 0 ? 0 : taps[r * kw + largest % kw] / peak);
    for (int64_t c = 0; c < kw; ++c) filter.x[c] = static_cast<T>(taps[largest / kw * kw + c]);
  } else {
    filter.y.assign(kh, T(1));
    filter.x.assign(taps.begin(), taps.end());
  }
  return filter;
}

// Compute to[i] = sum_j taps[j * step] from[i + j * shift], or += if `add` is true.
template <bool add, typename T>
inline void weighted_sum(T* __restrict to, const T* __restrict from, int64_t n, const T* taps, int64_t count, int64_t step, int64_t shift) {
  if (count == 4) {
    const T a = taps[0], b = taps[step], c = taps[2 * step], d = taps[3 * step];
    const T *p = from, *q = from + shift, *r = from + 2 * shift, *s = from + 3 * shift;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = (add ? to[i] : T(0)) + (a * p[i] + b * q[i] + (c * r[i] + d * s[i]));
  } else if (count == 2) {
    const T a = taps[0], b = taps[step];
    const T *p = from, *q = from + shift;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = (add ? to[i] : T(0)) + (a * p[i] + b * q[i]);
  } else {
    if (!add && count == 0) std::fill_n(to, n, T(0));
    for (int64_t j = 0; j < count; ++j) {
      const T tap = taps[j * step];
      const T* p = from + j * shift;
      if (!add && j == 0)
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = tap * p[i];
      else
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] += tap * p[i];
    }
  }
}

template <typename T> struct Buffers {
  std::vector<T> row, even, odd;  // `row` begins at the first input pixel that the tile reads
};

// Compute the horizontal step for the output pixels [n0, n1). `row` begins at input pixel `low`.
template <bool add, typename T>
void horizontal(const Axis& axis, int64_t n0, int64_t n1, int64_t low, int64_t pixel, const T* taps, Buffers<T>& own, T* out) {
  const T* row = own.row.data();
  if (axis.up == 1 && axis.down == 1) {
    weighted_sum<add>(out, row + (axis.lowest(n0) - low) * pixel, (n1 - n0) * pixel, taps, axis.k, 1, pixel);
  } else if (pixel == 1 && axis.up == 2 && axis.down == 1) {  // even and odd outputs separately, which are then interleaved
    const int64_t counts[2] = {(n1 - n0 + 1) / 2, (n1 - n0) / 2};
    T* phases[2] = {own.even.data(), own.odd.data()};
    for (int a = 0; a < 2; ++a) {
      const int64_t m = axis.tap(n0 + a);
      weighted_sum<false>(phases[a], row + (axis.lowest(n0 + a) - low), counts[a], taps + m, (axis.k - m + 1) / 2, 2, 1);
    }
    const T *__restrict even = phases[0], *__restrict odd = phases[1];
#pragma omp simd
    for (int64_t q = 0; q < counts[1]; ++q) {
      out[2 * q] = (add ? out[2 * q] : T(0)) + even[q];
      out[2 * q + 1] = (add ? out[2 * q + 1] : T(0)) + odd[q];
    }
    if (counts[0] > counts[1]) out[n1 - n0 - 1] = (add ? out[n1 - n0 - 1] : T(0)) + even[counts[1]];
  } else if (pixel == 1 && axis.up == 1 && axis.down == 2) {  // even and odd pixels are separated, then there are two sums of neighbours
    const int64_t half = (axis.highest(n1 - 1) - low) / 2 + 1;
    T *__restrict even = own.even.data(), *__restrict odd = own.odd.data();
#pragma omp simd
    for (int64_t q = 0; q < half; ++q) {
      even[q] = row[2 * q];
      odd[q] = row[2 * q + 1];
    }
    weighted_sum<add>(out, even, n1 - n0, taps, (axis.k + 1) / 2, 2, 1);
    weighted_sum<true>(out, odd, n1 - n0, taps + 1, axis.k / 2, 2, 1);
  } else {
    for (int64_t n = n0; n < n1; ++n) {
      const int64_t m = axis.tap(n), count = m < axis.k ? (axis.k - m + axis.up - 1) / axis.up : 0;
      weighted_sum<add>(out + (n - n0) * pixel, row + (axis.lowest(n) - low) * pixel, pixel, taps + m, count, axis.up, pixel);
    }
  }
}

template <typename T> struct Image {
  const T* in;
  T* out;
};

// Compute the output rows [r0, r1) of the tile with the output pixels [n0, n1).
template <typename T>
void tile(const Image<T>& image, const Axis& ax, const Axis& ay, const Filter<T>& filter, int64_t pixel, int64_t n0, int64_t n1, int64_t r0,
          int64_t r1, Buffers<T>& own) {
  const int64_t low = ax.lowest(n0), high = ax.highest(n1 - 1);
  const int64_t from = std::clamp<int64_t>(low, 0, ax.in), to = std::clamp<int64_t>(high + 1, from, ax.in);
  const int64_t length = std::max<int64_t>(high + 1 - low, 1) * pixel;
  own.row.assign(length + 2, T(0));  // two more, because the last pair of pixels may lie partly outside
  own.even.resize(std::max(length, (n1 - n0) * pixel) + 2);
  own.odd.resize(own.even.size());
  T* inside = own.row.data() + (from - low) * pixel;
  const int64_t count = (to - from) * pixel, stride = ax.in * pixel;
  for (int64_t r = r0; r < r1; ++r) {
    T* out = image.out + (r * ax.out + n0) * pixel;
    const int64_t begin = std::max<int64_t>(ay.lowest(r), 0), end = std::min(ay.highest(r), ay.in - 1) + 1;
    const int64_t m = ay.tap(r) + (begin - ay.lowest(r)) * ay.up;
    const T* source = image.in + (begin * ax.in + from) * pixel;
    if (filter.separable || begin >= end) {
      if (begin >= end) std::fill_n(inside, count, T(0));
      else weighted_sum<false>(inside, source, count, &filter.y[m], end - begin, ay.up, stride);
      horizontal<false>(ax, n0, n1, low, pixel, filter.x.data(), own, out);
      continue;
    }
    for (int64_t i = begin; i < end; ++i, source += stride) {
      std::copy_n(source, count, inside);
      const T* taps = &filter.x[(m + (i - begin) * ay.up) * ax.k];
      if (i == begin) horizontal<false>(ax, n0, n1, low, pixel, taps, own, out);
      else horizontal<true>(ax, n0, n1, low, pixel, taps, own, out);
    }
  }
}

template <typename T> void resample(const Tensor& x, Tensor& y, Axis ax, Axis ay, const Filter<T>& filter, bool channels_last) {
  const int64_t pixel = channels_last ? x.size(1) : 1, images = x.size(0) * x.size(1) / pixel;
  const T* in = static_cast<const T*>(x.const_data_ptr());
  T* out = static_cast<T*>(y.mutable_data_ptr());
  int64_t width = std::max<int64_t>(kTile / pixel, 8);
  const int64_t tiles = (ax.out + width - 1) / width;
  width = (ax.out + tiles - 1) / tiles;
  const int threads = images * ax.out * ay.out * pixel < kSerial ? 1 : static_cast<int>(torch::stable::get_num_threads());
  const int64_t bands = images * tiles >= 4 * threads ? 1 : std::min<int64_t>(ay.out, threads);
#pragma omp parallel num_threads(threads)
  {
    Buffers<T> own;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < images * tiles * bands; ++job) {
      const int64_t image = job / (tiles * bands), t = job / bands % tiles, band = job % bands;
      const Image<T> here{in + image * ax.in * ay.in * pixel, out + image * ax.out * ay.out * pixel};
      const int64_t n0 = t * width, n1 = std::min(n0 + width, ax.out);
      if (n0 < n1) tile(here, ax, ay, filter, pixel, n0, n1, ay.out * band / bands, ay.out * (band + 1) / bands, own);
    }
  }
}

Tensor upfirdn2d(
    Tensor x, Tensor f, std::vector<int64_t> up, std::vector<int64_t> down, std::vector<int64_t> padding, bool flip_filter, double gain) {
  const int64_t kh = f.size(0), kw = f.dim() == 1 ? kh : f.size(1), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t out_w = (w * up[0] + padding[0] + padding[1] - kw) / down[0] + 1;
  const int64_t out_h = (h * up[1] + padding[2] + padding[3] - kh) / down[1] + 1;
  const bool channels_last = c > 1 && h * w > 1 && x.stride(1) == 1;
  Tensor y = torch::stable::new_empty(x, {x.size(0), channels_last ? out_h : c, channels_last ? out_w : out_h, channels_last ? c : out_w});
  if (channels_last) y = torch::stable::transpose(torch::stable::transpose(y, 1, 3), 2, 3);
  const Axis ax{w, out_w, up[0], down[0], padding[0], kw}, ay{h, out_h, up[1], down[1], padding[2], kh};
  if (f.scalar_type() == torch::headeronly::ScalarType::Double)
    resample(x, y, ax, ay, prepare<double>(f, flip_filter, gain), channels_last);
  else
    resample(x, y, ax, ay, prepare<float>(f, flip_filter, gain), channels_last);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }
