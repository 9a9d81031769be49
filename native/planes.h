// The shape of a convolution, the padded image that it reads, and how images lie between layers.
#pragma once
#include <cstring>

#include "blob.h"

namespace secateur {

constexpr i64 kSlack = 2 * kWidth;  // floats that may be read behind an image

struct Geometry {
    i64 batch, channels, height, width, kh, kw, sh, sw, ph, pw, dh, dw;
    // whether it makes sense, and gives something
    bool good() const {
        return sh >= 1 && sw >= 1 && dh >= 1 && dw >= 1 && kh >= 1 && kw >= 1 && ph >= 0 && pw >= 0 &&
               height + 2 * ph >= dh * (kh - 1) + 1 && width + 2 * pw >= dw * (kw - 1) + 1;
    }
    i64 oh() const { return (height + 2 * ph - dh * (kh - 1) - 1) / sh + 1; }
    i64 ow() const { return (width + 2 * pw - dw * (kw - 1) - 1) / sw + 1; }
    bool same_but_batch(const Geometry& other) const {
        return !std::memcmp(&channels, &other.channels, sizeof *this - sizeof batch);
    }
    bool plain() const { return kh * kw * sh * sw == 1 && ph + pw == 0; }  // the image is what the weights meet
};

// The padded image, a plane for each channel and phase of the strides, so that what a weight meets at neighbouring
// outputs of a row lies at neighbouring addresses.
struct Planes {
    Geometry g;
    i64 pitch, height, phases, plane;  // floats a row, rows, horizontal phases, floats a plane
    explicit Planes(const Geometry& g_) : g(g_) {
        pitch = g.plain() ? g.width : g.ow() + (g.kw - 1) * g.dw / g.sw;
        height = g.plain() ? g.height : g.oh() + (g.kh - 1) * g.dh / g.sh;
        phases = g.sw;
        plane = pitch * height;
    }
    std::size_t size() const { return std::size_t(g.channels * g.sh * phases * plane + kSlack); }
    i64 at(i64 c, i64 y, i64 x) const { return ((c * g.sh + y) * phases + x) * plane; }
    i64 offset(i64 c, i64 ky, i64 kx) const {
        const i64 y = ky * g.dh, x = kx * g.dw;
        return at(c, y % g.sh, x % g.sw) + y / g.sh * pitch + x / g.sw;
    }
    // the planes of channel c that weights meet, from its first pixel in an image whose rows are `step` floats apart
    void fill(const float* from, i64 step, i64 c, float* planes) const {
        for (i64 ky = 0; ky < g.kh && ky < g.sh; ky++)
            for (i64 kx = 0; kx < g.kw && kx < g.sw; kx++) {
                const i64 py = ky * g.dh % g.sh, px = kx * g.dw % g.sw;
                // columns [begin, end) come from the image
                const i64 x0 = px - g.pw;
                i64 begin = x0 >= 0 ? 0 : (-x0 + g.sw - 1) / g.sw, end = (g.width - x0 + g.sw - 1) / g.sw;
                end = end < 0 ? 0 : end > pitch ? pitch : end;
                begin = begin > end ? end : begin;
                float* row = planes + at(c, py, px);
                for (i64 q = 0; q < height; q++, row += pitch) {
                    const i64 y = q * g.sh + py - g.ph;
                    if (y < 0 || y >= g.height) {
                        std::memset(row, 0, pitch * sizeof(float));
                        continue;
                    }
                    const float* line = from + y * step;
                    for (i64 p = 0; p < begin; p++) row[p] = 0;
                    if (g.sw == 1)
                        std::memcpy(row + begin, line + (begin + x0), (end - begin) * sizeof(float));
                    else
                        for (i64 p = begin; p < end; p++) row[p] = line[p * g.sw + x0];
                    for (i64 p = end; p < pitch; p++) row[p] = 0;
                }
            }
    }
    // Places are counted along the planes' rows, and so are some beyond the last output of a row, whose results are
    // dropped: cheaper than to leave them out.
    i64 places() const { return (g.oh() - 1) * pitch + g.ow(); }
    // where what each column of the weights meets at the first place lies
    void offsets(i64 columns, i64* offset) const {
        const i64 taps = g.kh * g.kw, step = at(1, 0, 0);
        for (i64 j = 0; j < columns; j++)  // divisions for the first channel only
            offset[j] = j < taps ? this->offset(0, j / g.kw, j % g.kw) : offset[j - taps] + step;
    }
};

// How an image lies between layers: a plane for each channel, with zeros around it.
struct Frame {
    i64 channels, height, width, ph, pw;
    i64 pitch() const { return width + 2 * pw; }
    i64 plane() const { return pitch() * (height + 2 * ph); }
    i64 first() const { return ph * pitch() + pw; }  // of the pixels of a plane
    i64 size() const { return channels * plane(); }
    bool same_size(const Frame& other) const {
        return channels == other.channels && height == other.height && width == other.width;
    }
    bool same(const Frame& other) const { return same_size(other) && ph == other.ph && pw == other.pw; }
};

// Images that lie in the same way, each `next` floats behind the one before.
struct Images {
    float* data;
    i64 next;
    Frame frame;
    bool ends;  // nothing may be read beyond the last one
    float* pixels(i64 image, i64 c) const { return data + image * next + c * frame.plane() + frame.first(); }
};

}  // namespace secateur
