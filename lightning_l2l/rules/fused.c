/* The LSTM kernel's compiled parts: its pointwise part for meta-training, and a whole inner step for deployment.
 *
 * Compiled on first use by fused.py. NaN must come through, so nothing here may be built with -ffast-math. */

#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* ---- A cell in one pass over memory; lstm_kernel.py explains the form and the symbols. ---- */

/* 1 / (1 + e^y), where y = -x = whole log(2) + part, and e^part is its Taylor polynomial. */
static inline float sigmoid(float x) {
  float y = -x;
  y = y > 87.0f ? 87.0f : y;
  y = y < -87.0f ? -87.0f : y;
  float whole = __builtin_rintf(1.44269504088896341f * y);
  float part = (y - whole * 0.693359375f) - whole * -2.12194440e-4f; /* log(2) in two parts, the first exact */
  float p = 1.0f / 720;
  p = p * part + 1.0f / 120;
  p = p * part + 1.0f / 24;
  p = p * part + 1.0f / 6;
  p = p * part + 0.5f;
  p = p * part + 1.0f;
  p = p * part + 1.0f;
  union {
    int32_t i;
    float f;
  } power;
  power.i = ((int32_t)whole + 127) << 23;
  return 1.0f / (1.0f + p * power.f);
}

#define PARALLEL _Pragma("omp parallel for simd schedule(static) if (n > 16384)")

/* z [4, n], cell_before [n] -> kept (i, f, o, g, tau) [5, n], cell [n], hidden [n] */
void cell_forward(long n, const float *restrict z, const float *restrict cell_before, float *restrict kept,
                  float *restrict cell, float *restrict hidden) {
  PARALLEL
  for (long k = 0; k < n; k++) {
    float i = sigmoid(z[k]), f = sigmoid(z[n + k]), o = sigmoid(z[2 * n + k]);
    float g = 2.0f * sigmoid(z[3 * n + k]) - 1.0f;
    float c = f * cell_before[k] + 2.0f * i * g;
    float tau = 2.0f * sigmoid(c) - 1.0f;
    kept[k] = i;
    kept[n + k] = f;
    kept[2 * n + k] = o;
    kept[3 * n + k] = g;
    kept[4 * n + k] = tau;
    cell[k] = c;
    hidden[k] = o * tau;
  }
}

/* d_hidden [n], kept [5, n], cell_before [n] -> d (i, f, o, g, cell) [5, n]; d's last part is read as well */
void cell_backward(long n, const float *restrict d_hidden, const float *restrict kept,
                   const float *restrict cell_before, float *restrict d) {
  PARALLEL
  for (long k = 0; k < n; k++) {
    float i = kept[k], f = kept[n + k], o = kept[2 * n + k], g = kept[3 * n + k], tau = kept[4 * n + k];
    float d_cell = d[4 * n + k] + 0.5f * d_hidden[k] * o * (1.0f - tau * tau);
    d[k] = d_cell * g * i * (1.0f - i);
    d[n + k] = d_cell * cell_before[k] * f * (1.0f - f);
    d[2 * n + k] = d_hidden[k] * tau * o * (1.0f - o);
    d[3 * n + k] = d_cell * i * (1.0f - g * g);
    d[4 * n + k] = d_cell * f;
  }
}

/* ---- One inner step of the whole LSTM, the state changed in place: what a deployed rule does. ----
 *
 * A tile of coordinates goes through all layers before the next one is touched, so that the state is read and written
 * once and all else stays in registers and the first cache. A gate's sum is never stored before it is complete. */

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define WIDE 2 /* vectors: 4 gates by 2 vectors are 8 sums, what it takes to hide the latency of two units */
#define TILE (WIDE * LANES)

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define ALL(x) ((x) - (vec){0}) /* x in all lanes */

/* x within -bound and bound; nan comes through, which decides the order of arguments. */
static inline vec clamped(vec x, float bound) {
#if defined __AVX512F__
  return (vec)_mm512_max_ps((__m512)ALL(-bound), _mm512_min_ps((__m512)ALL(bound), (__m512)x));
#elif defined __AVX__
  return (vec)_mm256_max_ps((__m256)ALL(-bound), _mm256_min_ps((__m256)ALL(bound), (__m256)x));
#else
  ivec above = x > bound, below = x < -bound;
  x = (vec)((above & (ivec)ALL(bound)) | (~above & (ivec)x));
  return (vec)((below & (ivec)ALL(-bound)) | (~below & (ivec)x));
#endif
}

/* 2^x for |x| <= 40 and at the nearer end beyond: three such factors do not overflow. nan comes through.
 * The nearest integer is in the last bits of x + 1.5 * 2^23, from where it is shifted into the exponent's place; the
 * polynomial has a relative error of 1e-7 on the remaining [-1/2, 1/2]. */
static inline vec power_of_2(vec x) {
  const float shift = 12582912.0f + 127.0f;
  x = clamped(x, 40.0f);
  vec shifted = x + shift, part = x - (shifted - shift);
  vec p = part * 0.00132647459f + 0.00967151253f;
  p = p * part + 0.0555073369f;
  p = p * part + 0.240222421f;
  p = p * part + 0.693146978f;
  p = p * part + 1.0f;
  return p * (vec)((ivec)shifted << 23);
}

#define LOG2_E 1.44269504088896341f

/* A unit's four sums (i, f, o, g), times -log2(e) and g's twice that, are exponents of 2. With I = 1 + 2^i and so on,
 * sigmoid(i) = 1 / I and tanh(g) = (2 - G) / G: the cell is one division and the output another. */
static inline void unit(const float *restrict sums, float *restrict cell, float *restrict hidden) {
  const vec *s = (const vec *)sums;
  vec i = 1.0f + power_of_2(s[0]), f = 1.0f + power_of_2(s[WIDE]), o = 1.0f + power_of_2(s[2 * WIDE]);
  vec g = power_of_2(s[3 * WIDE]), i_g = i * (1.0f + g);
  vec c = (*(vec *)cell * i_g + f * (1.0f - g)) / (f * i_g);
  vec tau = power_of_2(c * (-2.0f * LOG2_E));
  *(vec *)cell = c;
  *(vec *)hidden = (1.0f - tau) / (o * (1.0f + tau));
}

/* inputs: rows x, h of the lowest layer, h of the next, ...; a layer reads what is below and its own h, which are
 * adjacent, and writes its own h: the next layer's input. */
static void tile_step(long hidden, long layers, long features, const float *restrict weights, float *restrict inputs,
                      float *restrict cells, float *restrict sums, float *restrict update) {
  for (long layer = 0; layer < layers; layer++) {
    long below = layer ? hidden : features;
    for (long j = 0; j < hidden; j++) {
      vec sum[4][WIDE];
      for (int gate = 0; gate < 4; gate++)
        for (int v = 0; v < WIDE; v++) sum[gate][v] = ALL(weights[gate]);
      weights += 4;
      for (long k = 0; k < below + hidden; k++, weights += 4) {
        vec x[WIDE];
        for (int v = 0; v < WIDE; v++) {
          x[v] = ((vec *)(inputs + k * TILE))[v];
#ifdef __AVX__
          __asm__("" : "+x"(x[v])); /* keep it in a register: each is used four times, and loads are what is scarce */
#endif
        }
        for (int gate = 0; gate < 4; gate++) {
          vec weight = ALL(weights[gate]);
          for (int v = 0; v < WIDE; v++) sum[gate][v] += weight * x[v];
        }
      }
      for (int gate = 0; gate < 4; gate++)
        for (int v = 0; v < WIDE; v++) ((vec *)(sums + (4 * j + gate) * TILE))[v] = sum[gate][v];
    }
    inputs += below * TILE;
    for (long j = 0; j < hidden; j++, cells += TILE)
      for (int v = 0; v < TILE; v += LANES) unit(sums + 4 * j * TILE + v, cells + v, inputs + j * TILE + v);
  }
  for (int v = 0; v < WIDE; v++) {
    vec sum = ALL(weights[0]);
    for (long j = 0; j < hidden; j++) sum += weights[1 + j] * ((vec *)(inputs + j * TILE))[v];
    ((vec *)update)[v] = sum;
  }
}

static inline void copy(float *restrict to, const float *restrict from, long n) {
  if (n == TILE)
    for (int v = 0; v < TILE; v += LANES) *(unaligned *)(to + v) = *(const unaligned *)(from + v);
  else
    for (long k = 0; k < n; k++) to[k] = from[k];
}

/* A column of weights, for the four gates; torch's order of gates is (i, f, g, o). */
static float *put(float *restrict to, const float *restrict from, long j, long hidden, long columns, long k) {
  *to++ = -LOG2_E * from[j * columns + k];
  *to++ = -LOG2_E * from[(hidden + j) * columns + k];
  *to++ = -LOG2_E * from[(3 * hidden + j) * columns + k];
  *to++ = -2.0f * LOG2_E * from[(2 * hidden + j) * columns + k];
  return to;
}

static void pack_weights(long hidden, long layers, long features, const float *const *from, float scale, float *to) {
  for (long layer = 0; layer < layers; layer++, from += 3) {
    long below = layer ? hidden : features;
    for (long j = 0; j < hidden; j++) {
      to = put(to, from[2], j, hidden, 1, 0);
      for (long k = 0; k < below; k++) to = put(to, from[0], j, hidden, below, k);
      for (long k = 0; k < hidden; k++) to = put(to, from[1], j, hidden, hidden, k);
    }
  }
  *to++ = scale * from[1][0];
  for (long j = 0; j < hidden; j++) *to++ = scale * from[0][j];
}

static long packed_size(long hidden, long layers, long features) {
  long size = layers * 4 * hidden * (1 + 2 * hidden) - 4 * hidden * (hidden - features) + 1 + hidden;
  return (size + 15) / 16 * 16;
}

static long tile_size(long hidden, long layers, long features) {
  return (features + 2 * layers * hidden + 4 * hidden + 1) * TILE;
}

/* Numbers of scratch that lstm_step needs with so many threads. */
long lstm_scratch(long hidden, long layers, long features, long threads) {
  return packed_size(hidden, layers, features) + threads * tile_size(hidden, layers, features);
}

/* features [features, n]; state rows (h, c) of each layer, `stride` numbers apart, n of each; update [n].
 * from: weight_ih, weight_hh and bias of each layer, the readout's weight and bias. scratch is aligned to 64 bytes. */
void lstm_step(long n, long stride, long hidden, long layers, long features, const float *const *from, float scale,
               const float *restrict x, float *restrict state, float *restrict update, long threads,
               float *restrict scratch) {
  pack_weights(hidden, layers, features, from, scale, scratch);
  float *tiles = scratch + packed_size(hidden, layers, features);
  long size = tile_size(hidden, layers, features), count = (n + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 8)
  for (long tile = 0; tile < count; tile++) {
    float *inputs = tiles + omp_get_thread_num() * size, *cells = inputs + (features + layers * hidden) * TILE;
    float *sums = cells + layers * hidden * TILE, *out = sums + 4 * hidden * TILE;
    long at = tile * TILE, m = n - at < TILE ? n - at : TILE;
    if (m < TILE) memset(inputs, 0, size * sizeof(float));
    for (long k = 0; k < features; k++) copy(inputs + k * TILE, x + k * n + at, m);
    for (long k = 0; k < layers * hidden; k++) {
      float *h = state + (k + k / hidden * hidden) * stride + at, *c = h + hidden * stride;
      copy(inputs + (features + k) * TILE, h, m);
      copy(cells + k * TILE, c, m);
      __builtin_prefetch(h + TILE); /* there are more rows than the processor foresees by itself */
      __builtin_prefetch(c + TILE);
    }
    tile_step(hidden, layers, features, scratch, inputs, cells, sums, out);
    for (long k = 0; k < layers * hidden; k++) {
      float *h = state + (k + k / hidden * hidden) * stride + at;
      copy(h, inputs + (features + k) * TILE, m);
      copy(h + hidden * stride, cells + k * TILE, m);
    }
    copy(update + at, out, m);
  }
}
