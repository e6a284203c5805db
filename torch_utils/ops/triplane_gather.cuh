// Bilinear interpolation of channels-last planes at a tile of points, and its transpose, for triplane_decode.cuh.
#pragma once
#include "cuda_portable.cuh"

namespace eg3d {

constexpr int kMaxPlanes = 8;
constexpr int kTile = 128;  // points of a block, one for each thread

template <typename T> struct Planes {
  const T* values;  // [N, K, H, W, channels]
  const T* points;  // [N, P, 3], -1..1 on the planes
  int planes, height, width, channels;
  int64_t per_image, points_total;  // P, N * P
  bool vectors;                     // true if channels can be read and written as four floats at a time
  int width_axis[kMaxPlanes], height_axis[kMaxPlanes];
};

// The two texels next to a coordinate: index of the first one, and weight of the second one. `low` is -2 if neither texel exists, also for NaN
// and infinity.
template <typename T> struct Neighbours {
  int low;
  T share;
};
template <typename T> EG3D_DEVICE Neighbours<T> neighbours(T coordinate, int size) {
  const T position = ((coordinate + T(1)) * T(size) - T(1)) / T(2), low = floor_of(position);
  const bool touches = low >= T(-1) && low < T(size);
  return {touches ? static_cast<int>(low) : -2, touches ? position - low : T(0)};
}

// Call visit(offset of the texel's first channel, weight) for the texels around point `g`, plane by plane.
template <typename T, typename Visit> EG3D_DEVICE void for_each_texel(const Planes<T>& p, int64_t g, Visit visit) {
  const int64_t image = g / p.per_image;
  for (int k = 0; k < p.planes; ++k) {
    const Neighbours<T> across = neighbours(p.points[g * 3 + p.width_axis[k]], p.width);
    const Neighbours<T> down = neighbours(p.points[g * 3 + p.height_axis[k]], p.height);
    if (across.low < -1 || down.low < -1) continue;
    const int64_t plane = (image * p.planes + k) * p.height;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int x = across.low + corner % 2, y = down.low + corner / 2;
      if (x < 0 || y < 0 || x >= p.width || y >= p.height) continue;
      const T weight = (corner % 2 ? across.share : T(1) - across.share) * (corner / 2 ? down.share : T(1) - down.share);
      visit(((plane + y) * p.width + x) * p.channels, weight);
    }
  }
}

template <typename T> EG3D_DEVICE void add_four(const T* from, int count, bool, T weight, T (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) sum[i] += weight * from[i];
  }
}
EG3D_DEVICE void add_four(const float* from, int count, bool vectors, float weight, float (&sum)[4]) {
  if (!vectors) return add_four<float>(from, count, false, weight, sum);
  const float4 v = *reinterpret_cast<const float4*>(from);
  sum[0] += weight * v.x;
  sum[1] += weight * v.y;
  sum[2] += weight * v.z;
  sum[3] += weight * v.w;
}

template <typename T> EG3D_DEVICE void scatter_four(T* to, int count, bool vectors, T weight, const T* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 4) {
    if (vectors) {
      atomicAdd(reinterpret_cast<float4*>(to), make_float4(weight * values[0], weight * values[1], weight * values[2], weight * values[3]));
      return;
    }
  }
#endif
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) atomicAdd(to + i, weight * values[i]);
  }
}

// Compute tile[point][channel], the sum of the interpolated features over planes, for the points first .. first + kTile - 1. Entries beyond the
// last point and the last channel are 0. C / 4 neighbouring threads process the same point, so that a warp reads complete rows of channels.
template <typename T, int C> EG3D_DEVICE void gather(const Planes<T>& p, int64_t first, int stride, T* tile) {
  for (int i = threadIdx.x; i < kTile * (C / 4); i += kTile) {
    const int point = i / (C / 4), channel = i % (C / 4) * 4;
    T sum[4] = {};
    if (first + point < p.points_total && channel < p.channels) {
      for_each_texel(p, first + point, [&](int64_t offset, T weight) {
        add_four(p.values + offset + channel, p.channels - channel, p.vectors, weight, sum);
      });
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) tile[point * stride + channel + c] = sum[c];
  }
}

// Transpose of `gather`: add weight * tile[point] to grad[texel] by atomic operations. Their order, and so the rounding, differs between runs.
template <typename T, int C> EG3D_DEVICE void scatter(const Planes<T>& p, int64_t first, int stride, const T* tile, T* grad) {
  for (int i = threadIdx.x; i < kTile * (C / 4); i += kTile) {
    const int point = i / (C / 4), channel = i % (C / 4) * 4;
    if (first + point >= p.points_total || channel >= p.channels) continue;
    for_each_texel(p, first + point, [&](int64_t offset, T weight) {
      scatter_four(grad + offset + channel, p.channels - channel, p.vectors, weight, tile + point * stride + channel);
    });
  }
}

}  // namespace eg3d
