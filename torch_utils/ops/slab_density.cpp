// Compiled op for a CPU: sigma_raw on a grid from maps of two coordinates each, and its gradients. See slab_density.py for the formula.
//
// The exponential of a sum of maps is the product of their exponentials. Therefore t = exp(h) takes two multiplications for each point, and
// softplus(h) = log(1 + t) and sigmoid(h) = t / (1 + t) follow from t. If |h| could be too large for exp in float32, h is computed instead, and
// softplus is applied to h. Vector lanes run along z. Rows along z are padded to complete vectors with values that do not change the sums.
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
using Map = std::optional<Tensor>;

constexpr double kExpRange = 85.0;  // bound of |h| below which exp(h) and all partial products are normal float32 numbers
constexpr int64_t kSerial = 1 << 16;  // number of softplus evaluations below which one thread is faster than several

struct Sizes {
  int64_t x, y, z, j;
  int64_t padded;  // z rounded up to complete vectors
};

// Values of the maps, or their exponentials if `product` is true. The map xy is stored as scalars, the others as padded rows along z.
template <typename T> struct Maps {
  Sizes n;
  bool product;
  std::vector<T> xy;  // [x][y][j]; a map that does not exist is empty
  std::vector<T> xz;  // [x][j][padded]
  std::vector<T> yz;  // [y][j][padded]
};

int threads_for(int64_t points) { return points < kSerial ? 1 : static_cast<int>(torch::stable::get_num_threads()); }

template <typename T> void exponentiate(std::vector<T>& values) {
  constexpr int width = Pack<T>::width;
  size_t i = 0;
  for (; i + width <= values.size(); i += width) Pack<T>::store(&values[i], Pack<T>::exp(Pack<T>::load(&values[i])));
  for (; i < values.size(); ++i) values[i] = std::exp(values[i]);
}

// Add the largest |map| of each hidden unit to `reach`.
template <typename T> void add_reach(const Map& map, int64_t outer, int64_t units, int64_t inner, std::vector<double>& reach) {
  if (!map) return;
  const T* p = static_cast<const T*>(map->const_data_ptr());
  std::vector<T> largest(units, T(0));
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t j = 0; j < units; ++j) {
      const T* row = p + (o * units + j) * inner;
      T m = largest[j];
      for (int64_t i = 0; i < inner; ++i) m = std::max(m, std::abs(row[i]));
      largest[j] = m;
    }
  for (int64_t j = 0; j < units; ++j) reach[j] += largest[j];
}

template <typename T> Maps<T> prepare(const Map& xy, const Map& xz, const Map& yz, Sizes n) {
  Maps<T> maps{n, false, {}, {}, {}};
  std::vector<double> reach(n.j, 0.0);
  add_reach<T>(xy, n.x, n.j, n.y, reach);
  add_reach<T>(xz, n.x, n.j, n.z, reach);
  add_reach<T>(yz, 1, n.j, n.y * n.z, reach);
  maps.product = sizeof(T) == 4 && *std::max_element(reach.begin(), reach.end()) < kExpRange;  // false for NaN
  if (xy) {
    const T* p = static_cast<const T*>(xy->const_data_ptr());
    maps.xy.resize(n.x * n.y * n.j);
    for (int64_t x = 0; x < n.x; ++x)
      for (int64_t j = 0; j < n.j; ++j)
        for (int64_t y = 0; y < n.y; ++y) maps.xy[(x * n.y + y) * n.j + j] = p[(x * n.j + j) * n.y + y];
  }
  if (xz) {
    const T* p = static_cast<const T*>(xz->const_data_ptr());
    maps.xz.assign(n.x * n.j * n.padded, T(0));
    for (int64_t r = 0; r < n.x * n.j; ++r) std::copy_n(p + r * n.z, n.z, &maps.xz[r * n.padded]);
  }
  if (yz) {
    const T* p = static_cast<const T*>(yz->const_data_ptr());
    maps.yz.assign(n.y * n.j * n.padded, T(0));
    for (int64_t j = 0; j < n.j; ++j)
      for (int64_t y = 0; y < n.y; ++y) std::copy_n(p + (j * n.y + y) * n.z, n.z, &maps.yz[(y * n.j + j) * n.padded]);
  }
  if (maps.product) {
    exponentiate(maps.xy);
    exponentiate(maps.xz);
    exponentiate(maps.yz);
  }
  return maps;
}

// Return t = exp(h), a product of values in `Maps`, or h, a sum of such values, for one vector along z.
template <bool product, bool has_xz, bool has_yz, typename T>
inline typename Pack<T>::type combine(T at_xy, const T* xz, const T* yz, int64_t z) {
  using V = typename Pack<T>::type;
  V value = V{} + at_xy;
  if constexpr (has_xz) value = product ? value * Pack<T>::load(xz + z) : value + Pack<T>::load(xz + z);
  if constexpr (has_yz) value = product ? value * Pack<T>::load(yz + z) : value + Pack<T>::load(yz + z);
  return value;
}

template <bool product> inline simd::vfloat softplus_of(simd::vfloat value) {
  return product ? simd::log(value + 1.0f) : simd::softplus(value);
}
template <bool product> inline double softplus_of(double value) { return simd::softplus(value); }
template <bool product> inline simd::vfloat sigmoid_of(simd::vfloat value) {
  return product ? value / (value + 1.0f) : simd::sigmoid(value);
}
template <bool product> inline double sigmoid_of(double value) { return simd::sigmoid(value); }

// Call work<product, has_xz, has_yz>(), with template arguments that describe the maps.
template <typename T, typename Work> void specialise(const Maps<T>& maps, Work&& work) {
  auto by_maps = [&]<bool product>() {
    if (!maps.xz.empty() && !maps.yz.empty()) work.template operator()<product, true, true>();
    else if (!maps.xz.empty()) work.template operator()<product, true, false>();
    else if (!maps.yz.empty()) work.template operator()<product, false, true>();
    else work.template operator()<product, false, false>();
  };
  if (maps.product) by_maps.template operator()<true>();
  else by_maps.template operator()<false>();
}

template <typename T> struct Rows {  // pointers to the values of the maps for one (x, y)
  const T *xy, *xz, *yz;
};

template <typename T> Rows<T> rows_at(const Maps<T>& maps, const std::vector<T>& neutral, int64_t x, int64_t y) {
  const Sizes& n = maps.n;
  return {
      maps.xy.empty() ? neutral.data() : &maps.xy[(x * n.y + y) * n.j],
      maps.xz.empty() ? nullptr : &maps.xz[x * n.j * n.padded],
      maps.yz.empty() ? nullptr : &maps.yz[y * n.j * n.padded],
  };
}

template <bool product, bool has_xz, bool has_yz, typename T>
void forward_row(const Rows<T>& rows, const T* w, T b, const Sizes& n, T* out) {
  using V = typename Pack<T>::type;
  constexpr int width = Pack<T>::width;
  for (int64_t z = 0; z < n.padded; z += width) {
    V total = V{} + b, other = V{};
    int64_t j = 0;
    for (; j + 2 <= n.j; j += 2) {  // two independent sums, whose polynomials the processor can compute at the same time
      const V first = combine<product, has_xz, has_yz, T>(rows.xy[j], rows.xz + j * n.padded, rows.yz + j * n.padded, z);
      const V second = combine<product, has_xz, has_yz, T>(rows.xy[j + 1], rows.xz + (j + 1) * n.padded, rows.yz + (j + 1) * n.padded, z);
      total += w[j] * softplus_of<product>(first);
      other += w[j + 1] * softplus_of<product>(second);
    }
    for (; j < n.j; ++j)
      total += w[j] * softplus_of<product>(combine<product, has_xz, has_yz, T>(rows.xy[j], rows.xz + j * n.padded, rows.yz + j * n.padded, z));
    Pack<T>::store(out + z, total + other);
  }
}

template <typename T> Tensor forward(const Maps<T>& maps, const Tensor& w, const Tensor& b) {
  const Sizes& n = maps.n;
  Tensor sigma = torch::stable::new_empty(w, {n.x, n.y, n.z});
  T* out = static_cast<T*>(sigma.mutable_data_ptr());
  const T *weight = static_cast<const T*>(w.const_data_ptr()), bias = *static_cast<const T*>(b.const_data_ptr());
  const std::vector<T> neutral(n.j, maps.product ? T(1) : T(0));
  specialise(maps, [&]<bool product, bool has_xz, bool has_yz>() {
#pragma omp parallel num_threads(threads_for(n.x * n.y * n.z * n.j))
    {
      std::vector<T> row(n.padded);
#pragma omp for schedule(static)
      for (int64_t line = 0; line < n.x * n.y; ++line) {
        forward_row<product, has_xz, has_yz, T>(rows_at(maps, neutral, line / n.y, line % n.y), weight, bias, n, row.data());
        std::copy_n(row.data(), n.z, out + line * n.z);
      }
    }
  });
  return sigma;
}

// Sums of one thread over its range of x. The gradients of the maps are not yet multiplied by w[j].
template <typename T> struct Sums {
  std::vector<double> w;  // [j]
  std::vector<T> yz;      // [y][j][padded]
};

template <bool product, bool has_xz, bool has_yz, typename T>
void backward_row(const Rows<T>& rows, const T* grad, const Sizes& n, T* grad_xy, T* grad_xz, T* grad_yz, double* grad_w) {
  using V = typename Pack<T>::type;
  constexpr int width = Pack<T>::width;
  for (int64_t j = 0; j < n.j; ++j) {
    V along_z = V{}, weighted = V{};
    for (int64_t z = 0; z < n.padded; z += width) {
      const V value = combine<product, has_xz, has_yz, T>(rows.xy[j], rows.xz + j * n.padded, rows.yz + j * n.padded, z);
      const V g = Pack<T>::load(grad + z);
      const V slope = g * sigmoid_of<product>(value);
      along_z += slope;
      weighted += g * softplus_of<product>(value);
      if constexpr (has_xz) Pack<T>::store(grad_xz + j * n.padded + z, Pack<T>::load(grad_xz + j * n.padded + z) + slope);
      if constexpr (has_yz) Pack<T>::store(grad_yz + j * n.padded + z, Pack<T>::load(grad_yz + j * n.padded + z) + slope);
    }
    grad_xy[j] = Pack<T>::sum(along_z);
    grad_w[j] += Pack<T>::sum(weighted);
  }
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Maps<T>& maps, const Tensor& grad, const Tensor& w) {
  const Sizes& n = maps.n;
  auto like = [&](bool present, int64_t a, int64_t b, int64_t c) {
    return present ? torch::stable::new_empty(w, {a, b, c}) : torch::stable::new_empty(w, {0});
  };
  Tensor grad_w = torch::stable::new_empty(w, {n.j});
  Tensor grad_xy = like(!maps.xy.empty(), n.x, n.j, n.y), grad_xz = like(!maps.xz.empty(), n.x, n.j, n.z);
  Tensor grad_yz = like(!maps.yz.empty(), n.j, n.y, n.z);
  const T *g = static_cast<const T*>(grad.const_data_ptr()), *weight = static_cast<const T*>(w.const_data_ptr());
  T* out_xy = static_cast<T*>(grad_xy.mutable_data_ptr());
  T* out_xz = static_cast<T*>(grad_xz.mutable_data_ptr());
  const std::vector<T> neutral(n.j, maps.product ? T(1) : T(0));
  const int count = threads_for(n.x * n.y * n.z * n.j);
  std::vector<Sums<T>> sums(count);
  specialise(maps, [&]<bool product, bool has_xz, bool has_yz>() {
#pragma omp parallel for schedule(static, 1) num_threads(count)
    for (int part = 0; part < count; ++part) {  // a fixed range of x for each part, so that sums do not depend on timing
      Sums<T>& own = sums[part];
      own.w.assign(n.j, 0.0);
      own.yz.assign(maps.yz.size(), T(0));
      std::vector<T> row(n.padded, T(0)), per_xy(n.y * n.j), per_xz(n.j * n.padded);
      for (int64_t x = n.x * part / count; x < n.x * (part + 1) / count; ++x) {
        std::fill(per_xz.begin(), per_xz.end(), T(0));
        for (int64_t y = 0; y < n.y; ++y) {
          std::copy_n(g + (x * n.y + y) * n.z, n.z, row.data());
          T* yz = has_yz ? &own.yz[y * n.j * n.padded] : nullptr;
          backward_row<product, has_xz, has_yz, T>(
              rows_at(maps, neutral, x, y), row.data(), n, &per_xy[y * n.j], per_xz.data(), yz, own.w.data());
        }
        for (int64_t j = 0; j < n.j; ++j) {
          if (!maps.xy.empty())
            for (int64_t y = 0; y < n.y; ++y) out_xy[(x * n.j + j) * n.y + y] = weight[j] * per_xy[y * n.j + j];
          if (has_xz)
            for (int64_t z = 0; z < n.z; ++z) out_xz[(x * n.j + j) * n.z + z] = weight[j] * per_xz[j * n.padded + z];
        }
      }
    }
  });
  T* out_w = static_cast<T*>(grad_w.mutable_data_ptr());
  T* out_yz = static_cast<T*>(grad_yz.mutable_data_ptr());
  for (int64_t j = 0; j < n.j; ++j) {
    double total = 0;
    for (const Sums<T>& own : sums) total += own.w[j];
    out_w[j] = static_cast<T>(total);
  }
  if (!maps.yz.empty()) {
#pragma omp parallel for schedule(static) num_threads(count)
    for (int64_t j = 0; j < n.j; ++j)
      for (int64_t y = 0; y < n.y; ++y)
        for (int64_t z = 0; z < n.z; ++z) {
          T total = 0;
          for (const Sums<T>& own : sums) total += own.yz[(y * n.j + j) * n.padded + z];
          out_yz[(j * n.y + y) * n.z + z] = weight[j] * total;
        }
  }
  return {grad_w, grad_xy, grad_xz, grad_yz};
}

bool is_double(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Double; }

Sizes sizes(int64_t x, int64_t y, int64_t z, int64_t j, bool doubles) {
  const int64_t width = doubles ? Pack<double>::width : Pack<float>::width;
  return {x, y, z, j, (z + width - 1) / width * width};
}

Tensor slab_density(Map xy, Map xz, Map yz, Tensor w, Tensor b, std::vector<int64_t> shape) {
  const Sizes n = sizes(shape[0], shape[1], shape[2], w.size(0), is_double(w));
  return is_double(w) ? forward(prepare<double>(xy, xz, yz, n), w, b) : forward(prepare<float>(xy, xz, yz, n), w, b);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slab_density_backward(Tensor grad, Map xy, Map xz, Map yz, Tensor w) {
  const Sizes n = sizes(grad.size(0), grad.size(1), grad.size(2), w.size(0), is_double(w));
  return is_double(w) ? backward(prepare<double>(xy, xz, yz, n), grad, w) : backward(prepare<float>(xy, xz, yz, n), grad, w);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("slab_density", TORCH_BOX(&slab_density));
  m.impl("slab_density_backward", TORCH_BOX(&slab_density_backward));
}
