// Small matrix products of tiles that fit into the first-level cache of a core. Vector lanes run along the columns of the result.
#pragma once
#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

#include "simd.h"

namespace tile {

using simd::Pack;

constexpr int64_t kLine = 64;  // length of a cache line, bytes

template <typename T> inline void add(T* p, typename Pack<T>::type v) { Pack<T>::store(p, Pack<T>::load(p) + v); }

// Array that is initialised with zeros and aligned to cache lines.
template <typename T> class Array {
 public:
  explicit Array(int64_t size = 0) : size_(size), data_(size ? static_cast<T*>(::operator new(size * sizeof(T), kAligned)) : nullptr) {
    std::fill_n(data_, size, T(0));
  }
  Array(Array&& other) noexcept : size_(other.size_), data_(std::exchange(other.data_, nullptr)) {}
  Array& operator=(Array&& other) noexcept {
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Array() { ::operator delete(data_, kAligned); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAligned{kLine};
  int64_t size_;
  T* data_;
};

// Return a copy [rows][padded] of a matrix with any strides. The columns beyond those of the matrix are 0.
template <typename T> Array<T> packed(const T* p, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t padded) {
  Array<T> out(rows * padded);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; ++i) out[r * padded + i] = p[r * row_step + i * column_step];
  return out;
}

// Compute out[r][i] = finish(sum_k a[r][k] b[k][i], r, i) for `rows` rows and `vectors` vectors of columns. The sums stay in registers.
template <int rows, int vectors, typename T, typename Finish>
inline void product_block(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, Finish finish) {
  using V = typename Pack<T>::type;
  constexpr int width = Pack<T>::width;
  V acc[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V right[vectors];
    for (int v = 0; v < vectors; ++v) right[v] = Pack<T>::load(b + k * ldb + v * width);
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) acc[r][v] += a[r * lda + k] * right[v];
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) Pack<T>::store(out + r * ldo + v * width, finish(acc[r][v], r, v * width));
}

// The same for a complete tile: a [rows][depth], b [depth][columns], out [rows][columns]. The number of columns is a multiple of the vector
// width.
template <typename T, typename Finish>
inline void product(const T* a, int64_t lda, const T* b, int64_t columns, int64_t depth, int rows, T* out, Finish finish) {
  constexpr int width = Pack<T>::width;
  int64_t from = 0;
  auto strip = [&]<int vectors, int height>() {
    int r = 0;
    for (; r + height <= rows; r += height)
      product_block<height, vectors>(a + r * lda, lda, b + from, columns, depth, out + r * columns + from, columns,
                                     [&](auto sum, int at, int64_t i) { return finish(sum, r + at, from + i); });
    for (; r < rows; ++r)
      product_block<1, vectors>(a + r * lda, lda, b + from, columns, depth, out + r * columns + from, columns,
                                [&](auto sum, int at, int64_t i) { return finish(sum, r + at, from + i); });
    from += vectors * width;
  };
  if constexpr (simd::kManyRegisters)
    while (columns - from >= 4 * width) strip.template operator()<4, 4>();
  while (columns - from >= 2 * width) strip.template operator()<2, simd::kManyRegisters ? 8 : 6>();
  while (columns - from >= width) strip.template operator()<1, 8>();
}

// Add sum_p a[p][k] b[p][i] to out[k][i]. This is the contribution of a tile to the gradient of a layer's weights.
template <typename T>
inline void outer_product(const T* a, int64_t lda, int64_t count, const T* b, int64_t columns, int rows, T* out) {
  using V = typename Pack<T>::type;
  constexpr int width = Pack<T>::width;
  auto block = [&]<int height, int vectors>(int64_t k, int64_t from) {
    V acc[height][vectors] = {};  // sum over the tile first: adding single points to a large sum would lose digits
    for (int p = 0; p < rows; ++p) {
      V right[vectors];
      for (int v = 0; v < vectors; ++v) right[v] = Pack<T>::load(b + p * columns + from + v * width);
      for (int i = 0; i < height; ++i)
        for (int v = 0; v < vectors; ++v) acc[i][v] += a[p * lda + k + i] * right[v];
    }
    for (int i = 0; i < height; ++i)
      for (int v = 0; v < vectors; ++v) add(out + (k + i) * columns + from + v * width, acc[i][v]);
  };
  auto strip = [&]<int vectors>(int64_t from) {
    constexpr int height = vectors == 2 && simd::kManyRegisters ? 8 : 4;
    int64_t k = 0;
    for (; k + height <= count; k += height) block.template operator()<height, vectors>(k, from);
    for (; k < count; ++k) block.template operator()<1, vectors>(k, from);
  };
  int64_t from = 0;
  if constexpr (simd::kManyRegisters)
    for (; columns - from >= 4 * width; from += 4 * width) strip.template operator()<4>(from);
  for (; columns - from >= 2 * width; from += 2 * width) strip.template operator()<2>(from);
  for (; columns - from >= width; from += width) strip.template operator()<1>(from);
}

// Larger products, computed in panels of columns that are copied into the first-level cache. They are twice as fast as MKL's products on
// processors whose widest vectors MKL does not use.
constexpr int kPanelVectors = 2, kPanelRows = simd::kManyRegisters ? 8 : 6;
constexpr int64_t kPanelDepth = 256;

template <typename T> struct Strided {  // matrix with strides; columns of the right factor and of the result are adjacent
  T* data;
  int64_t row_step, step = 1;  // distances of neighbouring rows and of neighbouring columns, in elements
};

// Compute out = a b, or out += a b if `more` is true, for one panel [depth][vectors] of b.
template <int rows, int vectors, typename T>
inline void panel_block(Strided<const T> a, const T* panel, int64_t depth, Strided<T> out, bool more) {
  using V = typename Pack<T>::type;
  constexpr int width = Pack<T>::width;
  V acc[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, panel += vectors * width) {
    V right[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) right[v] = Pack<T>::load(panel + v * width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) acc[r][v] += a.data[r * a.row_step + k * a.step] * right[v];
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      T* const to = out.data + r * out.row_step + v * width;
      Pack<T>::store(to, more ? Pack<T>::load(to) + acc[r][v] : acc[r][v]);
    }
}

// The same for the rows from `from` to `all`, in blocks of `rows` rows, and at the end in blocks of half as many rows, and so on.
template <int rows, int vectors, typename T>
void panel_rows(Strided<const T> a, const T* panel, int64_t depth, Strided<T> out, bool more, int64_t from, int64_t all) {
  for (; from + rows <= all; from += rows)
    panel_block<rows, vectors, T>(
        {a.data + from * a.row_step, a.row_step, a.step}, panel, depth, {out.data + from * out.row_step, out.row_step}, more);
  if constexpr (rows > 1) panel_rows<rows / 2, vectors, T>(a, panel, depth, out, more, from, all);
}

// Compute out [rows][vectors] = a [rows][depth] b, or out += a b if `more` is true. Row k of b begins at row(k).
template <int vectors, typename T, typename Row>
void panel_product(Strided<const T> a, int64_t rows, Row row, int64_t depth, Strided<T> out, bool more) {
  constexpr int width = Pack<T>::width;
  alignas(kLine) T panel[kPanelDepth * vectors * width];
  for (int64_t first = 0; first < depth; first += kPanelDepth, more = true) {
    const int64_t deep = std::min(kPanelDepth, depth - first);
    for (int64_t k = 0; k < deep; ++k)
      for (int v = 0; v < vectors; ++v) Pack<T>::store(panel + (k * vectors + v) * width, Pack<T>::load(row(first + k) + v * width));
    panel_rows<kPanelRows, vectors, T>({a.data + first * a.step, a.row_step, a.step}, panel, deep, out, more, 0, rows);
  }
}

// Division of columns into panels. The number of columns is a multiple of the vector width.
template <typename T> struct Panels {
  static constexpr int64_t width = kPanelVectors * Pack<T>::width;
  int64_t columns, count = (columns + width - 1) / width;
  // Compute panel i of a product. row(k) returns a pointer to row k of the right factor.
  template <typename Row>
  void product(int64_t i, Strided<const T> a, int64_t rows, Row row, int64_t depth, Strided<T> out, bool more) const {
    const int64_t from = i * width;
    auto part = [&](int64_t k) { return row(k) + from; };
    const Strided<T> to{out.data + from, out.row_step};
    columns - from >= width ? panel_product<kPanelVectors>(a, rows, part, depth, to, more) : panel_product<1>(a, rows, part, depth, to, more);
  }
};

}  // namespace tile
