// Small CPU kernels for bfloat16 steps: what torch does in many passes over small tensors, in one.
//
// Each has a torch form beside it in serving/engine (the module that calls it) and a test that compares the two. They
// need AVX512 with bfloat16 dot products; the caller asks the machine first. Every (token, head) and every row of a
// block is computed by itself and in one order, so a token's result does not depend on what shares its step.

#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t KEY_BLOCK = 16;  // positions of a block of the cache
constexpr int64_t QUERIES_AT_ONCE = 8;
constexpr int64_t BLOCK_ROWS = 4;  // tokens of one adapter that share a read of its weights

// exp(x) for x <= 0 and above -87: 2^n times a polynomial of degree 5 on [-ln2/2, ln2/2]; error below 3e-7 of the value.
inline __m512 exp_negative(__m512 x) {
  const __m512 limit = _mm512_set1_ps(-87.0f);
  const __mmask16 gone = _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ);
  x = _mm512_max_ps(limit, x);  // in this order a NaN stays one
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(~gone), _mm512_scalef_ps(p, n));
}

// --- norm ------------------------------------------------------------------------------------------------------------

// x (T, n) += y when y is there, rounded; returns x / rms(x) * (weight + offset). Zhang and Sennrich 2019, eq. 4.
Tensor add_rms_norm(Tensor x, const std::optional<Tensor>& y, const Tensor& weight, double eps, double offset) {
  check(x, 2, "x");
  const int64_t rows = x.size(0), n = x.size(1);
  TORCH_CHECK(n % LANES == 0, "the width must be a multiple of ", LANES);
  Tensor out = at::empty_like(x);
  bf16* xs = x.data_ptr<bf16>();
  const bf16* ys = y ? y->data_ptr<bf16>() : nullptr;
  const bf16* w = weight.data_ptr<bf16>();
  bf16* outs = out.data_ptr<bf16>();
  const __m512 shift = _mm512_set1_ps(static_cast<float>(offset));
#pragma omp parallel for if (rows * n > 65536)
  for (int64_t t = 0; t < rows; ++t) {
    bf16* row = xs + t * n;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) {
      __m512 value = load16(row + i);
      if (ys != nullptr) {
        value = rounded(_mm512_add_ps(value, load16(ys + t * n + i)));
        store16(row + i, value);
      }
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(n) + static_cast<float>(eps));
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < n; i += LANES) {
      const __m512 gain = _mm512_add_ps(load16(w + i), shift);
      store16(outs + t * n + i, _mm512_mul_ps(_mm512_mul_ps(load16(row + i), factor), gain));
    }
  }
  return out;
}

// --- activation ------------------------------------------------------------------------------------------------------

inline __m512 sigmoid(__m512 x) {
  // Of |x| first: exp of a negative number does not overflow.
  const __m512 e = exp_negative(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 small = _mm512_div_ps(e, _mm512_add_ps(one, e));
  const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
  return _mm512_mask_blend_ps(positive, small, _mm512_sub_ps(one, small));
}

// act(gate) * up for gate_up (T, 2n) -> (T, n). tanh_gelu: the tanh form of GELU in place of SiLU.
Tensor gated(const Tensor& gate_up, bool tanh_gelu) {
  check(gate_up, 2, "gate_up");
  const int64_t rows = gate_up.size(0), n = gate_up.size(1) / 2;
  TORCH_CHECK(n % LANES == 0, "the width must be a multiple of ", LANES);
  Tensor out = at::empty({rows, n}, gate_up.options());
  const bf16* in = gate_up.data_ptr<bf16>();
  bf16* outs = out.data_ptr<bf16>();
#pragma omp parallel for if (rows * n > 16384)
  for (int64_t t = 0; t < rows; ++t) {
    const bf16* gate = in + t * 2 * n;
    const bf16* up = gate + n;
    for (int64_t i = 0; i < n; i += LANES) {
      const __m512 g = load16(gate + i);
      __m512 inner = g;
      if (tanh_gelu) {  // 0.5 (1 + tanh(u)) is sigmoid(2u)
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(g, g), g);
        inner = _mm512_mul_ps(_mm512_set1_ps(1.5957691216f), _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, g));
      }
      const __m512 act = rounded(_mm512_mul_ps(g, sigmoid(inner)));
      store16(outs + t * n + i, _mm512_mul_ps(act, load16(up + i)));
    }
  }
  return out;
}

// --- attention -------------------------------------------------------------------------------------------------------
// The cache of a layer: keys (rows, kv, blocks, d/2, 16, 2), values (rows, kv, blocks, 8, d, 2). A block of 16 positions
// lies in one piece; pairs are what a bfloat16 dot product takes: of dimensions for keys, of positions for values.

struct Shape {
  int64_t heads, kv, d, blocks;
};

inline void rotate(bf16* x, const bf16* cos, const bf16* sin, int64_t turned) {
  const int64_t half = turned / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    const __m512 a = load16(x + i), b = load16(x + half + i);
    // Rounded after each product, as the torch form does.
    const __m512 first = _mm512_sub_ps(rounded(_mm512_mul_ps(a, load16(cos + i))), rounded(_mm512_mul_ps(b, load16(sin + i))));
    const __m512 second =
        _mm512_add_ps(rounded(_mm512_mul_ps(b, load16(cos + half + i))), rounded(_mm512_mul_ps(a, load16(sin + half + i))));
    store16(x + i, first);
    store16(x + half + i, second);
  }
}

// The norm of one head in place (Qwen3, Gemma 3).
inline void norm_head(bf16* x, const bf16* weight, int64_t d, float eps, float offset) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += LANES) squares = _mm512_fmadd_ps(load16(x + i), load16(x + i), squares);
  const float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(d) + eps);
  for (int64_t i = 0; i < d; i += LANES) {
    const __m512 gain = _mm512_add_ps(load16(weight + i), _mm512_set1_ps(offset));
    store16(x + i, _mm512_mul_ps(_mm512_mul_ps(load16(x + i), _mm512_set1_ps(scale)), gain));
  }
}

inline void write_key(bf16* block, const bf16* key, int64_t d, int64_t at) {
  const int32_t* pairs = reinterpret_cast<const int32_t*>(key);
  int32_t* to = reinterpret_cast<int32_t*>(block) + at;
  for (int64_t i = 0; i < d / 2; ++i) to[i * KEY_BLOCK] = pairs[i];
}

// newest: nothing of this step lies behind it. The other half of its pair is then cleared: it is read, with weight 0,
// and what another sequence left there may be no number.
inline void write_value(bf16* block, const bf16* value, int64_t d, int64_t at, bool newest) {
  bf16* to = block + (at / 2) * d * 2 + at % 2;
  for (int64_t i = 0; i < d; ++i) to[2 * i] = value[i];
  if (newest && at % 2 == 0)
    for (int64_t i = 0; i < d; ++i) to[2 * i + 1] = 0;
}

// out[j] = sum over positions of weights[j] * values / total[j], for 16 * PARTS dimensions from `c` on. weights (QUERIES,
// width); pairs: of positions, of which the first `written` hold something.
template <int QUERIES, int PARTS>
void mix(const bf16* weights, int64_t width, int64_t written, const bf16* pairs, int64_t d, const float* total,
         bf16* const* out, int64_t c) {
  __m512 sums[QUERIES][PARTS];
  for (int j = 0; j < QUERIES; ++j)
    for (int k = 0; k < PARTS; ++k) sums[j][k] = _mm512_setzero_ps();
  for (int64_t p = 0; p < written; ++p, pairs += 2 * d) {
    __m512bh value[PARTS];
    for (int k = 0; k < PARTS; ++k) value[k] = load_pairs(pairs + k * 2 * LANES);
    for (int j = 0; j < QUERIES; ++j) {
      const __m512bh weight = both(weights + j * width + 2 * p);
      for (int k = 0; k < PARTS; ++k) sums[j][k] = _mm512_dpbf16_ps(sums[j][k], value[k], weight);
    }
  }
  for (int j = 0; j < QUERIES; ++j)
    for (int k = 0; k < PARTS; ++k)
      store16(out[j] + c + k * LANES, _mm512_mul_ps(sums[j][k], _mm512_set1_ps(1.0f / total[j])));
}

// Attend from QUERIES queries of one key head to the cached keys; query j sees positions first[j]..last[j].
template <int QUERIES>
void attend_block(const bf16* const* q, bf16* const* out, const bf16* keys, const bf16* values, const int64_t* last,
                  const int64_t* first, int64_t d, float scale, float softcap, std::vector<float>& scratch) {
  const int64_t longest = *std::max_element(last, last + QUERIES);
  const int64_t from = *std::min_element(first, first + QUERIES) / KEY_BLOCK, until = longest / KEY_BLOCK + 1, width = (until - from) * KEY_BLOCK;
  scratch.resize(QUERIES * width);
  float* scores = scratch.data();
  __m512 top[QUERIES];
  for (int j = 0; j < QUERIES; ++j) top[j] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t b = from; b < until; ++b) {
    const bf16* block = keys + b * KEY_BLOCK * d;
    __m512 even[QUERIES], odd[QUERIES];
    for (int j = 0; j < QUERIES; ++j) even[j] = odd[j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < d / 2; i += 2) {
      const __m512bh k0 = load_pairs(block + i * KEY_BLOCK * 2), k1 = load_pairs(block + (i + 1) * KEY_BLOCK * 2);
      for (int j = 0; j < QUERIES; ++j) {
        even[j] = _mm512_dpbf16_ps(even[j], k0, both(q[j] + 2 * i));
        odd[j] = _mm512_dpbf16_ps(odd[j], k1, both(q[j] + 2 * i + 2));
      }
    }
    const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(b * KEY_BLOCK)));
    for (int j = 0; j < QUERIES; ++j) {
      __m512 score = _mm512_mul_ps(_mm512_add_ps(even[j], odd[j]), _mm512_set1_ps(scale));
      if (softcap > 0) {  // cap * tanh(score / cap), tanh(u) = 2 sigmoid(2u) - 1
        const __m512 s = sigmoid(_mm512_mul_ps(score, _mm512_set1_ps(2.0f / softcap)));
        score = _mm512_mul_ps(_mm512_set1_ps(softcap), _mm512_fmsub_ps(s, _mm512_set1_ps(2.0f), _mm512_set1_ps(1.0f)));
      }
      const __mmask16 seen = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32(static_cast<int>(last[j]))) &
                             _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(static_cast<int>(first[j])));
      score = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-std::numeric_limits<float>::infinity()), score);
      top[j] = _mm512_max_ps(top[j], score);
      _mm512_storeu_ps(scores + j * width + (b - from) * KEY_BLOCK, score);
    }
  }
  float total[QUERIES];
  bf16* weights = reinterpret_cast<bf16*>(scores);  // written behind what is read: half as wide
  for (int j = 0; j < QUERIES; ++j) {
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top[j]));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) {
      const __m512 e = exp_negative(_mm512_sub_ps(_mm512_loadu_ps(scores + j * width + i), most));
      sum = _mm512_add_ps(sum, e);
      store16(weights + j * width + i, e);
    }
    total[j] = _mm512_reduce_add_ps(sum);
  }
  const int64_t written = (longest - from * KEY_BLOCK) / 2 + 1;
  // As many dimensions at a time as registers hold: values then pass through once.
  constexpr int PARTS = QUERIES <= 4 ? 4 : 2;
  for (int64_t c = 0; c < d; c += PARTS * LANES) {
    const int64_t parts = std::min<int64_t>(PARTS, (d - c) / LANES);
    const bf16* pair = values + from * KEY_BLOCK * d + 2 * c;
    if (parts == PARTS)
      mix<QUERIES, PARTS>(weights, width, written, pair, d, total, out, c);
    else
      for (int64_t part = 0; part < parts; ++part)
        mix<QUERIES, 1>(weights, width, written, pair + part * 2 * LANES, d, total, out, c + part * LANES);
  }
}

void attend_some(int64_t count, const bf16* const* q, bf16* const* out, const bf16* keys, const bf16* values,
                 const int64_t* last, const int64_t* first, int64_t d, float scale, float softcap,
                 std::vector<float>& scratch) {
#define ATTEND(N) \
  case N: return attend_block<N>(q, out, keys, values, last, first, d, scale, softcap, scratch);
  switch (count) {
    ATTEND(1)
    ATTEND(2)
    ATTEND(3)
    ATTEND(4)
    ATTEND(5)
    ATTEND(6)
    ATTEND(7)
    default: return attend_block<8>(q, out, keys, values, last, first, d, scale, softcap, scratch);
  }
}

// Rotate q and k, write k and v to the cache, attend. qkv (T, (heads + 2 kv) d); cos, sin (positions, turned): the first
// `turned` dimensions of a head are rotated; rows, where (T): each token's cache row and position, the tokens of a row
// together and in order. window 0: all earlier positions are seen. Returns (T, heads * d).
// q_norm, k_norm (d): norms of each head before the rotation, where the family has them.
Tensor attend(Tensor qkv, const Tensor& cos, const Tensor& sin, const Tensor& rows, const Tensor& where, Tensor keys,
              Tensor values, int64_t heads, double scale, double softcap, int64_t window,
              const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps, double offset) {
  check(qkv, 2, "qkv");
  check(keys, 6, "keys");
  check(values, 6, "values");
  const Shape s{heads, keys.size(1), values.size(4), keys.size(2)};
  const int64_t tokens = qkv.size(0), wide = qkv.size(1), turned = cos.size(1), positions = s.blocks * KEY_BLOCK;
  TORCH_CHECK(wide == (s.heads + 2 * s.kv) * s.d && s.d % LANES == 0 && turned % (2 * LANES) == 0, "shapes do not fit");
  Tensor out = at::empty({tokens, s.heads * s.d}, qkv.options());
  bf16* base = qkv.data_ptr<bf16>();
  bf16* outs = out.data_ptr<bf16>();
  bf16* all_keys = keys.data_ptr<bf16>();
  bf16* all_values = values.data_ptr<bf16>();
  const bf16* coses = cos.data_ptr<bf16>();
  const bf16* sines = sin.data_ptr<bf16>();
  const bf16* q_gain = q_norm ? q_norm->data_ptr<bf16>() : nullptr;
  const bf16* k_gain = k_norm ? k_norm->data_ptr<bf16>() : nullptr;
  const int64_t* row = rows.data_ptr<int64_t>();
  const int64_t* pos = where.data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK(row[t] >= 0 && row[t] < keys.size(0) && pos[t] >= 0 && pos[t] < positions && pos[t] < cos.size(0),
                "a token lies outside the cache");
  const int64_t group = s.heads / s.kv, line = s.kv * s.blocks * KEY_BLOCK * s.d, head_line = s.blocks * KEY_BLOCK * s.d;
  // Tokens of the same row, at most so many that its queries of one key head fill a block.
  const int64_t share = std::max<int64_t>(1, QUERIES_AT_ONCE / group);
  std::vector<int64_t> starts;
  for (int64_t t = 0; t < tokens;) {
    starts.push_back(t);
    int64_t end = t + 1;
    while (end < tokens && end - t < share && row[end] == row[t]) ++end;
    t = end;
  }
  starts.push_back(tokens);
  const int64_t runs = static_cast<int64_t>(starts.size()) - 1;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      bf16* token = base + t * wide;
      for (int64_t h = 0; h < s.heads + s.kv; ++h) {
        const bf16* gain = h < s.heads ? q_gain : k_gain;
        if (gain != nullptr) norm_head(token + h * s.d, gain, s.d, static_cast<float>(eps), static_cast<float>(offset));
        if (turned > 0) rotate(token + h * s.d, coses + pos[t] * turned, sines + pos[t] * turned, turned);
      }
      const int64_t block = pos[t] / KEY_BLOCK, at = pos[t] % KEY_BLOCK;
      const bool newest = t + 1 == tokens || row[t + 1] != row[t];
      for (int64_t g = 0; g < s.kv; ++g) {
        const int64_t to = row[t] * line + g * head_line + block * KEY_BLOCK * s.d;
        write_key(all_keys + to, token + (s.heads + g) * s.d, s.d, at);
        write_value(all_values + to, token + (s.heads + s.kv + g) * s.d, s.d, at, newest);
      }
    }
    std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < runs * s.kv; ++item) {
      const int64_t run = item / s.kv, g = item % s.kv, first_token = starts[run];
      const bf16* k = all_keys + row[first_token] * line + g * head_line;
      const bf16* v = all_values + row[first_token] * line + g * head_line;
      const bf16* q[QUERIES_AT_ONCE];
      bf16* to[QUERIES_AT_ONCE];
      int64_t last[QUERIES_AT_ONCE], first[QUERIES_AT_ONCE];
      int64_t filled = 0;
      for (int64_t t = first_token; t < starts[run + 1]; ++t)
        for (int64_t j = 0; j < group; ++j) {
          q[filled] = base + t * wide + (g * group + j) * s.d;
          to[filled] = outs + t * s.heads * s.d + (g * group + j) * s.d;
          first[filled] = window > 0 ? std::max<int64_t>(0, pos[t] - window + 1) : 0;
          last[filled++] = pos[t];
          const bool full = filled == QUERIES_AT_ONCE || (j + 1 == group && t + 1 == starts[run + 1]);
          if (full) {
            attend_some(filled, q, to, k, v, last, first, s.d, static_cast<float>(scale), static_cast<float>(softcap), scratch);
            filled = 0;
          }
        }
    }
  }
  return out;
}

// One query a row over caches that lie plainly: softmax(scale q.k + bias) v over the first lengths[n] positions of cache
// row rows[n]. q (n, heads, d); keys, values (rows, heads, positions, d); bias (heads, n, at least the longest length),
// float32. Returns (n, heads * d).
Tensor attend_rows(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& rows, const Tensor& lengths,
                   const std::optional<Tensor>& bias, double scale) {
  check(q, 3, "q");
  check(keys, 4, "keys");
  check(values, 4, "values");
  const int64_t count = q.size(0), heads = q.size(1), d = q.size(2), positions = keys.size(2);
  TORCH_CHECK(d % LANES == 0 && keys.size(1) == heads && keys.size(3) == d && values.sizes() == keys.sizes() &&
                  rows.numel() == count && lengths.numel() == count,
              "shapes do not fit");
  if (bias) check(*bias, 3, "bias");
  const int64_t* row = rows.data_ptr<int64_t>();
  const int64_t* length = lengths.data_ptr<int64_t>();
  const int64_t span = bias ? bias->size(2) : positions;
  for (int64_t n = 0; n < count; ++n)
    TORCH_CHECK(row[n] >= 0 && row[n] < keys.size(0) && length[n] >= 1 && length[n] <= std::min(span, positions),
                "a row lies outside the cache");
  const float* biases = bias ? bias->data_ptr<float>() : nullptr;
  const bf16* qs = q.data_ptr<bf16>();
  const bf16* all_keys = keys.data_ptr<bf16>();
  const bf16* all_values = values.data_ptr<bf16>();
  Tensor out = at::empty({count, heads * d}, q.options());
  bf16* outs = out.data_ptr<bf16>();
#pragma omp parallel
  {
    std::vector<float> weight(static_cast<size_t>(positions + LANES));
#pragma omp for schedule(static)
    for (int64_t item = 0; item < count * heads; ++item) {
      const int64_t n = item / heads, h = item % heads, seen = length[n];
      const bf16* query = qs + item * d;
      const bf16* k = all_keys + (row[n] * heads + h) * positions * d;
      const bf16* v = all_values + (row[n] * heads + h) * positions * d;
      const float* shift = biases == nullptr ? nullptr : biases + (h * count + n) * span;
      float most = -std::numeric_limits<float>::infinity();
      for (int64_t p = 0; p < seen; ++p) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < d; i += LANES) sum = _mm512_fmadd_ps(load16(query + i), load16(k + p * d + i), sum);
        weight[p] = _mm512_reduce_add_ps(sum) * static_cast<float>(scale) + (shift == nullptr ? 0.0f : shift[p]);
        // Written so that a NaN is kept: a row whose numbers went wrong must show it.
        if (!(weight[p] <= most)) most = weight[p];
      }
      for (int64_t p = seen; p < seen + LANES; ++p) weight[p] = -std::numeric_limits<float>::infinity();
      float total = 0.0f;
      for (int64_t p = 0; p < seen; p += LANES) {
        const __m512 e = exp_negative(_mm512_sub_ps(_mm512_loadu_ps(weight.data() + p), _mm512_set1_ps(most)));
        _mm512_storeu_ps(weight.data() + p, e);
        total += _mm512_reduce_add_ps(e);
      }
      for (int64_t i = 0; i < d; i += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t p = 0; p < seen; ++p) sum = _mm512_fmadd_ps(_mm512_set1_ps(weight[p]), load16(v + p * d + i), sum);
        store16(outs + item * d + i, _mm512_div_ps(sum, _mm512_set1_ps(total)));
      }
    }
  }
  return out;
}

// --- low-rank updates ------------------------------------------------------------------------------------------------
// An adapter lies in one buffer. For a site, at `a`: (ranks/16, in/2, 16, 2), the ranks of its modules one after the
// other, each module's padded to an even number, all padded to 16. For a module, at `b`: (out/16, rank/2, 16, 2).

struct Module {
  int64_t b, first_rank, rank, first_out, out;
};
constexpr int64_t SITE_FIELDS = 2;
constexpr int64_t MODULE_FIELDS = 5;

// hidden[j] = A x[j] for one tile of 16 ranks. The order of the sum is the same for every ROWS.
template <int ROWS>
void shrink(const bf16* const* x, const bf16* a, int64_t in, int64_t tile, bf16* hidden, int64_t stride) {
  constexpr int UNROLL = 4;
  __m512 sums[ROWS][UNROLL];
  for (int j = 0; j < ROWS; ++j)
    for (int u = 0; u < UNROLL; ++u) sums[j][u] = _mm512_setzero_ps();
  const bf16* weights = a + tile * in * LANES;
  int64_t i = 0;
  for (; i + 2 * UNROLL <= in; i += 2 * UNROLL)
    for (int u = 0; u < UNROLL; ++u) {
      const __m512bh w = load_pairs(weights + (i + 2 * u) * LANES);
      for (int j = 0; j < ROWS; ++j) sums[j][u] = _mm512_dpbf16_ps(sums[j][u], w, both(x[j] + i + 2 * u));
    }
  for (; i < in; i += 2) {
    const __m512bh w = load_pairs(weights + i * LANES);
    for (int j = 0; j < ROWS; ++j) sums[j][0] = _mm512_dpbf16_ps(sums[j][0], w, both(x[j] + i));
  }
  for (int j = 0; j < ROWS; ++j)
    store16(hidden + j * stride + tile * LANES,
            _mm512_add_ps(_mm512_add_ps(sums[j][0], sums[j][1]), _mm512_add_ps(sums[j][2], sums[j][3])));
}

// y[j] += B hidden[j] for 16 outputs of a module.
template <int ROWS>
void expand(const bf16* hidden, int64_t stride, const bf16* b, const Module& m, int64_t tile, bf16* const* y) {
  __m512 sums[ROWS];
  for (int j = 0; j < ROWS; ++j) sums[j] = _mm512_setzero_ps();
  const bf16* weights = b + tile * m.rank * LANES;
  for (int64_t r = 0; r < m.rank; r += 2) {
    const __m512bh w = load_pairs(weights + r * LANES);
    for (int j = 0; j < ROWS; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], w, both(hidden + j * stride + m.first_rank + r));
  }
  for (int j = 0; j < ROWS; ++j) {
    bf16* to = y[j] + m.first_out + tile * LANES;
    store16(to, _mm512_add_ps(load16(to), sums[j]));
  }
}

#define FOR_ROWS(count, call)  \
  switch (count) {             \
    case 1: call(1); break;    \
    case 2: call(2); break;    \
    case 3: call(3); break;    \
    default: call(4); break;   \
  }

// y[t] += B A x[t], by the adapter of each token. x (T, in), y (T, out). blocks (n, 6): a slot, how many tokens, and
// their indices. buffers (slots): addresses. table (slots, sites, 2 + 5 modules): offsets, see above.
void lora_add(Tensor y, const Tensor& x, const Tensor& blocks, const Tensor& buffers, const Tensor& table, int64_t site) {
  check(y, 2, "y");
  check(x, 2, "x");
  check(blocks, 2, "blocks");
  check(table, 3, "table");
  const int64_t in = x.size(1), out = y.size(1), count = blocks.size(0), fields = table.size(2);
  const int64_t modules = (fields - SITE_FIELDS) / MODULE_FIELDS;
  TORCH_CHECK(in % 2 == 0 && blocks.size(1) == 2 + BLOCK_ROWS && site < table.size(1), "shapes do not fit");
  const int64_t* block = blocks.data_ptr<int64_t>();
  const int64_t* address = buffers.data_ptr<int64_t>();
  const int64_t* rows = table.data_ptr<int64_t>();
  const bf16* xs = x.data_ptr<bf16>();
  bf16* ys = y.data_ptr<bf16>();
  const auto line = [&](int64_t slot) { return rows + (slot * table.size(1) + site) * fields; };
  int64_t widest = 0;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t* b = block + n * (2 + BLOCK_ROWS);
    TORCH_CHECK(b[0] >= 0 && b[0] < table.size(0) && b[1] >= 1 && b[1] <= BLOCK_ROWS, "a block is wrong");
    for (int64_t j = 0; j < b[1]; ++j) TORCH_CHECK(b[2 + j] >= 0 && b[2 + j] < x.size(0), "a token is not there");
    widest = std::max(widest, line(b[0])[1]);
  }
  if (widest == 0) return;  // no adapter of this step touches this site
  std::vector<bf16> hidden(static_cast<size_t>(count * BLOCK_ROWS * widest));
  const int64_t threads = omp_get_max_threads(), parts = count >= 4 * threads ? 1 : threads;
#pragma omp parallel
  {
    const int64_t tiles = widest / LANES;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < count * tiles; ++item) {
      const int64_t* b = block + (item / tiles) * (2 + BLOCK_ROWS);
      const int64_t* at = line(b[0]);
      const int64_t tile = item % tiles;
      if (tile * LANES >= at[1]) continue;
      const bf16* tokens[BLOCK_ROWS];
      for (int64_t j = 0; j < b[1]; ++j) tokens[j] = xs + b[2 + j] * in;
      const bf16* a = reinterpret_cast<const bf16*>(address[b[0]]) + at[0];
      bf16* to = hidden.data() + (item / tiles) * BLOCK_ROWS * widest;
#define SHRINK(ROWS) shrink<ROWS>(tokens, a, in, tile, to, widest)
      FOR_ROWS(b[1], SHRINK)
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < count * parts; ++item) {
      const int64_t* b = block + (item / parts) * (2 + BLOCK_ROWS);
      const int64_t* at = line(b[0]);
      if (at[1] == 0) continue;
      bf16* tokens[BLOCK_ROWS];
      for (int64_t j = 0; j < b[1]; ++j) tokens[j] = ys + b[2 + j] * out;
      const bf16* from = hidden.data() + (item / parts) * BLOCK_ROWS * widest;
      for (int64_t k = 0; k < modules; ++k) {
        const int64_t* f = at + SITE_FIELDS + k * MODULE_FIELDS;
        const Module m{f[0], f[1], f[2], f[3], f[4]};
        const bf16* weights = reinterpret_cast<const bf16*>(address[b[0]]) + m.b;
        const int64_t all = m.rank == 0 ? 0 : m.out / LANES, part = item % parts;
        for (int64_t tile = all * part / parts; tile < all * (part + 1) / parts; ++tile) {
#define EXPAND(ROWS) expand<ROWS>(from, widest, weights, m, tile, tokens)
          FOR_ROWS(b[1], EXPAND)
        }
      }
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplane, m) {
  m.def("add_rms_norm(Tensor(a!) x, Tensor? y, Tensor weight, float eps, float offset) -> Tensor", add_rms_norm);
  m.def("gated(Tensor gate_up, bool tanh_gelu) -> Tensor", gated);
  m.def(
      "attend(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor rows, Tensor where, Tensor(b!) keys, Tensor(c!) values, "
      "int heads, float scale, float softcap, int window, Tensor? q_norm, Tensor? k_norm, float eps, float offset) -> Tensor",
      attend);
  m.def(
      "attend_rows(Tensor q, Tensor keys, Tensor values, Tensor rows, Tensor lengths, Tensor? bias, float scale) -> Tensor",
      attend_rows);
  m.def("lora_add(Tensor(a!) y, Tensor x, Tensor blocks, Tensor buffers, Tensor table, int site) -> ()", lora_add);
}
