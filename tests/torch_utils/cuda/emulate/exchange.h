// Exchange of arguments and results between a test and an emulated op. The arguments are read from one file, and the results are written to
// another. The file contains an int64 number of bytes, and then the bytes, for each argument. Every tensor has a separate heap block of exactly
// its size.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cuda_portable.cuh"

class Exchange {
 public:
  Exchange(int count, char** words) {
    if (count != 4 || !(in_ = std::fopen(words[1], "rb")) || !(out_ = std::fopen(words[2], "wb"))) std::_Exit(2);
    emulated::order = std::atoi(words[3]);
  }
  ~Exchange() { std::fclose(in_); std::fclose(out_); }

  template <typename T> T number() { return *tensor<T>(); }  // int64_t or double

  // Return the next tensor, or null if it is absent (0 bytes).
  template <typename T> T* tensor() {
    int64_t bytes = 0;
    if (std::fread(&bytes, sizeof bytes, 1, in_) != 1) std::_Exit(2);
    if (bytes == 0) return nullptr;
    T* memory = allocate<T>(bytes / static_cast<int64_t>(sizeof(T)));
    if (std::fread(memory, 1, static_cast<size_t>(bytes), in_) != static_cast<size_t>(bytes)) std::_Exit(2);
    return memory;
  }

  // Return memory of the emulated device, filled with NaN, so that a result that was never written is detected.
  template <typename T> T* allocate(int64_t count, int fill = 0xFF) {
    void* raw = std::malloc(static_cast<size_t>(count) * sizeof(T));
    std::memset(raw, fill, static_cast<size_t>(count) * sizeof(T));
    owned_.emplace_back(raw, std::free);
    return static_cast<T*>(raw);
  }

  template <typename T> void result(const T* values, int64_t count) { std::fwrite(values, sizeof(T), static_cast<size_t>(count), out_); }

 private:
  std::FILE *in_ = nullptr, *out_ = nullptr;
  std::vector<std::unique_ptr<void, void (*)(void*)>> owned_;
};
