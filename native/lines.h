// The padded image as shifted sums read it: each row of outputs is cut into tiles of 14, and a line holds the 16 inputs
// that a row of the kernel meets there.
#pragma once
#include "generate.h"
#include "planes.h"

namespace secateur {

constexpr i64 kOutputs = kLanes - kTaps + 1;  // of a tile

struct Lines {
    Geometry g;
    i64 across, plane;  // tiles of a row; floats of a channel
    explicit Lines(const Geometry& g_) : g(g_), across(g_.width / kOutputs), plane((g_.height + 2) * across * kLanes) {}

    // Where tiles have no outputs to spare; elsewhere measurements were in favour of what reads the planes.
    static bool suit(const Geometry& g) {
        const bool square = g.kh == 3 && g.kw == 3 && g.ph == 1 && g.pw == 1;
        return square && g.sh * g.sw * g.dh * g.dw == 1 && g.height > 0 && g.width > 0 && g.width % kOutputs == 0;
    }
    std::size_t size() const { return std::size_t(g.channels * plane); }
    // what the first tap of a row of channel c's weights meets at the first tile; the next tile is the next line
    i64 at(i64 c, i64 ky) const { return c * plane + ky * across * kLanes; }
    void offsets(i64 columns, i64* offset) const {
        for (i64 j = 0; j < columns; j++) offset[j] = at(j / 9, j / 3 % 3);
    }
    // channel c, whose first pixel is at `from`, rows `pitch` apart
    void fill(const float* from, i64 pitch, i64 c, float* lines) const {
        float* to = lines + at(c, 0);
        for (i64 y = -1; y <= g.height; y++)
            for (i64 t = 0; t < across; t++, to += kLanes) {
                if (y < 0 || y == g.height) {
                    std::memset(to, 0, kLanes * sizeof(float));
                    continue;
                }
                const float* seen = from + y * pitch + t * kOutputs;
                to[0] = t > 0 ? seen[-1] : 0;
                std::memcpy(to + 1, seen, kOutputs * sizeof(float));
                to[kLanes - 1] = t + 1 < across ? seen[kOutputs] : 0;
            }
    }
};

}  // namespace secateur
