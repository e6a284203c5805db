// Compiled ops for a CPU: forward pass of the parts of a residual squeeze-and-excitation block on volumes. See volume_block.py for the
// formulas.
#include "volume_block.h"

#include <limits>
#include <tuple>

namespace {

using namespace volume;

Tensor volume_conv(
    Tensor x, Tensor scale, Tensor shift, Tensor u, std::optional<Tensor> residual, std::optional<Tensor> mix, bool relu, Tensor y) {
  const Sizes from = sizes_of(x);
  const int64_t outputs = u.size(1) * kOut, inputs = scale.size(1);
  const Sizes s{from.n, outputs, from.d, from.h, from.w};
  const int64_t own = u.size(0) > 1 ? outputs * kPatch * 9 * inputs : 0;
  Tensor sums = new_sums(x, {s.n, s.c, 2});
  convolve(
      Normalised{in(x), from, inputs, in(scale), in(shift)}, Layer{s, in(u), own, companion_of(residual, mix), false, relu, out(y)}, sums);
  return sums;
}

// Coarse planes or rows that position i of the result of a transposed convolution with stride 2 reads, and the tap of each.
struct Taps {
  int count;
  int64_t place[2];
  int tap[2];
  explicit Taps(int64_t i) : count(i % 2 ? 2 : 1), place{i / 2, i / 2 + 1}, tap{i % 2 ? 2 : 1, 0} {}
};

// Compute row (z, y) of the transposed convolution for eight output channels, to[o][2 x] and to[o][2 x + 1], with kernels w [inputs][27][8].
[[gnu::noinline]] void up_row(const float* x, const Sizes& s, const float* w, Taps z, Taps y, int64_t stride, float* to) {
  for (int64_t i = 0; i < s.w; i += kWidth) {
    const int count = lanes(i, s.w), next = lanes(i + 1, s.w);
    for (int first = 0; first < kOut; first += kOutAtOnce) {
      vfloat even[kOutAtOnce] = {}, odd[kOutAtOnce] = {};
      for (int64_t c = 0; c < s.c; ++c)
        for (int a = 0; a < z.count; ++a)
          for (int b = 0; b < y.count; ++b) {
            const float* row = x + ((c * s.d + z.place[a]) * s.h + y.place[b]) * s.w + i;
            const float* k = w + (c * 27 + z.tap[a] * 9 + y.tap[b] * 3) * kOut + first;
            const vfloat here = load(row, count), after = load(row + 1, next);
#pragma GCC unroll 8
            for (int o = 0; o < kOutAtOnce; ++o) {
              even[o] += k[kOut + o] * here;
              odd[o] += k[2 * kOut + o] * here + k[o] * after;
            }
          }
      for (int o = 0; o < kOutAtOnce; ++o) {
        float* const row = to + (first + o) * stride + 2 * i;
        simd::store(row, simd::interleaved<0>(even[o], odd[o]));
        simd::store(row + kWidth, simd::interleaved<kWidth / 2>(even[o], odd[o]));
      }
    }
  }
}

Tensor volume_up(Tensor skip, Tensor x, Tensor w, Tensor y) {
  const Sizes s = sizes_of(skip), small = sizes_of(x);
  Tensor sums = new_sums(skip, {s.n, s.c, 2});
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
  collect(parts, tasks, s.n, s.c * 2, sums);
  return sums;
}

// Multiply one plane of a sample, with all channels, by its gates.
void gate_plane(const float* from, float* to, const float* gates, const float* w, float b, int64_t channels, int64_t volume, int64_t plane) {
  for (int64_t i = 0; i < plane; i += kWidth) {
    const int count = lanes(i, plane);
    const vfloat gate = spatial(from + i, volume, channels, w, b, count);
    for (int64_t c = 0; c < channels; ++c) {
      const float* p = from + c * volume + i;
      const vfloat v = load(p, count) * simd::max(gate, vfloat{} + gates[c]);
      store(to + c * volume + i, v, count);
    }
  }
}

// Compute the maxima over blocks of 2 x 2 x 2 voxels in two planes.
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

std::tuple<Tensor, Tensor> volume_profile(Tensor h, Tensor channel, Tensor w, Tensor b, Tensor final_w, Tensor final_b) {
  const Sizes s = sizes_of(h);
  Tensor y = torch::stable::new_empty(h, {s.n, s.d}), places = torch::stable::new_empty(h, {s.n, s.d}, torch::headeronly::ScalarType::Long);
  const int64_t plane = s.h * s.w, volume = s.volume(), responses = final_w.size(0);
  const float *gates = in(channel), *weight = in(w), bias = *in(b), *from = in(h), *last = in(final_w), *offset = in(final_b);
  float* to = out(y);
  int64_t* place = static_cast<int64_t*>(places.mutable_data_ptr());
#pragma omp parallel for num_threads(threads()) schedule(static)
  for (int64_t task = 0; task < s.n * s.d; ++task) {
    const int64_t start = task / s.d * s.c * volume + task % s.d * plane;
    float best = -std::numeric_limits<float>::infinity();
    std::vector<float> value(s.c * kWidth);
    place[task] = 0;
    for (int64_t i = 0; i < plane; i += kWidth) {
      const int count = lanes(i, plane);
      const vfloat gate = spatial(from + start + i, volume, s.c, weight, bias, count);
      for (int64_t c = 0; c < s.c; ++c)
        simd::store(&value[c * kWidth], load(from + c * volume + start + i, count) * simd::max(gate, vfloat{} + gates[task / s.d * s.c + c]));
      vfloat top = vfloat{} - std::numeric_limits<float>::infinity();
      for (int64_t r = 0; r < responses; ++r) {
        vfloat v = vfloat{} + offset[r];
        for (int64_t c = 0; c < s.c; ++c) v += last[r * s.c + c] * simd::load(&value[c * kWidth]);
        top = simd::max(v, top);
      }
      for (int k = 0; k < count; ++k)
        if (!(top[k] <= best)) best = top[k], place[task] = i + k;
    }
    to[task] = best;
  }
  return {y, places};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("volume_conv", TORCH_BOX(&volume_conv));
  m.impl("volume_up", TORCH_BOX(&volume_up));
  m.impl("volume_gate", TORCH_BOX(&volume_gate));
  m.impl("volume_profile", TORCH_BOX(&volume_profile));
}
