// Interface of the CUDA ops ray_march and importance_depths to torch. The kernels are in ray_march.cuh.
#include "cuda_tensor.cuh"
#include "ray_march.cuh"

namespace {

using namespace eg3d;
constexpr const char* kOp = "ray_march";

void check_rays(const Tensor& densities, const Tensor& depths) {
  STD_TORCH_CHECK(densities.dim() == 2, kOp, ": expected densities [rays, samples]");
  const int64_t samples = densities.size(1);
  STD_TORCH_CHECK(samples >= 2 && samples <= kMaxSamples, kOp, ": the CUDA kernel supports 2 to ", kMaxSamples, " samples, got ", samples);
  check_like(kOp, "densities", densities, densities);
  check_like(kOp, "depths", depths, densities);
  check_size(kOp, "depths", depths, {densities.size(0), samples});
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor densities, Tensor depths) {
  check_rays(densities, depths);
  const OnDevice here(densities);
  const int64_t rays = densities.size(0), samples = densities.size(1);
  Tensor weights = empty(densities, {rays, samples}), depth_sum = empty(densities, {rays}), total = empty(densities, {rays});
  with_real(kOp, densities, [&](auto zero) {
    using T = decltype(zero);
    ray_march(
        data<T>(densities), data<T>(depths), rays, int(samples), mutable_data<T>(weights), mutable_data<T>(depth_sum),
        mutable_data<T>(total), here.stream);
    return 0;
  });
  return {weights, depth_sum, total};
}

Tensor backward(Tensor grad_weights, Tensor grad_depth, Tensor grad_total, Tensor densities, Tensor depths) {
  check_rays(densities, depths);
  const int64_t rays = densities.size(0), samples = densities.size(1);
  check_like(kOp, "grad_sample_weights", grad_weights, densities);
  check_like(kOp, "grad_depth_sum", grad_depth, densities);
  check_like(kOp, "grad_total", grad_total, densities);
  check_size(kOp, "grad_sample_weights", grad_weights, {rays, samples});
  check_size(kOp, "grad_depth_sum", grad_depth, {rays});
  check_size(kOp, "grad_total", grad_total, {rays});
  const OnDevice here(densities);
  Tensor grad = empty(densities, {rays, samples});
  with_real(kOp, densities, [&](auto zero) {
    using T = decltype(zero);
    ray_march_backward(
        data<T>(grad_weights), data<T>(grad_depth), data<T>(grad_total), data<T>(densities), data<T>(depths), rays, int(samples),
        mutable_data<T>(grad), here.stream);
    return 0;
  });
  return grad;
}

Tensor importance(Tensor densities, Tensor depths, Tensor u) {
  check_rays(densities, depths);
  check_like(kOp, "u", u, densities);
  STD_TORCH_CHECK(u.dim() == 2 && u.size(0) == densities.size(0), kOp, ": expected u [rays, fine samples]");
  const OnDevice here(densities);
  const int64_t rays = densities.size(0), samples = densities.size(1), fine = u.size(1);
  Tensor out = empty(densities, {rays, fine});
  with_real(kOp, densities, [&](auto zero) {
    using T = decltype(zero);
    importance_depths(data<T>(densities), data<T>(depths), data<T>(u), rays, int(samples), int(fine), mutable_data<T>(out), here.stream);
    return 0;
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eg3d_rlhf, CUDA, m) {
  m.impl("ray_march", TORCH_BOX(&forward));
  m.impl("ray_march_backward", TORCH_BOX(&backward));
  m.impl("importance_depths", TORCH_BOX(&importance));
}
