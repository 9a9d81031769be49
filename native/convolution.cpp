// Convolutions: products with what each output place sees of the image.
#include "convolution.h"
#include "linear.h"
#include "secateur.h"

namespace secateur {
namespace {

struct Convolver {
    const Convolution& of;
    Images from;
    const i64 images;
    Result result;
    const int threads;
    const Planes planes;
    const i64 rows, columns, ow, area;
    const float* start = nullptr;   // of the sums
    const i64* offset = nullptr;    // of what a column meets at the first place
    i64 line, step = 1;             // floats from there to the next place below, and to the next in a row

    Convolver(const Convolution& of_, const Images& from_, i64 images_, const Result& result_, int threads_)
        : of(of_), from(from_), images(images_), result(result_), threads(threads_), planes(of_.shape),
          rows(of_.blob.head->rows), columns(of_.blob.head->columns), ow(of_.shape.ow()), area(of_.shape.oh() * ow),
          line(planes.pitch) {}

    bool run() {
        i64* at = reinterpret_cast<i64*>(offsets.get(2 * columns));
        start = zeros.get(rows);
        if (!at || !start) return false;
        offset = at;
        if (result.finish.shift && !result.finish.scale) start = result.finish.shift, result.finish.shift = nullptr;
        const bool plain = from.ends && of.shape.plain();
        const bool coded = of.code && (!plain || planes.places() >= kLanes), shifts = coded && shifted();
        if (!shifts && (coded ? tight() : plain || roomy())) {
            planes_of(from.frame, at);
        } else {
            if (!(shifts ? lay(Lines(of.shape)) : lay(planes))) return false;
            planes.offsets(columns, at);
        }
        return coded ? by_code() : by_panels();
    }

    bool shifted() const { return of.code && of.code->shifted; }
    // Whether images lie as code wants them.
    bool tight() const {
        const Geometry& g = of.shape;
        return g.sh * g.sw == 1 && from.frame.ph == g.ph && from.frame.pw == g.pw;
    }
    // Whether panels can be made of images as they lie.
    bool roomy() const {
        const Geometry& g = of.shape;
        return !from.ends && g.sw <= kStrides && from.frame.ph >= g.ph && from.frame.pw >= g.pw;
    }
    // Where columns meet images that lie as they are.
    void planes_of(const Frame& frame, i64* at) {
        const Geometry& g = of.shape;
        const i64 pitch = frame.pitch(), begin = (frame.ph - g.ph) * pitch + frame.pw - g.pw, taps = g.kh * g.kw;
        for (i64 j = 0; j < columns; j++)
            at[j] = j < taps ? begin + j / g.kw * g.dh * pitch + j % g.kw * g.dw : at[j - taps] + frame.plane();
        line = g.sh * pitch, step = g.sw;
    }
    // Lays images into the planes, or lines, that are read.
    template <class Form>
    bool lay(const Form& form) {
        const i64 next = i64(form.size()), channels = form.g.channels;
        float* laid = gathered.get(std::size_t(next * images));
        if (!laid) return false;
        share(images * channels, threads, [&](i64 i) {
            const i64 b = i / channels, c = i % channels;
            form.fill(from.pixels(b, c), from.frame.pitch(), c, laid + b * next);
        });
        from.data = laid, from.next = next, from.ends = false;
        return true;
    }

    Piece piece(i64 image, i64 y, i64 x, i64 lane, i64 n) const {
        const Images &to = result.to, &add = result.add;
        return {image * from.next + y * line + x * step,
                image * to.next + to.frame.first() + y * to.frame.pitch() + x,
                image * add.next + add.frame.first() + y * add.frame.pitch() + x, int(lane), int(n)};
    }

    // Places of outputs, counted through all images, by pieces of rows.
    int of_outputs(i64 first, i64 n, Piece* pieces) const {
        const bool flat = line == ow && step == 1 && result.to.frame.pw == 0 && (!result.add.data || result.add.frame.pw == 0);
        int count = 0;
        for (i64 p = first; p < first + n; count++) {
            const i64 at = p % area, x = at % ow, left = first + n - p, row = flat ? area - at : ow - x;
            const i64 take = row < left ? row : left;
            pieces[count] = piece(p / area, at / ow, x, p - first, take);
            p += take;
        }
        return count;
    }

    // Places of the planes of an image. Between the outputs of two rows lie places that are none. Where the rows of the
    // result are as far apart, these are written, too, between its rows, which are made zero afterwards; elsewhere they are
    // left out.
    int of_planes(i64 image, i64 first, i64 n, Piece* pieces) const {
        const i64 pitch = planes.pitch;
        const bool alike = result.to.frame.pitch() == pitch && (!result.add.data || result.add.frame.pitch() == pitch);
        int count = 0;
        for (i64 p = first; p < first + n;) {
            const i64 x = p % pitch, left = first + n - p, row = alike ? left : ow - x;
            if (row > 0) pieces[count++] = piece(image, p / pitch, x, p - first, row < left ? row : left);
            p += alike ? left : pitch - x;
        }
        return count;
    }

    // Rows [first, last) of sums, to where they belong.
    void put(const float* sums, int width, i64 first, i64 last, const Piece* pieces, int count) const {
        const Images &to = result.to, &add = result.add;
        const i64 step = to.frame.plane(), add_step = add.frame.plane();
        for (const Piece* p = pieces; p < pieces + count; p++)
            kernels->finish(sums + p->lane, width, last - first, p->n, result.at(first, add.data + p->add + first * add_step),
                            to.data + p->to + first * step, step);
    }

    // Panels of outputs of all images, as places between the rows of small ones would be many.
    bool by_panels() const {
        const Kernels& k = *kernels;
        const Blob blob = of.blob;
        const Header& head = *blob.head;
        const i64 places = images * area;
        auto arrange = [&](i64 tile, float* panel) -> const float* {
            const Tile t(tile, places, false);
            Piece pieces[kWidth];
            const int count = of_outputs(t.first, t.n, pieces);
            const i64 reach = t.width + (count > 1 ? kLanes : 0);  // whole vectors of a piece
            if (!from.ends || t.first + reach <= places) {
                k.gather(from.data, int(step), offset, columns, t.width, pieces, count, panel);
                return panel;
            }
            for (const Piece* p = pieces; p < pieces + count; p++)  // no vector may reach beyond
                for (i64 j = 0; j < columns; j++)
                    for (int i = 0; i < p->n; i++) panel[j * t.width + p->lane + i] = from.data[offset[j] + p->from + i];
            return panel;
        };
        auto compute = [&](i64 i, const float* in, i64 part, i64 parts) {
            const Tile t(i, places, false);
            Piece pieces[kWidth];
            const int count = of_outputs(t.first, t.n, pieces);
            float* out = sums.get(std::size_t(head.chunk) * kWidth);
            if (!out) return false;
            for (u32 c = u32(head.chunks * part / parts); c < u32(head.chunks * (part + 1) / parts); c++) {
                const i64 first = i64(c) * head.chunk, last = first + head.chunk < rows ? first + head.chunk : rows;
                k.panel(blob, in, t.width, start, c, out);
                put(out, t.width, first, last, pieces, count);
            }
            return true;
        };
        const i64 tiles = Tile::count(places, false);
        return by_tiles(tiles, std::size_t(columns + 2) * kWidth, head.chunks, threads, arrange, compute);
    }

    bool by_code() const {
        for (i64 b = 0; b < images; b++)
            if (!by_code(b)) return false;
        return true;
    }

    // Tiles read the planes, or lines, where they lie. Where nothing may be read beyond their end, the last tile begins
    // early enough, and some places are computed twice.
    bool by_code(i64 b) const {
        const Generated& code = *of.code;
        const float* seen = from.data + b * from.next;
        const i64 step = shifted() ? kOutputs : kLanes, places = shifted() ? area : planes.places();
        const i64 tiles = (places + step - 1) / step;
        const i64 together = together_of(tiles, kLanes * rows, threads);
        const i64 end = from.ends ? places - kLanes : places;  // the last place where a tile may begin
        auto arrange = [&](i64, float*) { return seen; };
        auto compute = [&](i64 i, const float* in, i64 part, i64 parts) {
            float* out = sums.get(together * rows * kLanes);
            if (!out) return false;
            const i64 first = code.blocks * part / parts, last = code.blocks * (part + 1) / parts;
            const i64 begin = i * together, count = tiles - begin < together ? tiles - begin : together;
            const i64 moved = (begin + count - 1) * step > end ? 1 : 0;  // of these tiles
            code.run(first, last, in + begin * kLanes, count - moved, start, out);
            if (moved) code.run(first, last, in + end, 1, start, out + (count - 1) * rows * kLanes);
            for (i64 t = 0; t < count; t++) {
                const i64 at = moved && t == count - 1 ? end : (begin + t) * step;
                const i64 n = places - at < step ? places - at : step;
                Piece pieces[kLanes];
                const int found = shifted() ? of_outputs(b * area + at, n, pieces) : of_planes(b, at, n, pieces);
                put(out + (t * rows + code.row(first)) * kLanes, kLanes, code.row(first), code.row(last), pieces, found);
            }
            return true;
        };
        return by_tiles((tiles + together - 1) / together, 0, code.blocks, threads, arrange, compute);
    }
};

}  // namespace

bool convolve(const Convolution& convolution, const Images& from, i64 images, const Result& result, int threads) {
    return Convolver(convolution, from, images, result, threads).run();
}

}  // namespace secateur

using namespace secateur;

int32_t secateur_conv2d(const void* blob, const void* code, const float* x, const int64_t shape[12], const float* bias,
                        float* y, int32_t threads) {
    if (valid(blob) && static_cast<const Header*>(blob)->rows == 0) return 0;
    secateur_step step{0, 0, 1, -1, 0, 0, -1, blob, code, nullptr, bias, {}};
    std::memcpy(step.shape, shape, sizeof step.shape);
    return secateur_network(&step, 1, shape[0], x, y, threads);
}
