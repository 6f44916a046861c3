/* The pointwise part of an LSTM cell in one pass over memory; lstm_kernel.py explains the form and the symbols.
 *
 * Compiled on first use by fused.py. NaN must come through, so nothing here may be built with -ffast-math. */

#include <stdint.h>

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
