// CUDA kernels that interpolate tri-planes at points and apply the decoder, and their gradients (formulas and schema: triplane_decode.py).
//
// A block of 128 threads processes 128 points at a time. First, the threads together write the features of all points to shared memory. Then
// each thread computes the decoder for one point, with its features and outputs in registers and the weights in shared memory, so that hidden
// units are never stored. Sizes are padded to C = 16 or 32 channels and D = 0, 16 or 32 colours. The backward pass computes all of this again.
// It writes the hidden units to shared memory, 16 at a time, to sum the weights' gradients over points. These sums have a fixed order. The
// planes' gradients are added by atomic operations and are not bitwise reproducible.
#pragma once
#include "triplane_gather.cuh"

namespace eg3d {

template <typename T> struct Decoder {
  const T *w0, *b0, *w1, *b1;  // [J, channels], [J], [1 + colours, J], [1 + colours]
  int units, colours;
};

constexpr int kChunk = 16, kChunkLine = kChunk + 4;  // hidden units in shared memory at a time; lines are padded to avoid bank conflicts

// Offsets of the arrays in shared memory, in elements. The outputs of a point are stored as D colours, the density, and three zeros.
template <int C, int D> struct Layout {
  static constexpr int kFeatures = C + 4, kOutputs = D + 4;  // lengths of a point's lines of features and outputs; C + 4 >= D
  int units, w0, w1, b0, b1, features, grads, hidden, slopes, pairs, singles, biases, forward_end, backward_end;
  EG3D_BOTH explicit Layout(int units_) : units(units_) {
    const int padded = (units + kChunk - 1) / kChunk * kChunk;
    w0 = 0;                              // [unit][C]
    w1 = w0 + padded * C;                // [unit][D + 4]
    b0 = w1 + padded * kOutputs;         // [unit]
    b1 = b0 + padded;                    // [D + 4]
    features = b1 + kOutputs;            // [point][C + 4]
    forward_end = features + kTile * kFeatures;
    grads = forward_end;                 // [point][D + 4], gradients of the outputs
    hidden = grads + kTile * kOutputs;   // [point][kChunkLine]
    slopes = hidden + kTile * kChunkLine;  // [point][kChunkLine], gradient of w0 f + b0
    pairs = slopes + kTile * kChunkLine;   // [chunk][8][thread], sums for w0 and the colours of w1
    singles = pairs + padded / kChunk * 8 * kTile;  // [chunk][thread], for b0 and the density's row of w1
    biases = singles + padded / kChunk * kTile;     // [2][D + 4], for b1
    backward_end = biases + 2 * kOutputs;
  }
};

template <typename T, int C, int D> EG3D_DEVICE void load_weights(const Decoder<T>& d, int channels, const Layout<C, D>& at, T* shared) {
  constexpr int O = Layout<C, D>::kOutputs;
  const int padded = (d.units + kChunk - 1) / kChunk * kChunk;
  for (int i = threadIdx.x; i < padded * C; i += kTile) {
    shared[at.w0 + i] = i / C < d.units && i % C < channels ? d.w0[int64_t(i / C) * channels + i % C] : T(0);
  }
  for (int i = threadIdx.x; i < padded * O; i += kTile) {
    const int j = i / O, o = i % O, row = o < D ? o + 1 : 0;  // the density's row comes first in w1
    const bool there = j < d.units && (o < d.colours || o == D);
    shared[at.w1 + i] = there ? d.w1[int64_t(row) * d.units + j] : T(0);
  }
  for (int i = threadIdx.x; i < padded; i += kTile) shared[at.b0 + i] = i < d.units ? d.b0[i] : T(0);
  for (int i = threadIdx.x; i < O; i += kTile) shared[at.b1 + i] = i < d.colours ? d.b1[i + 1] : i == D ? d.b1[0] : T(0);
}

template <typename T, int Count> EG3D_DEVICE T dot(T start, const T* line, const T (&with)[Count]) {
  T parts[4] = {start, T(0), T(0), T(0)};
#pragma unroll
  for (int i = 0; i < Count; ++i) parts[i % 4] += line[i] * with[i];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Compute the decoder's outputs of one point.
template <typename T, int C, int D>
EG3D_DEVICE void decode(const Layout<C, D>& at, const T* shared, const T (&feature)[C], T (&out)[D + 4]) {
  constexpr int O = D + 4;
#pragma unroll
  for (int o = 0; o < O; ++o) out[o] = shared[at.b1 + o];
  for (int j = 0; j < at.units; ++j) {
    const T h = quick_softplus(dot(shared[at.b0 + j], shared + at.w0 + j * C, feature));
#pragma unroll
    for (int o = 0; o < O; ++o) out[o] += shared[at.w1 + j * O + o] * h;
  }
}

template <typename T, int C, int D>
EG3D_KERNEL void EG3D_BOUNDS(kTile) decode_forward_kernel(EG3D_CONSTANT Planes<T> p, Decoder<T> d, T* features, T* sigma) {
  EG3D_SHARED(T, shared);
  const Layout<C, D> at(d.units);
  const int64_t first = int64_t(blockIdx.x) * kTile;
  const int tid = threadIdx.x;
  load_weights(d, p.channels, at, shared);
  gather<T, C>(p, first, at.kFeatures, shared + at.features);
  __syncthreads();
  T* const line = shared + at.features + tid * at.kFeatures;  // from here to the next barrier, only this thread uses the line
  T feature[C], out[D + 4];
#pragma unroll
  for (int c = 0; c < C; ++c) feature[c] = line[c];
  decode(at, shared, feature, out);
  if (first + tid < p.points_total) sigma[first + tid] = out[D];
  if constexpr (D > 0) {
#pragma unroll
    for (int o = 0; o < D; ++o) line[o] = quick_sigmoid(out[o]) * T(1.002) - T(0.001);
    __syncthreads();
    const int points = static_cast<int>(smaller(int64_t(kTile), p.points_total - first));
    for (int i = tid; i < points * d.colours; i += kTile) {
      features[first * d.colours + i] = shared[at.features + i / d.colours * at.kFeatures + i % d.colours];
    }
  }
}

template <typename T> struct DecoderPartials {
  T *w0, *b0, *w1, *b1;  // each [blocks, ...] of the weight's shape
};

// Add the sums over the tile's points for 16 hidden units. Thread t computes 4 x 2 entries (4 units, 2 columns) of the matrix
// [units, C features | D colours], and a quarter of the sum for one entry of the gradient of b0 or of the density's row.
template <typename T, int C, int D> EG3D_DEVICE void add_products(const Layout<C, D>& at, T* shared, int chunk) {
  constexpr int O = D + 4, kPairs = (C + D) / 2, kQuads = kChunk / 4;
  static_assert(kPairs * kQuads <= kTile, "one pair of columns and four units for each thread");
  const int tid = threadIdx.x;
  if (tid < kPairs * kQuads) {
    const int column = tid % kPairs * 2, quad = tid / kPairs * 4;
    const bool of_features = column < C;
    const T* left = shared + (of_features ? at.slopes : at.hidden) + quad;
    const T* right = of_features ? shared + at.features + column : shared + at.grads + column - C;
    const int step = of_features ? at.kFeatures : O;
    T sum[8] = {};
#pragma unroll 4
    for (int point = 0; point < kTile; ++point) {
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] += left[point * kChunkLine + k / 2] * right[point * step + k % 2];
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) shared[at.pairs + (chunk * 8 + k) * kTile + tid] += sum[k];
  }
  const int entry = tid % 32, quarter = tid / 32;
  T single = 0;
#pragma unroll 4
  for (int point = quarter * (kTile / 4); point < (quarter + 1) * (kTile / 4); ++point) {
    single += entry < kChunk ? shared[at.slopes + point * kChunkLine + entry]
                             : shared[at.hidden + point * kChunkLine + entry - kChunk] * shared[at.grads + point * O + D];
  }
  shared[at.singles + chunk * kTile + tid] += single;
}

// Compute the gradients of the outputs of this thread's point before the sigmoid, in registers and in the line of `grads`. At the start, the
// line contains the gradients of the colour features and of the density.
template <typename T, int C, int D>
EG3D_DEVICE void output_gradients(const Layout<C, D>& at, T* shared, const T (&feature)[C], T* line, T (&grad)[D + 4]) {
  T out[D + 4];
  if constexpr (D > 0) decode(at, shared, feature, out);
#pragma unroll
  for (int o = 0; o < D + 4; ++o) {
    grad[o] = line[o];
    if (o < D) {
      const T s = quick_sigmoid(out[o]);
      grad[o] *= T(1.002) * s * (T(1) - s);
      line[o] = grad[o];
    }
  }
}

template <typename T, int C, int D>
EG3D_DEVICE void load_gradients(const Decoder<T>& d, const T* grad_features, const T* grad_sigma, int64_t first, int points, T* tile) {
  constexpr int O = D + 4;
  for (int i = threadIdx.x; i < kTile * O; i += kTile) {
    const int point = i / O, o = i % O;
    T value = 0;
    if (point < points && o < d.colours) value = grad_features[(first + point) * d.colours + o];
    if (point < points && o == D) value = grad_sigma[first + point];
    tile[i] = value;
  }
}

template <typename T, int C, int D>
EG3D_DEVICE void write_partials(const Layout<C, D>& at, const Decoder<T>& d, int channels, const T* shared, const DecoderPartials<T>& out) {
  constexpr int O = D + 4, kPairs = (C + D) / 2, kQuads = kChunk / 4;
  const int tid = threadIdx.x;
  const int64_t block = blockIdx.x, rows = 1 + d.colours;
  for (int chunk = 0; chunk * kChunk < d.units; ++chunk) {
    for (int k = 0; k < 8 && tid < kPairs * kQuads; ++k) {
      const int column = tid % kPairs * 2 + k % 2, j = chunk * kChunk + tid / kPairs * 4 + k / 2;
      const T value = shared[at.pairs + (chunk * 8 + k) * kTile + tid];
      if (j >= d.units) continue;
      if (column < channels) out.w0[(block * d.units + j) * channels + column] = value;
      if (column >= C && column - C < d.colours) out.w1[(block * rows + 1 + column - C) * d.units + j] = value;
    }
    const int j = chunk * kChunk + tid % kChunk;
    if (tid < 2 * kChunk && j < d.units) {
      const T* quarter = shared + at.singles + chunk * kTile + tid;
      const T value = (quarter[0] + quarter[32]) + (quarter[64] + quarter[96]);
      if (tid < kChunk) out.b0[block * d.units + j] = value; else out.w1[block * rows * d.units + j] = value;
    }
  }
  if (tid < O && (tid < d.colours || tid == D)) {
    out.b1[block * rows + (tid == D ? 0 : tid + 1)] = shared[at.biases + tid] + shared[at.biases + O + tid];
  }
}

template <typename T, int C, int D>
EG3D_KERNEL void EG3D_BOUNDS(kTile)
    decode_backward_kernel(EG3D_CONSTANT Planes<T> p, Decoder<T> d, const T* grad_features, const T* grad_sigma, T* grad_planes,
                           DecoderPartials<T> partial) {
  EG3D_SHARED(T, shared);
  constexpr int O = D + 4;
  const Layout<C, D> at(d.units);
  const int tid = threadIdx.x;
  load_weights(d, p.channels, at, shared);
  for (int i = at.pairs + tid; i < at.backward_end; i += kTile) shared[i] = 0;
  for (int64_t first = int64_t(blockIdx.x) * kTile; first < p.points_total; first += int64_t(gridDim.x) * kTile) {
    const int points = static_cast<int>(smaller(int64_t(kTile), p.points_total - first));
    gather<T, C>(p, first, at.kFeatures, shared + at.features);
    load_gradients<T, C, D>(d, grad_features, grad_sigma, first, points, shared + at.grads);
    __syncthreads();
    T* const line = shared + at.features + tid * at.kFeatures;
    T feature[C], grad[O], grad_feature[C] = {};
#pragma unroll
    for (int c = 0; c < C; ++c) feature[c] = line[c];
    output_gradients(at, shared, feature, shared + at.grads + tid * O, grad);
    for (int chunk = 0; chunk * kChunk < d.units; ++chunk) {
      for (int k = 0; k < kChunk; ++k) {  // units beyond the last one have the weight 0
        const int j = chunk * kChunk + k;
        const T* w0 = shared + at.w0 + j * C;
        const T pre = dot(shared[at.b0 + j], w0, feature);
        const T slope = dot(T(0), shared + at.w1 + j * O, grad) * quick_sigmoid(pre);
        shared[at.hidden + tid * kChunkLine + k] = quick_softplus(pre);
        shared[at.slopes + tid * kChunkLine + k] = slope;
#pragma unroll
        for (int c = 0; c < C; ++c) grad_feature[c] += w0[c] * slope;
      }
      __syncthreads();
      add_products(at, shared, chunk);
      __syncthreads();
    }
    if (tid < 2 * O) {
      T sum = 0;
      for (int point = tid / O * (kTile / 2); point < (tid / O + 1) * (kTile / 2); ++point) sum += shared[at.grads + point * O + tid % O];
      shared[at.biases + tid] += sum;
    }
#pragma unroll
    for (int c = 0; c < C; ++c) line[c] = grad_feature[c];
    __syncthreads();
    scatter<T, C>(p, first, at.kFeatures, shared + at.features, grad_planes);
    __syncthreads();
  }
  write_partials(at, d, p.channels, shared, partial);
}

// ---- host ------------------------------------------------------------------------------------------------------------------------------
constexpr int kMaxChannels = 32, kMaxColours = 32;
constexpr size_t kMaxShared = 160 * 1024;  // bytes that a block can have on every device for which the kernels are built

// Call work<C, D>() with padded sizes that are large enough for these numbers. Return false if there are none.
template <typename Work> bool with_padded(int channels, int colours, Work work) {
  if (channels > kMaxChannels || colours > kMaxColours) return false;
  if (channels <= 16 && colours == 0) work.template operator()<16, 0>();
  else if (channels <= 16 && colours <= 16) work.template operator()<16, 16>();
  else if (colours == 0) work.template operator()<32, 0>();
  else work.template operator()<32, 32>();
  return true;
}

// Return true if a decoder of these sizes fits into shared memory. The backward pass needs more memory than the forward pass.
template <typename T> bool decoder_fits(int units, int channels, int colours, bool backward) {
  bool fits = false;
  with_padded(channels, colours, [&]<int C, int D>() {
    const Layout<C, D> at(units);
    fits = size_t(backward ? at.backward_end : at.forward_end) * sizeof(T) <= kMaxShared;
  });
  return fits;
}

template <typename T> void decode_forward(const Planes<T>& p, const Decoder<T>& d, T* features, T* sigma, Stream stream) {
  with_padded(p.channels, d.colours, [&]<int C, int D>() {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.points_total, kTile)));
    launch(decode_forward_kernel<T, C, D>, grid, dim3(kTile), Layout<C, D>(d.units).forward_end * sizeof(T), stream, p, d, features, sigma);
  });
}

template <typename T> int64_t decode_backward_blocks(const Planes<T>& p) {
  return smaller(ceil_div(p.points_total, kTile), int64_t(resident_blocks(2)));
}

// Compute all gradients. grad_planes must contain zeros, and `partial` must have decode_backward_blocks(p) rows.
template <typename T>
void decode_backward(
    const Planes<T>& p, const Decoder<T>& d, const T* grad_features, const T* grad_sigma, T* grad_planes, const DecoderPartials<T>& partial,
    const DecoderPartials<T>& grad, Stream stream) {
  const int64_t blocks = decode_backward_blocks(p), rows = 1 + d.colours;
  with_padded(p.channels, d.colours, [&]<int C, int D>() {
    const size_t shared = Layout<C, D>(d.units).backward_end * sizeof(T);
    const dim3 grid(static_cast<unsigned>(blocks));
    launch(decode_backward_kernel<T, C, D>, grid, dim3(kTile), shared, stream, p, d, grad_features, grad_sigma, grad_planes, partial);
  });
  const T* unscaled = nullptr;
  launch_sum_partials<T>(partial.w0, blocks, int64_t(d.units) * p.channels, unscaled, 1, 1, grad.w0, stream);
  launch_sum_partials<T>(partial.b0, blocks, d.units, unscaled, 1, 1, grad.b0, stream);
  launch_sum_partials<T>(partial.w1, blocks, rows * d.units, unscaled, 1, 1, grad.w1, stream);
  launch_sum_partials<T>(partial.b1, blocks, rows, unscaled, 1, 1, grad.b1, stream);
}

}  // namespace eg3d
