/* NormalizedMLP, compiled: an inner step of one tensor of each task.
 *
 * Compiled on first use by fused.py. What is summed over a tensor is summed block by block, and then in the blocks' order:
 * the number of threads changes nothing. `moved` are coordinates whose running mean of squares is not zero. */

#include "vectors.h"

#define BLOCK 8192 /* coordinates of a block, a multiple of TILE */
#define BANDS 16 /* of rows, whose sums over columns are made side by side */
#define RUN 64 /* tiles whose squares are added up in single precision */
#define TINY 1.17549435e-38f /* the least normal number */
#define EACH for (int v = 0; v < WIDE; v++)
#define MOST_OWN (6 + 4 * MOST_MEANS) /* inputs of a coordinate */
#define MOST_INPUTS (6 + 8 * MOST_MEANS)
#define MOST_MIXED 2.0f /* that anything counts in a mixture, the first running mean 1 */

/* Weights of the layers: hidden [H, inputs of the rule] and bias, second [H, H] and bias, readout [1, H] and bias. */
typedef struct {
  const float *hidden, *hidden_bias, *second, *second_bias, *readout, *readout_bias;
  const long *places; /* of each input the first layer's column, -1 where it is not seen; from MOST_INPUTS on the moment's */
  const float *times; /* [tasks, times] */
  long columns;       /* of the first layer */
  long each;          /* whether every task has weights of its own, one after the other */
} Weights;

/* The small MLP that sees a tensor as a whole: hidden [units, means + 9] and bias, readout [2 + mixes, units] and bias. */
typedef struct {
  const float *hidden, *hidden_bias, *readout, *readout_bias;
  const float *moments; /* [tasks, 4]: what it sees of the time; most that the remembered logarithm changes by */
  long exists, units;   /* whether there is one; 0: no hidden layer */
  long mixes;           /* what is mixed beside the first running mean: 0, or as many as there are means */
  float bound;          /* on that logarithm */
} Sizes;

typedef struct {
  long hidden;           /* units of a layer, 0: no MLP */
  long means, times;     /* running means of the gradient; numbers that are the moment */
  long factors;          /* whether the running means of rows and columns are kept */
  float gain1[MOST_MEANS], gain2, eps, largest, clip; /* 1 - beta; bounds on the gradient, and on the input "clipped" */
  Weights weights;
  Sizes sizes;
} Rule;

/* One tensor of each task. */
typedef struct {
  long tasks, size, rows, columns; /* coordinates of a task; 0 rows: no matrix, or the rule does not mind */
  const float *gradient, *theta;   /* [tasks, size] */
  float *state;                    /* [means + 1, tasks, size]: running means of the gradient, and that of its square */
  float *vector;                   /* [tasks, width]: steps, for each beta rows and columns, and a size's logarithm */
  long width;
  float shape[3];                  /* what the small MLP sees of it */
  float *direction;                /* [tasks, size] */
  double *sums;                    /* [tasks, 3]: squares of the direction, moved coordinates, the factor on the rate */
} Tensor;

/* Of the running means of rows and columns, unbiased, [means, rows + columns] each. */
typedef struct {
  float *value, *inverse, *root; /* themselves; 1 / (root + eps); the root, that of rows without that of their mean */
} Factors;

/* Of one task. */
typedef struct {
  float unbias1[MOST_MEANS], unbias2, whole; /* what running means are multiplied with; the direction likewise */
  float mix[MOST_MEANS];                     /* how much the gradient counts, and the running means after the first */
  Factors factors;
  float *first, *second;    /* weights of the layers, [units of four, 1 + rows, 4]; after those of `second` the readout's */
  float *by_row, *by_column; /* what rows and columns add to the first layer's sums, [padded hidden, rows], [.., columns] */
} Task;

/* Numbers that the MLP sees of a coordinate; 4 * means more are those of its row and column. */
INLINE long inputs_of(const Rule *rule, const Tensor *t) { return 6 + (t->rows ? 4 : 2) * rule->means; }
INLINE int sees(const Rule *rule) { return rule->hidden || rule->sizes.exists; }
INLINE long summed(const Rule *rule, const Tensor *t) { return sees(rule) ? inputs_of(rule, t) : 1; }
INLINE long min_of(long a, long b) { return a < b ? a : b; }
INLINE long blocks_of(const Tensor *t) { return (t->size + BLOCK - 1) / BLOCK; }

/* Those of a task. */
static Weights weights_of(const Rule *rule, long of) {
  Weights w = rule->weights;
  long task = w.each ? of : 0, hidden = rule->hidden;
  w.hidden += task * hidden * w.columns;
  w.hidden_bias += task * hidden;
  w.second += task * hidden * hidden;
  w.second_bias += task * hidden;
  w.readout += task * hidden;
  w.readout_bias += task;
  return w;
}

/* What a running mean with 1 - beta = gain is divided by after so many steps. */
static double weight_of(float gain, double steps) {
  double power = 1.0, base = 1.0 - (double)gain;
  for (long n = (long)steps; n > 0; n /= 2, base *= base)
    if (n % 2) power *= base;
  return 1.0 - power;
}

INLINE float sum_of(vec x) {
  float sum = 0.0f;
  for (int k = 0; k < LANES; k++) sum += x[k];
  return sum;
}

INLINE vec load(const float *from) { return (vec) * (const unaligned *)from; }
INLINE void store(float *to, vec x) { *(unaligned *)to = (unaligned)x; }

/* Of squares with this sum. */
INLINE float root_mean(double sum, double count) {
  float square = (float)(sum / count);
  return __builtin_sqrtf(square < TINY ? TINY : square);
}

/* 1 / x for x from 1e-37 to 1e37, to 2e-7: one step of Newton's after a first approximation costs less than a division. */
INLINE vec inverse_of(vec x) {
#if defined __AVX512F__
  vec first = (vec)_mm512_rcp14_ps((__m512)x);
  return first * (2.0f - x * first);
#elif defined __AVX__
  vec first = (vec)_mm256_rcp_ps((__m256)x);
  return first * (2.0f - x * first);
#else
  return 1.0f / x;
#endif
}

/* ---- Rows and columns ---- */

INLINE vec square_or_one(const int count, float largest, vec x) {
  if (count) return only((vec)(x != 0.0f), ALL(1.0f));
  x = clamped(x, largest);
  return x * x;
}

/* Sums over band `band` of a matrix's rows: of squares, or with `count` of how many are not zero. bands [rows + BANDS *
 * columns]: of each row, and for each band of its columns. */
INLINE void add_band(const int count, const Rule *rule, const Tensor *t, const float *restrict x, long band,
                     float *restrict bands) {
  long of_band = (t->rows + BANDS - 1) / BANDS, first = band * of_band, end = min_of(first + of_band, t->rows);
  float *of_columns = bands + t->rows + band * t->columns, last[TILE] __attribute__((aligned(64))) = {0};
  memset(of_columns, 0, t->columns * sizeof(float));
  for (long r = first; r < end; r++) {
    const float *row = x + r * t->columns;
    vec sum = {0};
    long c = 0;
    for (; c + LANES <= t->columns; c += LANES) {
      vec one = square_or_one(count, rule->largest, load(row + c));
      sum += one;
      store(of_columns + c, load(of_columns + c) + one);
    }
    if (c < t->columns) {
      copy(last, row + c, t->columns - c);
      vec one = square_or_one(count, rule->largest, *(vec *)last);
      sum += one;
      for (long k = 0; c + k < t->columns; k++) of_columns[c + k] += one[k];
    }
    bands[r] = sum_of(sum);
  }
}

/* bands [rows + columns] after that: the sums over all bands. */
INLINE void join_bands(const Tensor *t, float *restrict bands) {
  for (long band = 1; band < BANDS; band++)
    for (long c = 0; c < t->columns; c++) bands[t->rows + c] += bands[t->rows + band * t->columns + c];
}

/* now [rows + columns]: means of the squares at this step. */
static void follow(const Rule *rule, const Tensor *t, const Task *task, float *restrict vector, const float *restrict now) {
  long both = t->rows + t->columns;
  for (long k = 0; k < rule->means; k++) {
    float *kept = vector + 1 + k * both, *value = task->factors.value + k * both, unbias = task->unbias1[k];
    double sum = 0.0;
    for (long i = 0; i < both; i++) {
      kept[i] += rule->gain1[k] * (now[i] - kept[i]);
      value[i] = kept[i] * unbias;
      if (i < t->rows) sum += value[i];
    }
    float mean = (float)(sum / (double)t->rows);
    if (mean < TINY) mean = TINY;
    for (long i = 0; i < both; i++) {
      task->factors.inverse[k * both + i] = 1.0f / (__builtin_sqrtf(value[i]) + rule->eps);
      task->factors.root[k * both + i] = __builtin_sqrtf(i < t->rows ? value[i] / mean : value[i]);
    }
  }
}

/* ---- What the MLP sees ---- */

/* A tile of coordinates, from row r and column c on: where gradient, theta and the running means are. */
typedef struct {
  long at, n, r, c;
  const float *gradient, *theta;
  float *square, *means[MOST_MEANS];
  float x[MOST_OWN * TILE] __attribute__((aligned(64)));
  float room[(3 + MOST_MEANS) * TILE]; /* for those of a tile that is not full */
} Tile;

/* Calls `RUN_OF(i, r, c, n)` for each run of a tile's coordinates, from the i-th on, that lie in one row. */
#define EACH_RUN(t, tile, RUN_OF)                                                             \
  for (long i_ = 0, r_ = (tile)->r, c_ = (tile)->c; i_ < (tile)->n; r_++, c_ = 0) {            \
    long n_ = min_of((t)->columns - c_, (tile)->n - i_);                                       \
    RUN_OF(i_, r_, c_, n_);                                                                    \
    i_ += n_;                                                                                  \
  }

/* x [inputs, TILE]: gradient, clipped, theta, square, inverse, ratio, means, mean_ratios, factored, factored_means. With
 * `squares` theirs are added there instead. */
INLINE void see(const long means, const Rule *rule, const Tensor *t, const Task *task, Tile *tile, vec *squares) {
  long both = t->rows + t->columns;
  float roots[MOST_MEANS * TILE] __attribute__((aligned(64)));
  const float *of_rows = task->factors.root, *of_columns = of_rows + t->rows;
  if (t->rows && tile->c + TILE <= t->columns) {
    for (long k = 0; k < means; k++)
      for (int v = 0; v < TILE; v += LANES)
        *(vec *)(roots + k * TILE + v) = of_rows[k * both + tile->r] * load(of_columns + k * both + tile->c + v);
  } else if (t->rows) {
    memset(roots, 0, sizeof roots);
#define ROOTS(i, r, c, n)            \
  for (long k = 0; k < means; k++)   \
    for (long j = 0; j < n; j++) roots[k * TILE + i + j] = of_rows[k * both + r] * of_columns[k * both + c + j]
    EACH_RUN(t, tile, ROOTS)
  }
#define PUT(k, value)                                              \
  do {                                                             \
    vec sum_ = {0};                                                \
    EACH {                                                         \
      vec value_ = value;                                          \
      if (squares)                                                 \
        sum_ += value_ * value_;                                   \
      else                                                         \
        *(vec *)(tile->x + (k)*TILE + v * LANES) = value_;         \
    }                                                              \
    if (squares) squares[k] += sum_;                               \
  } while (0)
  vec g[WIDE], square[WIDE], inverse[WIDE], mean[WIDE], factor[WIDE];
  EACH {
    g[v] = clamped(load(tile->gradient + v * LANES), rule->largest);
    square[v] = load(tile->square + v * LANES) * task->unbias2;
    inverse[v] = inverse_of(square_root(square[v]) + rule->eps);
  }
  PUT(0, g[v]);
  PUT(1, clamped(g[v], rule->clip));
  PUT(2, only((vec)(square[v] != 0.0f), load(tile->theta + v * LANES)));
  PUT(3, square[v]);
  PUT(4, only((vec)(square[v] != 0.0f), inverse[v]));
  PUT(5, g[v] * inverse[v]);
  for (long k = 0; k < means; k++) {
    EACH mean[v] = load(tile->means[k] + v * LANES) * task->unbias1[k];
    PUT(6 + k, mean[v]);
    PUT(6 + means + k, mean[v] * inverse[v]);
    if (t->rows) {
      EACH factor[v] = inverse_of(*(vec *)(roots + k * TILE + v * LANES) + rule->eps);
      PUT(6 + 2 * means + k, g[v] * factor[v]);
      PUT(6 + 3 * means + k, mean[v] * factor[v]);
    }
  }
}

/* The next tile of a block that ends at `end`. */
INLINE void go_to(const Tensor *t, Tile *tile, long at, long end) {
  tile->n = min_of(TILE, end - at);
  if (t->rows) {
    if (!tile->at || at != tile->at + TILE) {
      tile->r = at / t->columns;
      tile->c = at % t->columns;
    } else
      for (tile->c += TILE; tile->c >= t->columns; tile->c -= t->columns) tile->r++;
  }
  tile->at = at;
}

INLINE const float *there(float *room, const float *from, long n) {
  if (n == TILE) return from;
  memset(room, 0, TILE * sizeof(float));
  copy(room, from, n);
  return room;
}

/* Where the coordinates of a tile are, which is there already: in place, or with zeros behind them. */
INLINE void find(const long means, const Tensor *t, long of, Tile *tile) {
  long at = of * t->size + tile->at, stride = t->tasks * t->size;
  tile->gradient = there(tile->room, t->gradient + at, tile->n);
  tile->theta = there(tile->room + TILE, t->theta + at, tile->n);
  tile->square = (float *)there(tile->room + 2 * TILE, t->state + means * stride + at, tile->n);
  for (long k = 0; k < means; k++)
    tile->means[k] = (float *)there(tile->room + (3 + k) * TILE, t->state + k * stride + at, tile->n);
}

/* ---- The running means, and the sums of squares of all that the MLP sees ---- */

/* Block `block` of a task. sums [inputs + 1]: squares of the inputs, and the number of moved coordinates. Without an MLP the
 * direction is written, and the squares are those of what gives the sizes, or the first is that of the direction. */
INLINE void remember(const long means, const Rule *rule, const Tensor *t, const Task *task, long of, long block,
                     double *restrict sums) {
  long inputs = summed(rule, t), end = min_of((block + 1) * BLOCK, t->size);
  vec squares[MOST_OWN] = {{0}}, count = {0};
  Tile tile = {.at = 0};
  memset(sums, 0, (inputs + 1) * sizeof(double));
  float *direction = t->direction + of * t->size, *state = t->state + of * t->size;
  long at = block * BLOCK, stride = t->tasks * t->size;
  for (long tiles = 1; at < end; at += TILE, tiles++) {
    go_to(t, &tile, at, end);
    find(means, t, of, &tile);
    for (int v = 0; v < TILE; v += LANES) {
      vec x = clamped(load(tile.gradient + v), rule->largest), square = load(tile.square + v);
      square += rule->gain2 * (x * x - square);
      store(tile.square + v, square);
      for (long k = 0; k < means; k++) {
        vec mean = load(tile.means[k] + v);
        store(tile.means[k] + v, mean + rule->gain1[k] * (x - mean));
      }
      count -= __builtin_convertvector((ivec)(square * task->unbias2 != 0.0f), vec);
    }
    if (tile.n < TILE) {
      copy(state + means * stride + at, tile.square, tile.n);
      for (long k = 0; k < means; k++) copy(state + k * stride + at, tile.means[k], tile.n);
    }
    if (rule->hidden)
      see(means, rule, t, task, &tile, squares);
    else {
      for (int v = 0; v < TILE; v += LANES) {
        vec square = load(tile.square + v) * task->unbias2, root = square_root(square) + rule->eps;
        vec x = only((vec)(square != 0.0f), load(tile.means[0] + v) * task->unbias1[0] / root);
        *(vec *)(tile.x + v) = x;
        squares[rule->sizes.exists ? 6 + means : 0] += x * x;
        if (!rule->sizes.exists) continue;
        vec inverse = inverse_of(root), ratio = clamped(load(tile.gradient + v), rule->largest) * inverse;
        vec theta = only((vec)(square != 0.0f), load(tile.theta + v));
        squares[2] += theta * theta;
        squares[5] += ratio * ratio;
        for (long k = 1; k < means; k++) {
          ratio = load(tile.means[k] + v) * task->unbias1[k] * inverse;
          squares[6 + means + k] += ratio * ratio;
        }
      }
      copy(direction + at, tile.x, tile.n);
    }
    if (tiles % RUN == 0 || at + TILE >= end) {
      for (long k = 0; k < inputs; k++) {
        sums[k] += sum_of(squares[k]);
        squares[k] = (vec){0};
      }
      sums[inputs] += sum_of(count);
      count = (vec){0};
    }
  }
}

static void remember_block(const Rule *rule, const Tensor *t, const Task *task, long of, long block, double *sums) {
  if (rule->means == 1)
    remember(1, rule, t, task, of, block, sums);
  else if (rule->means == 3)
    remember(3, rule, t, task, of, block, sums);
  else
    remember(rule->means, rule, t, task, of, block, sums);
}

/* ---- The MLP ---- */

/* What the layers' weights take in Task. */
INLINE long first_size(const Rule *rule) { return padded(rule->hidden, 4) * (1 + MOST_OWN); }
INLINE long second_size(const Rule *rule) { return padded(rule->hidden, 4) * (2 + padded(rule->hidden, 4)); }

/* The division of each input by its root mean square is in the first layer's weights; `sums` as remember() made them. */
static void pack(const Rule *rule, const Tensor *t, long of, const double *sums, Task *task) {
  long inputs = inputs_of(rule, t), hidden = rule->hidden, wide = padded(hidden, 4);
  const Weights own = weights_of(rule, of), *w = &own;
  float size[MOST_OWN];
  for (long k = 0; k < inputs; k++) size[k] = root_mean(sums[k], (double)t->size);
  for (long j = 0; j < wide; j++) {
    float *to = task->first + j / 4 * 4 * (1 + inputs) + j % 4;
    to[0] = j < hidden ? w->hidden_bias[j] : 0.0f;
    for (long k = 0; k < rule->times && j < hidden; k++)
      to[0] += w->hidden[j * w->columns + w->places[MOST_INPUTS + k]] * w->times[of * rule->times + k];
    for (long k = 0; k < inputs; k++) {
      long place = w->places[k];
      to[4 * (1 + k)] = j < hidden && place >= 0 ? w->hidden[j * w->columns + place] / size[k] : 0.0f;
    }
    to = task->second + j / 4 * 4 * (1 + wide) + j % 4;
    to[0] = j < hidden ? w->second_bias[j] : 0.0f;
    for (long k = 0; k < wide; k++) to[4 * (1 + k)] = j < hidden && k < hidden ? w->second[j * hidden + k] : 0.0f;
    task->second[wide * (1 + wide) + j] = j < hidden ? w->readout[j] : 0.0f;
  }
  task->whole = 1.0f / root_mean(sums[6 + rule->means], sums[inputs] < 1.0 ? 1.0 : sums[inputs]);
}

/* What the inputs of rows and columns, (rows, columns, inverse_rows, inverse_columns), add to the first layer's sums. counts
 * [rows + columns]: of coordinates that have moved. */
static void pack_factors(const Rule *rule, const Tensor *t, long of, Task *task, const float *restrict counts) {
  const Weights own = weights_of(rule, of), *w = &own;
  long both = t->rows + t->columns, wide = padded(rule->hidden, 4), first = 6 + 4 * rule->means;
  memset(task->by_row, 0, wide * both * sizeof(float));
  for (long kind = 0; kind < 4 * rule->means; kind++) {
    long column = kind / rule->means % 2, n = column ? t->columns : t->rows, place = w->places[first + kind];
    const float *values = kind < 2 * rule->means ? task->factors.value : task->factors.inverse;
    float *to = column ? task->by_column : task->by_row;
    double sum = 0.0;
    if (place < 0) continue;
    values += kind % rule->means * both + column * t->rows;
    for (long i = 0; i < n; i++) sum += (double)(values[i] * values[i]) * counts[column * t->rows + i];
    float size = root_mean(sum, (double)t->size);
    for (long j = 0; j < rule->hidden; j++) {
      float weight = w->hidden[j * w->columns + place] / size;
      for (long i = 0; i < n; i++) to[j * n + i] += weight * values[i];
    }
  }
}

/* h [wide, TILE]: what the rows and columns of a tile's coordinates add, if these have moved. The tile lies in several
 * rows. */
INLINE void gather_factors(const Tensor *t, const Task *task, const Tile *tile, long wide, float *restrict h) {
  memset(h, 0, wide * TILE * sizeof(float));
#define GATHER(i, r, c, n)              \
  for (long j = 0; j < wide; j++)       \
    for (long k = 0; k < n; k++)        \
      if (tile->square[i + k] != 0.0f) h[j * TILE + i + k] = task->by_row[j * t->rows + r] + task->by_column[j * t->columns + c + k]
  EACH_RUN(t, tile, GATHER)
}

/* h [4 units, TILE] from tile->x, for some units from the j-th on. */
INLINE void first_layer(const int units, long j, const Tensor *t, const Task *task, const Tile *tile, long inputs,
                        float *restrict h) {
  long stride = 4 * (1 + inputs);
  const float *weights = task->first + j * stride;
  const int whole = tile->c + TILE <= t->columns;
  vec sum[4 * UNITS][WIDE];
  for (int r = 0; r < 4 * units; r++)
    EACH {
      sum[r][v] = ALL(weights[r / 4 * stride + r % 4]);
      if (t->rows && whole)
        sum[r][v] += only((vec)(load(tile->square + v * LANES) != 0.0f),
                          task->by_row[(4 * j + r) * t->rows + tile->r] +
                              load(task->by_column + (4 * j + r) * t->columns + tile->c + v * LANES));
      else if (t->rows)
        sum[r][v] += *(vec *)(h + (4 * j + r) * TILE + v * LANES);
    }
  add_products(units, weights + 4, stride, tile->x, inputs, sum);
  for (int r = 0; r < 4 * units; r++) EACH *(vec *)(h + (4 * j + r) * TILE + v * LANES) = at_least(sum[r][v], 0.0f);
}

/* out += what some units of the second layer, from the j-th of all `wide / 4` on, give of the MLP's number. */
INLINE void second_layer(const int units, long j, const Task *task, const float *restrict h, long wide, vec *out) {
  long stride = 4 * (1 + wide);
  const float *weights = task->second + j * stride, *readout = task->second + (1 + wide) * wide + 4 * j;
  vec sum[4 * UNITS][WIDE];
  for (int r = 0; r < 4 * units; r++) EACH sum[r][v] = ALL(weights[r / 4 * stride + r % 4]);
  add_products(units, weights + 4, stride, h, wide, sum);
  for (int r = 0; r < 4 * units; r++)
    EACH out[v] += ALL(readout[r]) * at_least(sum[r][v], 0.0f);
}

/* Block `block` of a task: gives the sum of the squares of its direction. h [padded hidden, TILE] is scratch. */
INLINE double correct(const long means, const Rule *rule, const Tensor *t, const Task *task, long of, long block,
                      float *restrict h) {
  const Weights own = weights_of(rule, of), *w = &own;
  long inputs = inputs_of(rule, t), units = padded(rule->hidden, 4) / 4, j;
  long end = min_of((block + 1) * BLOCK, t->size), at = block * BLOCK;
  float *direction = t->direction + of * t->size;
  Tile tile = {.at = 0};
  double sum = 0.0;
  vec squares = {0};
  for (long tiles = 1; at < end; at += TILE, tiles++) {
    go_to(t, &tile, at, end);
    find(means, t, of, &tile);
    see(means, rule, t, task, &tile, 0);
    if (t->rows && tile.c + TILE > t->columns) gather_factors(t, task, &tile, 4 * units, h);
    for (j = 0; j + UNITS <= units; j += UNITS) first_layer(UNITS, j, t, task, &tile, inputs, h);
    for (; j < units; j++) first_layer(1, j, t, task, &tile, inputs, h);
    vec out[WIDE];
    EACH out[v] = ALL(w->readout_bias[0]) + *(vec *)(tile.x + (6 + means) * TILE + v * LANES) * task->whole;
    for (j = 0; j + UNITS <= units; j += UNITS) second_layer(UNITS, j, task, h, 4 * units, out);
    for (; j < units; j++) second_layer(1, j, task, h, 4 * units, out);
    EACH {
      out[v] = only((vec)(load(tile.square + v * LANES) * task->unbias2 != 0.0f), out[v]);
      squares += out[v] * out[v];
      *(vec *)(tile.x + v * LANES) = out[v];
    }
    copy(direction + at, tile.x, tile.n);
    if (tiles % RUN == 0 || at + TILE >= end) {
      sum += sum_of(squares);
      squares = (vec){0};
    }
  }
  return sum;
}

static double correct_block(const Rule *rule, const Tensor *t, const Task *task, long of, long block, float *h) {
  if (rule->means == 3) return correct(3, rule, t, task, of, block, h);
  return correct(rule->means, rule, t, task, of, block, h);
}

/* ---- The size of a tensor ---- */

/* A bound that nan passes through. */
INLINE float within(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

INLINE float half_log(double sum, long count) {
  float square = (float)(sum / (double)count);
  return __builtin_logf(square < 1e-12f ? 1e-12f : square) / 2.0f;
}

/* The factor on the rate of a task. `sums` as remember() made them, `kept` the remembered logarithm, which moves on, `mix`
 * what is mixed. */
static float size_of(const Rule *rule, const Tensor *t, long of, const double *sums, float *kept, float *mix) {
  const Sizes *z = &rule->sizes;
  long task = rule->weights.each ? of : 0, means = rule->means, inputs = means + 9, last = z->units ? z->units : inputs;
  const float *hidden = z->hidden + task * z->units * inputs, *hidden_bias = z->hidden_bias + task * z->units;
  long outs = 2 + z->mixes;
  const float *readout = z->readout + task * outs * last, *readout_bias = z->readout_bias + task * outs;
  float x[MOST_MEANS + 9], out[2 + MOST_MEANS];
  copy(out, readout_bias, outs);
  x[0] = within(half_log(sums[2], t->size), -7.0f, 2.0f) / 3.0f + 1.0f;
  x[1] = within(half_log(sums[5], t->size), -2.0f, 2.0f);
  for (long k = 0; k < means; k++) x[2 + k] = half_log(sums[6 + means + k], t->size) / 2.0f;
  x[2 + means] = *kept / 3.0f;
  for (long k = 0; k < 3; k++) {
    x[3 + means + k] = t->shape[k];
    x[6 + means + k] = z->moments[of * 4 + k];
  }
  for (long j = 0; j < last; j++) {
    float sum = z->units ? hidden_bias[j] : x[j];
    for (long k = 0; k < inputs && z->units; k++) sum += hidden[j * inputs + k] * x[k];
    if (z->units && sum < 0.0f) sum = 0.0f;
    for (long k = 0; k < outs; k++) out[k] += readout[k * last + j] * sum;
  }
  for (long k = 0; k < z->mixes; k++) mix[k] = MOST_MIXED * __builtin_tanhf(out[2 + k]);
  *kept = within(*kept + z->moments[of * 4 + 3] * __builtin_tanhf(out[0]), -z->bound, z->bound);
  return __builtin_expf(within(*kept + z->bound / 2.0f * __builtin_tanhf(out[1]), -z->bound, z->bound));
}

/* Block `block` of a task: the direction becomes what is mixed. Gives the sum of its squares. */
INLINE double mix(const long means, const Rule *rule, const Tensor *t, const Task *task, long of, long block) {
  long end = min_of((block + 1) * BLOCK, t->size), at = block * BLOCK;
  float *direction = t->direction + of * t->size;
  Tile tile = {.at = 0};
  double sum = 0.0;
  vec squares = {0};
  for (long tiles = 1; at < end; at += TILE, tiles++) {
    go_to(t, &tile, at, end);
    find(means, t, of, &tile);
    for (int v = 0; v < TILE; v += LANES) {
      vec square = load(tile.square + v) * task->unbias2, root = square_root(square) + rule->eps;
      vec x = load(tile.means[0] + v) * task->unbias1[0] + task->mix[0] * clamped(load(tile.gradient + v), rule->largest);
      for (long k = 1; k < means; k++) x += task->mix[k] * (load(tile.means[k] + v) * task->unbias1[k]);
      x = only((vec)(square != 0.0f), x / root);
      squares += x * x;
      *(vec *)(tile.x + v) = x;
    }
    copy(direction + at, tile.x, tile.n);
    if (tiles % RUN == 0 || at + TILE >= end) {
      sum += sum_of(squares);
      squares = (vec){0};
    }
  }
  return sum;
}

static double mix_block(const Rule *rule, const Tensor *t, const Task *task, long of, long block) {
  if (rule->means == 3) return mix(3, rule, t, task, of, block);
  return mix(rule->means, rule, t, task, of, block);
}

/* ---- A step ---- */

/* Where the scratch's parts begin, in bytes. */
typedef struct {
  long sums, tasks, factors, weights, bands, by, layers, end;
} Layout;

static Layout lay_out(const Rule *rule, const Tensor *t, long threads) {
  Layout at = {0};
  long both = t->rows ? t->rows + t->columns : 0;
  at.tasks = padded(t->tasks * blocks_of(t) * (MOST_OWN + 1) * (long)sizeof(double), 64);
  at.factors = at.tasks + padded(t->tasks * (long)sizeof(Task), 64);
  at.weights = at.factors + t->tasks * padded(3 * rule->means * both * (long)sizeof(float), 64);
  at.bands = at.weights + t->tasks * padded((first_size(rule) + second_size(rule)) * (long)sizeof(float), 64);
  at.by = at.bands + t->tasks * padded(t->rows ? t->rows + BANDS * t->columns : 0, 16) * (long)sizeof(float);
  at.layers = at.by + t->tasks * padded(padded(rule->hidden, 4) * both * (long)sizeof(float), 64);
  at.end = at.layers + threads * padded(rule->hidden, 4) * TILE * (long)sizeof(float);
  return at;
}

/* Bytes of scratch, to be aligned to 64, that normalized_direction needs. */
long normalized_scratch(const Rule *rule, const Tensor *t, long threads) { return lay_out(rule, t, threads).end; }

/* The running means of all tasks are brought to this step, and the direction is written, with its sums; the steps in
 * `vector` are counted. */
void normalized_direction(const Rule *rule, const Tensor *t, long threads, char *scratch) {
  const Layout at = lay_out(rule, t, threads);
  double *sums = (double *)(scratch + at.sums);
  Task *tasks = (Task *)(scratch + at.tasks);
  long both = t->rows ? t->rows + t->columns : 0, width = t->width, blocks = blocks_of(t);
  long of_bands = padded(t->rows + BANDS * t->columns, 16);
  float *bands = (float *)(scratch + at.bands);
  const float *squares = t->state + rule->means * t->tasks * t->size;
  long inputs = summed(rule, t);
  for (long i = 0; i < t->tasks; i++) {
    float *vector = t->vector + i * width;
    vector[0] += 1.0f;
    for (long k = 0; k < rule->means; k++) tasks[i].unbias1[k] = (float)(1.0 / weight_of(rule->gain1[k], vector[0]));
    tasks[i].unbias2 = (float)(1.0 / weight_of(rule->gain2, vector[0]));
    float *factors = (float *)(scratch + at.factors + i * padded(3 * rule->means * both * (long)sizeof(float), 64));
    tasks[i].factors = (Factors){factors, factors + rule->means * both, factors + 2 * rule->means * both};
    tasks[i].first = (float *)(scratch + at.weights +
                               i * padded((first_size(rule) + second_size(rule)) * (long)sizeof(float), 64));
    tasks[i].second = tasks[i].first + first_size(rule);
    tasks[i].by_row = (float *)(scratch + at.by + i * padded(padded(rule->hidden, 4) * both * (long)sizeof(float), 64));
    tasks[i].by_column = tasks[i].by_row + padded(rule->hidden, 4) * t->rows;
  }
#pragma omp parallel num_threads(threads) if (t->tasks * t->size > BLOCK)
  {
    unsigned mode = flush_denormals();
    if (t->rows) {
#pragma omp for schedule(static)
      for (long u = 0; u < t->tasks * BANDS; u++)
        add_band(0, rule, t, t->gradient + u / BANDS * t->size, u % BANDS, bands + u / BANDS * of_bands);
#pragma omp for schedule(static)
      for (long i = 0; i < t->tasks; i++) {
        float *now = bands + i * of_bands;
        join_bands(t, now);
        for (long k = 0; k < both; k++) now[k] /= (float)(k < t->rows ? t->columns : t->rows);
        follow(rule, t, tasks + i, t->vector + i * width, now);
      }
    }
#pragma omp for schedule(static)
    for (long u = 0; u < t->tasks * blocks; u++)
      remember_block(rule, t, tasks + u / blocks, u / blocks, u % blocks, sums + u * (MOST_OWN + 1));
#pragma omp for schedule(static)
    for (long i = 0; i < t->tasks; i++) {
      double *total = sums + i * blocks * (MOST_OWN + 1);
      for (long b = 1; b < blocks; b++)
        for (long k = 0; k <= inputs; k++) total[k] += total[b * (MOST_OWN + 1) + k];
      t->sums[3 * i] = total[sees(rule) ? 6 + rule->means : 0];
      t->sums[3 * i + 2] = rule->sizes.exists ? size_of(rule, t, i, total, t->vector + (i + 1) * width - 1, tasks[i].mix) : 1.0;
      t->sums[3 * i + 1] = total[inputs];
      if (rule->hidden) pack(rule, t, i, total, tasks + i);
    }
    if (rule->hidden && t->rows) {
#pragma omp for schedule(static)
      for (long u = 0; u < t->tasks * BANDS; u++)
        if (t->sums[u / BANDS * 3 + 1] < (double)t->size)
          add_band(1, rule, t, squares + u / BANDS * t->size, u % BANDS, bands + u / BANDS * of_bands);
#pragma omp for schedule(static)
      for (long i = 0; i < t->tasks; i++) {
        float *counts = bands + i * of_bands;
        if (t->sums[3 * i + 1] < (double)t->size)
          join_bands(t, counts);
        else
          for (long k = 0; k < both; k++) counts[k] = (float)(k < t->rows ? t->columns : t->rows);
        pack_factors(rule, t, i, tasks + i, counts);
      }
    }
    if (rule->hidden || rule->sizes.mixes) {
      float *h = (float *)(scratch + at.layers) + omp_get_thread_num() * padded(rule->hidden, 4) * TILE;
#pragma omp for schedule(static)
      for (long u = 0; u < t->tasks * blocks; u++)
        sums[u * (MOST_OWN + 1)] = rule->hidden
                                       ? correct_block(rule, t, tasks + u / blocks, u / blocks, u % blocks, h)
                                       : mix_block(rule, t, tasks + u / blocks, u / blocks, u % blocks);
#pragma omp for schedule(static)
      for (long i = 0; i < t->tasks; i++) {
        t->sums[3 * i] = 0.0;
        for (long b = 0; b < blocks; b++) t->sums[3 * i] += sums[(i * blocks + b) * (MOST_OWN + 1)];
      }
    }
    restore(mode);
  }
}

/* From directions to updates, in place: -rate of the task times the direction, which is divided by its root mean square if
 * it is to be `normalized`. After the direction was changed `squares`, the running means [tasks, size], say which
 * coordinates have moved, and what is summed over them is summed anew, by scratch [tasks, blocks]; else 0. */
void normalized_update(const Tensor *t, long normalized, const float *restrict squares, const float *restrict rates,
                       long threads, double *restrict scratch) {
  long blocks = blocks_of(t);
#pragma omp parallel num_threads(threads) if (t->tasks * t->size > BLOCK)
  {
    unsigned mode = flush_denormals();
    if (squares) {
#pragma omp for schedule(static)
      for (long u = 0; u < t->tasks * blocks; u++) {
        long at = u / blocks * t->size + u % blocks * BLOCK, n = min_of(BLOCK, t->size - u % blocks * BLOCK);
        float *x = t->direction + at;
        double total = 0.0;
        for (long first = 0; first < n; first += RUN * LANES) {
          vec sum = {0};
          long k = first, end = min_of(n, first + RUN * LANES);
          for (; k + LANES <= end; k += LANES) {
            vec one = only((vec)(load(squares + at + k) != 0.0f), load(x + k));
            store(x + k, one);
            sum += one * one;
          }
          for (; k < end; k++) {
            if (squares[at + k] == 0.0f) x[k] = 0.0f;
            total += x[k] * x[k];
          }
          total += sum_of(sum);
        }
        scratch[u] = total;
      }
#pragma omp for schedule(static)
      for (long i = 0; i < t->tasks; i++) {
        t->sums[3 * i] = 0.0;
        for (long b = 0; b < blocks; b++) t->sums[3 * i] += scratch[i * blocks + b];
      }
    }
#pragma omp for schedule(static)
    for (long u = 0; u < t->tasks * blocks; u++) {
      long i = u / blocks, at = i * t->size + u % blocks * BLOCK, n = min_of(BLOCK, t->size - u % blocks * BLOCK);
      double count = t->sums[3 * i + 1] < 1.0 ? 1.0 : t->sums[3 * i + 1];
      float rate = -rates[i] * (float)t->sums[3 * i + 2];
      float factor = normalized ? rate / root_mean(t->sums[3 * i], count) : rate;
      float *x = t->direction + at;
      for (long k = 0; k < n; k++) x[k] *= factor;
    }
    restore(mode);
  }
}
