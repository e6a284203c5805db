// Parts of a residual squeeze-and-excitation block on volumes, forward alone, on a CPU. See volume_block.py for the formulas.
//
// x runs in the vector lanes. The convolution takes blocks of planes and rows that stay in cache: rows are normalised and transformed along
// y (F(4, 3)), then every output row gets six sums over channels and the 3 x 3 taps of z and x, of which four rows are made.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "simd.h"

namespace {

using simd::kWidth;
using simd::vfloat;
using torch::stable::Tensor;

constexpr int kRows = 4, kPatch = 6, kOut = 8, kPlanes = 4, kTiles = 2;  // outputs and inputs of a tile, channels, planes, tiles at once
constexpr int kStep = 2 * kWidth;                                        // x positions whose sums stay in registers

struct Sizes {
  int64_t n, c, d, h, w;
  int64_t volume() const { return d * h * w; }
};

Sizes sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)}; }
const float* in(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* out(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// Sum and sum of squares of values that are added in vectors.
struct Moments {
  vfloat sum{}, square{};
  void add(vfloat v) { sum += v, square += v * v; }
  void store(double* to) const { to[0] += simd::sum(sum), to[1] += simd::sum(square); }
};

// Adds what tasks found, [task][per][2], to sums [n][per][2]: in order, so that the threads' number does not matter.
void collect(const std::vector<double>& parts, int64_t tasks, int64_t n, int64_t values, double* sums) {
  std::fill_n(sums, n * values, 0.0);
  const int64_t each = tasks / n;
  for (int64_t t = 0; t < tasks; ++t)
    for (int64_t i = 0; i < values; ++i) sums[t / each * values + i] += parts[t * values + i];
}

struct Task {
  int64_t n, z, y;  // sample, first plane, first row
};

// Six transformed rows per plane, tile and input channel, each with a zero before it and zeros behind. Inputs beyond the volume's channels
// read its last one: each input is a scale and a shift of a channel.
void prepare(
    const float* x, const Sizes& s, const float* scale, const float* shift, Task at, int64_t inputs, int64_t length, float* scratch) {
  for (int64_t p = 0; p < kPlanes + 2; ++p)
    for (int64_t t = 0; t < kTiles; ++t)
      for (int64_t c = 0; c < inputs; ++c) {
        float* to = scratch + (((p * kTiles + t) * kPatch) * inputs + c) * length;
        const int64_t z = at.z + p - 1, stride = inputs * length;
        if (z < 0 || z >= s.d) {
          for (int k = 0; k < kPatch; ++k) std::fill_n(to + k * stride, length, 0.0f);
          continue;
        }
        const float a = scale[at.n * inputs + c], b = shift[at.n * inputs + c];
        const float* plane = x + ((at.n * s.c + std::min(c, s.c - 1)) * s.d + z) * s.h * s.w;
        for (int64_t i = 0; i < s.w; i += kWidth) {
          const int count = static_cast<int>(std::min<int64_t>(kWidth, s.w - i));
          vfloat d[kPatch];
          for (int k = 0; k < kPatch; ++k) {
            const int64_t y = at.y + kRows * t + k - 1;
            const float* row = plane + y * s.w + i;
            d[k] = y < 0 || y >= s.h ? vfloat{} : (count == kWidth ? simd::load(row) : simd::load_first(row, count)) * a + b;
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

// Sums over input channels and the 3 x 3 taps of z and x for eight outputs at 16 or 32 positions: [channel][half]. Apart from its caller, so
// that the sums stay in registers.
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

// Four rows [row][channel * halves] of a tile.
template <int halves>
void multiply(const float* scratch, const float* u, int64_t channels, int64_t length, vfloat (&rows)[kRows][2 * kOut]) {
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

// What is added to a convolution: a volume like the result, or one volume times a factor per channel plus an offset.
struct Residual {
  const float* from = nullptr;
  int64_t channels = 0;
  const float* mix = nullptr;  // [outputs][2] of the second kind
};

struct Layer {
  Sizes s;           // of the result
  int64_t inputs;    // channels after normalisation
  int64_t length;    // of a row in the scratch memory
  const float* u;    // kernels
  Residual residual;
  bool relu;
  float* to;
};

// The rows of one tile at x..x + 16 halves, of eight outputs: adds the residual, cuts at 0, writes.
template <int halves> void finish(const Layer& l, Task at, int64_t output, int64_t x, const vfloat (&rows)[kRows][2 * kOut], Moments* moments) {
  for (int o = 0; o < kOut; ++o)
    for (int j = 0; j < std::min<int64_t>(kRows, l.s.h - at.y); ++j)
      for (int half = 0; half < halves; ++half) {
        const int64_t first = x + half * kWidth, inside = ((at.z * l.s.h) + at.y + j) * l.s.w + first;
        const int count = static_cast<int>(std::min<int64_t>(kWidth, l.s.w - first));
        if (count <= 0) break;
        vfloat v = rows[j][o * halves + half];
        if (l.residual.from) {
          const int64_t channel = l.residual.mix ? at.n : at.n * l.s.c + output + o;
          const float* p = l.residual.from + channel * l.s.volume() + inside;
          vfloat r = count == kWidth ? simd::load(p) : simd::load_first(p, count);
          if (l.residual.mix) r = r * l.residual.mix[2 * (output + o)] + l.residual.mix[2 * (output + o) + 1];
          v += r;
        }
        if (l.relu) v = simd::max(v, vfloat{});
        float* p = l.to + (at.n * l.s.c + output + o) * l.s.volume() + inside;
        if (count == kWidth) {
          simd::store(p, v);
        } else {
          simd::store_first(p, v, count);
          v = simd::load_first(p, count);
        }
        moments[o].add(v);
      }
}

template <int halves> void run_task(const Layer& l, Task at, const float* scratch, double* sums) {
  vfloat rows[kRows][2 * kOut];
  for (int64_t output = 0; output < l.s.c; output += kOut) {
    Moments moments[kOut];
    for (int64_t p = 0; p < std::min<int64_t>(kPlanes, l.s.d - at.z); ++p)
      for (int64_t t = 0; t < kTiles && at.y + kRows * t < l.s.h; ++t)
        for (int64_t x = 0; x < l.s.w; x += halves * kWidth) {
          const float* tile = scratch + (p * kTiles + t) * kPatch * l.inputs * l.length + x;
          multiply<halves>(tile, l.u + output * kPatch * 9 * l.inputs, l.inputs, l.length, rows);
          finish<halves>(l, {at.n, at.z + p, at.y + kRows * t}, output, x, rows, moments);
        }
    for (int o = 0; o < kOut; ++o) moments[o].store(sums + 2 * (output + o));
  }
}

Tensor volume_conv(
    Tensor x, Tensor scale, Tensor shift, Tensor u, std::optional<Tensor> residual, std::optional<Tensor> mix, bool relu, Tensor y) {
  const Sizes from = sizes_of(x);
  const int64_t outputs = u.size(1) * kOut;
  const int64_t step = from.w > kWidth ? kStep : kWidth;
  Layer layer{{from.n, outputs, from.d, from.h, from.w}, scale.size(1), (from.w + step - 1) / step * step + kWidth, in(u), {}, relu, nullptr};
  const Sizes& s = layer.s;
  Tensor sums = torch::stable::new_empty(x, {s.n, s.c, 2}, torch::headeronly::ScalarType::Double);
  layer.to = out(y);
  if (residual) layer.residual = {in(*residual), residual->size(1), mix ? in(*mix) : nullptr};
  const int64_t own = u.size(0) > 1 ? s.c * kPatch * 9 * layer.inputs : 0;  // kernels of each sample
  const int64_t deep = (s.d + kPlanes - 1) / kPlanes, high = (s.h + kRows * kTiles - 1) / (kRows * kTiles), tasks = s.n * deep * high;
  std::vector<double> parts(tasks * s.c * 2, 0.0);
#pragma omp parallel num_threads(threads())
  {
    std::vector<float> scratch((kPlanes + 2) * kTiles * kPatch * layer.inputs * layer.length);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const Task at{task / (deep * high), task / high % deep * kPlanes, task % high * kRows * kTiles};
      prepare(in(x), from, in(scale), in(shift), at, layer.inputs, layer.length, scratch.data());
      Layer here = layer;
      here.u += at.n * own;
      double* found = &parts[task * s.c * 2];
      s.w > kWidth ? run_task<2>(here, at, scratch.data(), found) : run_task<1>(here, at, scratch.data(), found);
    }
  }
  collect(parts, tasks, s.n, s.c * 2, static_cast<double*>(sums.mutable_data_ptr()));
  return sums;
}

// The coarse planes or rows that fine position i of a transposed convolution with stride 2 reads, and the tap of each.
struct Taps {
  int count;
  int64_t place[2];
  int tap[2];
  explicit Taps(int64_t i) : count(i % 2 ? 2 : 1), place{i / 2, i / 2 + 1}, tap{i % 2 ? 2 : 1, 0} {}
};

// Row (z, y) of the transposed convolution for eight outputs: to[o][2 x] and to[o][2 x + 1] from kernels w [inputs][27][8].
[[gnu::noinline]] void up_row(const float* x, const Sizes& s, const float* w, Taps z, Taps y, int64_t stride, float* to) {
  for (int64_t i = 0; i < s.w; i += kWidth) {
    const int count = static_cast<int>(std::min<int64_t>(kWidth, s.w - i)), next = static_cast<int>(std::min<int64_t>(kWidth, s.w - i - 1));
    vfloat even[kOut] = {}, odd[kOut] = {};
    for (int64_t c = 0; c < s.c; ++c)
      for (int a = 0; a < z.count; ++a)
        for (int b = 0; b < y.count; ++b) {
          const float* row = x + ((c * s.d + z.place[a]) * s.h + y.place[b]) * s.w + i;
          const float* k = w + (c * 27 + z.tap[a] * 9 + y.tap[b] * 3) * kOut;
          const vfloat here = count == kWidth ? simd::load(row) : simd::load_first(row, count);
          const vfloat after = next == kWidth ? simd::load(row + 1) : simd::load_first(row + 1, next);
#pragma GCC unroll 8
          for (int o = 0; o < kOut; ++o) {
            even[o] += k[kOut + o] * here;
            odd[o] += k[2 * kOut + o] * here + k[o] * after;
          }
        }
    for (int o = 0; o < kOut; ++o) {  // the lanes of both in turn
      simd::store(to + o * stride + 2 * i, __builtin_shufflevector(even[o], odd[o], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
      simd::store(to + o * stride + 2 * i + kWidth,
                  __builtin_shufflevector(even[o], odd[o], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
  }
}

// Where the nearest neighbour, floor(i * in / out), walks on by one: [first, first + count) reads from `source` on.
struct Run {
  int64_t first, count, source;
};

std::vector<Run> nearest_runs(int64_t in, int64_t out) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t source = i * in / out;
    if (runs.empty() || source != runs.back().source + runs.back().count) runs.push_back({i, 0, source});
    ++runs.back().count;
  }
  return runs;
}

Tensor volume_up(Tensor skip, Tensor x, Tensor w, Tensor y) {
  const Sizes s = sizes_of(skip), small = sizes_of(x);
  Tensor sums = torch::stable::new_empty(skip, {s.n, s.c, 2}, torch::headeronly::ScalarType::Double);
  const int64_t tasks = s.n * s.d, fine = 2 * small.w - 1;
  std::vector<double> parts(tasks * s.c * 2, 0.0);
  const std::vector<Run> runs = nearest_runs(fine, s.w);
  const int64_t stride = 2 * (small.w + kWidth);
  const float *from = in(skip), *coarse = in(x), *kernels = in(w);
  float* to = out(y);
#pragma omp parallel num_threads(threads())
  {
    std::vector<float> rows(kOut * stride);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t n = task / s.d, z = task % s.d;
      for (int64_t output = 0; output < s.c; output += kOut)
        for (int64_t j = 0; j < s.h; ++j) {
          const Taps deep(z * (2 * small.d - 1) / s.d), high(j * (2 * small.h - 1) / s.h);
          up_row(coarse + n * small.c * small.volume(), small, kernels + output * small.c * 27, deep, high, stride, rows.data());
          for (int o = 0; o < kOut; ++o) {
            const int64_t place = (((n * s.c + output + o) * s.d + z) * s.h + j) * s.w;
            float sum = 0, square = 0;
            for (const Run& run : runs) {
              const float *row = rows.data() + o * stride + run.source, *before = from + place + run.first;
              float* after = to + place + run.first;
#pragma omp simd reduction(+ : sum, square)
              for (int64_t i = 0; i < run.count; ++i) {
                const float v = before[i] + row[i];
                after[i] = v, sum += v, square += v * v;
              }
            }
            double* found = &parts[(task * s.c + output + o) * 2];
            found[0] += sum, found[1] += square;
          }
        }
    }
  }
  collect(parts, tasks, s.n, s.c * 2, static_cast<double*>(sums.mutable_data_ptr()));
  return sums;
}

// Gate of 16 voxels from `h`: sigmoid(w . h + b).
inline vfloat spatial(const float* h, int64_t stride, int64_t channels, const float* w, float b, int count) {
  vfloat v = vfloat{} + b;
  for (int64_t c = 0; c < channels; ++c) v += w[c] * (count == kWidth ? simd::load(h + c * stride) : simd::load_first(h + c * stride, count));
  return simd::sigmoid(v);
}

// Gates one plane [channels] of a sample.
void gate_plane(const float* from, float* to, const float* gates, const float* w, float b, int64_t channels, int64_t volume, int64_t plane) {
  for (int64_t i = 0; i < plane; i += kWidth) {
    const int count = static_cast<int>(std::min<int64_t>(kWidth, plane - i));
    const vfloat gate = spatial(from + i, volume, channels, w, b, count);
    for (int64_t c = 0; c < channels; ++c) {
      const float* p = from + c * volume + i;
      const vfloat v = (count == kWidth ? simd::load(p) : simd::load_first(p, count)) * simd::max(gate, vfloat{} + gates[c]);
      count == kWidth ? simd::store(to + c * volume + i, v) : simd::store_first(to + c * volume + i, v, count);
    }
  }
}

// Largest of 2 x 2 x 2 voxels of two planes.
void pool_planes(const float* first, const float* second, int64_t h, int64_t w, float* row, float* to) {
  for (int64_t j = 0; j < h / 2; ++j) {
    const int64_t a = 2 * j * w, b = a + w;
#pragma omp simd
    for (int64_t i = 0; i < w; ++i) row[i] = std::max(std::max(first[a + i], first[b + i]), std::max(second[a + i], second[b + i]));
    for (int64_t i = 0; i < w / 2; ++i) to[j * (w / 2) + i] = std::max(row[2 * i], row[2 * i + 1]);
  }
}

Tensor volume_gate(Tensor h, Tensor channel, Tensor w, Tensor b, Tensor y, bool pool) {
  const Sizes s = sizes_of(h);
  Tensor small = torch::stable::new_empty(h, {s.n, s.c, pool ? s.d / 2 : 0, s.h / 2, s.w / 2});
  const int64_t plane = s.h * s.w, volume = s.volume(), pairs = (s.d + 1) / 2, coarse = (s.h / 2) * (s.w / 2);
  const float *gates = in(channel), *weight = in(w), bias = *in(b), *from = in(h);
  float *to = out(y), *pooled = out(small);
#pragma omp parallel num_threads(threads())
  {
    std::vector<float> row(s.w);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.n * pairs; ++task) {
      const int64_t n = task / pairs, z = task % pairs * 2, start = n * s.c * volume + z * plane;
      for (int64_t k = 0; k < std::min<int64_t>(2, s.d - z); ++k)
        gate_plane(from + start + k * plane, to + start + k * plane, gates + n * s.c, weight, bias, s.c, volume, plane);
      for (int64_t c = 0; pool && z + 1 < s.d && c < s.c; ++c) {
        const float* first = to + start + c * volume;
        pool_planes(first, first + plane, s.h, s.w, row.data(), pooled + ((n * s.c + c) * (s.d / 2) + z / 2) * coarse);
      }
    }
  }
  return small;
}

Tensor volume_profile(Tensor h, Tensor channel, Tensor w, Tensor b, Tensor final_w, Tensor final_b) {
  const Sizes s = sizes_of(h);
  Tensor y = torch::stable::new_empty(h, {s.n, s.d});
  const int64_t plane = s.h * s.w, volume = s.volume(), responses = final_w.size(0);
  const float *gates = in(channel), *weight = in(w), bias = *in(b), *from = in(h), *last = in(final_w), *offset = in(final_b);
  float* to = out(y);
#pragma omp parallel for num_threads(threads()) schedule(static)
  for (int64_t task = 0; task < s.n * s.d; ++task) {
    const int64_t start = task / s.d * s.c * volume + task % s.d * plane;
    float best = -std::numeric_limits<float>::infinity();
    std::vector<float> value(s.c * kWidth);
    for (int64_t i = 0; i < plane; i += kWidth) {
      const int count = static_cast<int>(std::min<int64_t>(kWidth, plane - i));
      const vfloat gate = spatial(from + start + i, volume, s.c, weight, bias, count);
      for (int64_t c = 0; c < s.c; ++c) {
        const float* p = from + start + c * volume + i;
        const vfloat v = count == kWidth ? simd::load(p) : simd::load_first(p, count);
        simd::store(&value[c * kWidth], v * simd::max(gate, vfloat{} + gates[task / s.d * s.c + c]));
      }
      for (int64_t r = 0; r < responses; ++r) {
        vfloat v = vfloat{} + offset[r];
        for (int64_t c = 0; c < s.c; ++c) v += last[r * s.c + c] * simd::load(&value[c * kWidth]);
        for (int k = 0; k < count; ++k) best = std::max(best, v[k]);
      }
    }
    to[task] = best;
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("volume_conv", TORCH_BOX(&volume_conv));
  m.impl("volume_up", TORCH_BOX(&volume_up));
  m.impl("volume_gate", TORCH_BOX(&volume_gate));
  m.impl("volume_profile", TORCH_BOX(&volume_profile));
}
