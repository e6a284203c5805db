// Minimal filtering along a line (Toom-Cook algorithm): m results of a filter with 3 taps are computed from m + 2 values by m + 2
// multiplications. Filters with stride 2 follow below.
//
// The algorithm multiplies a polynomial with m coefficients by one with 3 coefficients. A evaluates the first polynomial at m + 2 points, one
// of which is infinity, G evaluates the second one, and B interpolates the product from its values. The transpose of this multiplication is
// the filter y = A^T [(G g) * (B^T d)]. The denominators of the interpolation, prod (point - other points), are multiplied into G, because G
// is applied only to kernels. A two-dimensional tile is transformed along its columns and then along its rows.
#pragma once
#include <cstdint>

#include "simd.h"

namespace minimal {

using simd::Pack;

// Constants that all filters have: `in`, the number of values that a tile reads; `in_step`, the distance to the values of the next tile;
// `products`, the number of multiplications; `kernels`, the number of transformed kernel values, of which multiplication i uses number
// kernel_of(i); `out`, the number of results. A chunk has about `elements` transformed values, and at least `least` tiles.
template <int m, typename T> struct Stride1 {
  using value = T;
  using V = typename Pack<T>::type;
  static constexpr int in = m + 2, in_step = m, products = m + 2, kernels = m + 2, out = m;
  static constexpr int kernel_of(int product) { return product; }
  static constexpr int64_t elements = m == 2 ? 1 << 19 : 1 << 18, least = m == 2 ? 64 : 128;
};

template <int m, typename T> struct Filter;

template <typename T> struct Filter<2, T> : Stride1<2, T> {  // points 0, 1, -1 and infinity
  using V = typename Pack<T>::type;
  static void patch(const V (&d)[4], V (&v)[4]) {  // B^T d
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
  }
  static void result(const V (&p)[4], V (&y)[2]) {  // A^T p
    y[0] = p[0] + p[1] + p[2], y[1] = p[1] - p[2] - p[3];
  }
  static void gradient(const V (&y)[2], V (&p)[4]) {  // A y
    p[0] = y[0], p[1] = y[0] + y[1], p[2] = y[0] - y[1], p[3] = -y[1];
  }
  static void kernel(const V (&g)[3], V (&u)[4]) {  // G g
    const V sum = (g[0] + g[2]) / 2, middle = g[1] / 2;
    u[0] = g[0], u[1] = sum + middle, u[2] = sum - middle, u[3] = g[2];
  }
  static void kernel_gradient(const V (&u)[4], V (&g)[3]) {  // G^T u
    const V sum = (u[1] + u[2]) / 2;
    g[0] = u[0] + sum, g[1] = (u[1] - u[2]) / 2, g[2] = u[3] + sum;
  }
};

// Points 0, a, -a, b, -b and infinity. Of about twenty pairs (a, b) that were tried, 5/8 and 3/2 had the smallest rounding error (root mean
// square). With 1 and 2 it is twice as large, and the largest single error is four times as large. Powers of a and b up to the third are
// exact in float32.
template <typename T> struct Filter<4, T> : Stride1<4, T> {
  using V = typename Pack<T>::type;
  static constexpr T a = T(5) / 8, b = T(3) / 2, aa = a * a, bb = b * b, aaa = a * aa, bbb = b * bb;
  static constexpr T at_0 = 1 / (aa * bb), at_a = 1 / (2 * aa * (aa - bb)), at_b = 1 / (2 * bb * (bb - aa));  // 1 / prod (point - other)

  static void patch(const V (&d)[6], V (&v)[6]) {  // B^T d
    const V even_a = d[4] - bb * d[2], odd_a = d[3] - bb * d[1], even_b = d[4] - aa * d[2], odd_b = d[3] - aa * d[1];
    v[0] = even_a - aa * (d[2] - bb * d[0]);
    v[1] = even_a + a * odd_a, v[2] = even_a - a * odd_a;
    v[3] = even_b + b * odd_b, v[4] = even_b - b * odd_b;
    v[5] = d[5] - bb * d[3] - aa * odd_a;
  }
  static void result(const V (&p)[6], V (&y)[4]) {  // A^T p
    const V even_a = p[1] + p[2], odd_a = p[1] - p[2], even_b = p[3] + p[4], odd_b = p[3] - p[4];
    y[0] = p[0] + even_a + even_b;
    y[1] = a * odd_a + b * odd_b;
    y[2] = aa * even_a + bb * even_b;
    y[3] = aaa * odd_a + bbb * odd_b + p[5];
  }
  static void gradient(const V (&y)[4], V (&p)[6]) {  // A y
    const V even_a = y[0] + aa * y[2], odd_a = y[1] + aa * y[3], even_b = y[0] + bb * y[2], odd_b = y[1] + bb * y[3];
    p[0] = y[0];
    p[1] = even_a + a * odd_a, p[2] = even_a - a * odd_a;
    p[3] = even_b + b * odd_b, p[4] = even_b - b * odd_b;
    p[5] = y[3];
  }
  static void kernel(const V (&g)[3], V (&u)[6]) {  // G g
    const V even_a = at_a * (g[0] + aa * g[2]), odd_a = at_a * a * g[1], even_b = at_b * (g[0] + bb * g[2]), odd_b = at_b * b * g[1];
    u[0] = at_0 * g[0];
    u[1] = even_a + odd_a, u[2] = even_a - odd_a, u[3] = even_b + odd_b, u[4] = even_b - odd_b;
    u[5] = g[2];
  }
  static void kernel_gradient(const V (&u)[6], V (&g)[3]) {  // G^T u
    const V even_a = at_a * (u[1] + u[2]), odd_a = at_a * (u[1] - u[2]), even_b = at_b * (u[3] + u[4]), odd_b = at_b * (u[3] - u[4]);
    g[0] = at_0 * u[0] + even_a + even_b;
    g[1] = a * odd_a + b * odd_b;
    g[2] = aa * even_a + bb * even_b + u[5];
  }
};

// Stride 2: the two outer taps form a filter over every second value, of which four multiplications give three results (points 0, 1, -1 and
// infinity). The middle tap is multiplied directly. There are seven multiplications instead of nine, three of which use the same kernel value.
template <typename T> struct Stride2 {
  using value = T;
  using V = typename Pack<T>::type;
  static constexpr int products = 7, kernels = 5;
  static constexpr int kernel_of(int product) { return product < 4 ? product : 4; }
  static constexpr int64_t elements = 1 << 18, least = 128;

  static void kernel(const V (&g)[3], V (&u)[5]) {
    u[0] = g[0], u[1] = (g[0] + g[2]) / 2, u[2] = (g[0] - g[2]) / 2, u[3] = g[2], u[4] = g[1];
  }
  static void kernel_gradient(const V (&u)[5], V (&g)[3]) {
    g[0] = u[0] + (u[1] + u[2]) / 2, g[1] = u[4], g[2] = u[3] + (u[1] - u[2]) / 2;
  }
};

template <typename T> struct Down : Stride2<T> {  // y[i] = g0 d[2i] + g1 d[2i + 1] + g2 d[2i + 2]
  using V = typename Pack<T>::type;
  static constexpr int in = 7, in_step = 6, out = 3;
  static void patch(const V (&d)[7], V (&v)[7]) {
    v[0] = d[0] - d[4], v[1] = d[2] + d[4], v[2] = d[4] - d[2], v[3] = d[2] - d[6];
    v[4] = d[1], v[5] = d[3], v[6] = d[5];
  }
  static void result(const V (&p)[7], V (&y)[3]) {
    const V sum = p[1] + p[2];
    y[0] = p[0] + sum + p[4], y[1] = p[1] - p[2] + p[5], y[2] = sum - p[3] + p[6];
  }
  static void gradient(const V (&y)[3], V (&p)[7]) {
    const V sum = y[0] + y[2];
    p[0] = y[0], p[1] = sum + y[1], p[2] = sum - y[1], p[3] = -y[2];
    p[4] = y[0], p[5] = y[1], p[6] = y[2];
  }
};

// The transpose of Down, with the taps in reverse order: y[2i] = g0 d[i - 1] + g2 d[i], y[2i + 1] = g1 d[i].
template <typename T> struct Up : Stride2<T> {
  using V = typename Pack<T>::type;
  static constexpr int in = 4, in_step = 3, out = 6;
  static void patch(const V (&d)[4], V (&v)[7]) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
    v[4] = d[1], v[5] = d[2], v[6] = d[3];
  }
  static void result(const V (&p)[7], V (&y)[6]) {
    const V sum = p[1] + p[2];
    y[0] = p[0] + sum, y[2] = p[1] - p[2], y[4] = sum - p[3];
    y[1] = p[4], y[3] = p[5], y[5] = p[6];
  }
};

// Apply the transformation `line` to the columns of a matrix, and then to its rows. load(row, column) returns an element of the matrix, and
// store(row, column, value) receives an element of the result.
template <typename V, int in, int out, typename Load, typename Store>
[[gnu::always_inline]] inline void both_ways(void (*line)(const V (&)[in], V (&)[out]), Load load, Store store) {
  V half[out][in];
#pragma GCC unroll 7
  for (int c = 0; c < in; ++c) {
    V from[in], to[out];
#pragma GCC unroll 7
    for (int r = 0; r < in; ++r) from[r] = load(r, c);
    line(from, to);
#pragma GCC unroll 7
    for (int r = 0; r < out; ++r) half[r][c] = to[r];
  }
#pragma GCC unroll 7
  for (int r = 0; r < out; ++r) {
    V to[out];
    line(half[r], to);
#pragma GCC unroll 7
    for (int c = 0; c < out; ++c) store(r, c, to[c]);
  }
}

}  // namespace minimal
