// Compiled ops for a CPU: backward pass of the parts of a residual squeeze-and-excitation block on volumes. See volume_block.py for the
// formulas.
#include "tile_products.h"
#include "volume_block.h"

namespace {

using namespace volume;

Tensor volume_conv_gradient(Tensor g, Tensor h, Tensor factors, Tensor u, Tensor other, std::optional<Tensor> mix, Tensor y) {
  const Sizes from = sizes_of(g), s{from.n, u.size(1) * kOut, from.d, from.h, from.w};
  Tensor sums = new_sums(g, {s.n, s.c, 2});
  convolve(Rectified{in(g), in(h), from, in(factors)}, Layer{s, in(u), 0, companion_of(other, mix), true, false, out(y)}, sums);
  return sums;
}

// Incoming gradients: of the volume, of its maxima over 2^3 voxels, or both.
struct Arrived {
  const float *whole, *pooled;
};

// Two rows in each of two planes of a sample: their spatial gates, gated values, gradients, and gradients of the spatial gates.
struct Quad {
  int64_t w, length;
  std::vector<float> gate, value, grad, slope;
  explicit Quad(int64_t width) : w(width), length(width + kWidth), gate(4 * length), value(4 * length), grad(4 * length), slope(4 * length) {}

  // Add the gradient of each maximum to the gradient of the first voxel with the maximal value, in the order of z, y, x.
  void route(const float* pooled) {
    for (int64_t i = 0; i < w / 2; ++i) {
      int64_t best = 2 * i;
      for (int row = 0; row < 4; ++row)
        for (int64_t at = row * length + 2 * i, k = 0; k < 2; ++k)
          if (value[at + k] > value[best]) best = at + k;
      grad[best] += pooled[i];
    }
  }
};

Tensor volume_gate_gradient(
    Tensor h, Tensor channel, Tensor w, Tensor b, std::optional<Tensor> whole, std::optional<Tensor> pooled, Tensor y) {
  const Sizes s = sizes_of(h);
  const int64_t plane = s.h * s.w, volume = s.volume(), tasks = s.n * ((s.d + 1) / 2), coarse = (s.d / 2) * (s.h / 2) * (s.w / 2);
  const float *gates = in(channel), *weight = in(w), bias = *in(b), *from = in(h);
  float* to = out(y);
  const int64_t values = 2 * s.c + 1;  // gradients of the channel gates, of w and of b
  Tensor sums = new_sums(h, {s.n, values});
  std::vector<double> parts(tasks * values, 0.0);
#pragma omp parallel num_threads(threads())
  {
    Quad q(s.w);
    std::vector<float> found(values * kWidth);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t n = task / ((s.d + 1) / 2), z = task % ((s.d + 1) / 2) * 2;
      std::fill(found.begin(), found.end(), 0.0f);
      for (int64_t j = 0; j < s.h; j += 2) {
        const bool deep = z + 1 < s.d, high = j + 1 < s.h, inside[4] = {true, high, deep, deep && high};
        const int64_t start = n * s.c * volume + z * plane + j * s.w, row_at[4] = {start, start + s.w, start + plane, start + plane + s.w};
        for (int r = 0; r < 4; ++r)
          for (int64_t i = 0; inside[r] && i < s.w; i += kWidth) {
            simd::store(&q.gate[r * q.length + i], spatial(from + row_at[r] + i, volume, s.c, weight, bias, lanes(i, s.w)));
            simd::store(&q.slope[r * q.length + i], vfloat{});
          }
        for (int64_t c = 0; c < s.c; ++c) {
          const float gate = gates[n * s.c + c];
          vfloat mine{};  // gradient of this channel's gate
          for (int r = 0; r < 4; ++r)
            for (int64_t i = 0; inside[r] && i < s.w; i += kWidth) {
              const int count = lanes(i, s.w);
              const int64_t at = row_at[r] + c * volume + i, own = r * q.length + i;
              if (pooled) simd::store(&q.value[own], load(from + at, count) * simd::max(simd::load(&q.gate[own]), vfloat{} + gate));
              simd::store(&q.grad[own], whole ? load(in(*whole) + at, count) : vfloat{});
            }
          if (pooled && deep && high)
            q.route(in(*pooled) + (n * s.c + c) * coarse + (z / 2 * (s.h / 2) + j / 2) * (s.w / 2));
          for (int r = 0; r < 4; ++r)
            for (int64_t i = 0; inside[r] && i < s.w; i += kWidth) {
              const int count = lanes(i, s.w);
              const int64_t at = row_at[r] + c * volume + i, own = r * q.length + i;
              const vfloat grad = simd::load(&q.grad[own]), s_gate = simd::load(&q.gate[own]), product = grad * load(from + at, count);
              const auto here = s_gate > vfloat{} + gate;
              simd::store(&q.slope[own], simd::load(&q.slope[own]) + (here ? product : vfloat{}));
              mine += here ? vfloat{} : product;
              store(to + at, grad * simd::max(s_gate, vfloat{} + gate), count);
            }
          simd::store(&found[c * kWidth], simd::load(&found[c * kWidth]) + mine);
        }
        for (int r = 0; r < 4; ++r)
          for (int64_t i = 0; inside[r] && i < s.w; i += kWidth) {
            const int count = lanes(i, s.w);
            const vfloat gate = simd::load(&q.gate[r * q.length + i]), slope = simd::load(&q.slope[r * q.length + i]) * gate * (1.0f - gate);
            for (int64_t c = 0; c < s.c; ++c) {
              const int64_t at = row_at[r] + c * volume + i;
              float* reached = &found[(s.c + c) * kWidth];
              store(to + at, load(to + at, count) + slope * weight[c], count);
              simd::store(reached, simd::load(reached) + slope * load(from + at, count));
            }
            float* reached = &found[2 * s.c * kWidth];
            simd::store(reached, simd::load(reached) + slope);
          }
      }
      for (int64_t k = 0; k < values; ++k) parts[task * values + k] = simd::sum(simd::load(&found[k * kWidth]));
    }
  }
  collect(parts, tasks, s.n, values, sums);
  return sums;
}

// Compute the gradient of a block with respect to its residual r: g + f0 where h > 0 (elsewhere 0), plus f1 inner + f2 r + f3. With `mix`, r is
// a single channel, multiplied by a factor and shifted by an offset for each channel, and the result is the gradient of the single channel.
void volume_join(Tensor g, Tensor h, Tensor inner, Tensor r, Tensor factors, std::optional<Tensor> mix, Tensor y) {
  const Sizes s = sizes_of(h);
  const int64_t volume = s.volume(), vectors = (volume + kWidth - 1) / kWidth, outputs = mix ? 1 : s.c;
  const float *first = in(g), *value = in(h), *second = in(inner), *residual = in(r), *factor = in(factors), *mixing = mix ? in(*mix) : nullptr;
  float* to = out(y);
#pragma omp parallel for num_threads(threads()) schedule(static)
  for (int64_t task = 0; task < s.n * outputs * vectors; ++task) {
    const int64_t n = task / (outputs * vectors), i = task % vectors * kWidth, own = task / vectors % outputs;
    const int count = lanes(i, volume);
    const vfloat x = load(residual + (n * outputs + own) * volume + i, count);
    vfloat sum{};
    for (int64_t c = own; c < (mix ? s.c : own + 1); ++c) {
      const int64_t at = (n * s.c + c) * volume + i;
      const float* f = factor + (n * s.c + c) * 4;
      const vfloat through = load(value + at, count) > 0.0f ? load(first + at, count) + f[0] : vfloat{};
      const vfloat from = mix ? x * mixing[2 * c] + mixing[2 * c + 1] : x;
      const vfloat all = through + load(second + at, count) * f[1] + from * f[2] + f[3];
      sum += mix ? all * mixing[2 * c] : all;
    }
    store(to + (n * outputs + own) * volume + i, sum, count);
  }
}

// Division of the gradient and the input of a convolution into blocks of planes and rows with about kBrick voxels. Two zeros follow each row,
// so that all rows of a plane can be processed as one long row for the taps along y and x.
struct Brick {
  static constexpr int64_t kBrick = 1024;
  Sizes s;
  int64_t pitch, rows, planes, deep, high, units, length;
  explicit Brick(const Sizes& of) : s(of), pitch(s.w + 2) {
    high = blocks(s.h, std::max<int64_t>(1, kBrick / pitch)), rows = blocks(s.h, high);
    deep = blocks(s.d, std::max<int64_t>(1, kBrick / (pitch * rows))), planes = blocks(s.d, deep);
    units = s.n * deep * high, length = blocks(rows * pitch, kWidth) * kWidth;
  }
  static int64_t blocks(int64_t whole, int64_t each) { return (whole + each - 1) / each; }
  int64_t padded() const { return length + 3 * pitch; }  // number of elements of a plane of the input
  Task at(int64_t unit) const { return {unit / (deep * high), unit / high % deep * planes, unit % high * rows}; }
  // Read one channel with `border` additional voxels on all sides, which are 0 outside the volume. A plane takes `size` elements.
  template <typename Source> void read(const Source& source, Task at, int64_t c, int64_t border, int64_t size, float* to) const {
    std::fill_n(to, (planes + 2 * border) * size, 0.0f);
    for (int64_t z = std::max<int64_t>(0, at.z - border); z < std::min(s.d, at.z + planes + border); ++z) {
      const auto plane = source.plane(at.n, c, z);
      for (int64_t y = std::max<int64_t>(0, at.y - border); y < std::min(s.h, at.y + rows + border); ++y) {
        float* row = to + (z - at.z + border) * size + (y - at.y + border) * pitch + border;
        for (int64_t i = 0; i < s.w; i += kWidth) store(row + i, plane(y * s.w + i, lanes(i, s.w)), lanes(i, s.w));
      }
    }
  }
};

// Add the products of eight channels of a gradient with one channel of the input to sums [output][stride], for the three taps along x.
[[gnu::noinline]] void correlate(const Brick& b, const float* grad, const float* input, int64_t stride, double* sums) {
  for (int first = 0; first < kOut; first += kOutAtOnce, grad += kOutAtOnce * b.planes * b.length, sums += kOutAtOnce * stride) {
    vfloat acc[kOutAtOnce][3] = {};
    for (int64_t p = 0; p < b.planes; ++p)
      for (int64_t i = 0; i < b.length; i += kWidth) {
        const float *g = grad + p * b.length + i, *x = input + p * b.padded() + i;
        const vfloat left = simd::load(x), here = simd::load(x + 1), right = simd::load(x + 2);
#pragma GCC unroll 8
        for (int o = 0; o < kOutAtOnce; ++o) {
          const vfloat v = simd::load(g + o * b.planes * b.length);
          acc[o][0] += v * left, acc[o][1] += v * here, acc[o][2] += v * right;
        }
      }
    vfloat found[kOutAtOnce][3];
#pragma GCC unroll 8
    for (int o = 0; o < kOutAtOnce; ++o)
#pragma GCC unroll 3
      for (int dx = 0; dx < 3; ++dx) found[o][dx] = acc[o][dx];  // in a separate array, so that the sums stay in registers
    for (int o = 0; o < kOutAtOnce; ++o)
      for (int dx = 0; dx < 3; ++dx) sums[o * stride + dx] += simd::sum(found[o][dx]);
  }
}

// Compute the gradient of kernels. Volumes are divided into parts, so that there are about kTasks pairs of a part and a block of eight outputs.
// The sums of the parts are added in order.
Tensor volume_conv_weight(Tensor g, Tensor h, Tensor factors, Tensor x, Tensor scale, Tensor shift) {
  constexpr int64_t kTasks = 32;
  const Sizes s = sizes_of(h);
  const int64_t inputs = scale.size(1), blocks = s.c / kOut, parts = std::max<int64_t>(1, kTasks / blocks), values = s.c * inputs * 27;
  const Brick brick(s);
  const Rectified gradient{in(g), in(h), s, in(factors)};
  const Normalised input{in(x), sizes_of(x), inputs, in(scale), in(shift)};
  const int64_t inside = brick.planes * brick.length;
  std::vector<double> found(parts * values, 0.0);
#pragma omp parallel num_threads(threads())
  {
    tile::Array<float> memory(kOut * inside + (brick.planes + 2) * brick.padded());
    float *const grads = memory.data(), *const read = grads + kOut * inside;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < parts * blocks; ++task) {
      const int64_t part = task / blocks, output = task % blocks * kOut;
      for (int64_t unit = part * brick.units / parts; unit < (part + 1) * brick.units / parts; ++unit) {
        const Task at = brick.at(unit);
        for (int o = 0; o < kOut; ++o) brick.read(gradient, at, output + o, 0, brick.length, grads + o * inside);
        for (int64_t c = 0; c < inputs; ++c) {
          brick.read(input, at, c, 1, brick.padded(), read);
          double* sums = &found[part * values + (output * inputs + c) * 27];
          for (int tap = 0; tap < 9; ++tap)
            correlate(brick, grads, read + tap / 3 * brick.padded() + tap % 3 * brick.pitch, inputs * 27, sums + 3 * tap);
        }
      }
    }
  }
  Tensor sums = new_sums(g, {1, s.c, inputs, 3, 3, 3});
  collect(found, parts, 1, values, sums);
  return sums;
}

// Return the first index i in 0..out - 1 whose nearest input, floor(i * in / out), is `source` or a later one.
int64_t first_reader(int64_t source, int64_t in, int64_t out) { return (source * out + in - 1) / in; }

// Compute the gradient of plane z of the result of the transposed convolution, before it is resampled: rows [channel][y][even columns, odd
// columns], where the odd columns follow a 0.
void fold_plane(const float* grad, const Sizes& s, const Sizes& small, const std::vector<Run>& runs, int64_t z, int64_t length, float* rows) {
  const int64_t deep = 2 * small.d - 1, high = 2 * small.h - 1, wide = 2 * small.w - 1;
  std::vector<float> sum(s.w), fine(wide + 1);
  for (int64_t c = 0; c < s.c; ++c)
    for (int64_t y = 0; y < high; ++y, rows += 2 * length) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(fine.begin(), fine.end(), 0.0f);
      for (int64_t k = first_reader(z, deep, s.d); k < first_reader(z + 1, deep, s.d); ++k)
        for (int64_t j = first_reader(y, high, s.h); j < first_reader(y + 1, high, s.h); ++j) {
          const float* row = grad + ((c * s.d + k) * s.h + j) * s.w;
#pragma omp simd
          for (int64_t i = 0; i < s.w; ++i) sum[i] += row[i];
        }
      for (const Run& run : runs) {
        float* to = fine.data() + run.source;
        const float* from = sum.data() + run.first;
#pragma omp simd
        for (int64_t i = 0; i < run.count; ++i) to[i] += from[i];
      }
      for (int64_t i = 0; i < small.w; ++i) rows[i] = fine[2 * i], rows[length + 1 + i] = fine[2 * i + 1];
    }
}

void volume_up_gradient(Tensor grad, Tensor u, Tensor y) {
  const Sizes s = sizes_of(grad), small = sizes_of(y);
  const int64_t high = 2 * small.h - 1, length = (small.w + kWidth - 1) / kWidth * kWidth + kWidth, plane = s.c * high * 2 * length;
  const std::vector<Run> runs = nearest_runs(2 * small.w - 1, s.w);
  const float *from = in(grad), *kernels = in(u);
  float* to = out(y);
#pragma omp parallel num_threads(threads())
  {
    std::vector<float> rows(3 * plane);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < small.n * small.d; ++task) {
      const int64_t n = task / small.d, z = task % small.d;
      const int first_tap = z == 0, last_tap = z == small.d - 1 ? 1 : 2;  // fine plane 2 z - 1 + tap
      for (int tz = first_tap; tz <= last_tap; ++tz)
        fold_plane(from + n * s.c * s.volume(), s, small, runs, 2 * z - 1 + tz, length, rows.data() + tz * plane);
      for (int64_t output = 0; output < small.c; output += kOut)
        for (int64_t j = 0; j < small.h; ++j)
          for (int64_t i = 0; i < small.w; i += kWidth) {
            vfloat acc[kOut] = {};
            for (int tz = first_tap; tz <= last_tap; ++tz)
              for (int ty = j == 0; ty <= (j == small.h - 1 ? 1 : 2); ++ty) {
                const float* row = rows.data() + tz * plane + (2 * j - 1 + ty) * 2 * length + i;
                const float* k = kernels + output * s.c * 27 + (tz * 9 + ty * 3) * kOut;
                for (int64_t c = 0; c < s.c; ++c, row += high * 2 * length, k += 27 * kOut) {
                  const vfloat before = simd::load(row + length), even = simd::load(row), odd = simd::load(row + length + 1);
#pragma GCC unroll 8
                  for (int o = 0; o < kOut; ++o) acc[o] += k[o] * before + k[kOut + o] * even + k[2 * kOut + o] * odd;
                }
              }
            for (int o = 0; o < kOut; ++o) {
              const int64_t at = (((n * small.c + output + o) * small.d + z) * small.h + j) * small.w + i;
              store(to + at, acc[o], lanes(i, small.w));
            }
          }
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("volume_conv_gradient", TORCH_BOX(&volume_conv_gradient));
  m.impl("volume_gate_gradient", TORCH_BOX(&volume_gate_gradient));
  m.impl("volume_join", TORCH_BOX(&volume_join));
  m.impl("volume_conv_weight", TORCH_BOX(&volume_conv_weight));
  m.impl("volume_up_gradient", TORCH_BOX(&volume_up_gradient));
}
