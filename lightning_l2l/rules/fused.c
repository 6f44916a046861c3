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
#define WIDE 2 /* vectors: 4 gates by 2 vectors are 8 sums, what it takes to keep two multipliers busy */
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

/* 2^x for |x| <= bound and at the nearer end beyond; nan comes through. With 126 all that a float can hold is right; of
 * factors that are bounded by 40 three may be multiplied.
 * The nearest integer is in the last bits of x + 1.5 * 2^23, from where it is shifted into the exponent's place; the
 * polynomial has a relative error of 1e-7 on the remaining [-1/2, 1/2]. */
static inline vec power_of_2(vec x, float bound) {
  const float shift = 12582912.0f + 127.0f;
  x = clamped(x, bound);
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
  vec i = 1.0f + power_of_2(s[0], 40.0f), f = 1.0f + power_of_2(s[WIDE], 40.0f), o = 1.0f + power_of_2(s[2 * WIDE], 40.0f);
  vec g = power_of_2(s[3 * WIDE], 40.0f), i_g = i * (1.0f + g);
  vec c = (*(vec *)cell * i_g + f * (1.0f - g)) / (f * i_g);
  vec tau = power_of_2(c * (-2.0f * LOG2_E), 40.0f);
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

/* m columns of the state's rows (h, c) of each layer, from `state` to h [units, TILE] and c [units, TILE]. */
static void load(float *restrict h, float *restrict c, const float *restrict state, long stride, long hidden, long units,
                 long m) {
  for (long k = 0; k < units; k++) {
    const float *row = state + (k + k / hidden * hidden) * stride;
    copy(h + k * TILE, row, m);
    copy(c + k * TILE, row + hidden * stride, m);
    __builtin_prefetch(row + TILE); /* the next tile: there are more rows than the processor foresees by itself */
    __builtin_prefetch(row + hidden * stride + TILE);
  }
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

static long padded(long n, long to) { return (n + to - 1) / to * to; }

/* Where the readout's weights are in what pack_weights writes. */
static long readout_at(long hidden, long layers, long features) {
  return layers * 4 * hidden * (1 + 2 * hidden) - 4 * hidden * (hidden - features);
}

static long packed_size(long hidden, long layers, long features) {
  return padded(readout_at(hidden, layers, features) + 1 + hidden, 16);
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
    load(inputs + features * TILE, cells, state + at, stride, hidden, layers * hidden, m);
    tile_step(hidden, layers, features, scratch, inputs, cells, sums, out);
    for (long k = 0; k < layers * hidden; k++) {
      float *h = state + (k + k / hidden * hidden) * stride + at;
      copy(h, inputs + (features + k) * TILE, m);
      copy(h + hidden * stride, cells + k * TILE, m);
    }
    copy(update + at, out, m);
  }
}

/* ---- The meta-gradient: a tile goes through all inner steps again and back, before the next one is touched. ----
 *
 * So its activations stay in the second cache. The gradients of the weights are summed over a tile in float, over tiles in
 * double. Rows of sums and of their gradients are ordered by unit, then gate (i, f, o, g). */

typedef struct {
  float i[TILE], f[TILE], o[TILE], g[TILE], tau[TILE], cell_before[TILE];
} Kept;

static inline vec sigmoid(vec exponent) { return 1.0f / (1.0f + power_of_2(exponent, 126.0f)); }

/* As `unit`, but for what the way back needs. There a saturated gate's slope may meet a huge x: it has to vanish. */
static inline void kept_unit(const float *restrict sums, float *restrict cell, float *restrict hidden, Kept *kept) {
  for (int v = 0; v < TILE; v += LANES) {
    const vec *s = (const vec *)(sums + v);
    vec i = sigmoid(s[0]), f = sigmoid(s[WIDE]), o = sigmoid(s[2 * WIDE]), g = 2.0f * sigmoid(s[3 * WIDE]) - 1.0f;
    vec before = *(vec *)(cell + v), c = f * before + i * g;
    vec tau = 2.0f * sigmoid(c * (-2.0f * LOG2_E)) - 1.0f;
    *(vec *)(kept->i + v) = i;
    *(vec *)(kept->f + v) = f;
    *(vec *)(kept->o + v) = o;
    *(vec *)(kept->g + v) = g;
    *(vec *)(kept->tau + v) = tau;
    *(vec *)(kept->cell_before + v) = before;
    *(vec *)(cell + v) = c;
    *(vec *)(hidden + v) = o * tau;
  }
}

/* d_hidden, d_cell -> gradients of the unit's four sums, and d_cell of the step before */
static inline void unit_backward(const Kept *kept, const float *restrict d_hidden, float *restrict d_cell,
                                 float *restrict d_sums) {
  for (int v = 0; v < TILE; v += LANES) {
    vec i = *(vec *)(kept->i + v), f = *(vec *)(kept->f + v), o = *(vec *)(kept->o + v), g = *(vec *)(kept->g + v);
    vec tau = *(vec *)(kept->tau + v), d_h = *(vec *)(d_hidden + v);
    vec d_c = *(vec *)(d_cell + v) + d_h * o * (1.0f - tau * tau);
    *(vec *)(d_sums + v) = d_c * g * i * (1.0f - i);
    *(vec *)(d_sums + TILE + v) = d_c * *(vec *)(kept->cell_before + v) * f * (1.0f - f);
    *(vec *)(d_sums + 2 * TILE + v) = d_h * tau * o * (1.0f - o);
    *(vec *)(d_sums + 3 * TILE + v) = d_c * i * (1.0f - g * g);
    *(vec *)(d_cell + v) = d_c * f;
  }
}

/* total [rows, columns] += d [rows, TILE] x [TILE, columns]; rows are a multiple of 4, columns of TILE. */
static void add_product(long rows, long columns, const float *restrict d, const float *restrict x, float *restrict total) {
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

/* Sizes, and where a thread has what it needs for a tile; numbers of the arrays in brackets. */
typedef struct {
  long hidden, layers, features, steps, units;
  float *x;        /* [steps, features, TILE] */
  float *states;   /* [steps + 1, units, TILE], h before each step and after the last */
  float *cells;    /* [units, TILE], on the way back their gradients */
  Kept *kept;      /* [steps, units] */
  float *sums;     /* [4 hidden, TILE], on the way back their gradients */
  float *d_hidden; /* [units, TILE] */
  float *d_inputs; /* [2 hidden padded to 4, TILE] */
  float *turned;   /* [TILE, 2 hidden + 1 + features padded], what a layer reads, by coordinate */
  float *totals;   /* a layer: [4 hidden, columns(layer)]; the readout: [hidden + 1, TILE] */
  float *end;
} Tile;

static long below(const Tile *t, long layer) { return layer ? t->hidden : t->features; }
static long fan_in(const Tile *t, long layer) { return below(t, layer) + t->hidden + 1; }
static long columns(const Tile *t, long layer) { return padded(fan_in(t, layer), TILE); }

/* Numbers of the weights that lead back from a layer's sums: to its own h, and in all but the lowest to the h below. */
static long back_size(const Tile *t, long layer) {
  return padded(layer ? 2 * t->hidden : t->hidden, 4) * 4 * t->hidden;
}

static Tile lay_out(long hidden, long layers, long features, long steps, float *at) {
  Tile t = {hidden, layers, features, steps, layers * hidden};
  t.x = at;
  t.states = t.x + steps * features * TILE;
  t.cells = t.states + (steps + 1) * t.units * TILE;
  t.kept = (Kept *)(t.cells + t.units * TILE);
  t.sums = (float *)(t.kept + steps * t.units);
  t.d_hidden = t.sums + 4 * hidden * TILE;
  t.d_inputs = t.d_hidden + t.units * TILE;
  t.turned = t.d_inputs + padded(2 * hidden, 4) * TILE;
  t.totals = t.turned + padded(2 * hidden + 1 + features, TILE) * TILE;
  t.end = t.totals + (hidden + 1) * TILE;
  for (long layer = 0; layer < layers; layer++) t.end += 4 * hidden * columns(&t, layer);
  return t;
}

static void tile_forward(const Tile *t, const float *weights) {
  for (long step = 0; step < t->steps; step++) {
    const float *w = weights, *in = t->x + step * t->features * TILE;
    for (long layer = 0; layer < t->layers; layer++) {
      const float *own = t->states + (step * t->units + layer * t->hidden) * TILE;
      float *next = (float *)own + t->units * TILE;
      for (long j = 0; j < t->hidden; j++)
        w = four_sums(w, w + 4, in, below(t, layer), own, t->hidden, t->sums + 4 * j * TILE);
      for (long j = 0; j < t->hidden; j++) {
        long unit = layer * t->hidden + j;
        kept_unit(t->sums + 4 * j * TILE, t->cells + unit * TILE, next + j * TILE, t->kept + step * t->units + unit);
      }
      in = next;
    }
  }
}

/* The readout: its own gradients, and what it adds to the highest layer's d_hidden. */
static void readout_backward(const Tile *t, long step, const float *readout, const float *cotangent, float *total) {
  const float *top = t->states + ((step + 2) * t->units - t->hidden) * TILE;
  float *d = t->d_hidden + (t->units - t->hidden) * TILE;
  for (int v = 0; v < TILE; v += LANES) {
    vec c = *(vec *)(cotangent + v);
    for (long j = 0; j < t->hidden; j++) {
      *(vec *)(total + j * TILE + v) += c * *(vec *)(top + j * TILE + v);
      *(vec *)(d + j * TILE + v) += readout[1 + j] * c;
    }
    *(vec *)(total + t->hidden * TILE + v) += c;
  }
}

static void layer_backward(const Tile *t, long step, long layer, const float *weights, float *total) {
  long hidden = t->hidden, first = layer * hidden, width = columns(t, layer), from_below = below(t, layer);
  float *d = t->d_hidden + first * TILE;
  for (long j = 0; j < hidden; j++)
    unit_backward(t->kept + step * t->units + first + j, d + j * TILE, t->cells + (first + j) * TILE, t->sums + 4 * j * TILE);

  const float *own = t->states + (step * t->units + first) * TILE;
  const float *in = layer ? own + (t->units - hidden) * TILE : t->x + step * t->features * TILE;
  transpose(in, from_below, width, t->turned);
  transpose(own, hidden, width, t->turned + from_below);
  for (int k = 0; k < TILE; k++)
    for (long c = from_below + hidden; c < width; c++) t->turned[k * width + c] = c == from_below + hidden;
  add_product(4 * hidden, width, t->sums, t->turned, total);

  long outputs = layer ? 2 * hidden : hidden;
  for (long k = 0; k < outputs; k += 4)
    weights = four_sums(0, weights, t->sums, 4 * hidden, 0, 0, t->d_inputs + k * TILE);
  if (layer)
    for (long k = 0; k < hidden * TILE; k++) d[k - hidden * TILE] += t->d_inputs[k];
  memcpy(d, t->d_inputs + (outputs - hidden) * TILE, hidden * TILE * sizeof(float));
}

/* Weights for the way back, four columns of what a layer reads (below, own) at a time. */
static void pack_back(const Tile *t, const float *const *from, float *to) {
  static const int torch_gate[4] = {0, 1, 3, 2};
  for (long layer = 0; layer < t->layers; layer++, from += 2) {
    long of_below = below(t, layer), first = layer ? 0 : of_below, last = of_below + t->hidden;
    const float *input = *from++;
    for (long c = first; c < last; c += 4)
      for (long row = 0; row < 4 * t->hidden; row++)
        for (long k = c; k < c + 4; k++) {
          long r = torch_gate[row % 4] * t->hidden + row / 4;
          *to++ = k < of_below ? input[r * of_below + k] : k < last ? from[0][r * t->hidden + k - of_below] : 0;
        }
  }
}

/* Numbers of gradients: a layer's [4 hidden, fan_in] (below, own, bias), the readout's [hidden + 1] (weight, bias). */
long lstm_gradient_size(long hidden, long layers, long features) {
  Tile t = {hidden, layers, features};
  long size = hidden + 1;
  for (long layer = 0; layer < layers; layer++) size += 4 * hidden * fan_in(&t, layer);
  return size;
}

static long weights_size(const Tile *t) {
  long size = packed_size(t->hidden, t->layers, t->features);
  for (long layer = 0; layer < t->layers; layer++) size += back_size(t, layer);
  return padded(size, 16);
}

/* Numbers of scratch that lstm_gradients needs with so many threads. */
long lstm_gradient_scratch(long hidden, long layers, long features, long steps, long threads) {
  Tile t = lay_out(hidden, layers, features, steps, 0);
  return weights_size(&t) + threads * (t.end - t.x);
}

/* x [steps, features, n], cotangents [steps, n], gradients [threads, lstm_gradient_size] to be added to; else as lstm_step. */
void lstm_gradients(long n, long stride, long hidden, long layers, long features, long steps, const float *const *from,
                    float scale, const float *restrict x, const float *restrict state, const float *restrict cotangents,
                    double *restrict gradients, long threads, float *restrict scratch) {
  Tile sizes = lay_out(hidden, layers, features, steps, 0);
  float *back = scratch + packed_size(hidden, layers, features), *tiles = scratch + weights_size(&sizes);
  pack_weights(hidden, layers, features, from, scale, scratch);
  pack_back(&sizes, from, back);
  const float *readout = scratch + readout_at(hidden, layers, features);
  long count = (n + TILE - 1) / TILE, size = lstm_gradient_size(hidden, layers, features);
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 1)
  for (long tile = 0; tile < count; tile++) {
    long at = tile * TILE, m = n - at < TILE ? n - at : TILE;
    Tile t = lay_out(hidden, layers, features, steps, tiles + omp_get_thread_num() * (sizes.end - sizes.x));
    if (m < TILE) memset(t.x, 0, (t.end - t.x) * sizeof(float));
    load(t.states, t.cells, state + at, stride, hidden, t.units, m);
    for (long k = 0; k < steps * features; k++) copy(t.x + k * TILE, x + k * n + at, m);
    tile_forward(&t, scratch);

    memset(t.cells, 0, t.units * TILE * sizeof(float));
    memset(t.d_hidden, 0, t.units * TILE * sizeof(float));
    memset(t.totals, 0, (t.end - t.totals) * sizeof(float));
    float *of_readout = t.end - (hidden + 1) * TILE;
    for (long step = steps - 1; step >= 0; step--) {
      float cotangent[TILE] __attribute__((aligned(64))) = {0};
      copy(cotangent, cotangents + step * n + at, m);
      readout_backward(&t, step, readout, cotangent, of_readout);
      float *total = of_readout, *weights = back;
      for (long layer = 0; layer < layers; layer++) weights += back_size(&t, layer);
      for (long layer = layers - 1; layer >= 0; layer--) {
        total -= 4 * hidden * columns(&t, layer);
        weights -= back_size(&t, layer);
        layer_backward(&t, step, layer, weights, total);
      }
    }

    double *to = gradients + omp_get_thread_num() * size;
    const float *total = t.totals;
    for (long layer = 0; layer < layers; layer++)
      for (long row = 0; row < 4 * hidden; row++, total += columns(&t, layer))
        for (long k = 0; k < fan_in(&t, layer); k++) *to++ += total[k];
    for (long j = 0; j <= hidden; j++, to++)
      for (int k = 0; k < TILE; k++) *to += scale * of_readout[j * TILE + k];
  }
}
