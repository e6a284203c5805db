// Runs bias_act.cuh on the emulated device. Inputs: type (0 float32, 1 float64, 2 bfloat16), count, inner, channels, act, alpha, gain, clamp, x, b,
// v. Outputs: the result, and for activations 0, 1, 2 slope(result) * (v + b).
#include "exchange.h"
#include "bias_act.cuh"

template <typename S> void run(Exchange& io) {
  using namespace eg3d;
  BiasAct o{};
  o.count = io.number<int64_t>(); o.inner = io.number<int64_t>(); o.channels = io.number<int64_t>(); o.act = io.number<int64_t>();
  o.alpha = io.number<double>(); o.gain = io.number<double>(); o.clamp = io.number<double>();
  const S *x = io.tensor<S>(), *b = io.tensor<S>(), *v = io.tensor<S>(), *none = nullptr;
  S* out = io.allocate<S>(o.count);
  bias_act(o, x, b, none, out, Stream{});
  io.result(out, o.count);
  if (o.act > kLrelu) return;
  S* scaled = io.allocate<S>(o.count);
  bias_act(o, v, b, out, scaled, Stream{});
  io.result(scaled, o.count);
}

int main(int count, char** words) {
  Exchange io(count, words);
  const int64_t type = io.number<int64_t>();
  type == 0 ? run<float>(io) : type == 1 ? run<double>(io) : run<__nv_bfloat16>(io);
}
