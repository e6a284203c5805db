// Runs ray_march.cuh on the emulated device. Inputs: bytes of a number (4 or 8), rays, samples, fine, densities, depths, grad_sample_weights,
// grad_depth_sum, grad_total, u. Outputs: sample_weights, depth_sum, total, grad_densities, and the importance depths of the unsorted depths.
#include "exchange.h"
#include "ray_march.cuh"

template <typename T> void run(Exchange& io) {
  using namespace eg3d;
  const int64_t rays = io.number<int64_t>(), s = io.number<int64_t>(), fine = io.number<int64_t>();
  const T *densities = io.tensor<T>(), *depths = io.tensor<T>();
  const T *grad_weights = io.tensor<T>(), *grad_depth = io.tensor<T>(), *grad_total = io.tensor<T>(), *u = io.tensor<T>();
  T *weights = io.allocate<T>(rays * s), *depth_sum = io.allocate<T>(rays), *total = io.allocate<T>(rays);
  ray_march(densities, depths, rays, int(s), weights, depth_sum, total, Stream{});
  io.result(weights, rays * s);
  io.result(depth_sum, rays);
  io.result(total, rays);
  T* grad = io.allocate<T>(rays * s);
  ray_march_backward(grad_weights, grad_depth, grad_total, densities, depths, rays, int(s), grad, Stream{});
  io.result(grad, rays * s);
  T* out = io.allocate<T>(rays * fine);
  importance_depths(densities, depths, u, rays, int(s), int(fine), out, Stream{});
  io.result(out, rays * fine);
}

int main(int count, char** words) {
  Exchange io(count, words);
  io.number<int64_t>() == 8 ? run<double>(io) : run<float>(io);
}
