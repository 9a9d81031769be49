// The kernels of one instruction set. Each works on a range and shares nothing, so that threads can divide the work;
// threads.h does the dividing, threads.cpp chooses the set.
#pragma once
#include "blob.h"

namespace secateur {

// What may follow a product, by its number in secateur.h.
enum class Activation { kNone, kRelu, kRelu6, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kHardswish, kEnd };

struct Kernels {
    const char* name;
    bool jagged;  // has small() for 1 <= n <= kSmall; otherwise a panel of width 4 or 1 takes these

    // x[n][columns] -> tiles[columns / 32, rounded up][n][32], zeros beyond the last column. 1 <= n <= kSmall.
    void (*small_pack)(const float* x, int n, i64 columns, float* tiles);

    // Groups [begin, end) of y[n][rows] = W tiles + (bias, or what y holds if accumulate).
    void (*small)(Blob, const float* tiles, int n, const float* bias, bool accumulate, float* y, u32 begin, u32 end);

    // x[n][columns], rows `stride` apart -> panel[columns][width], zeros beyond the n-th; width: 32, 16, 8, 4 or 1.
    void (*panel_pack)(const float* x, i64 stride, int n, int width, i64 columns, float* panel);

    // The rows of chunk `chunk`: sums[chunk rows][width] = bias + W panel; without bias sums += W panel.
    void (*panel)(Blob, const float* panel, int width, const float* bias, u32 chunk, float* sums);

    // y[n][rows], rows of y `stride` apart = sums[rows][width] transposed, of which the first n count.
    void (*panel_unpack)(const float* sums, int n, int width, i64 rows, float* y, i64 stride);

    // panel[columns][width], row j from planes + offset[j].
    void (*gather)(const float* planes, const i64* offset, i64 columns, int width, float* panel);

    // y[rows][n], rows of y `stride` apart = the first n of each row of sums[rows][width].
    void (*put)(const float* sums, int width, i64 rows, i64 n, float* y, i64 stride);

    // x = the activation of x; a NaN stays one, and infinities become what torch makes of them.
    void (*activate)(Activation, float* x, i64 count);

    // One step of `units` units. LSTM: gates[4][units] = i f g o before their nonlinearities; c is updated, h written.
    void (*lstm)(const float* gates, i64 units, float* c, float* h);
    // GRU: x[3][units] and s[3][units] = r z n from the input and from the state; h is updated.
    void (*gru)(const float* x, const float* s, i64 units, float* h);
};

extern const Kernels kPortable, kNeon, kAvx2, kAvx512;

i64 pack(const float* weight, i64 rows, i64 columns, i64 groups, bool with_jagged, Values values, void* blob);

}  // namespace secateur
