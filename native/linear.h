// Products with packed matrices, as the parts of larger layers need them.
#pragma once
#include "threads.h"

namespace secateur {

// y[n][rows] = W x[n][columns] + (bias, or what y holds if accumulate); false if there is no memory for scratch.
bool linear(Blob blob, const float* x, i64 n, const float* bias, float* y, bool accumulate, int threads);

// The same, without accumulating, by code that was generated from this blob and runs, or without code.
struct Generated;
bool linear(Blob blob, const Generated* code, const float* x, i64 n, const float* bias, float* y, int threads);

// One of several products of one input: y[n][rows] = W x + bias.
struct Product {
    Blob blob;
    const Generated* code;
    const float* bias;
    float* y;
};

// Products of one x[n][columns], which is arranged once for all where they are alike. `all` is written to.
bool products(Product* all, int count, const float* x, i64 n, int threads);

// All chunks of to[rows][width] = start + W panel, or to += W panel without start; by code, if there is some, where the
// width is that of its tiles.
void multiply(Blob blob, const Generated* code, const float* panel, int width, const float* start, float* to);

// Whether this is no code, or code that runs and was generated from a blob like this one, to add or not to.
bool fits(const Generated* code, Blob blob, bool adds);

// Whether these bytes are a packed matrix of this version.
inline bool valid(const void* blob) {
    auto head = static_cast<const Header*>(blob);
    return head && head->magic == kMagic && head->version == kVersion;
}

}  // namespace secateur
