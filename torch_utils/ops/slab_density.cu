// Interface of the CUDA op slab_density to torch. The kernels are in slab_density.cuh.
#include "cuda_tensor.cuh"
#include "slab_density.cuh"

namespace {

using namespace eg3d;
constexpr const char* kOp = "slab_density";

template <typename T>
SlabMaps<T> maps(const Optional& xy, const Optional& xz, const Optional& yz, const Tensor& w, int64_t x, int64_t y, int64_t z) {
  const int64_t j = w.size(0);
  check_size(kOp, "w", w, {j});
  check_like(kOp, "w", w, w);
  const auto check_map = [&](const char* name, const Optional& map, int64_t first, int64_t second, int64_t third) {
    if (!map) return;
    check_size(kOp, name, *map, {first, second, third});
    check_like(kOp, name, *map, w);
  };
  check_map("xy", xy, x, j, y);
  check_map("xz", xz, x, j, z);
  check_map("yz", yz, j, y, z);
  STD_TORCH_CHECK(x > 0 && y > 0 && z > 0 && j > 0 && x * j < (int64_t(1) << 31), kOp, ": the grid is empty or too large");
  return {data_or_null<T>(xy), data_or_null<T>(xz), data_or_null<T>(yz), data<T>(w), int(x), int(y), int(z), int(j)};
}

Tensor forward(Optional xy, Optional xz, Optional yz, Tensor w, Tensor b, std::vector<int64_t> shape) {
  STD_TORCH_CHECK(shape.size() == 3 && b.numel() == 1, kOp, ": expected a shape of three numbers (X, Y, Z) and a bias with one element");
  check_like(kOp, "b", b, w);
  const OnDevice here(w);
  Tensor sigma = empty(w, shape);
  return with_real(kOp, w, [&](auto zero) {
    using T = decltype(zero);
    slab_forward(maps<T>(xy, xz, yz, w, shape[0], shape[1], shape[2]), data<T>(b), mutable_data<T>(sigma), here.stream);
    return sigma;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Optional xy, Optional xz, Optional yz, Tensor w) {
  STD_TORCH_CHECK(grad.dim() == 3, kOp, ": expected grad [X, Y, Z]");
  check_like(kOp, "grad", grad, w);
  const int64_t x = grad.size(0), y = grad.size(1), z = grad.size(2), j = w.size(0);
  const OnDevice here(w);
  Tensor grad_w = empty(w, {j});
  Tensor grad_xy = xy ? empty(w, {x, j, y}) : empty(w, {0});
  Tensor grad_xz = xz ? empty(w, {x, j, z}) : empty(w, {0});
  Tensor grad_yz = yz ? empty(w, {j, y, z}) : empty(w, {0});
  with_real(kOp, w, [&](auto zero) {
    using T = decltype(zero);
    const SlabMaps<T> m = maps<T>(xy, xz, yz, w, x, y, z);
    const SlabTiles tiles = slab_tiles(m);
    const Tensor part_w = empty(w, {tiles.y * tiles.z, j});
    const Tensor part_xy = empty(w, {xy ? tiles.z * x * j * y : 0}), part_xz = empty(w, {xz ? tiles.y * x * j * z : 0});
    const SlabPartials<T> partial{
        mutable_data<T>(part_w), xy ? mutable_data<T>(part_xy) : nullptr, xz ? mutable_data<T>(part_xz) : nullptr,
        yz ? mutable_data<T>(grad_yz) : nullptr};
    slab_backward(m, data<T>(grad), partial, mutable_data<T>(grad_w), mutable_data<T>(grad_xy), mutable_data<T>(grad_xz), here.stream);
    return 0;
  });
  return {grad_w, grad_xy, grad_xz, grad_yz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CUDA, m) {
  m.impl("slab_density", TORCH_BOX(&forward));
  m.impl("slab_density_backward", TORCH_BOX(&backward));
}
