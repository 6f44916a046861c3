/* What the kernels have in common: vectors, and products with a tile of coordinates.
 *
 * NaN must come through, so nothing here may be built with -ffast-math. */

#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#define UNITS 2 /* at once: 2 units by 4 gates by 2 vectors are 16 sums; the processor has 32 registers */
#else
#define LANES 8
#define UNITS 1
#endif
enum { MOST_MEANS = 8 }; /* running means of the gradient that a rule may have */
#define WIDE 2 /* vectors a tile */
#define TILE (WIDE * LANES)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define ALL(x) ((x) - (vec){0}) /* x in all lanes */
#define LOG2_E 1.44269504088896341f

/* In a register from here on: what is used several times is not to be loaded several times, for loads are scarce. */
INLINE vec in_register(vec x) {
#if defined __AVX512F__
  __asm__("" : "+v"(x));
#elif defined __AVX__
  __asm__("" : "+x"(x));
#endif
  return x;
}

/* Numbers below 1e-38 count as zero: processors that keep them slow down up to a hundred times, and a truncation in which
 * gradients fade away is full of them. Returns what `restore` wants. */
static unsigned flush_denormals(void) {
#ifdef __SSE__
  unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040);
  return mode;
#else
  return 0;
#endif
}

static void restore(unsigned mode) {
#ifdef __SSE__
  _mm_setcsr(mode);
#else
  (void)mode;
#endif
}

/* ---- Functions of a vector. NaN comes through all of them, which decides the order of some arguments. ---- */

INLINE vec at_least(vec x, float bound) {
#if defined __AVX512F__
  return (vec)_mm512_max_ps((__m512)ALL(bound), (__m512)x);
#elif defined __AVX__
  return (vec)_mm256_max_ps((__m256)ALL(bound), (__m256)x);
#else
  ivec below = x < bound;
  return (vec)((below & (ivec)ALL(bound)) | (~below & (ivec)x));
#endif
}

INLINE vec at_most(vec x, float bound) {
#if defined __AVX512F__
  return (vec)_mm512_min_ps((__m512)ALL(bound), (__m512)x);
#elif defined __AVX__
  return (vec)_mm256_min_ps((__m256)ALL(bound), (__m256)x);
#else
  ivec above = x > bound;
  return (vec)((above & (ivec)ALL(bound)) | (~above & (ivec)x));
#endif
}

INLINE vec clamped(vec x, float bound) { return at_least(at_most(x, bound), -bound); }

INLINE vec square_root(vec x) {
#if defined __AVX512F__
  return (vec)_mm512_sqrt_ps((__m512)x);
#elif defined __AVX__
  return (vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int k = 0; k < LANES; k++) x[k] = __builtin_sqrtf(x[k]);
  return x;
#endif
}

/* x where `mask` has all bits set, 0 where it has none. */
INLINE vec only(vec mask, vec x) { return (vec)((ivec)mask & (ivec)x); }

/* sum[r] += sum over k of weights[k][r] * row k for each of some units' four r. `rows` may be the end of a sum that began with
 * others: a sum is never stored before it is complete. Returns the end of the first unit's weights. */
INLINE const float *add_products(const int units, const float *restrict weights, long stride, const float *restrict rows,
                                 long n, vec sum[4 * UNITS][WIDE]) {
  for (; n > 0; n--, rows += TILE, weights += 4) {
    vec x[WIDE];
    for (int v = 0; v < WIDE; v++) x[v] = in_register(((vec *)rows)[v]);
    for (int r = 0; r < 4 * units; r++)
      for (int v = 0; v < WIDE; v++) sum[r][v] += ALL(weights[r / 4 * stride + r % 4]) * x[v];
  }
  return weights;
}

/* For some units, sums[r] = start[r] + sum over k of weights[k][r] * row k for each of a unit's four r: the rows first of
 * `a`, then of `b`, and the start the first four weights if there is one. */
INLINE void sums_of(const int units, const int start, const float *restrict weights, long stride, const float *restrict a,
                    long rows_of_a, const float *restrict b, long rows_of_b, float *restrict sums) {
  vec sum[4 * UNITS][WIDE];
  for (int r = 0; r < 4 * units; r++)
    for (int v = 0; v < WIDE; v++) sum[r][v] = ALL(start ? weights[r / 4 * stride + r % 4] : 0.0f);
  weights = add_products(units, weights + 4 * start, stride, a, rows_of_a, sum);
  add_products(units, weights, stride, b, rows_of_b, sum);
  for (int r = 0; r < 4 * units; r++)
    for (int v = 0; v < WIDE; v++) ((vec *)sums)[r * WIDE + v] = sum[r][v];
}

/* sums [4 units, TILE]. Returns the end of the weights. */
INLINE const float *all_sums(long units, const int start, const float *restrict weights, const float *restrict a,
                             long rows_of_a, const float *restrict b, long rows_of_b, float *restrict sums) {
  long stride = 4 * (start + rows_of_a + rows_of_b), j = 0;
  for (; j + UNITS <= units; j += UNITS, weights += UNITS * stride)
    sums_of(UNITS, start, weights, stride, a, rows_of_a, b, rows_of_b, sums + 4 * j * TILE);
  for (; j < units; j++, weights += stride)
    sums_of(1, start, weights, stride, a, rows_of_a, b, rows_of_b, sums + 4 * j * TILE);
  return weights;
}

/* The least multiple of `to` that is not below n. */
INLINE long padded(long n, long to) { return (n + to - 1) / to * to; }

static inline void copy(float *restrict to, const float *restrict from, long n) {
  if (n == TILE)
    for (int v = 0; v < TILE; v += LANES) *(unaligned *)(to + v) = *(const unaligned *)(from + v);
  else
    for (long k = 0; k < n; k++) to[k] = from[k];
}

