// Generated code in memory, and how inputs go through it by tiles of 16.
#pragma once
#include "executable.h"
#include "lines.h"
#include "threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#define SYSTEM_V __attribute__((sysv_abi))
#else
#define SYSTEM_V
#endif

namespace secateur {

constexpr i64 kTogether = 128 << 10;  // floats of inputs and sums that go through the code at once: half of a usual L2
constexpr i64 kStrip = 4;             // blocks of rows whose sums are turned while they are in L1

constexpr int kInterpreted = 2;  // of `run`: code is made, and what it would compute is computed without it

struct Generated {
    i64 rows, columns, nonzeros, blocks, code_bytes;
    Geometry shape;  // of the convolution that it is for; without channels if it is for a Linear layer
    Program program;  // its code no longer where `memory` holds it
    Executable memory;
    bool runs, shifted;  // the latter: by shifted sums, from lines rather than planes
    Rows matrix;  // these two only if it is interpreted
    Layout layout;

    // As secateur_generate; false where there is none.
    bool make(const void* blob, i64 bytes, const i64* shape, int32_t adds, int run);

    using Call = void(SYSTEM_V*)(const float* x, const float* weights, float* sums, i64 tiles, const float* bias);

    // The first row of a block of rows.
    i64 row(i64 block) const { return block == blocks ? rows : program.units[block * parts()].row; }
    i64 parts() const { return blocks ? i64(program.units.size()) / blocks : 0; }

    // Blocks [begin, end) of sums[tile][rows][16] = bias + W x, or += W x if it adds.
    void run(i64 begin, i64 end, const float* x, i64 tiles, const float* bias, float* sums) const;

private:
    void interpret(i64 begin, i64 end, const float* x, i64 tiles, const float* bias, float* sums) const;
};

// Of some tiles, each of so many floats, how many go through the code together.
inline i64 together_of(i64 tiles, i64 floats, int threads) {
    const i64 fit = kTogether / floats, each = (tiles + threads - 1) / threads;
    return fit < 1 ? 1 : fit < each ? fit : each;
}

// Tiles of 16 inputs, in groups that go through the code together; the last tile may be short, and what is left beyond
// it is for other kernels.
struct Groups {
    i64 tiles, inputs, together;
    // features: floats that each input takes while it is on its way
    Groups(i64 features, i64 n, int threads) {
        tiles = n / kLanes + (n % kLanes >= kAtLeast);
        inputs = n < tiles * kLanes ? n : tiles * kLanes;
        together = together_of(tiles, kLanes * features, threads);
    }
    i64 count() const { return (tiles + together - 1) / together; }
    i64 of(i64 group) const {
        const i64 left = tiles - group * together;
        return left < together ? left : together;
    }
    // calls f(t, its first input, how many it has) for each tile of a group
    template <class F>
    void each(i64 group, const F& f) const {
        for (i64 t = 0; t < of(group); t++) {
            const i64 at = (group * together + t) * kLanes, left = inputs - at;
            f(t, at, int(left < kLanes ? left : kLanes));
        }
    }
};

}  // namespace secateur
