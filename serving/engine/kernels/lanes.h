// What the kernels share: registers of 16 floats, bfloat16 pairs, and the check of a tensor's shape.
#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

using at::Tensor;
using bf16 = at::BFloat16;

constexpr int64_t LANES = 16;  // floats in a register

inline __m512 widen(__m256i packed) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
}
inline __m512 load16(const bf16* from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline void store16(bf16* to, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
}
inline __m512 rounded(__m512 value) { return widen((__m256i)_mm512_cvtneps_pbh(value)); }
inline __m512bh load_pairs(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
inline __m512bh both(const bf16* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return (__m512bh)_mm512_set1_epi32(bits);
}

inline void check(const Tensor& tensor, int64_t dim, const char* name) {
  TORCH_CHECK(tensor.dim() == dim && tensor.is_contiguous(), name, " must be contiguous with ", dim, " dimensions");
}

}  // namespace
