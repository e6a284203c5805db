// CUDA kernel of bias_act: clip(gain * act(x + b), -clamp, clamp) in one pass over memory. The same kernel multiplies by the slope of this
// function, from which gradients of all orders follow. The formulas and schemas are in bias_act.py. A thread processes 16 bytes in each step.
#pragma once
#include "cuda_portable.cuh"

namespace eg3d {

enum Activation : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };  // in the order of activation_funcs
constexpr int kAnyActivation = -1;  // the kernel reads BiasAct::act; common activations have special kernels
constexpr int kBlock = 256, kBlocksPerProcessor = 8;

struct BiasAct {
  int64_t count, inner;  // number of elements; distance of neighbours along the axis of the bias, in elements
  int64_t channels;      // length of the bias; 1 if there is no bias
  int act;
  double alpha, gain, clamp;  // clamp < 0: no clamp
};

template <typename T> EG3D_DEVICE T activate(int act, T v, T alpha) {
  constexpr double kSeluScale = 1.0507009873554804934193349852946, kSeluAlpha = 1.6732632423543772848170429916717;
  switch (act) {
    case kRelu: return v < T(0) ? T(0) : v;  // NaN remains NaN
    case kLrelu: return v > T(0) ? v : alpha * v;
    case kTanh: return tanh_of(v);
    case kSigmoid: return sigmoid(v);
    case kElu: return v > T(0) ? v : expm1_of(v);
    case kSelu: return T(kSeluScale) * (v > T(0) ? v : T(kSeluAlpha) * expm1_of(v));
    case kSoftplus: return softplus(v);
    case kSwish: return v * sigmoid(v);
    default: return v;
  }
}

template <typename S> struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(S);
  S at[kCount];
};

// Apply activation, gain and clamp to v = x + b.
template <typename T> EG3D_DEVICE T finish(const BiasAct& o, int act, T v) {
  const T y = T(o.gain) * activate(act, v, T(o.alpha)), clamp = T(o.clamp);
  if (o.clamp < 0) return y;
  return y > clamp ? clamp : y < -clamp ? -clamp : y;
}

// Return slope(out) * v for a piecewise linear activation (linear, relu, lrelu), whose slope follows from the op's result `out`.
template <typename T> EG3D_DEVICE T slope_times(const BiasAct& o, int act, T v, T out) {
  if (o.clamp >= 0 && abs_of(out) >= T(o.clamp)) return T(0);
  const T below = act == kLinear ? T(1) : act == kRelu ? T(0) : T(o.alpha);
  return T(o.gain) * (out > T(0) ? T(1) : below) * v;
}

// Index is uint32_t if it can count all elements, because 64-bit divisions are slow.
template <typename S, int kAct, bool kSlope, typename Index>
EG3D_KERNEL void EG3D_BOUNDS(kBlock) bias_act_kernel(BiasAct o, const S* x, const S* b, const S* result, S* out) {
  using T = Arithmetic<S>;
  constexpr int kCount = Pack<S>::kCount;
  const int act = kAct == kAnyActivation ? o.act : kAct;
  const Index inner = static_cast<Index>(o.inner), channels = static_cast<Index>(o.channels), total = static_cast<Index>(o.count);
  const Index packs = (total + kCount - 1) / kCount, step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index pack = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; pack < packs; pack += step) {
    const Index first = pack * kCount;
    const bool whole = total - first >= kCount;
    Pack<S> values{}, results{};
    if (whole) {
      values = *reinterpret_cast<const Pack<S>*>(x + first);
      if (kSlope) results = *reinterpret_cast<const Pack<S>*>(result + first);
    } else {
      for (Index i = 0; i < total - first; ++i) {
        values.at[i] = x[first + i];
        if (kSlope) results.at[i] = result[first + i];
      }
    }
    Index within = 0, channel = 0;
    if (b != nullptr) {
      within = first % inner;
      channel = first / inner % channels;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const T bias = b == nullptr ? T(0) : widen(b[channel]);
      const T v = widen(values.at[i]) + bias;
      values.at[i] = narrow<S>(kSlope ? slope_times<T>(o, act, v, widen(results.at[i])) : finish<T>(o, act, v));
      if (b != nullptr && ++within == inner) {
        within = 0;
        channel = channel + 1 == channels ? 0 : channel + 1;
      }
    }
    if (whole) {
      *reinterpret_cast<Pack<S>*>(out + first) = values;
    } else {
      for (Index i = 0; i < total - first; ++i) out[first + i] = values.at[i];
    }
  }
}

template <typename S, int kAct, bool kSlope>
void bias_act_with(const BiasAct& o, const S* x, const S* b, const S* result, S* out, Stream stream) {
  const int64_t needed = ceil_div(o.count, int64_t(kBlock) * Pack<S>::kCount);
  const dim3 grid(static_cast<unsigned>(smaller(needed, int64_t(resident_blocks(kBlocksPerProcessor)))));
  if (o.count < (int64_t(1) << 31)) {  // the index after the last step still fits into 32 bits
    launch(bias_act_kernel<S, kAct, kSlope, uint32_t>, grid, dim3(kBlock), 0, stream, o, x, b, result, out);
  } else {
    launch(bias_act_kernel<S, kAct, kSlope, uint64_t>, grid, dim3(kBlock), 0, stream, o, x, b, result, out);
  }
}

// Compute out = bias_act(x) or, if `result` (a result of bias_act) is not null, out = slope(result) * (x + b). b may be null. The other
// pointers must be aligned to 16 bytes.
template <typename S> void bias_act(const BiasAct& o, const S* x, const S* b, const S* result, S* out, Stream stream) {
  if (result != nullptr) bias_act_with<S, kAnyActivation, true>(o, x, b, result, out, stream);
  else if (o.act == kLinear) bias_act_with<S, kLinear, false>(o, x, b, result, out, stream);
  else if (o.act == kLrelu) bias_act_with<S, kLrelu, false>(o, x, b, result, out, stream);
  else bias_act_with<S, kAnyActivation, false>(o, x, b, result, out, stream);
}

}  // namespace eg3d
