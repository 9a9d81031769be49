// Networks of convolutions: with pooling, additions and activations between, in one call.
#include "convolution.h"
#include "linear.h"
#include "secateur.h"

namespace secateur {
namespace {

enum Kind { kConvolution, kMaxima, kAverages, kNeither };

constexpr i64 kMost = i64(1) << 30;    // of a number of a shape
constexpr double kFloats = 1e12;       // more no image may have
constexpr i64 kResident = 512 << 10;   // floats of the values of images that go through all steps together

struct Value {
    Frame frame;
    i64 begin, size;   // where it is kept, in floats for each image that goes with it
    int writer, last;  // the step that writes it and the last that reads it; -1 is before all
    bool known, home;  // whether it has a size, and lies as code wants it
};

struct Network {
    const secateur_step* steps;
    const int count;
    const i64 batch;
    Value* values = nullptr;
    i64 floats = 0, laid = 0, work = 0;  // of an image: kept in all, the most laid out anew, and multiplications

    Network(const secateur_step* steps_, int count_, i64 batch_) : steps(steps_), count(count_), batch(batch_) {}

    // ---- whether it makes sense, and where values are kept

    static Geometry shape(const secateur_step& step) {
        Geometry g;
        std::memcpy(&g, step.shape, sizeof g);
        if (step.kind == kNeither) g.kh = g.kw = g.sh = g.sw = g.dh = g.dw = 1, g.ph = g.pw = 0;
        return g;
    }
    static const Header& head(const secateur_step& step) { return *static_cast<const Header*>(step.blob); }
    static Blob blob(const secateur_step& step) { return {static_cast<const Header*>(step.blob)}; }

    // That of a convolution of this shape, or NULL.
    static const Generated* code(const secateur_step& step, const Geometry& g) {
        const Generated* made = static_cast<const Generated*>(step.code);
        return made && made->runs && made->rows == i64(head(step).rows) && made->shape.same_but_batch(g) ? made : nullptr;
    }

    static bool good(const secateur_step& step, const Geometry& g) {
        const i64 all[] = {g.channels, g.height, g.width, g.kh, g.kw, g.sh, g.sw, g.ph, g.pw, g.dh, g.dw};
        for (i64 one : all)
            if (one < 0 || one > kMost) return false;
        const double padded = double(g.height + 2 * g.ph) * double(g.width + 2 * g.pw);
        if (!g.good() || g.channels < 1 || g.height < 1 || g.width < 1) return false;
        if (double(g.channels) * padded > kFloats) return false;
        if (step.kind == kConvolution)
            return valid(step.blob) && head(step).rows > 0 &&
                   double(head(step).rows) * double(g.oh()) * double(g.ow()) <= kFloats &&
                   double(g.channels) * double(g.kh) * double(g.kw) == double(head(step).columns);
        const bool spread = step.kind == kAverages && g.dh * g.dw != 1;
        return !spread && 2 * g.ph <= g.dh * (g.kh - 1) + 1 && 2 * g.pw <= g.dw * (g.kw - 1) + 1;
    }

    // How a value lies: as the first code that reads it in planes wants it; else with the widest padding that one of its
    // convolutions has.
    static void lie(Value& from, const secateur_step& step, const Geometry& g) {
        const Generated* made = code(step, g);
        const bool coded = made && !made->shifted && g.sh * g.sw == 1;
        if (from.home || (made && !coded) || g.sw > kStrides) return;
        Frame frame = from.frame;
        frame.ph = coded || frame.ph < g.ph ? g.ph : frame.ph;
        frame.pw = coded || frame.pw < g.pw ? g.pw : frame.pw;
        if (coded || double(frame.channels) * double(frame.height + 2 * frame.ph) * double(frame.pitch()) <= kFloats)
            from.frame = frame, from.home = coded;
    }

    bool is_value(int32_t i) const { return i >= 0 && i <= count && values[i].known; }

    bool sound() {
        for (int i = 0; i <= count; i++) values[i] = {{}, 0, 0, -1, -1, i == 0, false};
        for (int i = 0; i < count; i++) {
            const secateur_step& step = steps[i];
            const Geometry g = shape(step);
            if (step.kind < kConvolution || step.kind > kNeither || !is_value(step.from) || !good(step, g)) return false;
            if (step.activation < 0 || step.activation >= int32_t(Activation::kEnd)) return false;
            Value& from = values[step.from];
            const Frame seen{g.channels, g.height, g.width, 0, 0};
            if (step.from == 0 && i == 0) from.frame = seen;
            if (!from.frame.same_size(seen)) return false;
            const bool convolution = step.kind == kConvolution;
            if (convolution) lie(from, step, g);
            from.last = i;
            const Frame result{convolution ? i64(head(step).rows) : g.channels, g.oh(), g.ow(), 0, 0};
            if (step.add != -1) {
                if (!is_value(step.add) || !values[step.add].frame.same_size(result)) return false;
                values[step.add].last = i;
            }
            if (step.times != -1) {
                if (step.kind != kNeither || step.scale || !is_value(step.times)) return false;
                if (!values[step.times].frame.same_size({g.channels, 1, 1, 0, 0})) return false;
                values[step.times].last = i;
            }
            if (step.to < 1 || step.to > count || values[step.to].known) return false;
            values[step.to] = {result, 0, 0, i, i, true, false};
            if (!convolution) continue;
            const i64 planes = i64(Planes(g).size());
            laid = planes > laid ? planes : laid;
            work += i64(head(step).nonzeros) * result.height * result.width;
        }
        return true;
    }

    bool is_x(const Value& value) const { return &value == values && value.frame.ph + value.frame.pw == 0; }
    bool is_y(const Value& value) const { return value.writer == count - 1; }

    // Each value where it fits first among those that are needed when it is written.
    void place(int* live) {
        int alive = 0;
        for (int i = -1; i < count; i++) {
            const int v = i < 0 ? 0 : steps[i].to;
            Value& value = values[v];
            if (is_x(value) || is_y(value)) continue;
            value.size = (value.frame.size() + kSlack + 15) / 16 * 16;
            int left = 0;
            for (int k = 0; k < alive; k++)
                if (values[live[k]].last >= i) live[left++] = live[k];
            alive = left;
            for (int k = 0; k < alive; k++) {
                const Value& other = values[live[k]];
                if (value.begin < other.begin + other.size && other.begin < value.begin + value.size)
                    value.begin = other.begin + other.size, k = -1;  // look at all again
            }
            live[alive++] = v;
            if (floats < value.begin + value.size) floats = value.begin + value.size;
        }
    }

    // ---- its steps

    struct Run {
        const Network& net;
        const float* x;
        float* y;
        i64 images;
        int threads;
        float* kept;

        Images at(int v) const {
            const Value& value = net.values[v];
            const i64 size = value.frame.size();
            if (net.is_x(value)) return {const_cast<float*>(x), size, value.frame, true};
            if (net.is_y(value)) return {y, size, value.frame, true};
            return {kept + value.begin * images, value.size, value.frame, false};
        }

        bool go() const {
            const Value& first = net.values[0];
            if (!net.is_x(first)) {
                const i64 area = first.frame.height * first.frame.width;
                const Images given{const_cast<float*>(x), first.frame.channels * area,
                                   {first.frame.channels, first.frame.height, first.frame.width, 0, 0}, true};
                pointwise(given, {at(0), {}, {}}, {});
            }
            for (int i = 0; i < net.count; i++)
                if (!step(net.steps[i])) return false;
            return true;
        }

        bool step(const secateur_step& s) const {
            const Images from = at(s.from), none{};
            const Result result{at(s.to), s.add < 0 ? none : at(s.add), {s.scale, s.shift, nullptr, 0, static_cast<Activation>(s.activation)}};
            if (s.kind == kNeither) return pointwise(from, result, s.times < 0 ? none : at(s.times));
            if (s.kind != kConvolution) return pool(s, from, result);
            const Geometry g = shape(s);
            const bool worth = i64(head(s).nonzeros) * g.oh() * g.ow() * images >= kWorthSharing;
            if (!convolve({blob(s), code(s, g), g}, from, images, result, worth ? threads : 1)) return false;
            surround(result.to);
            return true;
        }

        // Zeros around images, as others lay there before.
        void surround(const Images& to) const {
            const Frame& l = to.frame;
            if (l.ph + l.pw) share(images * l.channels, threads, [&](i64 i) { surround(to, i / l.channels, i % l.channels); });
        }
        static void surround(const Images& to, i64 image, i64 c) {
            const Frame& l = to.frame;
            float *pixels = to.pixels(image, c), *begin = pixels - l.first();
            const i64 end = l.first() + (l.height - 1) * l.pitch() + l.width;  // behind the last pixel
            std::memset(begin, 0, l.first() * sizeof(float));
            std::memset(begin + end, 0, (l.plane() - end) * sizeof(float));
            for (i64 y = 0; y < l.height - 1; y++)
                for (i64 x = 0; x < 2 * l.pw; x++) pixels[y * l.pitch() + l.width + x] = 0;
        }

        // The n values of row y of a channel of an image, finished; with `times`, scaled by that.
        void finish(const float* row, i64 n, const Result& r, i64 image, i64 c, i64 y, const float* times = nullptr) const {
            const float* add = r.add.data ? r.add.pixels(image, c) + y * r.add.frame.pitch() : nullptr;
            Finish after = r.at(c, add);
            if (times) after.scale = times;
            kernels->finish(row, 0, 1, n, after, r.to.pixels(image, c) + y * r.to.frame.pitch(), 0);
        }

        bool pointwise(const Images& from, const Result& result, const Images& times) const {
            const Frame& l = from.frame;
            share(images * l.channels, threads, [&](i64 i) {
                const i64 b = i / l.channels, c = i % l.channels;
                const float* scale = times.data ? times.pixels(b, c) : nullptr;
                surround(result.to, b, c);
                for (i64 y = 0; y < l.height; y++) finish(from.pixels(b, c) + y * l.pitch(), l.width, result, b, c, y, scale);
            });
            return true;
        }

        // Rows of a window first, then along the row that these give, between what counts for nothing.
        bool pool(const secateur_step& s, const Images& from, const Result& result) const {
            const Geometry g = shape(s);
            const bool maxima = s.kind == kMaxima;
            const i64 padded = g.width + 2 * g.pw, ow = g.ow(), pitch = from.frame.pitch();
            std::atomic<bool> enough{true};
            share(images * g.channels, threads, [&](i64 i) {
                const i64 b = i / g.channels, c = i % g.channels;
                float *row = sums.get(padded + kSlack + 2 * ow), *found = row + padded + kSlack, *counts = found + ow;
                if (!row) return void(enough = false);
                surround(result.to, b, c);
                for (i64 p = 0; p < padded; p++) row[p] = maxima ? -__builtin_inff() : 0;
                for (i64 p = 0; p < ow; p++) counts[p] = float(s.counted ? g.kw : inside(p * g.sw - g.pw, g.kw, 1, g.width).n());
                for (i64 y = 0; y < g.oh(); y++) {
                    const i64 top = y * g.sh - g.ph;
                    const Range seen = inside(top, g.kh, g.dh, g.height);
                    if (seen.n() > 0)
                        kernels->pool_rows(maxima, from.pixels(b, c) + (top + seen.begin * g.dh) * pitch, g.dh * pitch,
                                           seen.n(), g.width, row + g.pw);
                    else
                        for (i64 p = 0; p < g.width; p++) row[g.pw + p] = -__builtin_inff();
                    kernels->pool_row(maxima, row, g.kw, g.dw, g.sw, ow, found);
                    if (!maxima)
                        for (i64 p = 0; p < ow; p++) found[p] /= counts[p] * float(s.counted ? g.kh : seen.n());
                    finish(found, ow, result, b, c, y);
                }
            });
            return enough;
        }

        struct Range {
            i64 begin, end;
            i64 n() const { return end - begin; }
        };
        // Which of a window's places, `spread` apart from `first` on, lie in [0, size).
        static Range inside(i64 first, i64 places, i64 spread, i64 size) {
            const i64 begin = first < 0 ? (-first + spread - 1) / spread : 0;
            const i64 end = first < size ? (size - first + spread - 1) / spread : 0;
            return {begin, end < begin ? begin : end < places ? end : places};
        }
    };

    // With images enough each thread takes some of them; else threads share each step.
    bool run(const float* x, float* y, int threads) const {
        if (work * batch < kWorthSharing) threads = 1;
        const bool apart = batch % threads == 0 || batch >= 4 * i64(threads);
        const i64 each = apart ? (batch + threads - 1) / threads : batch;
        i64 images = floats + laid ? kResident / (floats + laid) : each;
        images = images < 1 ? 1 : images > each ? each : images;
        const Frame &in = values[0].frame, &out = values[steps[count - 1].to].frame;
        const i64 x_size = in.channels * in.height * in.width, y_size = out.size();
        std::atomic<bool> enough{true};
        share((batch + images - 1) / images, apart ? threads : 1, [&](i64 i) {
            const i64 first = i * images, n = batch - first < images ? batch - first : images;
            float* memory = kept.get(std::size_t(floats * n));
            if (!memory || !Run{*this, x + first * x_size, y + first * y_size, n, apart ? 1 : threads, memory}.go())
                enough = false;
        });
        return enough;
    }
};

}  // namespace
}  // namespace secateur

using namespace secateur;

int32_t secateur_network(const secateur_step* steps, int32_t count, int64_t batch, const float* x, float* y,
                         int32_t threads) {
    if (!steps || count < 1 || batch < 0) return -1;
    Network network(steps, count, batch);
    constexpr i64 size = sizeof(Value) / sizeof(float);
    network.values = reinterpret_cast<Value*>(planned.get(std::size_t(count + 1) * (size + 1)));
    if (!network.values) return -2;
    if (!network.sound()) return -1;
    network.place(reinterpret_cast<int*>(network.values + count + 1));
    return batch == 0 || network.run(x, y, threads < 1 ? 1 : threads) ? 0 : -2;
}
