// CUDA kernels for sigma[x,y,z] = sum_j w[j] softplus(xy[x,j,y] + xz[x,j,z] + yz[j,y,z]) + b, and its gradients (schema: slab_density.py).
//
// In float32, exp(h) is a product of exponentials of the maps, which are computed once for each tile. Each point and hidden unit then takes one
// logarithm in the forward pass, and one logarithm and one division in the backward pass. If the absolute value of a map reaches 28, the product
// could leave the range of normal numbers; the tile (or the thread) then computes exp and log1p of h itself. lg2.approx has an absolute error
// below 2.4e-7 near 1, and an error of 2 ulp elsewhere, so the error of softplus(h) is below 3e-7 max(1, h). float64 always uses h itself.
#pragma once
#include "cuda_portable.cuh"

namespace eg3d {

template <typename T> struct SlabMaps {
  const T *xy, *xz, *yz;  // [X,J,Y], [X,J,Z], [J,Y,Z]; null if absent
  const T* w;             // [J]
  int x, y, z, j;         // lengths

  EG3D_DEVICE T at_xy(int64_t ix, int64_t ij, int64_t iy) const { return xy == nullptr ? T(0) : xy[(ix * j + ij) * y + iy]; }
  EG3D_DEVICE T at_xz(int64_t ix, int64_t ij, int64_t iz) const { return xz == nullptr ? T(0) : xz[(ix * j + ij) * z + iz]; }
  EG3D_DEVICE T at_yz(int64_t ij, int64_t iy, int64_t iz) const { return yz == nullptr ? T(0) : yz[(ij * y + iy) * z + iz]; }
  EG3D_DEVICE T hidden(int ix, int ij, int iy, int iz) const { return at_xy(ix, ij, iy) + at_xz(ix, ij, iz) + at_yz(ij, iy, iz); }
};

template <typename T> struct Factor;  // stored form of a map value, and functions of t = exp(h)
template <> struct Factor<float> {
  static EG3D_DEVICE float of(float map) { return expf(map); }
  static EG3D_DEVICE bool far(float map) { return !(fabsf(map) < 28.0f); }
  static EG3D_DEVICE float log2_1p(float t) { return __log2f(1.0f + t); }
  static EG3D_DEVICE float ratio(float t) { return __fdividef(t, 1.0f + t); }
};
template <> struct Factor<double> {
  static EG3D_DEVICE double of(double map) { return map; }
  static EG3D_DEVICE bool far(double) { return true; }
  static EG3D_DEVICE double log2_1p(double t) { return t; }  // not reached
  static EG3D_DEVICE double ratio(double t) { return t; }    // not reached
};

constexpr double kLn2 = 0.69314718055994530942;
constexpr int kWarps = 8, kThreads = 32 * kWarps;

// ---- forward: a block of 8 warps computes 8 x by 8 y by 32 z; a thread computes one (y, z) and all 8 x ---------------------------------------
constexpr int kFwdX = 8, kFwdY = kWarps, kFwdUnits = 16;

template <typename T>
EG3D_KERNEL void EG3D_BOUNDS(kThreads) slab_forward_kernel(SlabMaps<T> m, const T* b, T* sigma) {
  EG3D_SHARED(T, shared);
  T* const xy = shared;                               // [unit][y][x]
  T* const xz = shared + kFwdUnits * kFwdY * kFwdX;   // [unit][x][z]
  const int tid = threadIdx.x, lane = tid % 32, row = tid / 32;
  const int x0 = blockIdx.z * kFwdX, y0 = blockIdx.y * kFwdY, z0 = blockIdx.x * 32;
  const int y = y0 + row, z = z0 + lane;
  const bool inside = y < m.y && z < m.z;
  T sum[kFwdX] = {};
  for (int j0 = 0; j0 < m.j; j0 += kFwdUnits) {
    bool far = false;
    for (int i = tid; i < kFwdUnits * kFwdX * kFwdY; i += kThreads) {
      const int iy = i % kFwdY, ix = i / kFwdY % kFwdX, ij = i / (kFwdX * kFwdY);
      const bool valid = y0 + iy < m.y && x0 + ix < m.x && j0 + ij < m.j;
      const T value = valid ? m.at_xy(x0 + ix, j0 + ij, y0 + iy) : T(0);
      far = far || Factor<T>::far(value);
      xy[(ij * kFwdY + iy) * kFwdX + ix] = Factor<T>::of(value);
    }
    for (int i = tid; i < kFwdUnits * kFwdX * 32; i += kThreads) {
      const int iz = i % 32, ix = i / 32 % kFwdX, ij = i / (32 * kFwdX);
      const bool valid = z0 + iz < m.z && x0 + ix < m.x && j0 + ij < m.j;
      const T value = valid ? m.at_xz(x0 + ix, j0 + ij, z0 + iz) : T(0);
      far = far || Factor<T>::far(value);
      xz[i] = Factor<T>::of(value);
    }
    const bool tile_is_far = __syncthreads_or(far);
    const int units = smaller(kFwdUnits, m.j - j0);
#pragma unroll 4
    for (int j = 0; j < units; ++j) {
      const T c = inside ? m.at_yz(j0 + j, y, z) : T(0), weight = m.w[j0 + j];
      if (!tile_is_far && !Factor<T>::far(c)) {
        const T factor = Factor<T>::of(c), scaled = weight * T(kLn2);
#pragma unroll
        for (int x = 0; x < kFwdX; ++x) {
          sum[x] += scaled * Factor<T>::log2_1p(factor * (xy[(j * kFwdY + row) * kFwdX + x] * xz[(j * kFwdX + x) * 32 + lane]));
        }
      } else if (inside) {
#pragma unroll
        for (int x = 0; x < kFwdX; ++x) {
          if (x0 + x < m.x) sum[x] += weight * softplus(m.hidden(x0 + x, j0 + j, y, z));
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int x = 0; x < kFwdX; ++x) {
    if (inside && x0 + x < m.x) sigma[(int64_t(x0 + x) * m.y + y) * m.z + z] = sum[x] + b[0];
  }
}

template <typename T> void slab_forward(const SlabMaps<T>& m, const T* b, T* sigma, Stream stream) {
  const dim3 grid(ceil_div(m.z, 32), ceil_div(m.y, kFwdY), ceil_div(m.x, kFwdX));
  const size_t shared = sizeof(T) * kFwdUnits * kFwdX * (kFwdY + 32);
  launch(slab_forward_kernel<T>, grid, dim3(kThreads), shared, stream, m, b, sigma);
}

// ---- backward: a block processes 4 hidden units, 32 y and 32 z, and iterates over x; a thread processes one z and 4 y -----------------------------
// Sums over x stay in registers. Sums over the block's y and z are written as partial sums, one set for each tile along the summed axis,
// and a second kernel adds them in order. There are no atomic operations, so results are bitwise reproducible.
constexpr int kBwdUnits = 4, kBwdRows = 4, kBwdX = 4, kBwdY = kBwdRows * kWarps;

// Sum 16 values over the 32 lanes with 16 shuffles. Afterwards, values[0] of lane l is the sum of value l / 2 over the warp.
template <typename T> EG3D_DEVICE void warp_sum_16(T (&values)[16], int lane) {
#pragma unroll
  for (int keep = 8; keep > 0; keep /= 2) {
    const bool upper = (lane & (2 * keep)) != 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (k < keep) {
        const T given = upper ? values[k] : values[k + keep];
        const T kept = upper ? values[k + keep] : values[k];
        values[k] = kept + __shfl_xor_sync(kAllLanes, given, 2 * keep);
      }
    }
  }
  values[0] += __shfl_xor_sync(kAllLanes, values[0], 1);
}

template <typename T> struct SlabPartials {
  T *w, *xy, *xz;  // [tiles, J], [tiles along z, X, J, Y], [tiles along y, X, J, Z]; xy and xz are null if absent
  T* yz;           // [J, Y, Z], complete sums; null if absent
};

template <typename T>
EG3D_KERNEL void EG3D_BOUNDS(kThreads, 2) slab_backward_kernel(SlabMaps<T> m, const T* grad, SlabPartials<T> out) {
  EG3D_SHARED(T, shared);
  constexpr int kLine = kBwdX * kBwdUnits * 32;
  T* const xy = shared;                // [x][unit][y], 32 y
  T* const xz = shared + kLine;        // [x][unit][z]
  T* const over_z = shared + 2 * kLine;  // [x][unit][y], sums over the block's z
  T* const over_y = shared + 3 * kLine;  // [warp][x][unit][z], sums over the warp's y
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int j0 = blockIdx.z * kBwdUnits, y0 = blockIdx.y * kBwdY, z0 = blockIdx.x * 32, z = z0 + lane;
  T factor[kBwdUnits][kBwdRows], over_x[kBwdUnits][kBwdRows] = {}, over_all[kBwdUnits] = {};
  bool own_far = false;
#pragma unroll
  for (int j = 0; j < kBwdUnits; ++j) {
#pragma unroll
    for (int i = 0; i < kBwdRows; ++i) {
      const int y = y0 + warp * kBwdRows + i;
      const T c = j0 + j < m.j && y < m.y && z < m.z ? m.at_yz(j0 + j, y, z) : T(0);
      own_far = own_far || Factor<T>::far(c);
      factor[j][i] = Factor<T>::of(c);
    }
  }
  for (int x0 = 0; x0 < m.x; x0 += kBwdX) {
    bool far = false;
    for (int i = tid; i < kLine; i += kThreads) {
      const int at = i % 32, j = i / 32 % kBwdUnits, x = i / (32 * kBwdUnits);
      const bool valid = x0 + x < m.x && j0 + j < m.j;
      const T a = valid && y0 + at < m.y ? m.at_xy(x0 + x, j0 + j, y0 + at) : T(0);
      const T b = valid && z0 + at < m.z ? m.at_xz(x0 + x, j0 + j, z0 + at) : T(0);
      far = far || Factor<T>::far(a) || Factor<T>::far(b);
      xy[i] = Factor<T>::of(a);
      xz[i] = Factor<T>::of(b);
    }
    const bool direct = __syncthreads_or(far) || own_far;
    for (int x = 0; x < kBwdX && x0 + x < m.x; ++x) {
      T g[kBwdRows], slope[kBwdUnits * kBwdRows];
#pragma unroll
      for (int i = 0; i < kBwdRows; ++i) {
        const int y = y0 + warp * kBwdRows + i;
        g[i] = y < m.y && z < m.z ? grad[(int64_t(x0 + x) * m.y + y) * m.z + z] : T(0);
      }
#pragma unroll
      for (int j = 0; j < kBwdUnits; ++j) {
        const int line = (x * kBwdUnits + j) * 32;
        T over_rows = 0;
#pragma unroll
        for (int i = 0; i < kBwdRows; ++i) {
          const int y = y0 + warp * kBwdRows + i;
          T plus = 0, sig = 0;
          if (!direct) {
            const T t = factor[j][i] * (xy[line + warp * kBwdRows + i] * xz[line + lane]);
            plus = T(kLn2) * Factor<T>::log2_1p(t);
            sig = Factor<T>::ratio(t);
          } else if (j0 + j < m.j && y < m.y && z < m.z) {
            const T h = m.hidden(x0 + x, j0 + j, y, z);
            plus = softplus(h);
            sig = sigmoid(h);
          }
          const T s = g[i] * sig;
          over_all[j] += g[i] * plus;
          over_x[j][i] += s;
          over_rows += s;
          slope[j * kBwdRows + i] = s;
        }
        over_y[warp * kLine + line + lane] = over_rows;
      }
      warp_sum_16(slope, lane);
      const int j = lane / 2 / kBwdRows, i = lane / 2 % kBwdRows;
      if (lane % 2 == 0) over_z[(x * kBwdUnits + j) * 32 + warp * kBwdRows + i] = slope[0];
    }
    __syncthreads();
    for (int i = tid; i < kLine; i += kThreads) {
      const int at = i % 32, j = j0 + i / 32 % kBwdUnits, x = x0 + i / (32 * kBwdUnits);
      if (x >= m.x || j >= m.j) continue;
      const int64_t row = int64_t(x) * m.j + j, count = int64_t(m.x) * m.j;
      if (out.xy != nullptr && y0 + at < m.y) out.xy[(blockIdx.x * count + row) * m.y + y0 + at] = over_z[i];
      if (out.xz != nullptr && z0 + at < m.z) {
        T total = 0;
        for (int k = 0; k < kWarps; ++k) total += over_y[k * kLine + i];
        out.xz[(blockIdx.y * count + row) * m.z + z0 + at] = total;
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kBwdUnits; ++j) {
    const T total = warp_sum(over_all[j]);
    if (lane == 0) over_y[warp * kBwdUnits + j] = total;
#pragma unroll
    for (int i = 0; i < kBwdRows; ++i) {
      const int y = y0 + warp * kBwdRows + i;
      if (out.yz != nullptr && j0 + j < m.j && y < m.y && z < m.z) {
        out.yz[(int64_t(j0 + j) * m.y + y) * m.z + z] = m.w[j0 + j] * over_x[j][i];
      }
    }
  }
  __syncthreads();
  if (tid < kBwdUnits && j0 + tid < m.j) {
    T total = 0;
    for (int k = 0; k < kWarps; ++k) total += over_y[k * kBwdUnits + tid];
    out.w[(int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * m.j + j0 + tid] = total;
  }
}

struct SlabTiles {
  int64_t y, z;  // numbers of tiles of the backward pass along y and z
};
template <typename T> SlabTiles slab_tiles(const SlabMaps<T>& m) { return {ceil_div(m.y, kBwdY), ceil_div(m.z, 32)}; }

// Compute the gradients grad_w [J], grad_xy [X,J,Y] and grad_xz [X,J,Z]. The gradient of yz is written to partial.yz. `partial` is memory for
// partial sums, with the sizes in SlabPartials and the numbers of tiles from `slab_tiles`. Its pointers are null for absent maps.
template <typename T>
void slab_backward(const SlabMaps<T>& m, const T* grad, const SlabPartials<T>& partial, T* grad_w, T* grad_xy, T* grad_xz, Stream stream) {
  const SlabTiles tiles = slab_tiles(m);
  const dim3 grid(tiles.z, tiles.y, ceil_div(m.j, kBwdUnits));
  const size_t shared = sizeof(T) * (3 + kWarps) * kBwdX * kBwdUnits * 32;
  launch(slab_backward_kernel<T>, grid, dim3(kThreads), shared, stream, m, grad, partial);
  const T* unscaled = nullptr;
  launch_sum_partials<T>(partial.w, tiles.y * tiles.z, m.j, unscaled, 1, 1, grad_w, stream);
  if (m.xy) launch_sum_partials<T>(partial.xy, tiles.z, int64_t(m.x) * m.j * m.y, m.w, m.y, m.j, grad_xy, stream);
  if (m.xz) launch_sum_partials<T>(partial.xz, tiles.y, int64_t(m.x) * m.j * m.z, m.w, m.z, m.j, grad_xz, stream);
}

}  // namespace eg3d
