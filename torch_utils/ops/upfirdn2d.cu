// Interface of the CUDA op upfirdn2d to torch. The kernels are in upfirdn2d.cuh.
#include <array>
#include <cmath>

#include "cuda_tensor.cuh"
#include "upfirdn2d.cuh"

namespace {

using namespace eg3d;
constexpr const char* kOp = "upfirdn2d";

bool is_channels_last(const Tensor& x) {
  const int64_t expected[4] = {x.size(1) * x.size(2) * x.size(3), 1, x.size(1) * x.size(3), x.size(1)};
  bool fits = !x.is_contiguous();
  for (int axis = 0; axis < 4; ++axis) fits = fits && (x.size(axis) == 1 || x.stride(axis) == expected[axis]);
  return fits;
}

using Pair = std::array<int64_t, 2>;  // (x, y)

// Filter x in one pass with the taps [taps y, taps x]. The tensor f contains these taps and may have one or two axes.
Tensor filter(const Tensor& x, const Tensor& f, Pair taps, Pair up, Pair down, Pair before, Pair after, bool flip, double gain) {
  const bool channels_last = is_channels_last(x);
  STD_TORCH_CHECK(channels_last || x.is_contiguous(), kOp, ": x must be contiguous or channels-last");
  Resample r{};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t padded = x.size(3 - axis) * up[axis] + before[axis] + after[axis];
    STD_TORCH_CHECK(up[axis] >= 1 && down[axis] >= 1 && taps[axis] >= 1, kOp, ": the factors must be at least 1, and the filter must not be empty");
    STD_TORCH_CHECK(
        padded >= taps[axis] && padded < (int64_t(1) << 30), kOp, ": the padded image has fewer pixels than the filter has taps, or too many pixels");
    r.in[axis] = int(x.size(3 - axis));
    r.out[axis] = int((padded - taps[axis]) / down[axis] + 1);
    r.up[axis] = int(up[axis]);
    r.down[axis] = int(down[axis]);
    r.pad[axis] = int(before[axis]);
    r.taps[axis] = int(taps[axis]);
  }
  r.flip = flip;
  r.gain = gain;
  const int64_t n = x.size(0), c = x.size(1);
  Tensor out = empty(x, channels_last ? std::vector<int64_t>{n, r.out[1], r.out[0], c} : std::vector<int64_t>{n, c, r.out[1], r.out[0]});
  if (out.numel() > 0) {
    with_stored(kOp, x, [&](auto zero) {
      using S = decltype(zero);
      STD_TORCH_CHECK(
          channels_last || tile_bytes<Arithmetic<S>>(r) <= kMaxTile, kOp,
          ": the filter or the factors are too large for the CUDA kernel. Use impl=\"torch\".");
      const OnDevice here(x);
      upfirdn2d(r, channels_last ? n : n * c, channels_last ? int(c) : 0, data<S>(x), data<S>(f), mutable_data<S>(out), here.stream);
      return 0;
    });
  }
  return channels_last ? torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2) : out;  // [N, H, W, C] as a view [N, C, H, W]
}

Tensor forward(
    Tensor x, Tensor f, std::vector<int64_t> up, std::vector<int64_t> down, std::vector<int64_t> padding, bool flip_filter, double gain) {
  STD_TORCH_CHECK(
      x.dim() == 4 && up.size() == 2 && down.size() == 2 && padding.size() == 4, kOp,
      ": expected x [N, C, H, W], two factors up, two factors down, and four numbers of padding");
  STD_TORCH_CHECK(f.dim() == 1 || f.dim() == 2, kOp, ": expected f [K] or [KH, KW]");
  check_like(kOp, "f", f, f);
  const bool alike = f.scalar_type() == x.scalar_type() && f.get_device_index() == x.get_device_index();
  STD_TORCH_CHECK(alike, kOp, ": f must have the dtype and the device of x");
  const int64_t k = f.size(0);
  if (f.dim() == 2) {
    const Pair before{padding[0], padding[2]}, after{padding[1], padding[3]};
    return filter(x, f, {f.size(1), k}, {up[0], up[1]}, {down[0], down[1]}, before, after, flip_filter, gain);
  }
  const double half = std::sqrt(gain);
  const Tensor wide = filter(x, f, {k, 1}, {up[0], 1}, {down[0], 1}, {padding[0], 0}, {padding[1], 0}, flip_filter, half);
  return filter(wide, f, {1, k}, {1, up[1]}, {1, down[1]}, {0, padding[2]}, {0, padding[3]}, flip_filter, half);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CUDA, m) { m.impl("upfirdn2d", TORCH_BOX(&forward)); }
