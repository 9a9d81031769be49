// Convolutions: products with what each output place sees of the image.
#include <cstring>

#include "linear.h"
#include "secateur.h"

namespace secateur {
namespace {

struct Geometry {
    i64 batch, channels, height, width, kh, kw, sh, sw, ph, pw, dh, dw;
    i64 oh() const { return (height + 2 * ph - dh * (kh - 1) - 1) / sh + 1; }
    i64 ow() const { return (width + 2 * pw - dw * (kw - 1) - 1) / sw + 1; }
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
    std::size_t size() const { return std::size_t(g.channels * g.sh * phases * plane + 2 * kWidth); }
    i64 at(i64 c, i64 y, i64 x) const { return ((c * g.sh + y) * phases + x) * plane; }
    i64 offset(i64 c, i64 ky, i64 kx) const {
        const i64 y = ky * g.dh, x = kx * g.dw;
        return at(c, y % g.sh, x % g.sw) + y / g.sh * pitch + x / g.sw;
    }
    // all planes of channel c of an image
    void fill(const float* image, i64 c, float* planes) const {
        const float* from = image + c * g.height * g.width;
        for (i64 py = 0; py < g.sh; py++)
            for (i64 px = 0; px < phases; px++) {
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
                    const float* line = from + y * g.width;
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
};

bool conv2d(Blob blob, const float* x, const Geometry& g, const float* bias, float* y, int threads) {
    const Kernels& k = *kernels;
    const Header& head = *blob.head;
    const Planes planes(g);
    const i64 places = planes.places(), rows = head.rows, columns = head.columns;
    const i64 image = g.channels * g.height * g.width, oh = g.oh(), ow = g.ow();
    if (i64(head.nonzeros) * places * g.batch < kWorthSharing) threads = 1;
    i64* offset = reinterpret_cast<i64*>(offsets.get(2 * columns));
    const float* start = bias ? bias : zeros.get(rows);
    float* laid = gathered.get(g.plain() ? 0 : planes.size());
    if (!offset || !start || !laid) return false;
    const i64 taps = g.kh * g.kw, step = planes.at(1, 0, 0);
    for (i64 j = 0; j < columns; j++)  // divisions for the first channel only
        offset[j] = j < taps ? planes.offset(0, j / g.kw, j % g.kw) : offset[j - taps] + step;
    const i64 tiles = Tile::count(places, false);
    for (i64 b = 0; b < g.batch; b++) {
        const float* seen = laid;
        if (g.plain())
            seen = x + b * image;
        else
            share(g.channels, threads, [&](i64 c) { planes.fill(x + b * image, c, laid); });
        auto arrange = [&](i64 i, float* panel) -> const float* {
            const Tile t(i, places, false);
            if (g.plain() && t.n < t.width)  // x ends here: no vector may reach beyond
                for (i64 j = 0; j < columns; j++)
                    for (int i = 0; i < t.width; i++)
                        panel[j * t.width + i] = i < t.n ? seen[offset[j] + t.first + i] : 0;
            else
                k.gather(seen + t.first, offset, columns, t.width, panel);
            return panel;
        };
        auto compute = [&](i64 i, const float* in, i64 part, i64 parts) {
            const Tile t(i, places, false);
            float* out = sums.get(std::size_t(head.chunk) * kWidth);
            if (!out) return false;
            for (u32 c = u32(head.chunks * part / parts); c < u32(head.chunks * (part + 1) / parts); c++) {
                const i64 first = i64(c) * head.chunk, last = first + head.chunk < rows ? first + head.chunk : rows;
                k.panel(blob, in, t.width, start, c, out);
                for (i64 p = t.first; p < t.first + t.n;) {  // by pieces of output rows
                    const i64 py = p / planes.pitch, px = p % planes.pitch, left = t.first + t.n - p;
                    const i64 line = planes.pitch == ow ? left : ow - px;  // rows without a gap are one
                    const i64 take = line < left ? line : left;            // negative beyond the last output
                    if (take > 0)
                        k.put(out + p - t.first, t.width, last - first, take,
                              y + ((b * rows + first) * oh + py) * ow + px, oh * ow);
                    p += planes.pitch == ow ? left : planes.pitch - px;
                }
            }
            return true;
        };
        if (!by_tiles(tiles, std::size_t(columns + 2) * kWidth, head.chunks, threads, arrange, compute)) return false;
    }
    return true;
}

}  // namespace
}  // namespace secateur

using namespace secateur;

int32_t secateur_conv2d(const void* blob, const float* x, const int64_t shape[12], const float* bias, float* y,
                        int32_t threads) {
    if (!valid(blob)) return -1;
    const Blob b{static_cast<const Header*>(blob)};
    Geometry g;
    std::memcpy(&g, shape, sizeof g);
    if (g.sh < 1 || g.sw < 1 || g.dh < 1 || g.dw < 1 || g.kh < 1 || g.kw < 1 || g.ph < 0 || g.pw < 0) return -1;
    if (g.channels * g.kh * g.kw != b.head->columns) return -1;
    if (g.batch == 0 || b.head->rows == 0) return 0;
    if (g.height + 2 * g.ph < g.dh * (g.kh - 1) + 1 || g.width + 2 * g.pw < g.dw * (g.kw - 1) + 1) return -1;
    return conv2d(b, x, g, bias, y, threads) ? 0 : -2;
}
