// One token of an autoregressive transformer on a CPU, for ROWS sequences and weights of type WEIGHT.
//
// A step of a few sequences is bound by memory: it lasts as long as reading all weights once. In torch it is some 700
// operations, and memory is idle between two of them. Here the whole step is one parallel region, and the next rows of a
// weight are prefetched while the present ones are multiplied.
//
// Compiled by native.py, whose structures are those below. The network is AutoregressiveTransformer.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bfloat16 = uint16_t;  // the upper half of a float
using Weight = WEIGHT;

#ifdef __AVX512F__
constexpr int64_t LANES = 16;  // input channels at a time; `width` and `hidden` are multiples
constexpr int64_t GROUP = ROWS > 4 ? 2 : 4;  // output channels at a time: their sums fill the registers
#else
constexpr int64_t LANES = 8;
constexpr int64_t GROUP = ROWS > 4 ? 1 : 2;
#endif
using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));

struct Network {
  int64_t depth, width, num_heads, hidden, length, codebook_size;
  const float *norm, *head_bias;
  const Weight* head;
  float eps_norm, head_eps_norm;  // of the norms over `width`, and over a head's channels
};

struct Layer {
  const float *norm_attention, *norm_q, *norm_k, *norm_mlp, *qkv_bias, *proj_bias;
  const Weight *qkv, *proj, *proj_in, *proj_out;
  Weight *keys, *values;  // (ROWS or more, num_heads, length, head_dim)
};

inline Floats load(const float* p) {
  Floats values;
  std::memcpy(&values, p, sizeof values);
  return values;
}

inline Floats load(const bfloat16* p) {
  Halves upper;
  std::memcpy(&upper, p, sizeof upper);
  return reinterpret_cast<Floats>(__builtin_convertvector(upper, Words) << 16);
}

inline float number(float x) { return x; }

inline float number(bfloat16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float x, float* p) { *p = x; }

inline void store(float x, bfloat16* p) {  // the nearest, of two the even one
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *p = bfloat16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float sum(Floats values) {
  float total = 0;
  for (int64_t i = 0; i < LANES; ++i) total += values[i];
  return total;
}

// y[row][n] = bias[n] + weight[n] . x[row], or plus that, for COUNT channels n. x: (ROWS, in), y: (ROWS, out).
template <bool ADD, int64_t COUNT>
void channels(const Weight* weight, const float* bias, const float* x, int64_t in, float* y, int64_t out, int64_t n) {
  Floats sums[COUNT][ROWS] = {};
  for (int64_t i = 0; i < in; i += LANES) {
    Floats inputs[ROWS];
    for (int64_t row = 0; row < ROWS; ++row) inputs[row] = load(x + row * in + i);
    for (int64_t j = 0; j < COUNT; ++j) {
      const Weight* p = weight + (n + j) * in + i;
      __builtin_prefetch(p + COUNT * in);
      const Floats values = load(p);
      for (int64_t row = 0; row < ROWS; ++row) sums[j][row] += values * inputs[row];
    }
  }
  for (int64_t j = 0; j < COUNT; ++j)
    for (int64_t row = 0; row < ROWS; ++row) {
      float* p = y + row * out + n + j;
      *p = (ADD ? *p : 0) + (bias ? bias[n + j] : 0) + sum(sums[j][row]);
    }
}

// The same for channels from `first` to `last`.
template <bool ADD>
void linear(const Weight* weight, const float* bias, const float* x, int64_t in, float* y, int64_t out, int64_t first,
            int64_t last) {
  for (; first + GROUP <= last; first += GROUP) channels<ADD, GROUP>(weight, bias, x, in, y, out, first);
  for (; first < last; ++first) channels<ADD, 1>(weight, bias, x, in, y, out, first);
}

// gain x / sqrt(|x|^2 + eps_norm^2), as StepNorm
void norm(const float* x, const float* gain, float eps_norm, int64_t size, float* y) {
  float squares = eps_norm * eps_norm;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];
  const float scale = 1 / std::sqrt(squares);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = x[i] * scale * gain[i];
}

void rotate(float* x, const float* rotary, int64_t size) {  // pairs of channels, by (cosine, sine)
  for (int64_t i = 0; i < size; i += 2) {
    const float a = x[i], b = x[i + 1];
    x[i] = a * rotary[i] - b * rotary[i + 1];
    x[i + 1] = b * rotary[i] + a * rotary[i + 1];
  }
}

// One head of one row: keep its new key and value, and let its query attend to all so far. qkv, y: of the row.
void attend(const Network& network, const Layer& layer, const float* rotary, int64_t position, int64_t head,
            const float* qkv, Weight* keys, Weight* values, float* y, std::vector<float>& scratch) {
  const int64_t size = network.width / network.num_heads;
  float *query = scratch.data(), *key = query + size, *scores = key + size;
  const float* value = qkv + 2 * network.width + head * size;
  norm(qkv + head * size, layer.norm_q, network.head_eps_norm, size, query);
  norm(qkv + network.width + head * size, layer.norm_k, network.head_eps_norm, size, key);
  rotate(query, rotary, size);
  rotate(key, rotary, size);
  for (int64_t i = 0; i < size; ++i) {
    store(key[i], keys + position * size + i);
    store(value[i], values + position * size + i);
  }
  const float scale = 1 / std::sqrt(float(size));
  float highest = -INFINITY, total = 0;
  for (int64_t j = 0; j <= position; ++j) {
    float score = 0;
#pragma omp simd reduction(+ : score)
    for (int64_t i = 0; i < size; ++i) score += query[i] * number(keys[j * size + i]);
    scores[j] = score * scale;
    highest = std::max(highest, scores[j]);
  }
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j <= position; ++j) total += scores[j] = std::exp(scores[j] - highest);
  float* out = y + head * size;
  std::fill(out, out + size, 0.f);
  for (int64_t j = 0; j <= position; ++j) {
    const float share = scores[j] / total;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] += share * number(values[j * size + i]);
  }
}

}  // namespace

// x: embedded tokens (ROWS, width), overwritten; rotary: (head_dim / 2, 2) of this position; logits: (ROWS,
// codebook_size)
extern "C" void step(const Network* pointer, const Layer* layers, const float* rotary, int64_t position,
                     int64_t num_threads, float* x, float* logits) {
  const Network& network = *pointer;
  const int64_t width = network.width, hidden = network.hidden, num_heads = network.num_heads;
  const int64_t per_head = network.length * width / num_heads, units = ROWS * num_heads;
  std::vector<float> qkv(ROWS * 3 * width), y(ROWS * width), gated(ROWS * hidden);
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
    const auto start = [&](int64_t size, int64_t i) { return i == count ? size : size / GROUP * i / count * GROUP; };
    std::vector<float> normed(ROWS * width), up(ROWS * hidden), scratch(2 * width / num_heads + network.length);
    const auto normalise = [&](const float* gain) {  // each thread for itself, as waiting takes longer
      for (int64_t row = 0; row < ROWS; ++row)
        norm(x + row * width, gain, network.eps_norm, width, normed.data() + row * width);
    };
    for (const Layer* layer = layers; layer < layers + network.depth; ++layer) {
      normalise(layer->norm_attention);
      linear<false>(layer->qkv, layer->qkv_bias, normed.data(), width, qkv.data(), 3 * width, start(3 * width, id),
                    start(3 * width, id + 1));
#pragma omp barrier
      for (int64_t unit = units * id / count; unit < units * (id + 1) / count; ++unit) {
        const int64_t row = unit / num_heads;
        attend(network, *layer, rotary, position, unit % num_heads, qkv.data() + row * 3 * width,
               layer->keys + unit * per_head, layer->values + unit * per_head, y.data() + row * width, scratch);
      }
#pragma omp barrier
      linear<true>(layer->proj, layer->proj_bias, y.data(), width, x, width, start(width, id), start(width, id + 1));
#pragma omp barrier
      normalise(layer->norm_mlp);
      const int64_t first = start(hidden, id), last = start(hidden, id + 1);
      linear<false>(layer->proj_in, nullptr, normed.data(), width, gated.data(), hidden, first, last);
      linear<false>(layer->proj_in + hidden * width, nullptr, normed.data(), width, up.data(), hidden, first, last);
      for (int64_t row = 0; row < ROWS; ++row) {
        float *gate = gated.data() + row * hidden, *factor = up.data() + row * hidden;
#pragma omp simd
        for (int64_t i = first; i < last; ++i) gate[i] *= factor[i] / (1 + std::exp(-gate[i]));
      }
#pragma omp barrier
      linear<true>(layer->proj_out, nullptr, gated.data(), hidden, x, width, start(width, id), start(width, id + 1));
#pragma omp barrier
    }
    normalise(network.norm);
    linear<false>(network.head, network.head_bias, normed.data(), width, logits, network.codebook_size,
                  start(network.codebook_size, id), start(network.codebook_size, id + 1));
  }
}
