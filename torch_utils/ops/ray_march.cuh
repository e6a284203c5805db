// CUDA kernels of ray marching (sorting by depth, interval weights, compositing weights and their gradients) and of importance sampling.
// The formulas and schemas are in ray_march.py. A warp processes one ray; lane i processes the samples i, i + 32, ... A ray has at most
// kMaxSamples samples. There are no atomic operations, so results are bitwise reproducible.
#pragma once
#include "cuda_portable.cuh"

namespace eg3d {

constexpr int kMaxSamples = 512;  // largest number of samples of a ray: four rays in float64 must fit into shared memory
constexpr int kRays = 4;          // rays of a block, one for each warp

// Return true if sample i with depth a comes before sample j with depth b. NaN comes last, and samples of equal depth are not reordered, as in
// torch.sort(stable=True).
template <typename T> EG3D_DEVICE bool comes_before(T a, int i, T b, int j) {
  const bool a_nan = !(a == a), b_nan = !(b == b);
  if (a_nan || b_nan) return a_nan == b_nan ? i < j : b_nan;
  return a < b || (a == b && i < j);
}

// Load the samples of a ray into shared memory, sorted by depth, and write their sorted positions to `place`. If `place` is null, the samples
// must be sorted already.
template <typename T>
EG3D_DEVICE void load_sorted(const T* densities, const T* depths, int s, int lane, T* raw, T* density, T* depth, int* place) {
  for (int i = lane; i < s; i += 32) (place == nullptr ? depth : raw)[i] = depths[i];
  __syncwarp();
  for (int i = lane; i < s; i += 32) {
    int at = i;
    if (place != nullptr) {
      at = 0;
      for (int k = 0; k < s; ++k) at += k != i && comes_before(raw[k], k, raw[i], i);
      place[i] = at;
      depth[at] = raw[i];
    }
    density[at] = densities[i];
  }
  __syncwarp();
}

template <typename T> struct Interval {
  T alpha, kept;  // alpha, and the factor 1 - alpha + 1e-10 of the transmittance
};
template <typename T> EG3D_DEVICE Interval<T> interval(const T* density, const T* depth, int k) {
  const T optical = softplus((density[k] + density[k + 1]) / T(2) - T(1)) * (depth[k + 1] - depth[k]);
  return {-expm1_of(-optical), exp_of(-optical) + T(1e-10)};
}

// Return the product over the lanes of the warp up to this lane, included. `scan_sum` returns the sum.
template <typename T> EG3D_DEVICE T scan_product(T value, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value *= before;
  }
  return value;
}
template <typename T> EG3D_DEVICE T scan_sum(T value, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

// Compute weight[k] = alpha_k prod_{i<k} kept_i for the s - 1 intervals and, if `through` is not null, the product alone, through[k].
template <typename T> EG3D_DEVICE void interval_weights(const T* density, const T* depth, int s, int lane, T* weight, T* through) {
  T carry = 1;
  for (int first = 0; first < s - 1; first += 32) {
    const int k = first + lane;
    const Interval<T> here = k < s - 1 ? interval(density, depth, k) : Interval<T>{T(0), T(1)};
    const T product = scan_product(here.kept, lane);
    const T before = __shfl_up_sync(kAllLanes, product, 1);
    const T transmittance = carry * (lane == 0 ? T(1) : before);
    if (k < s - 1) {
      weight[k] = here.alpha * transmittance;
      if (through != nullptr) through[k] = transmittance;
    }
    carry *= __shfl_sync(kAllLanes, product, 31);
  }
  __syncwarp();
}

template <typename T> constexpr size_t march_shared(int s, int arrays) { return size_t(kRays) * s * (arrays * sizeof(T) + sizeof(int)); }

template <typename T> struct RayMemory {  // shared memory of one warp: `arrays` arrays of s values, and one array of positions
  T* values;
  int* place;
  EG3D_DEVICE RayMemory(T* shared, int warp, int s, int arrays)
      : values(shared + size_t(warp) * arrays * s), place(reinterpret_cast<int*>(shared + size_t(kRays) * arrays * s) + warp * s) {}
};

template <typename T>
EG3D_KERNEL void EG3D_BOUNDS(32 * kRays)
    ray_march_kernel(const T* densities, const T* depths, int64_t rays, int s, T* sample_weights, T* depth_sum, T* total) {
  EG3D_SHARED(T, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t ray = int64_t(blockIdx.x) * kRays + warp;
  if (ray >= rays) return;  // complete warps return; there is no barrier of the block below
  const RayMemory<T> memory(shared, warp, s, 4);
  T *raw = memory.values, *density = raw + s, *depth = raw + 2 * s, *weight = raw + 3 * s;
  load_sorted(densities + ray * s, depths + ray * s, s, lane, raw, density, depth, memory.place);
  interval_weights(density, depth, s, lane, weight, static_cast<T*>(nullptr));
  T sum = 0, sum_depth = 0;
  for (int k = lane; k < s - 1; k += 32) {
    sum += weight[k];
    sum_depth += weight[k] * ((depth[k] + depth[k + 1]) / T(2));
  }
  sum = warp_sum(sum);
  sum_depth = warp_sum(sum_depth);
  for (int i = lane; i < s; i += 32) {
    const int at = memory.place[i];
    sample_weights[ray * s + i] = ((at > 0 ? weight[at - 1] : T(0)) + (at < s - 1 ? weight[at] : T(0))) / T(2);
  }
  if (lane == 0) {
    depth_sum[ray] = sum_depth;
    total[ray] = sum;
  }
}

// Let g_k = d loss / d w_k, and T_k the transmittance in front of interval k. Then d loss / d alpha_k = T_k (g_k - R_k), where R_k is the effect
// on the intervals behind k. The recurrence R_k = g_{k+1} alpha_{k+1} + kept_{k+1} R_{k+1} needs no division by 1 - alpha, which can be 0. It is
// computed as a scan over affine maps.
template <typename T>
EG3D_KERNEL void EG3D_BOUNDS(32 * kRays) ray_march_backward_kernel(
    const T* grad_weights, const T* grad_depth, const T* grad_total, const T* densities, const T* depths, int64_t rays, int s,
    T* grad_densities) {
  EG3D_SHARED(T, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t ray = int64_t(blockIdx.x) * kRays + warp;
  if (ray >= rays) return;
  const RayMemory<T> memory(shared, warp, s, 5);
  T *raw = memory.values, *density = raw + s, *depth = raw + 2 * s, *weight = raw + 3 * s, *through = raw + 4 * s;
  load_sorted(densities + ray * s, depths + ray * s, s, lane, raw, density, depth, memory.place);
  interval_weights(density, depth, s, lane, weight, through);
  for (int i = lane; i < s; i += 32) raw[memory.place[i]] = grad_weights[ray * s + i];  // from here on, `raw` contains gradients, sorted by depth
  __syncwarp();
  const T of_depth = grad_depth[ray], of_total = grad_total[ray];
  T carry = 0;  // R_k for the last one of the 32 intervals
  for (int first = (s - 2) / 32 * 32; first >= 0; first -= 32) {
    const int k = first + lane;
    const bool valid = k < s - 1;
    T g = 0;
    Interval<T> here{T(0), T(1)};
    if (valid) {
      g = (raw[k] + raw[k + 1]) / T(2) + of_depth * ((depth[k] + depth[k + 1]) / T(2)) + of_total;
      here = interval(density, depth, k);
    }
    T offset = g * here.alpha, factor = here.kept;  // R_{k-1} = offset + factor R_k; scanned towards lower k
    for (int step = 1; step < 32; step *= 2) {
      const T behind = __shfl_down_sync(kAllLanes, offset, step), dimmed = __shfl_down_sync(kAllLanes, factor, step);
      if (lane + step < 32) {
        offset += factor * behind;
        factor *= dimmed;
      }
    }
    const T all = offset + factor * carry;  // R_{k-1}
    const T following = __shfl_down_sync(kAllLanes, all, 1);
    const T rest = lane == 31 ? carry : following;  // R_k
    if (valid) {
      const T delta = depth[k + 1] - depth[k];
      const T middle = (density[k] + density[k + 1]) / T(2) - T(1);
      const T unlit = exp_of(-softplus(middle) * delta);  // d alpha / d optical depth
      weight[k] = through[k] * (g - rest) * unlit * delta * sigmoid(middle) / T(2);  // half of the gradient for each of its two samples
    }
    carry = __shfl_sync(kAllLanes, all, 0);
  }
  __syncwarp();
  for (int i = lane; i < s; i += 32) {
    const int at = memory.place[i];
    grad_densities[ray * s + i] = (at > 0 ? weight[at - 1] : T(0)) + (at < s - 1 ? weight[at] : T(0));
  }
}

// Sample depths of the fine pass. The coarse weights are smoothed (max-pooling and average-pooling with a window of 2) and increased by 0.01.
// The histogram contains weights[1:-1]; its edges are the centres of the intervals.
template <typename T>
EG3D_KERNEL void EG3D_BOUNDS(32 * kRays)
    importance_kernel(const T* densities, const T* depths, const T* u, int64_t rays, int s, int fine, T* out) {
  EG3D_SHARED(T, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t ray = int64_t(blockIdx.x) * kRays + warp;
  if (ray >= rays) return;
  const RayMemory<T> memory(shared, warp, s, 4);
  T *cdf = memory.values, *density = cdf + s, *depth = cdf + 2 * s, *weight = cdf + 3 * s;
  load_sorted(densities + ray * s, depths + ray * s, s, lane, cdf, density, depth, static_cast<int*>(nullptr));
  interval_weights(density, depth, s, lane, weight, static_cast<T*>(nullptr));
  const int bins = larger(s - 3, 0);  // with 0 bins, all results are the centre of the first interval
  T* const pdf = density;  // in the memory of the densities, which are no longer needed
  T sum = 0;
  for (int k = lane; k < bins; k += 32) {  // bin k is weight k + 1, which has two neighbours
    const T before = larger(weight[k], weight[k + 1]), after = larger(weight[k + 1], weight[k + 2]);
    pdf[k] = (before + after) / T(2) + T(0.01) + T(1e-5);
    sum += pdf[k];
  }
  sum = warp_sum(sum);
  T carry = 0;
  if (lane == 0) cdf[0] = 0;
  for (int first = 0; first < bins; first += 32) {
    const int k = first + lane;
    const T part = scan_sum(k < bins ? pdf[k] / sum : T(0), lane);
    if (k < bins) cdf[k + 1] = carry + part;
    carry += __shfl_sync(kAllLanes, part, 31);
  }
  __syncwarp();
  for (int f = lane; f < fine; f += 32) {
    const T draw = u[ray * fine + f];
    int low = 0, high = bins + 1;  // binary search: number of entries of cdf[0..bins] that are <= draw
    while (low < high) {
      const int middle = (low + high) / 2;
      if (cdf[middle] <= draw) low = middle + 1; else high = middle;
    }
    const int below = larger(low - 1, 0), above = smaller(low, bins);
    const T start = (depth[below] + depth[below + 1]) / T(2), end = (depth[above] + depth[above + 1]) / T(2);
    const T width = cdf[above] - cdf[below];
    out[ray * fine + f] = start + (draw - cdf[below]) / (width < T(1e-5) ? T(1) : width) * (end - start);
  }
}

inline dim3 ray_blocks(int64_t rays) { return dim3(static_cast<unsigned>(ceil_div(rays, kRays))); }

template <typename T>
void ray_march(const T* densities, const T* depths, int64_t rays, int s, T* sample_weights, T* depth_sum, T* total, Stream stream) {
  launch(ray_march_kernel<T>, ray_blocks(rays), dim3(32 * kRays), march_shared<T>(s, 4), stream, densities, depths, rays, s, sample_weights,
         depth_sum, total);
}
template <typename T>
void ray_march_backward(
    const T* grad_weights, const T* grad_depth, const T* grad_total, const T* densities, const T* depths, int64_t rays, int s, T* grad,
    Stream stream) {
  launch(ray_march_backward_kernel<T>, ray_blocks(rays), dim3(32 * kRays), march_shared<T>(s, 5), stream, grad_weights, grad_depth,
         grad_total, densities, depths, rays, s, grad);
}
template <typename T>
void importance_depths(const T* densities, const T* depths, const T* u, int64_t rays, int s, int fine, T* out, Stream stream) {
  launch(importance_kernel<T>, ray_blocks(rays), dim3(32 * kRays), march_shared<T>(s, 4), stream, densities, depths, u, rays, s, fine, out);
}

}  // namespace eg3d
