// The kernels of one instruction set. Each works on a range and shares nothing, so that threads can divide the work;
// threads.h does the dividing, threads.cpp chooses the set.
#pragma once
#include "blob.h"

namespace secateur {

// What may follow a product, by its number in secateur.h.
enum class Activation { kNone, kRelu, kRelu6, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kHardswish, kHardsigmoid, kEnd };

// Neighbouring places of a row of an image that are neighbours in a panel, from lane `lane` on. Where the first of them
// lies: in the planes that are read, and in a plane of what is written and of what is added.
struct Piece {
    i64 from, to, add;
    int lane, n;
};

// What is done to sums: activation(scale[row] * sum + shift[row] + add[row]); NULL: 1, 0, 0.
struct Finish {
    const float *scale, *shift, *add;
    i64 add_stride;  // floats from row to row
    Activation activation;
};

constexpr int kStrides = 2;  // the greatest stride that vectors are read with

struct Kernels {
    const char* name;
    bool jagged;  // has small() for 1 <= n <= kSmall; otherwise a panel of width 4 or 1 takes these
    bool masked;  // panel() of width 1 takes the masked layout where there is one

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

    // panel[columns][width], each piece of row j from planes + offset[j] + its `from` on, of which every `stride`-th is
    // taken; at most kStrides. Whole vectors are read, and written beyond a piece, in the order of lanes.
    void (*gather)(const float* planes, int stride, const i64* offset, i64 columns, int width, const Piece* pieces,
                   int count, float* panel);

    // to[rows][n], rows of it `stride` apart = what `finish` makes of the first n of each row of sums[rows][width].
    void (*finish)(const float* sums, i64 width, i64 rows, i64 n, const Finish& finish, float* to, i64 stride);

    // to[n] = the maxima, or the sums, of so many rows, `step` floats apart; of what is NaN they are NaN.
    void (*pool_rows)(bool maxima, const float* from, i64 step, i64 rows, i64 n, float* to);
    // to[n] = the maxima, or the sums, of windows of `taps` values of a row, `spread` apart; windows are `stride` apart.
    // Whole vectors are read.
    void (*pool_row)(bool maxima, const float* row, i64 taps, i64 spread, i64 stride, i64 n, float* to);

    // x = the activation of x; a NaN stays one, and infinities become what torch makes of them.
    void (*activate)(Activation, float* x, i64 count);

    // One step of `units` units. LSTM: gates[4][units] = i f g o before their nonlinearities; c is updated, h written.
    void (*lstm)(const float* gates, i64 units, float* c, float* h);
    // GRU: x[3][units] and s[3][units] = r z n from the input and from the state; h is updated.
    void (*gru)(const float* x, const float* s, i64 units, float* h);
};

extern const Kernels kPortable, kNeon, kAvx2, kAvx512;

// Writes a blob for these kernels if it fits into so much room; gives its bytes, or -1 if the matrix is too large for any.
i64 pack(const float* weight, i64 rows, i64 columns, i64 groups, const Kernels& made_for, Values values, void* blob,
         i64 room);

}  // namespace secateur
