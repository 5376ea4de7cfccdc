// Products with frozen weights: x (T, in) bfloat16 times packed weights, for a few rows as well as for many.
//
// The torch form is F.linear. A row's sums are made in one order whatever shares the call, so its result is the same bits
// for every T. Threads take blocks of columns as they come free: one that the system holds up does not hold up the others.

#include <torch/library.h>

#include <algorithm>

#include "lanes.h"

namespace {

constexpr int64_t COLUMNS = 3 * LANES;  // of a block: eight rows of it, a row of weights and an input fill the registers
constexpr int64_t ROWS_AT_ONCE = 8;
constexpr int64_t AHEAD = 16;  // steps of k at which weights are asked for: what comes from memory is there in time

// y (ROWS, columns) = x (ROWS, in) times a block's weights (in / 2, COLUMNS, 2), plus bias (COLUMNS).
template <int ROWS>
void tile(const bf16* x, int64_t in, const bf16* weights, const float* bias, bf16* y, int64_t out, int64_t columns) {
  __m512 sums[ROWS][3];
  for (int c = 0; c < 3; ++c)
    for (int j = 0; j < ROWS; ++j) sums[j][c] = _mm512_loadu_ps(bias + c * LANES);
  for (int64_t k = 0; k < in; k += 2, weights += 2 * COLUMNS) {
    for (int c = 0; c < 3; ++c)  // beyond the last block it asks for nothing that is read
      _mm_prefetch(reinterpret_cast<const char*>(weights + 2 * (AHEAD * COLUMNS + c * LANES)), _MM_HINT_T0);
    const __m512bh w[3] = {load_pairs(weights), load_pairs(weights + 2 * LANES), load_pairs(weights + 4 * LANES)};
    for (int j = 0; j < ROWS; ++j) {
      const __m512bh input = both(x + j * in + k);
      for (int c = 0; c < 3; ++c) sums[j][c] = _mm512_dpbf16_ps(sums[j][c], w[c], input);
    }
  }
  for (int j = 0; j < ROWS; ++j)
    for (int c = 0; c * LANES < columns && c < 3; ++c) {
      const int64_t left = std::min(LANES, columns - c * LANES);
      _mm256_mask_storeu_epi16(y + j * out + c * LANES, static_cast<__mmask16>((1u << left) - 1),
                               (__m256i)_mm512_cvtneps_pbh(sums[j][c]));
    }
}

// x (T, in) -> (T, out). packed (blocks, in / 2, COLUMNS, 2), zero behind the last column; bias (blocks * COLUMNS).
Tensor product(const Tensor& x, const Tensor& packed, const Tensor& bias, int64_t out) {
  check(x, 2, "x");
  check(packed, 4, "packed");
  check(bias, 1, "bias");
  const int64_t rows = x.size(0), in = x.size(1), blocks = packed.size(0);
  TORCH_CHECK(packed.size(1) * 2 == in && packed.size(2) == COLUMNS && packed.size(3) == 2, "shapes do not fit");
  TORCH_CHECK(blocks * COLUMNS >= out && (blocks - 1) * COLUMNS < out && bias.size(0) == blocks * COLUMNS,
              "columns do not fit");
  Tensor made = at::empty({rows, out}, x.options());
  const bf16* from = x.data_ptr<bf16>();
  const bf16* weights = packed.data_ptr<bf16>();
  const float* biases = bias.data_ptr<float>();
  bf16* to = made.data_ptr<bf16>();
#pragma omp parallel for schedule(dynamic, 2)
  for (int64_t n = 0; n < blocks; ++n) {
    const bf16* w = weights + n * in * COLUMNS;
    const float* b = biases + n * COLUMNS;
    const int64_t columns = std::min(COLUMNS, out - n * COLUMNS);
    for (int64_t r = 0; r < rows; r += ROWS_AT_ONCE) {
      const bf16* xs = from + r * in;
      bf16* ys = to + r * out + n * COLUMNS;
      switch (std::min(ROWS_AT_ONCE, rows - r)) {
        case 1: tile<1>(xs, in, w, b, ys, out, columns); break;
        case 2: tile<2>(xs, in, w, b, ys, out, columns); break;
        case 3: tile<3>(xs, in, w, b, ys, out, columns); break;
        case 4: tile<4>(xs, in, w, b, ys, out, columns); break;
        case 5: tile<5>(xs, in, w, b, ys, out, columns); break;
        case 6: tile<6>(xs, in, w, b, ys, out, columns); break;
        case 7: tile<7>(xs, in, w, b, ys, out, columns); break;
        default: tile<8>(xs, in, w, b, ys, out, columns); break;
      }
    }
  }
  return made;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplane, m) { m.def("product(Tensor x, Tensor packed, Tensor bias, int out) -> Tensor", product); }
