// Runs slab_density.cuh on the emulated device. Inputs: bytes of a number (4 or 8), x, y, z, j, xy, xz, yz, w, b, grad.
// Outputs: sigma, grad_w, and then grad_xy, grad_xz and grad_yz of the maps that are present.
#include "exchange.h"
#include "slab_density.cuh"

template <typename T> void run(Exchange& io) {
  using namespace eg3d;
  const int x = io.number<int64_t>(), y = io.number<int64_t>(), z = io.number<int64_t>(), j = io.number<int64_t>();
  const T *xy = io.tensor<T>(), *xz = io.tensor<T>(), *yz = io.tensor<T>();
  const T *w = io.tensor<T>(), *b = io.tensor<T>(), *grad = io.tensor<T>();
  const SlabMaps<T> m{xy, xz, yz, w, x, y, z, j};
  T* sigma = io.allocate<T>(x * y * z);
  slab_forward(m, b, sigma, Stream{});
  io.result(sigma, x * y * z);
  const SlabTiles tiles = slab_tiles(m);
  const int64_t n_xy = xy ? x * j * y : 0, n_xz = xz ? x * j * z : 0, n_yz = yz ? j * y * z : 0;
  const SlabPartials<T> partial{
      io.allocate<T>(tiles.y * tiles.z * j), xy ? io.allocate<T>(tiles.z * n_xy) : nullptr, xz ? io.allocate<T>(tiles.y * n_xz) : nullptr,
      yz ? io.allocate<T>(n_yz) : nullptr};
  T *grad_w = io.allocate<T>(j), *grad_xy = io.allocate<T>(n_xy), *grad_xz = io.allocate<T>(n_xz);
  slab_backward(m, grad, partial, grad_w, grad_xy, grad_xz, Stream{});
  io.result(grad_w, j);
  io.result(grad_xy, n_xy);
  io.result(grad_xz, n_xz);
  if (yz) io.result(partial.yz, n_yz);
}

int main(int count, char** words) {
  Exchange io(count, words);
  io.number<int64_t>() == 8 ? run<double>(io) : run<float>(io);
}
