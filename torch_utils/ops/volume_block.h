// Common code of the forward and the backward pass of the parts of a residual squeeze-and-excitation block on volumes, on a CPU.
//
// The 3x3x3 convolution is computed directly along z and x, and by Winograd's F(4, 3) along y. It processes blocks of planes and rows that fit
// into the cache. A source reads the rows and normalises them, or computes a gradient from them. The rows are transformed along y. Then six
// sums over channels and the 3 x 3 taps along z and x are computed, from which four output rows follow. Vector lanes run along x.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "simd.h"

namespace volume {

using simd::kWidth;
using simd::vfloat;
using torch::stable::Tensor;

// Numbers of output rows and input rows of a tile, and of output channels, planes and tiles that are processed together
constexpr int kRows = 4, kPatch = 6, kOut = 8, kPlanes = 4, kTiles = 2;
constexpr int kHalves = simd::kManyRegisters ? 2 : 1;                    // vectors of x positions whose sums stay in registers together
constexpr int kOutAtOnce = simd::kManyRegisters ? kOut : kOut / 2;       // channels whose sums stay in registers, if each has two or three sums

struct Sizes {
  int64_t n, c, d, h, w;
  int64_t volume() const { return d * h * w; }
};

inline Sizes sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)}; }
inline const float* in(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* out(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline int threads() { return static_cast<int>(torch::stable::get_num_threads()); }
inline vfloat load(const float* p, int count) { return count == kWidth ? simd::load(p) : simd::load_first(p, count); }
inline void store(float* p, vfloat v, int count) { count == kWidth ? simd::store(p, v) : simd::store_first(p, v, count); }
inline int lanes(int64_t first, int64_t end) { return static_cast<int>(std::min<int64_t>(kWidth, end - first)); }
inline Tensor new_sums(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, torch::headeronly::ScalarType::Double);
}

// Sums of values, and of their products with other values, accumulated in vectors.
struct Moments {
  vfloat sum{}, product{};
  void add(vfloat v, vfloat other) { sum += v, product += v * other; }
  void store(double* to) const { to[0] += simd::sum(sum), to[1] += simd::sum(product); }
};

// Add the results of tasks, [task][values], to sums [n][values], in the order of tasks, so that the number of threads does not matter.
inline void collect(const std::vector<double>& parts, int64_t tasks, int64_t n, int64_t values, const Tensor& to) {
  double* sums = static_cast<double*>(to.mutable_data_ptr());
  std::fill_n(sums, n * values, 0.0);
  const int64_t each = tasks / n;
  for (int64_t t = 0; t < tasks; ++t)
    for (int64_t i = 0; i < values; ++i) sums[t / each * values + i] += parts[t * values + i];
}

struct Task {
  int64_t n, z, y;  // sample, first plane, first row
};

// Source of inputs that are scaled and shifted channels of a volume. Inputs beyond the volume's channels read its last channel.
struct Normalised {
  const float* x;
  Sizes s;
  int64_t inputs;
  const float *scale, *shift;  // [n][inputs]
  struct Plane {
    const float* from;
    float scale, shift;
    vfloat operator()(int64_t i, int count) const { return load(from + i, count) * scale + shift; }
  };
  Plane plane(int64_t n, int64_t c, int64_t z) const {
    const int64_t k = n * inputs + c;
    return {x + ((n * s.c + std::min(c, s.c - 1)) * s.d + z) * s.h * s.w, scale[k], shift[k]};
  }
};

// Source of inputs that are gradients of a ReLU followed by a normalisation: f0 g + f1 h + f2 where h > 0, and 0 elsewhere.
struct Rectified {
  const float *g, *h;
  Sizes s;
  const float* factors;  // [n][c][3]
  int64_t inputs = s.c;
  struct Plane {
    const float *g, *h, *f;
    vfloat operator()(int64_t i, int count) const {
      const vfloat value = load(h + i, count);
      return value > 0.0f ? load(g + i, count) * f[0] + value * f[1] + f[2] : vfloat{};
    }
  };
  Plane plane(int64_t n, int64_t c, int64_t z) const {
    const int64_t channel = n * s.c + c, at = (channel * s.d + z) * s.h * s.w;
    return {g + at, h + at, factors + 3 * channel};
  }
};

// Compute six transformed rows for each plane, tile and input channel. Each row has a zero before it and zeros after it.
template <typename Source> void prepare(const Source& source, Task at, int64_t length, float* scratch) {
  const Sizes& s = source.s;
  const int64_t inputs = source.inputs;
  for (int64_t p = 0; p < kPlanes + 2; ++p)
    for (int64_t t = 0; t < kTiles; ++t)
      for (int64_t c = 0; c < inputs; ++c) {
        float* to = scratch + (((p * kTiles + t) * kPatch) * inputs + c) * length;
        const int64_t z = at.z + p - 1, stride = inputs * length;
        if (z < 0 || z >= s.d) {
          for (int k = 0; k < kPatch; ++k) std::fill_n(to + k * stride, length, 0.0f);
          continue;
        }
        const auto plane = source.plane(at.n, c, z);
        for (int64_t i = 0; i < s.w; i += kWidth) {
          const int count = lanes(i, s.w);
          vfloat d[kPatch];
          for (int k = 0; k < kPatch; ++k) {
            const int64_t y = at.y + kRows * t + k - 1;
            d[k] = y < 0 || y >= s.h ? vfloat{} : plane(y * s.w + i, count);
          }
          const vfloat one = d[4] - 4.0f * d[2], two = d[3] - 4.0f * d[1], three = d[4] - d[2], four = 2.0f * (d[3] - d[1]);
          float* here = to + 1 + i;
          simd::store(here, 4.0f * d[0] - 5.0f * d[2] + d[4]);
          simd::store(here + stride, one + two);
          simd::store(here + 2 * stride, one - two);
          simd::store(here + 3 * stride, three + four);
          simd::store(here + 4 * stride, three - four);
          simd::store(here + 5 * stride, 4.0f * d[1] - 5.0f * d[3] + d[5]);
        }
        for (int k = 0; k < kPatch; ++k) {
          to[k * stride] = 0.0f;
          std::fill(to + k * stride + s.w + 1, to + (k + 1) * stride - stride + length, 0.0f);
        }
      }
}

// Compute sums over input channels and the 3 x 3 taps along z and x, for eight output channels and one or two vectors of positions:
// [channel][half]. This is a separate function, so that the sums stay in registers.
template <int halves>
[[gnu::noinline]] void accumulate(const float* scratch, const float* u, int64_t channels, int64_t length, int64_t plane, vfloat* result) {
  vfloat acc[kOut][halves] = {};
  for (int dz = 0; dz < 3; ++dz) {
    const float* row = scratch + dz * plane;
    for (int64_t c = 0; c < channels; ++c, row += length)
      for (int dx = 0; dx < 3; ++dx, u += kOut) {
        vfloat v[halves];
#pragma GCC unroll 2
        for (int half = 0; half < halves; ++half) v[half] = simd::load(row + dx + half * kWidth);
#pragma GCC unroll 8
        for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 2
          for (int half = 0; half < halves; ++half) acc[o][half] += u[o] * v[half];
      }
  }
  for (int o = 0; o < kOut; ++o)
    for (int half = 0; half < halves; ++half) result[o * halves + half] = acc[o][half];
}

// Compute four output rows [row][channel * halves] of a tile.
template <int halves>
inline void multiply(const float* scratch, const float* u, int64_t channels, int64_t length, vfloat (&rows)[kRows][2 * kOut]) {
  vfloat acc[kPatch][2 * kOut];
  for (int k = 0; k < kPatch; ++k)
    accumulate<halves>(scratch + k * channels * length, u + k * 9 * channels * kOut, channels, length, kTiles * kPatch * channels * length, acc[k]);
  for (int i = 0; i < kOut * halves; ++i) {
    const vfloat sum = acc[1][i] + acc[2][i], difference = acc[1][i] - acc[2][i], more = acc[3][i] + acc[4][i], less = acc[3][i] - acc[4][i];
    rows[0][i] = acc[0][i] + sum + more;
    rows[1][i] = difference + 2.0f * less;
    rows[2][i] = sum + 4.0f * more;
    rows[3][i] = difference + 8.0f * less + acc[5][i];
  }
}

// Second operand of a layer: a volume of the shape of the result, or a volume of one channel, multiplied by a factor and shifted by an offset
// for each output channel.
struct Companion {
  const float* from = nullptr;
  const float* mix = nullptr;  // [outputs][2], factor and offset; null for a volume of the shape of the result
  vfloat load(const Sizes& s, int64_t n, int64_t c, int64_t inside, int count) const {
    const vfloat v = volume::load(from + (mix ? n : n * s.c + c) * s.volume() + inside, count);
    return mix ? v * mix[2 * c] + mix[2 * c + 1] : v;
  }
};

inline Companion companion_of(const std::optional<Tensor>& x, const std::optional<Tensor>& mix) {
  return x ? Companion{in(*x), mix ? in(*mix) : nullptr} : Companion{};
}

struct Layer {
  Sizes s;               // sizes of the result
  const float* u;        // kernels, see volume_block.transformed_kernel
  int64_t own;           // length of the kernels of a sample; 0 if all samples have the same kernels
  Companion companion;   // is added to the result; for a gradient, is multiplied by it in the second sum
  bool gradient, relu;
  float* to;
};

// Finish the rows of one tile at x .. x + halves * kWidth for eight output channels: add the companion, apply the ReLU, write the result, and
// add to the moments.
template <int halves> void finish(const Layer& l, Task at, int64_t output, int64_t x, const vfloat (&rows)[kRows][2 * kOut], Moments* moments) {
  for (int o = 0; o < kOut; ++o)
    for (int j = 0; j < std::min<int64_t>(kRows, l.s.h - at.y); ++j)
      for (int half = 0; half < halves; ++half) {
        const int64_t first = x + half * kWidth, inside = ((at.z * l.s.h) + at.y + j) * l.s.w + first;
        const int count = lanes(first, l.s.w);
        if (count <= 0) break;
        vfloat v = rows[j][o * halves + half], other{};
        if (l.companion.from) other = l.companion.load(l.s, at.n, output + o, inside, count);
        if (!l.gradient) v += other;
        if (l.relu) v = simd::max(v, vfloat{});
        float* p = l.to + (at.n * l.s.c + output + o) * l.s.volume() + inside;
        store(p, v, count);
        if (count < kWidth) v = simd::load_first(p, count);
        moments[o].add(v, l.gradient ? other : v);
      }
}

template <int halves> void run_task(const Layer& l, int64_t inputs, int64_t length, Task at, const float* scratch, double* sums) {
  vfloat rows[kRows][2 * kOut];
  for (int64_t output = 0; output < l.s.c; output += kOut) {
    Moments moments[kOut];
    for (int64_t p = 0; p < std::min<int64_t>(kPlanes, l.s.d - at.z); ++p)
      for (int64_t t = 0; t < kTiles && at.y + kRows * t < l.s.h; ++t)
        for (int64_t x = 0; x < l.s.w; x += halves * kWidth) {
          const float* tile = scratch + (p * kTiles + t) * kPatch * inputs * length + x;
          multiply<halves>(tile, l.u + at.n * l.own + output * kPatch * 9 * inputs, inputs, length, rows);
          finish<halves>(l, {at.n, at.z + p, at.y + kRows * t}, output, x, rows, moments);
        }
    for (int o = 0; o < kOut; ++o) moments[o].store(sums + 2 * (output + o));
  }
}

// Convolve the inputs of `source`, and write the sums [N, O, 2] to `sums`.
template <typename Source> void convolve(const Source& source, const Layer& layer, const Tensor& sums) {
  const Sizes& s = layer.s;
  const int64_t step = s.w > kWidth ? kHalves * kWidth : kWidth, length = (s.w + step - 1) / step * step + kWidth;
  const int64_t deep = (s.d + kPlanes - 1) / kPlanes, high = (s.h + kRows * kTiles - 1) / (kRows * kTiles), tasks = s.n * deep * high;
  std::vector<double> parts(tasks * s.c * 2, 0.0);
#pragma omp parallel num_threads(threads())
  {
    std::vector<float> scratch((kPlanes + 2) * kTiles * kPatch * source.inputs * length);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const Task at{task / (deep * high), task / high % deep * kPlanes, task % high * kRows * kTiles};
      prepare(source, at, length, scratch.data());
      double* found = &parts[task * s.c * 2];
      s.w > kWidth ? run_task<kHalves>(layer, source.inputs, length, at, scratch.data(), found)
                   : run_task<1>(layer, source.inputs, length, at, scratch.data(), found);
    }
  }
  collect(parts, tasks, s.n, s.c * 2, sums);
}

// Range of outputs for which the nearest input, floor(i * in / out), increases by one each time: the outputs [first, first + count) read the
// inputs from `source` on.
struct Run {
  int64_t first, count, source;
};

inline std::vector<Run> nearest_runs(int64_t in, int64_t out) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t source = i * in / out;
    if (runs.empty() || source != runs.back().source + runs.back().count) runs.push_back({i, 0, source});
    ++runs.back().count;
  }
  return runs;
}

// Compute the spatial gate sigmoid(w . h + b) of a vector of voxels.
inline vfloat spatial(const float* h, int64_t stride, int64_t channels, const float* w, float b, int count) {
  vfloat v = vfloat{} + b;
  for (int64_t c = 0; c < channels; ++c) v += w[c] * load(h + c * stride, count);
  return simd::sigmoid(v);
}

}  // namespace volume
