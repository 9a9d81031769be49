// Machine code made for one packed matrix: see generate.cpp.
#pragma once
#include <vector>

#include "blob.h"

namespace secateur {

constexpr int kLanes = 16;       // inputs of a tile: of a vector of AVX-512
constexpr int kSums = 28;        // rows whose sums stay in registers; the other four hold inputs
constexpr int kTaps = 3;         // of shifted sums
constexpr int kShifted = 10;     // rows whose three sums each stay in registers; the other two hold inputs
constexpr i64 kAtLeast = 12;     // inputs for which a tile is worth its while

// Rows [row, next row) by the columns of a block: what one call of its code computes, for some tiles.
struct Unit {
    i64 code, weights;  // where its code begins, in bytes, and its part of the weights, in floats
    i64 row, rows;
};

// Where the inputs of a tile lie: column j is columns[j] bytes behind its start, the next tile `tile` bytes.
// With shifted sums columns 3 k, 3 k + 1 and 3 k + 2 lie at one place, and are met there from lane 0, 1 and 2 on.
struct Layout {
    std::vector<i64> columns;
    i64 tile;
    bool shifted;

    int taps() const { return shifted ? kTaps : 1; }
    int rows() const { return shifted ? kShifted : kSums; }  // that are summed up together
};

// A matrix by its rows: of each where its non-zeros begin, and the end of the last; their columns and values.
struct Rows {
    std::vector<u32> begin, column;
    std::vector<float> value;
};

// What these bytes hold, of which nothing is taken on trust; false if they are no packed matrix. See unpack.cpp.
bool read(const void* blob, i64 bytes, Rows& rows);

struct Program {
    bool adds = false;  // whether to add to the sums rather than to the bias
    std::vector<u8> code;
    std::vector<float> weights;
    std::vector<Unit> units;  // those of the same rows are neighbours, and run in this order
};

// The program of a packed matrix: each unit is f(x, weights, sums, tiles, bias) in the System V convention, and computes
// sums[tile][rows of the matrix][16] = bias + W x, adding to the sums unless it has the first columns of its rows; or it
// adds to the sums in any case. With shifted sums the last two of 16 places mean nothing.
// False if it is too large for 32-bit displacements.
bool generate(const Rows& rows, const Header& head, const Layout& layout, Program& program);

}  // namespace secateur
