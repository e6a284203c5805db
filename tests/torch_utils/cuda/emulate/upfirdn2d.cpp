// Runs upfirdn2d.cuh on the emulated device. Inputs: type (0 float32, 1 float64, 2 bfloat16), images, channels (0: planar), then for x and y: sizes
// of input and output, up, down, pads, taps; flip, gain, x, f. Output: the result.
#include "exchange.h"
#include "upfirdn2d.cuh"

template <typename S> void run(Exchange& io) {
  using namespace eg3d;
  const int64_t images = io.number<int64_t>(), channels = io.number<int64_t>();
  Resample r{};
  for (auto* pair : {r.in, r.out, r.up, r.down, r.pad, r.taps})
    for (int i = 0; i < 2; ++i) pair[i] = static_cast<int>(io.number<int64_t>());
  r.flip = io.number<int64_t>() != 0;
  r.gain = io.number<double>();
  const S* x = io.tensor<S>();
  const S* f = io.tensor<S>();
  const int64_t count = images * std::max<int64_t>(channels, 1) * r.out[0] * r.out[1];
  S* out = io.allocate<S>(count);
  upfirdn2d(r, images, int(channels), x, f, out, Stream{});
  io.result(out, count);
}

int main(int count, char** words) {
  Exchange io(count, words);
  const int64_t type = io.number<int64_t>();
  type == 0 ? run<float>(io) : type == 1 ? run<double>(io) : run<__nv_bfloat16>(io);
}
