/* The LSTM kernel, compiled: an inner step, and the backward pass over a truncation.
 *
 * Compiled on first use by fused.py. NaN must come through, so nothing here may be built with -ffast-math.
 *
 * A layer reads what is below it (what the rule sees of a gradient, or the h of the layer below) and its own h. Gates are
 * ordered (i, f, o, g), sums by unit and then gate. */

#include "vectors.h"

/* 1 / x for |x| from 1 to 2^126, to 1e-7: where there is a first approximation, one step of Newton's costs a quarter of a
 * division. */
INLINE vec reciprocal(vec x) {
#ifdef __AVX512F__
  vec first = (vec)_mm512_rcp14_ps((__m512)x);
  return first * (2.0f - x * first);
#else
  return 1.0f / x;
#endif
}

/* 2^x for |x| <= bound and at the nearer end beyond. With 126 all that a float can hold is right; of factors that are
 * bounded by 40 three may be multiplied.
 * The nearest integer is in the last bits of x + 1.5 * 2^23, from where it is shifted into the exponent's place; the
 * polynomial has a relative error of 1e-7 on the remaining [-1/2, 1/2]. */
INLINE vec power_of_2(vec x, float bound) {
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

/* log |x|, -88 for 0: x = 2^k m with m from sqrt(1/2) to sqrt(2), and a polynomial with a relative error of 1e-8 for m. */
INLINE vec log_abs(vec x) {
  ivec bits = (ivec)x & 0x7fffffff, exponent = (bits - 0x3f3504f3) >> 23, no_number = bits >= 0x7f800000;
  vec m = (vec)(bits - (exponent << 23)) - 1.0f;
  vec q = m * -0.0763448179f + 0.127615705f;
  q = q * m - 0.131601855f;
  q = q * m + 0.142017588f;
  q = q * m - 0.166233569f;
  q = q * m + 0.200012267f;
  q = q * m - 0.250008196f;
  q = q * m + 0.333333313f;
  vec log = __builtin_convertvector(exponent, vec) * 0.693147181f + (m + m * m * (q * m - 0.5f));
  return (vec)((no_number & bits) | (~no_number & (ivec)log));
}

/* sigmoid(s) of exponent = -log2(e) s */
INLINE vec sigmoid(vec exponent) { return reciprocal(1.0f + power_of_2(exponent, 126.0f)); }

INLINE vec tanh_of(vec x) { return 2.0f * sigmoid(x * (-2.0f * LOG2_E)) - 1.0f; }

/* ---- What a rule sees of a gradient ---- */

enum { IDENTITY, LOG_AND_SIGN, MOMENTS };
#define LEAST 0.05f /* of the bound on updates, at the horizon */

typedef struct {
  long hidden, layers;       /* units a layer, layers */
  long kind;                 /* IDENTITY: the gradient; LOG_AND_SIGN: preprocessing.py; MOMENTS: rnnprop.py */
  long means;                /* of MOMENTS: running means of the gradient, at most MOST_MEANS */
  long time, warmup, decay, horizon; /* of MOMENTS: whether the time is a feature; see rnnprop.py, 0 for none */
  long waits;                /* whether a coordinate waits for its first gradient other than 0 */
  float p, e_to_p;           /* of LOG_AND_SIGN */
  float gain1[MOST_MEANS], gain2, eps; /* of MOMENTS: 1 - beta; it has an input layer first, and a tanh at the end */
  float scale;               /* of the update */
} Rule;

static long features(const Rule *rule) {
  return rule->kind == MOMENTS ? rule->means + 1 + rule->time : rule->kind == IDENTITY ? 1 : 2;
}

/* Rows of what the lowest layer reads of a gradient. */
static long of_gradient(const Rule *rule) { return rule->kind == MOMENTS ? rule->hidden : features(rule); }

/* Whether the bound on updates does. */
static long changes(const Rule *rule) { return rule->warmup || rule->decay || rule->horizon; }

static long has_clock(const Rule *rule) { return rule->time || changes(rule); }

/* Rows of state besides those of the layers, which come first. */
static long memories(const Rule *rule) {
  return rule->kind == MOMENTS ? 2 * rule->means + 2 + has_clock(rule) : 0;
}

/* The row with the number of steps, where there is one. */
static float *clock_of(const Rule *rule, float *memory) { return memory + (2 * rule->means + 2) * TILE; }

/* mask [TILE] of the coordinates that move: those with a gradient other than 0, and those that had one, of which what the
 * weights in the mean of squares add up to tells, or the cells. Bits are looked at: as floats the least count as 0 here.
 * Returns whether some may not move, which is rare and so may cost more. */
INLINE int find_moving(const Rule *rule, const float *restrict gradient, const float *restrict memory,
                       const float *restrict cells, float *restrict mask) {
  int zeros = 0;
  for (int k = 0; k < TILE; k++) zeros |= gradient[k] == 0.0f;
  zeros &= rule->waits != 0;
  long moments = rule->kind == MOMENTS, rows = !zeros ? 0 : moments ? 1 : rule->layers * rule->hidden;
  const float *row = moments ? memory + (2 * rule->means + 1) * TILE : cells;
  for (int v = 0; v < TILE; v += LANES) {
    ivec bits = (ivec) * (const vec *)(gradient + v);
    for (long k = 0; k < rows; k++) bits |= (ivec) * (const vec *)(row + k * TILE + v);
    *(vec *)(mask + v) = (vec)(((bits & 0x7fffffff) != 0) | (zeros - 1));
  }
  return zeros;
}

/* Zeros in rows [rows, TILE] where a coordinate does not move. */
static void hold(const float *restrict mask, long rows, float *restrict to) {
  for (long k = 0; k < rows; k++, to += TILE)
    for (int v = 0; v < TILE; v += LANES) *(vec *)(to + v) = only(*(const vec *)(mask + v), *(vec *)(to + v));
}

/* Features x [features, TILE] of gradients [TILE]; memory [memories, TILE] is the running means of g and that of g^2, what
 * the weights in each of them add up to, and the number of steps. Where a coordinate does not move, the last alone
 * changes. */
INLINE void preprocess(const Rule *rule, const float *restrict gradient, const float *restrict mask,
                       float *restrict memory, float *restrict x) {
  for (int v = 0; v < TILE; v += LANES) {
    vec g = *(const vec *)(gradient + v);
    if (rule->kind == LOG_AND_SIGN) {
      *(vec *)(x + v) = at_least(log_abs(g) / rule->p, -1.0f);
      *(vec *)(x + TILE + v) = clamped(g * rule->e_to_p, 1.0f);
    } else if (rule->kind == MOMENTS) {
      g = clamped(g, 1e18f); /* its square has to be a float */
      long means = rule->means;
      vec *s = (vec *)(memory + means * TILE + v), *of_s = (vec *)(memory + (2 * means + 1) * TILE + v);
      *s += rule->gain2 * (g * g - *s);
      *of_s += rule->gain2 * (1.0f - *of_s);
      vec root = square_root(*s / *of_s) + rule->eps;
      for (long k = 0; k < means; k++) {
        vec *m = (vec *)(memory + k * TILE + v), *of_m = (vec *)(memory + (means + 1 + k) * TILE + v);
        *m += rule->gain1[k] * (g - *m);
        *of_m += rule->gain1[k] * (1.0f - *of_m);
        *(vec *)(x + k * TILE + v) = *m / (*of_m * root);
      }
      *(vec *)(x + means * TILE + v) = g / root;
      for (long k = 0; k <= means; k++) {
        vec *of = (vec *)(memory + (means + 1 + k) * TILE + v);
        *of = only(*(const vec *)(mask + v), *of);
      }
      vec *steps = (vec *)(clock_of(rule, memory) + v);
      if (has_clock(rule)) *steps += 1.0f;
      if (rule->time) *(vec *)(x + (means + 1) * TILE + v) = 0.25f * log_abs(1.0f + *steps) - 1.0f;
    } else
      *(vec *)(x + v) = g;
  }
}

/* The input layer: to [hidden, TILE] = elu(weights x + bias), the weights of a unit (bias, features). */
static void input_layer(const Rule *rule, const float *restrict weights, const float *restrict x, float *restrict to) {
  long count = features(rule);
  for (long j = 0; j < rule->hidden; j++, weights += 1 + count, to += TILE)
    for (int v = 0; v < TILE; v += LANES) {
      vec sum = ALL(weights[0]);
      for (long k = 0; k < count; k++) sum += weights[1 + k] * *(const vec *)(x + k * TILE + v);
      *(vec *)(to + v) = at_least(sum, 0.0f) + (power_of_2(at_most(sum, 0.0f) * LOG2_E, 126.0f) - 1.0f);
    }
}

/* ---- Products ---- */

/* total [rows, vecs * LANES] += d [rows, TILE] x [TILE, vecs * LANES], the rows of x and total `columns` apart. */
INLINE void add_block(const int rows, const int vecs, const float *restrict d, const float *restrict x, long columns,
                      float *restrict total) {
  vec sum[4 * UNITS][3];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vecs; v++) sum[r][v] = ((vec *)(total + r * columns))[v];
  for (int t = 0; t < TILE; t++) {
    vec in[3];
    for (int v = 0; v < vecs; v++) in[v] = in_register(((vec *)(x + t * columns))[v]);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < vecs; v++) sum[r][v] += ALL(d[r * TILE + t]) * in[v];
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vecs; v++) ((vec *)(total + r * columns))[v] = sum[r][v];
}

INLINE void add_rows(const int rows, const float *restrict d, const float *restrict x, long columns, float *restrict total) {
  for (long c = 0; c < columns;) {
    long left = (columns - c) / LANES;
    if (left == 3) {
      add_block(rows, 3, d, x + c, columns, total + c);
      c += 3 * LANES;
    } else if (left > 1) {
      add_block(rows, 2, d, x + c, columns, total + c);
      c += 2 * LANES;
    } else {
      add_block(rows, 1, d, x + c, columns, total + c);
      c += LANES;
    }
  }
}

/* total [4 units, columns] += d [4 units, TILE] x [TILE, columns]; columns are a multiple of LANES. */
static void add_product(long units, long columns, const float *restrict d, const float *restrict x, float *restrict total) {
  long j = 0;
  for (; j + UNITS <= units; j += UNITS) add_rows(4 * UNITS, d + 4 * j * TILE, x, columns, total + 4 * j * columns);
  for (; j < units; j++) add_rows(4, d + 4 * j * TILE, x, columns, total + 4 * j * columns);
}

/* ---- Weights, in the order in which they are used ---- */

/* What the readout is packed with: before a tanh there is no factor. */
static float outer_scale(const Rule *rule) { return rule->kind == MOMENTS ? 1.0f : rule->scale; }

/* Rows of what a layer reads to which its gradients are led back; features have none. */
static long outputs(const Rule *rule, long layer) {
  return layer || rule->kind == MOMENTS ? 2 * rule->hidden : rule->hidden;
}

/* A column of weights, for the four gates; torch's order of gates is (i, f, g, o). The sums are exponents of 2. */
static float *put(float *restrict to, const float *restrict from, long j, long hidden, long columns, long k) {
  *to++ = -LOG2_E * from[j * columns + k];
  *to++ = -LOG2_E * from[(hidden + j) * columns + k];
  *to++ = -LOG2_E * from[(3 * hidden + j) * columns + k];
  *to++ = -2.0f * LOG2_E * from[(2 * hidden + j) * columns + k];
  return to;
}

static void pack_forward(const Rule *rule, const float *const *from, float *to) {
  long hidden = rule->hidden;
  if (rule->kind == MOMENTS) {
    const float *const *input = from + 3 * rule->layers + 2;
    for (long j = 0; j < hidden; j++) {
      *to++ = input[1][j];
      for (long k = 0; k < features(rule); k++) *to++ = input[0][features(rule) * j + k];
    }
  }
  for (long layer = 0; layer < rule->layers; layer++, from += 3) {
    long below = layer ? hidden : of_gradient(rule);
    for (long j = 0; j < hidden; j++) {
      to = put(to, from[2], j, hidden, 1, 0);
      for (long k = 0; k < below; k++) to = put(to, from[0], j, hidden, below, k);
      for (long k = 0; k < hidden; k++) to = put(to, from[1], j, hidden, hidden, k);
    }
  }
  *to++ = outer_scale(rule) * from[1][0];
  for (long j = 0; j < hidden; j++) *to++ = outer_scale(rule) * from[0][j];
}

/* For the way back: four columns of what a layer reads (below, own) at a time; features lead nowhere. */
static void pack_back(const Rule *rule, const float *const *from, float *to) {
  static const int torch_gate[4] = {0, 1, 3, 2};
  long hidden = rule->hidden;
  for (long layer = 0; layer < rule->layers; layer++, from += 3) {
    long below = layer ? hidden : of_gradient(rule), last = below + hidden;
    for (long c = last - outputs(rule, layer); c < last; c += 4)
      for (long row = 0; row < 4 * hidden; row++)
        for (long k = c; k < c + 4; k++) {
          long r = torch_gate[row % 4] * hidden + row / 4;
          *to++ = k < below ? from[0][r * below + k] : k < last ? from[1][r * hidden + k - below] : 0;
        }
  }
}

/* Where the layers' weights and the readout's are in what pack_forward writes. */
static long layers_at(const Rule *rule) { return rule->kind == MOMENTS ? (1 + features(rule)) * rule->hidden : 0; }

static long readout_at(const Rule *rule) {
  long hidden = rule->hidden;
  return layers_at(rule) + rule->layers * 4 * hidden * (1 + 2 * hidden) - 4 * hidden * (hidden - of_gradient(rule));
}

static long forward_size(const Rule *rule) { return padded(readout_at(rule) + 1 + rule->hidden, 16); }

/* Numbers of the weights that lead back from a layer's sums. */
static long back_size(const Rule *rule, long layer) { return padded(outputs(rule, layer), 4) * 4 * rule->hidden; }

/* Numbers that lstm_pack writes, with the weights for the way back or without. */
long lstm_packed_size(const Rule *rule, int back) {
  long size = forward_size(rule);
  for (long layer = 0; back && layer < rule->layers; layer++) size += back_size(rule, layer);
  return size;
}

/* from: weight_ih, weight_hh and bias of each layer, lowest first, the readout's weight and bias, and the input layer's
 * where there is one. */
void lstm_pack(const Rule *rule, int back, const float *const *from, float *to) {
  pack_forward(rule, from, to);
  if (back) pack_back(rule, from, to + forward_size(rule));
}

/* ---- To and from a tile. One that is not full has zeros in the other columns. ---- */

/* A row of a tile, the same row of the next one on its way: there are more rows than the processor foresees by itself. */
static inline void load_row(float *restrict to, const float *restrict from, long n) {
  if (n < TILE) memset(to, 0, TILE * sizeof(float));
  copy(to, from, n);
  __builtin_prefetch(from + TILE);
  __builtin_prefetch(from + TILE + LANES);
}

/* m columns of the state's rows (h, c) of each layer, from `state` to h [units, TILE] and c [units, TILE]. */
static void load(float *restrict h, float *restrict c, const float *restrict state, long stride, long hidden, long units,
                 long m) {
  for (long k = 0; k < units; k++) {
    const float *row = state + (k + k / hidden * hidden) * stride;
    load_row(h + k * TILE, row, m);
    load_row(c + k * TILE, row + hidden * stride, m);
  }
}

/* ---- One inner step, the state changed in place. ----
 *
 * A tile of coordinates goes through all layers before the next one is touched, so that the state is read and written
 * once and all else stays in registers and the first cache. */

/* With I = 1 + 2^i and so on, sigmoid(i) = 1 / I and tanh(g) = (2 - G) / G: the cell takes one reciprocal and the output
 * another. */
INLINE void unit(const float *restrict sums, float *restrict cell, float *restrict hidden) {
  const vec *s = (const vec *)sums;
  vec i = 1.0f + power_of_2(s[0], 40.0f), f = 1.0f + power_of_2(s[WIDE], 40.0f), o = 1.0f + power_of_2(s[2 * WIDE], 40.0f);
  vec g = power_of_2(s[3 * WIDE], 40.0f), i_g = i * (1.0f + g);
  vec c = (*(vec *)cell * i_g + f * (1.0f - g)) * reciprocal(f * i_g);
  vec tau = power_of_2(c * (-2.0f * LOG2_E), 40.0f);
  *(vec *)cell = c;
  *(vec *)hidden = (1.0f - tau) * reciprocal(o * (1.0f + tau));
}

/* Factor on the bounded updates of a tile, vector v, after so many steps, of which `clock` has `more` by now. */
INLINE vec bound(const Rule *rule, const float *restrict clock, int v, long more) {
  vec found = ALL(rule->scale);
  if (!changes(rule)) return found;
  vec step = ((const vec *)clock)[v] - (float)more;
  if (rule->warmup) found *= at_most(step / (float)rule->warmup, 1.0f);
  if (rule->decay) found /= square_root(1.0f + step / (float)rule->decay);
  if (rule->horizon) found *= 1.0f - (1.0f - LEAST) * at_most((step - 1.0f) / (float)rule->horizon, 1.0f);
  return found;
}

/* inputs: rows x, h of the lowest layer, h of the next, ...; a layer reads what is below and its own h, which are
 * adjacent, and writes its own h: the next layer's input. mask: null where all coordinates move. */
static void tile_step(const Rule *rule, const float *restrict weights, const float *restrict mask, float *restrict inputs,
                      float *restrict cells, float *restrict sums, const float *restrict clock, float *restrict update) {
  long hidden = rule->hidden;
  for (long layer = 0; layer < rule->layers; layer++) {
    long below = layer ? hidden : of_gradient(rule);
    weights = all_sums(hidden, 1, weights, inputs, below + hidden, 0, 0, sums);
    inputs += below * TILE;
    for (long j = 0; j < hidden; j++, cells += TILE)
      for (int v = 0; v < TILE; v += LANES) unit(sums + 4 * j * TILE + v, cells + v, inputs + j * TILE + v);
    if (mask) {
      hold(mask, hidden, inputs);
      hold(mask, hidden, cells - hidden * TILE);
    }
  }
  for (int v = 0; v < WIDE; v++) {
    vec sum = ALL(weights[0]);
    for (long j = 0; j < hidden; j++) sum += weights[1 + j] * ((vec *)(inputs + j * TILE))[v];
    if (rule->kind == MOMENTS) sum = bound(rule, clock, v, 0) * tanh_of(sum);
    ((vec *)update)[v] = sum;
  }
  if (mask) hold(mask, 1, update);
}

static long step_size(const Rule *rule) {
  long rows = 2 + features(rule) + memories(rule) + of_gradient(rule);
  return (rows + 2 * rule->layers * rule->hidden + 4 * rule->hidden + 1) * TILE;
}

/* Numbers of scratch that lstm_step needs with so many threads. */
long lstm_scratch(const Rule *rule, long threads) { return threads * step_size(rule); }

/* weights: from lstm_pack. gradient [n]; state: rows (h, c) of each layer and the memories, `stride` numbers apart, n of
 * each; update [n]. scratch is aligned to 64 bytes. */
void lstm_step(const Rule *rule, long n, long stride, const float *restrict weights, const float *restrict gradient,
               float *restrict state, float *restrict update, long threads, float *restrict scratch) {
  long hidden = rule->hidden, size = step_size(rule), units = rule->layers * hidden, count = (n + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads) if (count > 8)
  {
    unsigned mode = flush_denormals();
    float *given = scratch + omp_get_thread_num() * size, *mask = given + TILE, *x = mask + TILE;
    float *memory = x + features(rule) * TILE;
    float *inputs = rule->kind == MOMENTS ? memory + memories(rule) * TILE : x, *h = inputs + of_gradient(rule) * TILE;
    float *cells = h + units * TILE, *sums = cells + units * TILE, *out = sums + 4 * hidden * TILE;
#pragma omp for schedule(static)
    for (long tile = 0; tile < count; tile++) {
      long at = tile * TILE, m = n - at < TILE ? n - at : TILE;
      float *remembered = state + 2 * units * stride + at;
      load_row(given, gradient + at, m);
      for (long k = 0; k < memories(rule); k++) load_row(memory + k * TILE, remembered + k * stride, m);
      load(h, cells, state + at, stride, hidden, units, m);
      int all = !find_moving(rule, given, memory, cells, mask);
      preprocess(rule, given, mask, memory, x);
      if (rule->kind == MOMENTS) input_layer(rule, weights, x, inputs);
      tile_step(rule, weights + layers_at(rule), all ? 0 : mask, inputs, cells, sums, clock_of(rule, memory), out);
      for (long k = 0; k < memories(rule); k++) copy(remembered + k * stride, memory + k * TILE, m);
      for (long k = 0; k < units; k++) {
        float *row = state + (k + k / hidden * hidden) * stride + at;
        copy(row, h + k * TILE, m);
        copy(row + hidden * stride, cells + k * TILE, m);
      }
      copy(update + at, out, m);
    }
    restore(mode);
  }
}

/* ---- The meta-gradient: a tile goes through all inner steps again and back, before the next one is touched. ----
 *
 * So its activations stay in the second cache. The gradients of the weights are summed over a tile in float, over tiles in
 * double. */

typedef struct {
  float i[TILE], f[TILE], o[TILE], g[TILE], tau[TILE], cell_before[TILE];
} Kept;

/* As `unit`, but for what the way back needs. There a saturated gate's slope may meet a huge x: it has to vanish. Without
 * i and tau no gradient comes to any of the four sums of a cell that was 0. */
INLINE void kept_unit(const float *restrict sums, const float *restrict mask, float *restrict cell,
                      float *restrict hidden, Kept *kept) {
  for (int v = 0; v < TILE; v += LANES) {
    const vec *s = (const vec *)(sums + v);
    vec moves = *(const vec *)(mask + v), i = only(moves, sigmoid(s[0])), f = sigmoid(s[WIDE]);
    vec o = sigmoid(s[2 * WIDE]), g = 2.0f * sigmoid(s[3 * WIDE]) - 1.0f;
    vec before = *(vec *)(cell + v), c = f * before + i * g;
    vec tau = only(moves, tanh_of(c));
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
INLINE void unit_backward(const Kept *kept, const float *restrict d_hidden, float *restrict d_cell, float *restrict d_sums) {
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

#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#if LANES == 16
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LAST_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define LAST_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#endif

/* Rows and columns of LANES vectors change places: each round brings row r and row r + LANES / 2 together, lane by lane. */
INLINE void transpose(vec *rows) {
  for (int round = 1; round < LANES; round *= 2) {
    vec mixed[LANES];
    for (int r = 0; r < LANES / 2; r++) {
      mixed[2 * r] = SHUFFLED(rows[r], rows[r + LANES / 2], FIRST_HALVES);
      mixed[2 * r + 1] = SHUFFLED(rows[r], rows[r + LANES / 2], LAST_HALVES);
    }
    for (int r = 0; r < LANES; r++) rows[r] = mixed[r];
  }
}

/* What a layer reads, by coordinate: to [TILE, columns], the columns those below, the layer's own, a one, and zeros. */
static void turn(const float *restrict in, long below, const float *restrict own, long hidden, long columns,
                 float *restrict to) {
  for (long c = 0; c < columns; c += LANES)
    for (int v = 0; v < TILE; v += LANES) {
      vec rows[LANES];
      for (int q = 0; q < LANES; q++) {
        long k = c + q, k_own = k - below;
        if (k_own < hidden)
          rows[q] = *(const vec *)((k < below ? in + k * TILE : own + k_own * TILE) + v);
        else
          rows[q] = ALL(k_own == hidden ? 1.0f : 0.0f);
      }
      transpose(rows);
      for (int q = 0; q < LANES; q++) *(vec *)(to + (v + q) * columns + c) = rows[q];
    }
}

/* Where a thread has what it needs for a tile; numbers of the arrays in brackets. */
typedef struct {
  const Rule *rule;
  long steps, units;
  float *gradients; /* [steps + 1, TILE] */
  float *moving;    /* [steps, TILE], masks */
  float *memory;    /* [memories, TILE] */
  float *seen;      /* [steps, features, TILE] */
  float *x;         /* [steps, of_gradient, TILE]: `seen`, or what the input layer makes of it */
  float *states;    /* [steps + 1, units, TILE], h before each step and after the last */
  float *cells;     /* [units, TILE], on the way back their gradients */
  Kept *kept;       /* [steps, units] */
  float *sums;      /* [4 hidden, TILE], on the way back their gradients */
  float *d_hidden;  /* [units, TILE] */
  float *d_inputs;  /* [2 hidden padded to 4, TILE] */
  float *turned;    /* [TILE, fan_in padded] */
  float *totals;    /* a layer: [4 hidden, columns(layer)]; the readout: [hidden + 1, TILE]; the input layer: [layers_at, TILE] */
  float *end;
} Tile;

static long below(const Rule *rule, long layer) { return layer ? rule->hidden : of_gradient(rule); }
static long fan_in(const Rule *rule, long layer) { return below(rule, layer) + rule->hidden + 1; }
static long columns(const Rule *rule, long layer) { return padded(fan_in(rule, layer), LANES); }

static Tile lay_out(const Rule *rule, long steps, float *at) {
  long hidden = rule->hidden, input = rule->kind == MOMENTS;
  Tile t = {rule, steps, rule->layers * hidden};
  t.gradients = at;
  t.moving = t.gradients + (steps + 1) * TILE;
  t.memory = t.moving + steps * TILE;
  t.seen = t.memory + memories(rule) * TILE;
  t.x = input ? t.seen + steps * features(rule) * TILE : t.seen;
  t.states = t.x + steps * of_gradient(rule) * TILE;
  t.cells = t.states + (steps + 1) * t.units * TILE;
  t.kept = (Kept *)(t.cells + t.units * TILE);
  t.sums = (float *)(t.kept + steps * t.units);
  t.d_hidden = t.sums + 4 * hidden * TILE;
  t.d_inputs = t.d_hidden + t.units * TILE;
  t.turned = t.d_inputs + padded(2 * hidden, 4) * TILE;
  t.totals = t.turned + padded(2 * hidden + features(rule) + 1, LANES) * TILE;
  t.end = t.totals + (hidden + 1 + layers_at(rule)) * TILE;
  for (long layer = 0; layer < rule->layers; layer++) t.end += 4 * hidden * columns(rule, layer);
  return t;
}

static void tile_forward(const Tile *t, const float *weights) {
  const Rule *rule = t->rule;
  long hidden = rule->hidden;
  for (long step = 0; step < t->steps; step++) {
    const float *w = weights + layers_at(rule);
    float *in = t->x + step * of_gradient(rule) * TILE, *seen = t->seen + step * features(rule) * TILE;
    float *mask = t->moving + step * TILE;
    find_moving(rule, t->gradients + step * TILE, t->memory, t->cells, mask);
    preprocess(rule, t->gradients + step * TILE, mask, t->memory, seen);
    if (rule->kind == MOMENTS) input_layer(rule, weights, seen, in);
    for (long layer = 0; layer < rule->layers; layer++) {
      const float *own = t->states + (step * t->units + layer * hidden) * TILE;
      float *next = (float *)own + t->units * TILE;
      w = all_sums(hidden, 1, w, in, below(rule, layer), own, hidden, t->sums);
      for (long j = 0; j < hidden; j++) {
        long unit = layer * hidden + j;
        Kept *kept = t->kept + step * t->units + unit;
        kept_unit(t->sums + 4 * j * TILE, mask, t->cells + unit * TILE, next + j * TILE, kept);
      }
      in = next;
    }
  }
}

/* The readout: its own gradients, and what it adds to the highest layer's d_hidden. */
static void readout_backward(const Tile *t, long step, const float *readout, const float *cotangent, float *total) {
  long hidden = t->rule->hidden;
  const float *top = t->states + ((step + 2) * t->units - hidden) * TILE;
  float *d = t->d_hidden + (t->units - hidden) * TILE;
  for (int v = 0; v < TILE; v += LANES) {
    vec c = only(*(vec *)(t->moving + step * TILE + v), *(vec *)(cotangent + v));
    if (t->rule->kind == MOMENTS) {
      vec sum = ALL(readout[0]);
      for (long j = 0; j < hidden; j++) sum += readout[1 + j] * *(vec *)(top + j * TILE + v);
      sum = tanh_of(sum);
      c *= bound(t->rule, clock_of(t->rule, t->memory), v / LANES, t->steps - 1 - step) * (1.0f - sum * sum);
    }
    for (long j = 0; j < hidden; j++) {
      *(vec *)(total + j * TILE + v) += c * *(vec *)(top + j * TILE + v);
      *(vec *)(d + j * TILE + v) += readout[1 + j] * c;
    }
    *(vec *)(total + hidden * TILE + v) += c;
  }
}

/* The input layer: the gradients of its weights, from those of what it made of the features. */
static void input_backward(const Tile *t, long step, const float *d, float *total) {
  long count = features(t->rule);
  const float *x = t->seen + step * count * TILE, *made = t->x + step * t->rule->hidden * TILE;
  for (long j = 0; j < t->rule->hidden; j++, d += TILE, made += TILE, total += (1 + count) * TILE)
    for (int v = 0; v < TILE; v += LANES) {
      vec d_sum = *(vec *)(d + v) * (at_most(*(vec *)(made + v), 0.0f) + 1.0f);
      *(vec *)(total + v) += d_sum;
      for (long k = 0; k < count; k++) *(vec *)(total + (1 + k) * TILE + v) += d_sum * *(vec *)(x + k * TILE + v);
    }
}

static void layer_backward(const Tile *t, long step, long layer, const float *weights, float *total) {
  const Rule *rule = t->rule;
  long hidden = rule->hidden, first = layer * hidden, width = columns(rule, layer), led = outputs(rule, layer);
  float *d = t->d_hidden + first * TILE;
  for (long j = 0; j < hidden; j++)
    unit_backward(t->kept + step * t->units + first + j, d + j * TILE, t->cells + (first + j) * TILE, t->sums + 4 * j * TILE);

  const float *own = t->states + (step * t->units + first) * TILE;
  const float *in = layer ? own + (t->units - hidden) * TILE : t->x + step * of_gradient(rule) * TILE;
  turn(in, below(rule, layer), own, hidden, width, t->turned);
  add_product(hidden, width, t->sums, t->turned, total);

  all_sums((led + 3) / 4, 0, weights, t->sums, 4 * hidden, 0, 0, t->d_inputs);
  if (layer)
    for (long k = 0; k < hidden * TILE; k++) d[k - hidden * TILE] += t->d_inputs[k];
  memcpy(d, t->d_inputs + (led - hidden) * TILE, hidden * TILE * sizeof(float));
}

/* From the last inner step to the first; the cotangent of an update is the sum of all that comes after it, and what there
 * is `beside`. */
static void tile_backward(const Tile *t, const float *readout, const float *back, const float *of_losses,
                          const float *beside, long n, long m) {
  const Rule *rule = t->rule;
  long hidden = rule->hidden, input = layers_at(rule);
  float *of_input = t->end - input * TILE, *of_readout = of_input - (hidden + 1) * TILE;
  float cotangent[TILE] __attribute__((aligned(64))) = {0}, whole[TILE] __attribute__((aligned(64)));
  memset(t->cells, 0, t->units * TILE * sizeof(float));
  memset(t->d_hidden, 0, t->units * TILE * sizeof(float));
  memset(t->totals, 0, (t->end - t->totals) * sizeof(float));
  for (long step = t->steps - 1; step >= 0; step--) {
    for (int v = 0; v < TILE; v += LANES)
      *(vec *)(cotangent + v) += of_losses[step] * *(vec *)(t->gradients + (step + 1) * TILE + v);
    if (beside) {
      load_row(whole, beside + step * n, m);
      for (int v = 0; v < TILE; v += LANES) *(vec *)(whole + v) += *(vec *)(cotangent + v);
    }
    readout_backward(t, step, readout, beside ? whole : cotangent, of_readout);
    float *total = of_readout;
    const float *weights = back;
    for (long layer = 0; layer < rule->layers; layer++) weights += back_size(rule, layer);
    for (long layer = rule->layers - 1; layer >= 0; layer--) {
      total -= 4 * hidden * columns(rule, layer);
      weights -= back_size(rule, layer);
      layer_backward(t, step, layer, weights, total);
    }
    if (input) input_backward(t, step, t->d_inputs, of_input);
  }
}

/* A tile's gradients to those of all, without the padding. */
static void add_totals(const Tile *t, double *restrict to) {
  const Rule *rule = t->rule;
  const float *total = t->totals;
  for (long layer = 0; layer < rule->layers; layer++)
    for (long row = 0; row < 4 * rule->hidden; row++, total += columns(rule, layer))
      for (long k = 0; k < fan_in(rule, layer); k++) *to++ += total[k];
  for (long j = 0; j <= rule->hidden; j++, to++, total += TILE)
    for (int k = 0; k < TILE; k++) *to += outer_scale(rule) * total[k];
  for (; total < t->end; to++, total += TILE)
    for (int k = 0; k < TILE; k++) *to += total[k];
}

/* Numbers of gradients: a layer's [4 hidden, fan_in] (below, own, bias), the readout's [hidden + 1] (weight, bias), the
 * input layer's [hidden, 1 + features] (bias, weight). */
long lstm_gradient_size(const Rule *rule) {
  long size = rule->hidden + 1 + layers_at(rule);
  for (long layer = 0; layer < rule->layers; layer++) size += 4 * rule->hidden * fan_in(rule, layer);
  return size;
}

/* Numbers of scratch that lstm_gradients needs with so many threads. */
long lstm_gradient_scratch(const Rule *rule, long steps, long threads) {
  Tile t = lay_out(rule, steps, 0);
  return threads * (t.end - t.gradients);
}

/* gradients [steps + 1, n], of_losses [steps]: the weight of the loss after each step. beside [steps, n]: what is added to
 * the cotangent of each update, or null. state: before the first step. to [threads, lstm_gradient_size] is added to; all
 * else as in lstm_step, the weights packed for the way back too. */
void lstm_gradients(const Rule *rule, long n, long stride, long steps, const float *restrict weights,
                    const float *restrict gradients, const float *restrict of_losses, const float *restrict beside,
                    const float *restrict state, double *restrict to, long threads, float *restrict scratch) {
  const float *readout = weights + readout_at(rule), *back = weights + forward_size(rule);
  long count = (n + TILE - 1) / TILE, size = lstm_gradient_scratch(rule, steps, 1);
#pragma omp parallel num_threads(threads) if (count > 1)
  {
    unsigned mode = flush_denormals();
    Tile t = lay_out(rule, steps, scratch + omp_get_thread_num() * size);
    double *found = to + omp_get_thread_num() * lstm_gradient_size(rule);
#pragma omp for schedule(static)
    for (long tile = 0; tile < count; tile++) {
      long at = tile * TILE, m = n - at < TILE ? n - at : TILE;
      load(t.states, t.cells, state + at, stride, rule->hidden, t.units, m);
      for (long k = 0; k < memories(rule); k++)
        load_row(t.memory + k * TILE, state + (2 * t.units + k) * stride + at, m);
      for (long step = 0; step <= steps; step++) load_row(t.gradients + step * TILE, gradients + step * n + at, m);
      tile_forward(&t, weights);
      tile_backward(&t, readout, back, of_losses, beside ? beside + at : 0, n, m);
      add_totals(&t, found);
    }
    restore(mode);
  }
}
