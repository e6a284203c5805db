// A kernel with mistakes that the emulated device has to detect. Input: number of the mistake; 0: no mistake.
#include "exchange.h"

namespace {

// Compute out[i] = in[n - 1 - i] by shared memory.
EG3D_KERNEL void reverse(const float* in, float* out, int n, int mistake) {
  EG3D_SHARED(float, shared);
  const int i = threadIdx.x;
  if (i >= n && mistake == 1) return;  // this thread does not reach the barrier
  if (i < n) shared[i] = in[i];
  if (mistake != 2) __syncthreads();
  if (i < n) out[i + (mistake == 3)] = shared[mistake == 4 ? n : n - 1 - i];
  if (mistake == 5 && i % 32 < 16) __shfl_sync(eg3d::kAllLanes, i, 0);  // half a warp
}

}  // namespace

int main(int count, char** words) {
  Exchange io(count, words);
  const int mistake = static_cast<int>(io.number<int64_t>()), n = 60;
  float *in = io.allocate<float>(n), *out = io.allocate<float>(n);
  for (int i = 0; i < n; ++i) in[i] = static_cast<float>(i);
  eg3d::launch(reverse, dim3(1), dim3(64), n * sizeof(float), Stream{}, in, out, n, mistake);
  io.result(out, n);
}
