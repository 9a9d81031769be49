// How the work of a call is divided among threads, and the scratch memory that these keep.
#pragma once
#include <atomic>
#include <cstdlib>

#include "kernels.h"

namespace secateur {

extern const Kernels* kernels;  // of the instruction set in use

// ---- threads: torch's own OpenMP pool

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
extern Parallel parallel;

// Calls work(i) for i in [0, count), on up to `threads` threads that take the next i when they are done with one.
template <class Work>
void share(i64 count, int threads, const Work& work) {
    if (threads <= 1 || count <= 1 || !parallel) {
        for (i64 i = 0; i < count; i++) work(i);
        return;
    }
    struct Shared {
        const Work* work;
        i64 count;
        std::atomic<i64> next;
    } shared{&work, count, {0}};
    auto run = [](void* data) {
        auto& s = *static_cast<Shared*>(data);
        for (i64 i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) (*s.work)(i);
    };
    parallel(run, &shared, unsigned(count < threads ? count : threads), 0);
}

// ---- scratch memory: one growing piece a thread and purpose, kept from call to call

struct Scratch {
    void* memory = nullptr;
    std::size_t size = 0;
    ~Scratch() { std::free(memory); }
    // at least so many floats, on a cache line; zeros when fresh; nullptr if there is no memory
    float* get(std::size_t floats) {
        if (floats > size || !memory) {
            std::free(memory);
            memory = std::calloc(floats + 16, sizeof(float));
            size = memory ? floats : 0;
        }
        const auto address = (reinterpret_cast<std::uintptr_t>(memory) + 63) / 64 * 64;
        return memory ? reinterpret_cast<float*>(address) : nullptr;
    }
};

inline thread_local Scratch inputs, sums, gathered, projected, collected, arranged, offsets, biases, planned, kept;
inline thread_local Scratch zeros;  // never written

constexpr i64 kWorthSharing = 200000;  // multiplications below which waking another thread costs more than it gains

// ---- y = W x, by tiles of at most kWidth inputs

// Calls arrange(tile, panel) for each tile, and compute(tile, what arrange returned, part, parts) for each part of its
// rows. With few tiles for the threads, they share the parts of a tile; otherwise each takes whole tiles.
template <class Arrange, class Compute>
bool by_tiles(i64 tiles, std::size_t floats, i64 parts, int threads, const Arrange& arrange, const Compute& compute) {
    std::atomic<bool> enough{true};
    if (threads <= 1 || tiles % threads == 0 || tiles >= 8 * i64(threads)) {
        share(tiles, threads, [&](i64 i) {
            if (float* panel = inputs.get(floats))
                enough = compute(i, arrange(i, panel), 0, 1) && enough;
            else
                enough = false;
        });
        return enough;
    }
    float* all = inputs.get(floats * tiles);
    const float** ready = reinterpret_cast<const float**>(arranged.get(2 * tiles));
    if (!all || !ready) return false;
    share(tiles, threads, [&](i64 i) { ready[i] = arrange(i, all + i * floats); });
    if (parts > 4 * i64(threads)) parts = 4 * i64(threads);
    share(tiles * parts, threads, [&](i64 unit) {
        if (!compute(unit / parts, ready[unit / parts], unit % parts, parts)) enough = false;
    });
    return enough;
}

inline int width_of(i64 n, bool jagged) {  // 0: the jagged layout
    return n > 16 ? 32 : n > 8 ? 16 : n > kSmall ? 8 : jagged ? 0 : n > 1 ? 4 : 1;
}

// Tiles of 32 inputs and one of the rest; where few of the rest are beyond 16, these go by the jagged layout.
struct Tile {
    i64 first;
    int n, width;
    Tile(i64 i, i64 all, bool jagged) : first(i * kWidth) {
        const i64 whole = all / kWidth * kWidth, rest = all - whole;
        n = int(i * kWidth < whole ? kWidth : rest);
        if (two(rest, jagged) && i * kWidth >= whole) {
            first = i * kWidth == whole ? whole : whole + kWidth / 2;
            n = int(i * kWidth == whole ? kWidth / 2 : rest - kWidth / 2);
        }
        width = width_of(n, jagged);
    }
    static bool two(i64 rest, bool jagged) { return jagged && rest > kWidth / 2 && rest <= kWidth / 2 + kSmall; }
    static i64 count(i64 all, bool jagged) { return (all + kWidth - 1) / kWidth + two(all % kWidth, jagged); }
};

}  // namespace secateur
