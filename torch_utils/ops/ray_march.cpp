// Compiled ops for a CPU: compositing weights of ray marching with their gradients, and depths of the importance pass. See ray_march.py for
// the formulas.
//
// Each vector lane processes one ray. The samples of a group of rays are stored as [sample][ray], sorted by depth, composited, and written back
// in their original order. They are sorted by a sorting network, which has the same exchanges for every ray and therefore no branches.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "simd.h"

namespace {

using simd::Pack;
using torch::stable::Tensor;

constexpr int64_t kSerial = 1 << 14;  // number of samples below which one thread is faster than several

// Return softplus(h) with a small relative error (4e-7), also for small results: the depth of a nearly empty pixel is a quotient of such
// values.
inline simd::vfloat softplus(simd::vfloat h) {
  const simd::vfloat t = simd::exp(h > 0.0f ? -h : h), u = t + 1.0f;
  return simd::max(h, simd::vfloat{}) + (simd::log(u) + (t - (u - 1.0f)));  // the last term corrects the rounding of 1 + t
}
inline double softplus(double h) { return simd::softplus(h); }

template <typename T> const T* values(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <typename T> T* writable(const Tensor& t) { return static_cast<T*>(const_cast<void*>(t.const_data_ptr())); }

// Values [samples][lanes] of a group of rays.
template <typename T> struct Lanes {
  static constexpr int width = Pack<T>::width;
  std::vector<T> data;
  explicit Lanes(int64_t samples) : data(samples * width) {}
  typename Pack<T>::type get(int64_t s) const { return Pack<T>::load(&data[s * width]); }
  void set(int64_t s, typename Pack<T>::type v) { Pack<T>::store(&data[s * width], v); }
  T& at(int64_t s, int lane) { return data[s * width + lane]; }

  // Read rows [rays][samples]. The remaining lanes repeat the last ray.
  void read(const T* rows, int64_t samples, int rays) {
    for (int r = 0; r < width; ++r) {
      const T* row = rows + std::min(r, rays - 1) * samples;
      for (int64_t s = 0; s < samples; ++s) data[s * width + r] = row[s];
    }
  }
};

// One group of rays: its samples, sorted by depth, and intermediate values.
template <typename T> struct Group {
  using V = typename Pack<T>::type;
  using I = typename Pack<T>::index;
  static constexpr int width = Pack<T>::width;
  int64_t samples;
  Lanes<T> densities, depths;      // sorted
  std::vector<I> order;            // [sample]: original position of a sorted sample
  Lanes<T> alpha, through, raw;    // [interval]: alpha_k, prod_{j<k} (1 - alpha_j + 1e-10), densities in original order
  std::vector<std::pair<int32_t, int32_t>> exchanges;

  explicit Group(int64_t s) : samples(s), densities(s), depths(s), order(s), alpha(s), through(s), raw(s) { plan(); }

  // Compute the exchanges of Batcher's merge exchange sort (Knuth, vol. 3, 5.2.2M) for any number of samples.
  void plan() {
    int64_t top = 1;
    while (2 * top < samples) top *= 2;
    for (int64_t p = top; p > 0; p /= 2) {
      int64_t q = top, r = 0, d = p;
      while (true) {
        for (int64_t i = 0; i + d < samples; ++i)
          if ((i & p) == r) exchanges.emplace_back(static_cast<int32_t>(i), static_cast<int32_t>(i + d));
        if (q == p) break;
        d = q - p;
        q /= 2;
        r = p;
      }
    }
  }

  void read(const T* all_densities, const T* all_depths, int rays, bool sort) {
    depths.read(all_depths, samples, rays);
    if (!sort) {
      densities.read(all_densities, samples, rays);
      return;
    }
    raw.read(all_densities, samples, rays);
    for (int64_t s = 0; s < samples; ++s) order[s] = I{} + static_cast<int32_t>(s);
    for (const auto& [i, k] : exchanges) {
      const V a = depths.get(i), b = depths.get(k);
      const I first = order[i], second = order[k];
      const auto swap = (a > b) | ((a == b) & (first > second));  // samples of equal depth are not reordered
      depths.set(i, swap ? b : a);
      depths.set(k, swap ? a : b);
      order[i] = swap ? second : first;
      order[k] = swap ? first : second;
    }
    for (int64_t s = 0; s < samples; ++s)
      for (int r = 0; r < width; ++r) densities.at(s, r) = raw.at(place(s, r), r);
  }

  int64_t place(int64_t sorted, int ray) const {
    if constexpr (width == 1) return order[sorted];
    else return order[sorted][ray];
  }

  V delta(int64_t k) const { return depths.get(k + 1) - depths.get(k); }
  V mid_depth(int64_t k) const { return (depths.get(k) + depths.get(k + 1)) / T(2); }
  V mid_density(int64_t k) const { return (densities.get(k) + densities.get(k + 1)) / T(2); }

  void march() {
    V left = V{} + T(1);
    for (int64_t k = 0; k + 1 < samples; ++k) {
      const V a = T(1) - Pack<T>::exp(-softplus(mid_density(k) - T(1)) * delta(k));
      alpha.set(k, a);
      through.set(k, left);
      left *= T(1) - a + T(1e-10);
    }
  }

  V weight(int64_t k) const { return alpha.get(k) * through.get(k); }

  // Write sorted values to rows [rays][samples], at the original positions of the samples.
  void scatter(const Lanes<T>& sorted, T* rows, int rays) const {
    for (int64_t s = 0; s < samples; ++s)
      for (int r = 0; r < rays; ++r) rows[r * samples + place(s, r)] = sorted.data[s * width + r];
  }
};

template <typename T> T lane_of(const typename Pack<T>::type& v, int r) {
  if constexpr (Pack<T>::width == 1) return v;
  else return v[r];
}

int threads_for(int64_t count) { return count < kSerial ? 1 : static_cast<int>(torch::stable::get_num_threads()); }

// Call work(group, first ray, number of rays) for all groups of rays. Each thread uses one object `group` for all of its groups.
template <typename T, typename Work> void for_groups(int64_t rays, int64_t samples, Work work) {
  constexpr int width = Pack<T>::width;
#pragma omp parallel num_threads(threads_for(rays * samples))
  {
    Group<T> group(samples);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rays; first += width) work(group, first, static_cast<int>(std::min<int64_t>(width, rays - first)));
  }
}

template <typename T> std::tuple<Tensor, Tensor, Tensor> march(const Tensor& densities, const Tensor& depths) {
  using V = typename Pack<T>::type;
  const int64_t rays = densities.size(0), samples = densities.size(1);
  Tensor weights = torch::stable::new_empty(densities, {rays, samples});
  Tensor depth_sum = torch::stable::new_empty(densities, {rays}), total = torch::stable::new_empty(densities, {rays});
  const T *in = values<T>(densities), *where = values<T>(depths);
  T *out = writable<T>(weights), *out_depth = writable<T>(depth_sum), *out_total = writable<T>(total);
  for_groups<T>(rays, samples, [&](Group<T>& group, int64_t first, int count) {
    group.read(in + first * samples, where + first * samples, count, true);
    group.march();
    V before{}, sum{}, distance{};
    for (int64_t k = 0; k + 1 < samples; ++k) {
      const V w = group.weight(k);
      sum += w;
      distance += w * group.mid_depth(k);
      group.through.set(k, (before + w) / T(2));
      before = w;
    }
    group.through.set(samples - 1, before / T(2));
    group.scatter(group.through, out + first * samples, count);
    for (int r = 0; r < count; ++r) {
      out_depth[first + r] = lane_of<T>(distance, r);
      out_total[first + r] = lane_of<T>(sum, r);
    }
  });
  return {weights, depth_sum, total};
}

template <typename T>
Tensor march_backward(const Tensor& grad_weights, const Tensor& grad_depth_sum, const Tensor& grad_total, const Tensor& densities,
                      const Tensor& depths) {
  using V = typename Pack<T>::type;
  const int64_t rays = densities.size(0), samples = densities.size(1);
  Tensor grad = torch::stable::new_empty(densities, {rays, samples});
  const T *in = values<T>(densities), *where = values<T>(depths), *upstream = values<T>(grad_weights);
  const T *up_depth = values<T>(grad_depth_sum), *up_total = values<T>(grad_total);
  T* out = writable<T>(grad);
  for_groups<T>(rays, samples, [&](Group<T>& group, int64_t first, int count) {
    group.read(in + first * samples, where + first * samples, count, true);
    group.march();
    Lanes<T>&raw = group.raw, &result = group.densities;
    raw.read(upstream + first * samples, samples, count);
    Lanes<T> ends(2);  // gradients of the depth sum and of the total
    ends.read(up_depth + first, 1, count);
    const V of_depth = ends.get(0);
    ends.read(up_total + first, 1, count);
    const V of_total = ends.get(0);
    auto upstream_at = [&](int64_t s) {  // gradient of a sorted sample's weight
      for (int r = 0; r < Pack<T>::width; ++r) ends.at(1, r) = raw.at(group.place(s, r), r);
      return ends.get(1);
    };
    V after = upstream_at(samples - 1), behind{}, carried{};  // behind: gradient of the transmittance after interval k
    for (int64_t k = samples - 2; k >= 0; --k) {
      const V here = upstream_at(k), a = group.alpha.get(k), left = group.through.get(k);
      const V of_weight = (here + after) / T(2) + of_depth * group.mid_depth(k) + of_total;
      const V of_alpha = (of_weight - behind) * left;
      const V raised = group.mid_density(k) - T(1), delta = group.delta(k);
      const V half = of_alpha * delta * Pack<T>::exp(-softplus(raised) * delta) * simd::sigmoid(raised) / T(2);
      result.set(k + 1, carried + half);  // in the memory of the densities, which are no longer needed above k
      carried = half;
      behind = of_weight * a + behind * (T(1) - a + T(1e-10));
      after = here;
    }
    result.set(0, carried);
    group.scatter(result, out + first * samples, count);
  });
  return grad;
}

// Smooth the interval weights, and compute their cumulative distribution function `cdf` [bins + 1].
template <typename T> void distribution(Group<T>& group, Lanes<T>& cdf) {
  using V = typename Pack<T>::type;
  // `last` is the index of the last interval. The bins are the intervals 1 .. last - 1.
  const int64_t last = group.samples - 2, bins = std::max<int64_t>(group.samples - 3, 0);
  auto larger = [](V a, V b) { return a > b ? a : b; };
  V total{}, missing{};
  for (int64_t k = 1; k < last; ++k) {
    const V w = group.weight(k);
    const V smooth = (larger(group.weight(k - 1), w) + larger(w, group.weight(k + 1))) / T(2) + T(0.01) + T(1e-5);
    group.raw.set(k, smooth);
    const V part = smooth - missing, next = total + part;
    missing = (next - total) - part;
    total = next;
  }
  V sum{}, lost{};  // compensated summation: an error of the distribution function is divided by the probability of a bin
  cdf.set(0, sum);
  for (int64_t k = 1; k <= bins; ++k) {
    const V part = group.raw.get(k) / total - lost, next = sum + part;
    lost = (next - sum) - part;
    sum = next;
    cdf.set(k, sum);
  }
}

template <typename T> Tensor importance(const Tensor& densities, const Tensor& depths, const Tensor& u) {
  using V = typename Pack<T>::type;
  using I = typename Pack<T>::index;
  constexpr int width = Pack<T>::width;
  const int64_t rays = densities.size(0), samples = densities.size(1), fine = u.size(1), bins = std::max<int64_t>(samples - 3, 0);
  Tensor result = torch::stable::new_empty(u, {rays, fine});
  const T *in = values<T>(densities), *where = values<T>(depths), *uniform = values<T>(u);
  T* out = writable<T>(result);
  for_groups<T>(rays, samples, [&](Group<T>& group, int64_t first, int count) {
    group.read(in + first * samples, where + first * samples, count, false);
    group.march();
    Lanes<T> cdf(bins + 1), draws(fine);
    distribution(group, cdf);
    draws.read(uniform + first * fine, fine, count);
    for (int64_t f = 0; f < fine; ++f) {
      const V x = draws.get(f);
      I index{};
      for (int64_t k = 0; k <= bins; ++k) index += cdf.get(k) <= x ? I{} + 1 : I{};
      for (int r = 0; r < count; ++r) {
        int64_t above;
        if constexpr (width == 1) above = index;
        else above = index[r];
        const int64_t below = std::max<int64_t>(above - 1, 0);
        above = std::min(above, bins);
        auto mid = [&](int64_t k) { return (group.depths.at(k, r) + group.depths.at(k + 1, r)) / T(2); };
        const T low = cdf.at(below, r), bin_low = mid(below);
        T step = cdf.at(above, r) - low;
        if (step < T(1e-5)) step = 1;
        out[(first + r) * fine + f] = bin_low + (draws.at(f, r) - low) / step * (mid(above) - bin_low);
      }
    }
  });
  return result;
}

bool is_double(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Double; }

std::tuple<Tensor, Tensor, Tensor> ray_march(Tensor densities, Tensor depths) {
  return is_double(densities) ? march<double>(densities, depths) : march<float>(densities, depths);
}

Tensor ray_march_backward(Tensor grad_weights, Tensor grad_depth_sum, Tensor grad_total, Tensor densities, Tensor depths) {
  return is_double(densities) ? march_backward<double>(grad_weights, grad_depth_sum, grad_total, densities, depths)
                              : march_backward<float>(grad_weights, grad_depth_sum, grad_total, densities, depths);
}

Tensor importance_depths(Tensor densities, Tensor depths, Tensor u) {
  return is_double(densities) ? importance<double>(densities, depths, u) : importance<float>(densities, depths, u);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CPU, m) {
  m.impl("ray_march", TORCH_BOX(&ray_march));
  m.impl("ray_march_backward", TORCH_BOX(&ray_march_backward));
  m.impl("importance_depths", TORCH_BOX(&importance_depths));
}
