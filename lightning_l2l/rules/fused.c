/* The LSTM kernel, compiled: an inner step, and the backward pass over a truncation.
 *
 * Compiled on first use by fused.py. NaN must come through, so nothing here may be built with -ffast-math. */

#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* ---- One inner step, the state changed in place. ----
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

/* In a register from here on: what is used four times is not to be loaded four times, for loads are what is scarce. */
static inline vec in_register(vec x) {
#ifdef __AVX__
  __asm__("" : "+x"(x));
#endif
  return x;
}

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

/* Four rows of a product: sums[r] = start[r] + sum over k of weights[k][r] * row k, the rows first of `a` and then of `b`.
 * Returns the end of the weights. */
static inline const float *four_sums(const float *restrict start, const float *restrict weights, const float *restrict a,
                                     long rows_of_a, const float *restrict b, long rows_of_b, float *restrict sums) {
  vec sum[4][WIDE];
  for (int r = 0; r < 4; r++)
    for (int v = 0; v < WIDE; v++) sum[r][v] = ALL(start ? start[r] : 0.0f);
  for (int part = 0; part < 2; part++) {
    const float *rows = part ? b : a;
    for (long k = part ? rows_of_b : rows_of_a; k > 0; k--, rows += TILE, weights += 4) {
      vec x[WIDE];
      for (int v = 0; v < WIDE; v++) x[v] = in_register(((vec *)rows)[v]);
      for (int r = 0; r < 4; r++)
        for (int v = 0; v < WIDE; v++) sum[r][v] += ALL(weights[r]) * x[v];
    }
  }
  for (int r = 0; r < 4; r++)
    for (int v = 0; v < WIDE; v++) ((vec *)sums)[r * WIDE + v] = sum[r][v];
  return weights;
}

/* inputs: rows x, h of the lowest layer, h of the next, ...; a layer reads what is below and its own h, which are
 * adjacent, and writes its own h: the next layer's input. */
static void tile_step(long hidden, long layers, long features, const float *restrict weights, float *restrict inputs,
                      float *restrict cells, float *restrict sums, float *restrict update) {
  for (long layer = 0; layer < layers; layer++) {
    long below = layer ? hidden : features;
    for (long j = 0; j < hidden; j++)
      weights = four_sums(weights, weights + 4, inputs, below + hidden, 0, 0, sums + 4 * j * TILE);
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

/* ---- The meta-gradient: forward again and backward, a tile after the other, nothing of it in main memory. ---- */

typedef struct {
  float i[TILE], f[TILE], o[TILE], g[TILE], tau[TILE], cell_before[TILE];
} Kept;

static inline void kept_unit(const float *restrict sums, float *restrict cell, float *restrict hidden, Kept *kept, int v) {
  const vec *s = (const vec *)(sums + v);
  vec i = 1.0f / (1.0f + power_of_2(s[0])), f = 1.0f / (1.0f + power_of_2(s[WIDE]));
  vec o = 1.0f / (1.0f + power_of_2(s[2 * WIDE])), g = 2.0f / (1.0f + power_of_2(s[3 * WIDE])) - 1.0f;
  vec before = *(vec *)(cell + v), c = f * before + i * g;
  vec tau = 2.0f / (1.0f + power_of_2(c * (-2.0f * LOG2_E))) - 1.0f;
  *(vec *)(kept->i + v) = i;
  *(vec *)(kept->f + v) = f;
  *(vec *)(kept->o + v) = o;
  *(vec *)(kept->g + v) = g;
  *(vec *)(kept->tau + v) = tau;
  *(vec *)(kept->cell_before + v) = before;
  *(vec *)(cell + v) = c;
  *(vec *)(hidden + v) = o * tau;
}

/* d rows (i, f, o, g) of a unit, natural scale */
static inline void unit_backward(const Kept *kept, const float *restrict d_hidden, float *restrict d_cell,
                                 float *restrict d, int v) {
  vec i = *(vec *)(kept->i + v), f = *(vec *)(kept->f + v), o = *(vec *)(kept->o + v), g = *(vec *)(kept->g + v);
  vec tau = *(vec *)(kept->tau + v), dh = *(vec *)(d_hidden + v);
  vec dc = *(vec *)(d_cell + v) + dh * o * (1.0f - tau * tau);
  *(vec *)(d + v) = dc * g * i * (1.0f - i);
  *(vec *)(d + TILE + v) = dc * *(vec *)(kept->cell_before + v) * f * (1.0f - f);
  *(vec *)(d + 2 * TILE + v) = dh * tau * o * (1.0f - o);
  *(vec *)(d + 3 * TILE + v) = dc * i * (1.0f - g * g);
  *(vec *)(d_cell + v) = dc * f;
}

static long padded(long n, long to) { return (n + to - 1) / to * to; }

/* total [rows, columns] += d [rows, TILE] x [TILE, columns]; rows a multiple of 4, columns of TILE */
static void outer(long rows, long columns, const float *restrict d, const float *restrict x, float *restrict total) {
  for (long r = 0; r < rows; r += 4)
    for (long c = 0; c < columns; c += TILE) {
      vec sum[4][WIDE];
      for (int q = 0; q < 4; q++)
        for (int v = 0; v < WIDE; v++) sum[q][v] = ((vec *)(total + (r + q) * columns + c))[v];
      for (int t = 0; t < TILE; t++) {
        vec in[WIDE];
        for (int v = 0; v < WIDE; v++) in[v] = in_register(((vec *)(x + t * columns + c))[v]);
        for (int q = 0; q < 4; q++)
          for (int v = 0; v < WIDE; v++) sum[q][v] += ALL(d[(r + q) * TILE + t]) * in[v];
      }
      for (int q = 0; q < 4; q++)
        for (int v = 0; v < WIDE; v++) ((vec *)(total + (r + q) * columns + c))[v] = sum[q][v];
    }
}

static void transpose(const float *restrict rows, long n, long columns, float *restrict to) {
  for (long k = 0; k < n; k++)
    for (int t = 0; t < TILE; t++) to[t * columns + k] = rows[k * TILE + t];
}

static long below_of(long hidden, long features, long layer) { return layer ? hidden : features; }

/* floats of a layer's total */
static long total_of(long hidden, long below) { return 4 * hidden * padded(below + hidden + 1, TILE); }
static long back_of(long hidden, long layer) { return padded(layer ? 2 * hidden : hidden, 4) * 4 * hidden; }

static long gradient_tile(long hidden, long layers, long features, long steps) {
  long size = steps * features * TILE + (steps + 1) * layers * hidden * TILE; /* x, h */
  size += layers * hidden * TILE;                                            /* cells, later their gradients */
  size += steps * layers * hidden * (long)(sizeof(Kept) / sizeof(float));
  size += 4 * hidden * TILE;                                                 /* sums, later d */
  size += layers * padded(2 * hidden, 4) * TILE + padded(2 * hidden, 4) * TILE; /* d_hidden */
  size += TILE * padded(2 * hidden + 1 + features, TILE);                     /* transposed */
  for (long l = 0; l < layers; l++) size += total_of(hidden, below_of(hidden, features, l));
  size += (hidden + 1) * TILE; /* readout's */
  return padded(size, 16);
}

long lstm_gradient_size(long hidden, long layers, long features) {
  long size = hidden + 1;
  for (long l = 0; l < layers; l++) size += 4 * hidden * (below_of(hidden, features, l) + hidden + 1);
  return size;
}

long lstm_gradient_scratch(long hidden, long layers, long features, long steps, long threads) {
  long size = packed_size(hidden, layers, features);
  for (long l = 0; l < layers; l++) size += back_of(hidden, l);
  return padded(size, 16) + threads * gradient_tile(hidden, layers, features, steps);
}

/* x [steps, features, n]; state rows (h, c) [.., n] stride; cotangents [steps, n];
 * gradients [threads][lstm_gradient_size] double, zeroed: per layer rows (unit, gate i f o g) of (below, own, bias); readout (w, b) */
void lstm_gradients(long n, long stride, long hidden, long layers, long features, long steps, const float *const *from,
                    float scale, const float *restrict x, const float *restrict state, const float *restrict cotangents,
                    double *restrict gradients, long threads, float *restrict scratch) {
  float *forward = scratch, *backward = scratch + packed_size(hidden, layers, features), *tiles = backward;
  pack_weights(hidden, layers, features, from, scale, forward);
  for (long l = 0; l < layers; l++) {
    long below = below_of(hidden, features, l), skip = l ? 0 : below;
    const float *ih = from[3 * l], *hh = from[3 * l + 1];
    static const int torch_gate[4] = {0, 1, 3, 2};
    for (long k = skip; k < skip + padded(below + hidden - skip, 4); k += 4)
      for (long r = 0; r < 4 * hidden; r++)
        for (int q = 0; q < 4; q++) {
          long row = torch_gate[r % 4] * hidden + r / 4, c = k + q;
          *tiles++ = c < below ? ih[row * below + c] : c < below + hidden ? hh[row * hidden + c - below] : 0;
        }
  }
  const float *readout = forward + layers * 4 * hidden * (1 + 2 * hidden) - 4 * hidden * (hidden - features);
  tiles = scratch + padded(tiles - scratch, 16);
  long size = gradient_tile(hidden, layers, features, steps), count = (n + TILE - 1) / TILE, units = layers * hidden;
  long gradient_size = lstm_gradient_size(hidden, layers, features);
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 1)
  for (long tile = 0; tile < count; tile++) {
    float *xs = tiles + omp_get_thread_num() * size, *hs = xs + steps * features * TILE;
    float *cells = hs + (steps + 1) * units * TILE;
    Kept *kept = (Kept *)(cells + units * TILE);
    float *sums = (float *)(kept + steps * units), *d_own = sums + 4 * hidden * TILE;
    long width = padded(2 * hidden, 4) * TILE;
    float *d_in = d_own + layers * width, *turned = d_in + width;
    float *totals = turned + TILE * padded(2 * hidden + 1 + features, TILE);
    long at = tile * TILE, m = n - at < TILE ? n - at : TILE;
    if (m < TILE) memset(xs, 0, size * sizeof(float));
    memset(d_own, 0, layers * width * sizeof(float));
    memset(totals, 0, (size - (totals - xs)) * sizeof(float));
    for (long k = 0; k < units; k++) {
      const float *h = state + (k + k / hidden * hidden) * stride + at;
      copy(hs + k * TILE, h, m);
      copy(cells + k * TILE, h + hidden * stride, m);
    }
    for (long s = 0; s < steps; s++) {
      for (long k = 0; k < features; k++) copy(xs + (s * features + k) * TILE, x + (s * features + k) * n + at, m);
      const float *w = forward, *in = xs + s * features * TILE;
      for (long l = 0; l < layers; l++) {
        const float *own = hs + (s * units + l * hidden) * TILE;
        float *next = hs + ((s + 1) * units + l * hidden) * TILE;
        for (long j = 0; j < hidden; j++) w = four_sums(w, w + 4, in, below_of(hidden, features, l), own, hidden, sums + 4 * j * TILE);
        for (long j = 0; j < hidden; j++)
          for (int v = 0; v < TILE; v += LANES)
            kept_unit(sums + 4 * j * TILE, cells + (l * hidden + j) * TILE, next + j * TILE, kept + s * units + l * hidden + j, v);
        in = next;
      }
    }
    memset(cells, 0, units * TILE * sizeof(float)); /* from here on the gradients of the cells */
    float *of_readout = totals;
    for (long l = 0; l < layers; l++) of_readout += total_of(hidden, below_of(hidden, features, l));
    for (long s = steps - 1; s >= 0; s--) {
      float cotangent[TILE] __attribute__((aligned(64))) = {0};
      copy(cotangent, cotangents + s * n + at, m);
      const float *top = hs + ((s + 1) * units + (layers - 1) * hidden) * TILE;
      float *d = d_own + (layers - 1) * width;
      for (int v = 0; v < WIDE; v++) {
        vec c = ((vec *)cotangent)[v];
        for (long j = 0; j < hidden; j++) {
          ((vec *)(of_readout + j * TILE))[v] += c * ((vec *)(top + j * TILE))[v];
          ((vec *)(d + j * TILE))[v] += readout[1 + j] * c;
        }
        ((vec *)(of_readout + hidden * TILE))[v] += c;
      }
      float *total = of_readout;
      const float *w = backward;
      for (long l = 0; l < layers - 1; l++) w += back_of(hidden, l);
      for (long l = layers - 1; l >= 0; l--) {
        long below = below_of(hidden, features, l), columns = padded(below + hidden + 1, TILE);
        total -= 4 * hidden * columns;
        d = d_own + l * width;
        for (long j = 0; j < hidden; j++)
          for (int v = 0; v < TILE; v += LANES)
            unit_backward(kept + s * units + l * hidden + j, d + j * TILE, cells + (l * hidden + j) * TILE, sums + 4 * j * TILE, v);
        const float *in = l ? hs + ((s + 1) * units + (l - 1) * hidden) * TILE : xs + s * features * TILE;
        transpose(in, below, columns, turned);
        transpose(hs + (s * units + l * hidden) * TILE, hidden, columns, turned + below);
        for (int t = 0; t < TILE; t++) {
          turned[t * columns + below + hidden] = 1;
          for (long k = below + hidden + 1; k < columns; k++) turned[t * columns + k] = 0;
        }
        outer(4 * hidden, columns, sums, turned, total);
        long outputs = l ? 2 * hidden : hidden;
        const float *b = w;
        for (long k = 0; k < outputs; k += 4) b = four_sums(0, b, sums, 4 * hidden, 0, 0, d_in + k * TILE);
        if (l) {
          float *lower = d_own + (l - 1) * width;
          for (long k = 0; k < hidden * TILE; k++) lower[k] += d_in[k];
          w -= back_of(hidden, l - 1);
        }
        memcpy(d, d_in + (l ? hidden : 0) * TILE, hidden * TILE * sizeof(float));
      }
    }
    double *to = gradients + omp_get_thread_num() * gradient_size;
    float *total = totals;
    for (long l = 0; l < layers; l++) {
      long fan_in = below_of(hidden, features, l) + hidden + 1, columns = padded(fan_in, TILE);
      for (long r = 0; r < 4 * hidden; r++, total += columns)
        for (long k = 0; k < fan_in; k++) *to++ += total[k];
    }
    for (long j = 0; j <= hidden; j++, to++)
      for (int t = 0; t < TILE; t++) *to += scale * of_readout[j * TILE + t];
  }
}
