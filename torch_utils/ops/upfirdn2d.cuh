// CUDA kernels that insert zeros, pad, filter and decimate images (formula: upfirdn2d.py). The gradient is the same op with other arguments.
// Inserted zeros are never multiplied: an output uses only the taps that are multiplied by an input pixel.
//
// For planar images [N, C, H, W], a block computes 32 x 32 outputs from a tile of the input in shared memory. For channels-last images, a thread
// computes one output, and neighbouring threads compute neighbouring channels; overlapping inputs are read from the caches.
#pragma once
#include "cuda_portable.cuh"

namespace eg3d {

struct Resample {  // each array contains the values for x and for y
  int in[2], out[2], up[2], down[2], pad[2], taps[2];  // sizes in pixels; `pad` is the padding before the image, negative: crop
  bool flip;                                           // true: correlation; false: convolution
  double gain;
};

constexpr int kOut = 32, kRowsOfThreads = 8;
constexpr size_t kMaxTile = 160 * 1024;

EG3D_BOTH int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Return the largest number of input pixels along an axis that 32 outputs use.
EG3D_BOTH int tile_length(int up, int down, int taps) { return ((kOut - 1) * down + taps - 1) / up + 2; }
template <typename T> size_t tile_bytes(const Resample& r) {
  const size_t pixels = size_t(tile_length(r.up[0], r.down[0], r.taps[0])) * tile_length(r.up[1], r.down[1], r.taps[1]);
  return (pixels + size_t(r.taps[0]) * r.taps[1]) * sizeof(T);
}

// First tap and input pixel of an output along one axis: tap `tap` is multiplied by pixel `pixel`, tap `tap` + up by the next pixel, and so on.
struct Phase {
  int tap, pixel;
};
EG3D_DEVICE Phase phase(int output, int up, int down, int pad) {
  const int base = output * down - pad, pixel = floor_div(base + up - 1, up);
  return {pixel * up - base, pixel};
}

// Return the filter tap at the offset (x, y) of the window, multiplied by the gain.
template <typename T, typename S> EG3D_DEVICE T tap_at(const Resample& r, const S* f, int x, int y) {
  const int at = r.flip ? y * r.taps[0] + x : (r.taps[1] - 1 - y) * r.taps[0] + r.taps[0] - 1 - x;
  return T(widen(f[at])) * T(r.gain);
}

// kUp and kDown are the factors of both axes, known to the compiler; if they are 0, the factors are read from `r`.
template <typename S, int kUp, int kDown>
EG3D_KERNEL void EG3D_BOUNDS(kOut* kRowsOfThreads) upfirdn2d_planar(Resample r, int64_t images, const S* x, const S* f, S* out) {
  using T = Arithmetic<S>;
  EG3D_SHARED(T, shared);
  const int up_x = kUp ? kUp : r.up[0], up_y = kUp ? kUp : r.up[1], down_x = kDown ? kDown : r.down[0], down_y = kDown ? kDown : r.down[1];
  const int width = tile_length(up_x, down_x, r.taps[0]), height = tile_length(up_y, down_y, r.taps[1]);
  T *const taps = shared, *const tile = shared + r.taps[0] * r.taps[1];
  const int tid = threadIdx.y * kOut + threadIdx.x, threads = kOut * kRowsOfThreads;
  for (int i = tid; i < r.taps[0] * r.taps[1]; i += threads) taps[i] = tap_at<T>(r, f, i % r.taps[0], i / r.taps[0]);
  const int out_x = blockIdx.x * kOut + threadIdx.x, first_out_y = blockIdx.y * kOut;
  const int left = phase(blockIdx.x * kOut, up_x, down_x, r.pad[0]).pixel, top = phase(first_out_y, up_y, down_y, r.pad[1]).pixel;
  const Phase across = phase(out_x, up_x, down_x, r.pad[0]);
  for (int64_t image = blockIdx.z; image < images; image += gridDim.z) {
    const S* from = x + image * r.in[1] * r.in[0];
    for (int i = tid; i < width * height; i += threads) {
      const int px = left + i % width, py = top + i / width;
      const bool inside = px >= 0 && py >= 0 && px < r.in[0] && py < r.in[1];
      tile[i] = inside ? T(widen(from[int64_t(py) * r.in[0] + px])) : T(0);
    }
    __syncthreads();
    for (int row = threadIdx.y; row < kOut; row += kRowsOfThreads) {
      const int out_y = first_out_y + row;
      if (out_x >= r.out[0] || out_y >= r.out[1]) continue;
      const Phase down = phase(out_y, up_y, down_y, r.pad[1]);
      T sum = 0;
      for (int ty = down.tap, py = down.pixel - top; ty < r.taps[1]; ty += up_y, ++py) {
        for (int tx = across.tap, px = across.pixel - left; tx < r.taps[0]; tx += up_x, ++px) {
          sum += taps[ty * r.taps[0] + tx] * tile[py * width + px];
        }
      }
      out[(image * r.out[1] + out_y) * r.out[0] + out_x] = narrow<S>(sum);
    }
    __syncthreads();
  }
}

template <typename S>
EG3D_KERNEL void EG3D_BOUNDS(256) upfirdn2d_channels_last(Resample r, int64_t images, int channels, const S* x, const S* f, S* out) {
  using T = Arithmetic<S>;
  const int64_t count = images * r.out[1] * r.out[0] * channels;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t pixel = i / channels, line = pixel / r.out[0], image = line / r.out[1];
    const int channel = static_cast<int>(i % channels);
    const Phase across = phase(static_cast<int>(pixel % r.out[0]), r.up[0], r.down[0], r.pad[0]);
    const Phase down = phase(static_cast<int>(line % r.out[1]), r.up[1], r.down[1], r.pad[1]);
    T sum = 0;
    for (int ty = down.tap, py = down.pixel; ty < r.taps[1]; ty += r.up[1], ++py) {
      if (py < 0 || py >= r.in[1]) continue;
      for (int tx = across.tap, px = across.pixel; tx < r.taps[0]; tx += r.up[0], ++px) {
        if (px < 0 || px >= r.in[0]) continue;
        sum += tap_at<T>(r, f, tx, ty) * T(widen(x[((image * r.in[1] + py) * r.in[0] + px) * channels + channel]));
      }
    }
    out[i] = narrow<S>(sum);
  }
}

// Resample x, and write the result to out, which has the layout of x. x is planar, [images, H, W] with images = N * C, channels = 0 and
// tile_bytes<Arithmetic<S>>(r) <= kMaxTile, or channels-last, [images, H, W, channels]. f is [KH, KW].
template <typename S> void upfirdn2d(const Resample& r, int64_t images, int channels, const S* x, const S* f, S* out, Stream stream) {
  if (channels > 0) {
    const int64_t blocks = ceil_div(images * r.out[0] * r.out[1] * channels, 256);
    const dim3 grid(static_cast<unsigned>(smaller(blocks, int64_t(resident_blocks(32)))));
    launch(upfirdn2d_channels_last<S>, grid, dim3(256), 0, stream, r, images, channels, x, f, out);
    return;
  }
  const dim3 grid(ceil_div(r.out[0], kOut), ceil_div(r.out[1], kOut), static_cast<unsigned>(smaller(images, int64_t(65535))));
  const size_t shared = tile_bytes<Arithmetic<S>>(r);
  const bool same = r.up[0] == r.up[1] && r.down[0] == r.down[1];
  auto* kernel = upfirdn2d_planar<S, 0, 0>;
  if (same && r.up[0] == 1 && r.down[0] == 1) kernel = upfirdn2d_planar<S, 1, 1>;
  if (same && r.up[0] == 2 && r.down[0] == 1) kernel = upfirdn2d_planar<S, 2, 1>;
  if (same && r.up[0] == 1 && r.down[0] == 2) kernel = upfirdn2d_planar<S, 1, 2>;
  launch(kernel, grid, dim3(kOut, kRowsOfThreads), shared, stream, r, images, x, f, out);
}

}  // namespace eg3d
