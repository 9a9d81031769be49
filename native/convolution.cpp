// Convolutions: products with what each output place sees of the image.
#include "generated.h"
#include "linear.h"
#include "planes.h"
#include "secateur.h"

namespace secateur {
namespace {

struct Convolution {
    Blob blob;
    Planes planes;
    const float* bias;
    int threads;
    i64 rows, columns, places, oh, ow;

    Convolution(Blob blob_, const Geometry& g, const float* bias_, int threads_)
        : blob(blob_), planes(g), bias(bias_), threads(threads_), rows(blob_.head->rows), columns(blob_.head->columns),
          places(planes.places()), oh(g.oh()), ow(g.ow()) {}

    bool run(const float* x, const Generated* code, float* y) {
        const Geometry& g = planes.g;
        if (i64(blob.head->nonzeros) * places * g.batch < kWorthSharing) threads = 1;
        i64* offset = reinterpret_cast<i64*>(offsets.get(2 * columns));
        if (!bias) bias = zeros.get(rows);
        float* laid = gathered.get(g.plain() ? 0 : planes.size());
        if (!offset || !bias || !laid) return false;
        planes.offsets(columns, offset);
        const bool generated = code && (!g.plain() || places >= kLanes);
        for (i64 b = 0; b < g.batch; b++) {
            const float *image = x + b * g.channels * g.height * g.width, *seen = g.plain() ? image : laid;
            if (!g.plain()) share(g.channels, threads, [&](i64 c) { planes.fill(image, c, laid); });
            float* to = y + b * rows * oh * ow;
            if (!(generated ? by_code(*code, seen, to) : by_panels(seen, offset, to))) return false;
        }
        return true;
    }

    bool by_panels(const float* seen, const i64* offset, float* y) const {
        const Kernels& k = *kernels;
        const Header& head = *blob.head;
        auto arrange = [&](i64 i, float* panel) -> const float* {
            const Tile t(i, places, false);
            if (planes.g.plain() && t.n < t.width)  // x ends here: no vector may reach beyond
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
                k.panel(blob, in, t.width, bias, c, out);
                put(out, t.width, t.first, t.n, first, last, y);
            }
            return true;
        };
        const i64 tiles = Tile::count(places, false);
        return by_tiles(tiles, std::size_t(columns + 2) * kWidth, head.chunks, threads, arrange, compute);
    }

    // Tiles read the planes where they lie. Where these are the image itself no vector may reach beyond its end, so that
    // the last tile begins early enough, and some places are computed twice.
    bool by_code(const Generated& code, const float* seen, float* y) const {
        const i64 tiles = (places + kLanes - 1) / kLanes, together = together_of(tiles, kLanes * rows, threads);
        const i64 end = planes.g.plain() ? places - kLanes : places;  // the last place where a tile may begin
        auto arrange = [&](i64, float*) { return seen; };
        auto compute = [&](i64 i, const float* in, i64 part, i64 parts) {
            float* out = sums.get(together * rows * kLanes);
            if (!out) return false;
            const i64 from = code.blocks * part / parts, to = code.blocks * (part + 1) / parts;
            const i64 begin = i * together, count = tiles - begin < together ? tiles - begin : together;
            const i64 moved = (begin + count - 1) * kLanes > end ? 1 : 0;  // of these tiles
            code.run(from, to, in + begin * kLanes, count - moved, bias, out);
            if (moved) code.run(from, to, in + end, 1, bias, out + (count - 1) * rows * kLanes);
            for (i64 t = 0; t < count; t++) {
                const i64 at = moved && t == count - 1 ? end : (begin + t) * kLanes;
                const i64 n = places - at < kLanes ? places - at : kLanes;
                put(out + (t * rows + code.row(from)) * kLanes, kLanes, at, n, code.row(from), code.row(to), y);
            }
            return true;
        };
        return by_tiles((tiles + together - 1) / together, 0, code.blocks, threads, arrange, compute);
    }

    // Rows [first, last) of n places from `place` on, to where they belong: by pieces of output rows.
    void put(const float* sums, int width, i64 place, i64 n, i64 first, i64 last, float* y) const {
        for (i64 p = place; p < place + n;) {
            const i64 py = p / planes.pitch, px = p % planes.pitch, left = place + n - p;
            const i64 line = planes.pitch == ow ? left : ow - px;  // rows without a gap are one
            const i64 take = line < left ? line : left;            // negative beyond the last output
            if (take > 0)
                kernels->put(sums + p - place, width, last - first, take, y + (first * oh + py) * ow + px, oh * ow);
            p += planes.pitch == ow ? left : planes.pitch - px;
        }
    }
};

}  // namespace
}  // namespace secateur

using namespace secateur;

int32_t secateur_conv2d(const void* blob, const void* code, const float* x, const int64_t shape[12], const float* bias,
                        float* y, int32_t threads) {
    if (!valid(blob)) return -1;
    const Blob b{static_cast<const Header*>(blob)};
    const Generated* made = static_cast<const Generated*>(code);
    Geometry g;
    std::memcpy(&g, shape, sizeof g);
    if (!g.good() || g.channels * g.kh * g.kw != b.head->columns) return -1;
    if (g.batch == 0 || b.head->rows == 0) return 0;
    const bool fits = made && made->runs && made->rows == b.head->rows && made->shape.same_but_batch(g);
    return Convolution(b, g, bias, threads < 1 ? 1 : threads).run(x, fits ? made : nullptr, y) ? 0 : -2;
}
