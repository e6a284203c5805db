// Compiled op bias_act for a CPU: clip(gain * act(x + b), -clamp, clamp) and, for piecewise linear activations, its derivatives. The formulas
// are in bias_act.py.
//
// In memory, a dense tensor has the axes [outer][B][inner], where B is the axis of the bias. The `inner` elements of a run have the same bias.
// If inner is 1 (channels-last images, rows of features), consecutive elements have consecutive entries of the bias. Sums are computed for
// each run, or by each thread, and are added in a fixed order, so that results are reproducible.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "simd.h"

namespace {

using simd::Pack;
using torch::stable::Tensor;

constexpr int64_t kSerial = 1 << 15;  // number of elements below which one thread is faster than several
constexpr int64_t kBlock = 4096;      // number of elements that are summed in the tensor's dtype before the sum is added to a double

enum Act { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };

struct View {
  int64_t outer, b, inner;
};

View view(const Tensor& x, int64_t dim) {
  const int64_t b = x.size(dim), inner = b == 1 ? x.numel() : x.stride(dim);
  return {x.numel() / (b * inner), b, inner};
}

int threads_for(int64_t elements) { return elements < kSerial ? 1 : static_cast<int>(torch::stable::get_num_threads()); }

template <typename T> struct Settings {
  T alpha, gain, clamp;
};

template <int act, typename T, typename V> inline V activate(V z, T alpha) {
  if constexpr (act == kRelu) return z < T(0) ? V{} : z;  // NaN remains NaN
  if constexpr (act == kLrelu) return z > T(0) ? z : z * alpha;
  if constexpr (act == kTanh) return T(2) * simd::sigmoid(T(2) * z) - T(1);
  if constexpr (act == kSigmoid) return simd::sigmoid(z);
  if constexpr (act == kElu) return z > T(0) ? z : Pack<T>::exp(z) - T(1);
  if constexpr (act == kSelu)
    return T(1.0507009873554805) * (z > T(0) ? z : T(1.6732632423543772) * Pack<T>::exp(z) - T(1.6732632423543772));
  if constexpr (act == kSoftplus) return simd::softplus(z);
  if constexpr (act == kSwish) return z * simd::sigmoid(z);
  return z;
}

// Return the slope of a piecewise linear activation, which follows from its result `out` (see bias_act.py).
template <int act, typename T, typename V> inline V slope(V out, const Settings<T>& s) {
  V value = V{} + s.gain;
  if constexpr (act == kRelu) value = out > T(0) ? value : V{};
  if constexpr (act == kLrelu) value = out > T(0) ? value : value * s.alpha;
  if (s.clamp >= 0) value = (out >= s.clamp) | (out <= -s.clamp) ? V{} : value;
  return value;
}

// Call work(offset, count) for each complete vector, and then for the remaining elements.
template <typename T, typename Work> inline void vectors(int64_t n, Work&& work) {
  constexpr int width = Pack<T>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) work(i, width);
  if (i < n) work(i, static_cast<int>(n - i));
}
template <typename T> inline typename Pack<T>::type load(const T* p, int count) {
  return count == Pack<T>::width ? Pack<T>::load(p) : Pack<T>::load_first(p, count);
}
template <typename T> inline void store(T* p, typename Pack<T>::type v, int count) {
  if (count == Pack<T>::width) Pack<T>::store(p, v);
  else Pack<T>::store_first(p, v, count);
}

// Compute out = function(x + b, other) for each element. b and other may be null.
template <typename T, typename Function> void apply(const T* x, const T* b, const T* other, T* out, View v, Function&& function) {
  using V = typename Pack<T>::type;
  const bool along = v.inner == 1 && b;  // consecutive elements have consecutive entries of the bias
  const int64_t run = along ? v.b : v.inner == 1 ? v.b * v.outer : v.inner;
  const int64_t whole = v.outer * v.b * v.inner / run;
  const int64_t piece = along ? run : std::min<int64_t>(run, kBlock), pieces = (run + piece - 1) / piece;
#pragma omp parallel for schedule(static) num_threads(threads_for(whole * run))
  for (int64_t p = 0; p < whole * pieces; ++p) {
    const int64_t start = p / pieces * run + p % pieces * piece, n = std::min(piece, run - p % pieces * piece);
    const V shared = V{} + (b && !along ? b[p / pieces % v.b] : T(0));
    vectors<T>(n, [&](int64_t i, int count) {
      V z = load(x + start + i, count);
      z += along ? load(b + i, count) : shared;
      store(out + start + i, function(z, other ? load(other + start + i, count) : V{}), count);
    });
  }
}

// Call work<act>(), with the number of the activation as the template argument.
template <int last, typename Work> void specialise(int64_t act, Work&& work) {
  auto at = [&]<int a>(auto& self) {
    if (act == a) work.template operator()<a>();
    else if constexpr (a < last) self.template operator()<a + 1>(self);
  };
  at.template operator()<0>(at);
}

template <typename T> const T* pointer(const std::optional<Tensor>& t) { return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr; }
template <typename T> const T* pointer(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <typename T> Settings<T> settings(double alpha, double gain, double clamp) {
  return {static_cast<T>(alpha), static_cast<T>(gain), static_cast<T>(clamp)};
}
bool is_double(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Double; }

template <typename T> Tensor forward(const Tensor& x, const std::optional<Tensor>& b, int64_t dim, int64_t act, Settings<T> s) {
  using V = typename Pack<T>::type;
  Tensor y = torch::stable::empty_like(x);
  specialise<kSwish>(act, [&]<int a>() {
    apply<T>(pointer<T>(x), pointer<T>(b), nullptr, static_cast<T*>(y.mutable_data_ptr()), view(x, dim), [&](V z, V) {
      V value = activate<a, T, V>(z, s.alpha) * s.gain;
      if (s.clamp >= 0) {
        value = value > s.clamp ? V{} + s.clamp : value;
        value = value < -s.clamp ? V{} - s.clamp : value;
      }
      return value;
    });
  });
  return y;
}

template <typename T>
Tensor with_slope(const Tensor& x, const std::optional<Tensor>& b, const Tensor& out, int64_t dim, int64_t act, Settings<T> s) {
  using V = typename Pack<T>::type;
  Tensor y = torch::stable::empty_like(x);
  specialise<kLrelu>(act, [&]<int a>() {
    apply<T>(pointer<T>(x), pointer<T>(b), pointer<T>(out), static_cast<T*>(y.mutable_data_ptr()), view(x, dim),
             [&](V z, V o) { return z * slope<a, T, V>(o, s); });
  });
  return y;
}

// Compute the gradient of a run of n elements with the same bias. Returns the contribution of the run to the gradient of the bias.
template <int act, typename T> double backward_run(const T* grad, const T* out, T* result, int64_t n, const Settings<T>& s) {
  using V = typename Pack<T>::type;
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    V sum = V{};
    vectors<T>(std::min(kBlock, n - start), [&](int64_t i, int count) {
      const V value = load(grad + start + i, count) * slope<act, T, V>(load(out + start + i, count), s);
      store(result + start + i, value, count);
      sum += value;
    });
    total += Pack<T>::sum(sum);
  }
  return total;
}

// Compute the gradient of rows of B elements, and add the sum of the rows to total [B].
template <int act, typename T>
void backward_rows(const T* grad, const T* out, T* result, int64_t rows, int64_t b, const Settings<T>& s, double* total) {
  using V = typename Pack<T>::type;
  std::vector<T> part(b + Pack<T>::width, T(0));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = row * b;
    vectors<T>(b, [&](int64_t i, int count) {
      const V value = load(grad + start + i, count) * slope<act, T, V>(load(out + start + i, count), s);
      store(result + start + i, value, count);
      Pack<T>::store(&part[i], Pack<T>::load(&part[i]) + value);
    });
    if (row % 64 == 63 || row + 1 == rows)
      for (int64_t i = 0; i < b; ++i) {
        total[i] += part[i];
        part[i] = T(0);
      }
  }
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& out, int64_t dim, int64_t act, Settings<T> s) {
  const View v = view(grad, dim);
  Tensor result = torch::stable::empty_like(grad), bias = torch::stable::new_empty(grad, {v.b});
  const T *g = pointer<T>(grad), *o = pointer<T>(out);
  T *r = static_cast<T*>(result.mutable_data_ptr()), *grad_b = static_cast<T*>(bias.mutable_data_ptr());
  const int threads = threads_for(v.outer * v.b * v.inner);
  const int64_t parts = v.inner == 1 ? std::min<int64_t>(threads, v.outer) : v.outer;  // number of parts, each with B sums
  std::vector<double> sums(parts * v.b, 0.0);
  specialise<kLrelu>(act, [&]<int a>() {
#pragma omp parallel num_threads(threads)
    if (v.inner == 1) {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t first = v.outer * p / parts, last = v.outer * (p + 1) / parts;
        backward_rows<a, T>(g + first * v.b, o + first * v.b, r + first * v.b, last - first, v.b, s, &sums[p * v.b]);
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < parts * v.b; ++p)
        sums[p] = backward_run<a, T>(g + p * v.inner, o + p * v.inner, r + p * v.inner, v.inner, s);
    }
  });
  for (int64_t i = 0; i < v.b; ++i) {
    double total = 0;
    for (int64_t p = 0; p < parts; ++p) total += sums[p * v.b + i];
    grad_b[i] = static_cast<T>(total);
  }
  return {result, bias};
}

Tensor bias_act(Tensor x, std::optional<Tensor> b, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
  return is_double(x) ? forward(x, b, dim, act, settings<double>(alpha, gain, clamp))
                      : forward(x, b, dim, act, settings<float>(alpha, gain, clamp));
}

Tensor bias_act_slope(Tensor x, std::optional<Tensor> b, Tensor out, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
  return is_double(x) ? with_slope(x, b, out, dim, act, settings<double>(alpha, gain, clamp))
                      : with_slope(x, b, out, dim, act, settings<float>(alpha, gain, clamp));
}

std::tuple<Tensor, Tensor> bias_act_backward(
    Tensor grad, Tensor out, int64_t dim, int64_t act, double alpha, double gain, double clamp, bool with_bias) {
  if (!with_bias) return {bias_act_slope(grad, std::nullopt, out, dim, act, alpha, gain, clamp), torch::stable::new_empty(grad, {0})};
  return is_double(grad) ? backward(grad, out, dim, act, settings<double>(alpha, gain, clamp))
                         : backward(grad, out, dim, act, settings<float>(alpha, gain, clamp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward));
  m.impl("bias_act_slope", TORCH_BOX(&bias_act_slope));
}
