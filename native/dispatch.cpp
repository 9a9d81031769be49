// The C ABI: which kernels run, on how many threads, over which parts of the work.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"
#include "secateur.h"

namespace secateur {
namespace {

// ---- instruction sets

const Kernels* by_name(const char* name) {
#if defined(SECATEUR_HAS_AVX512)
    if (!std::strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma") &&
                       __builtin_cpu_supports("bmi2")
                   ? &kAvx512
                   : nullptr;
#endif
#if defined(SECATEUR_HAS_AVX2)
    if (!std::strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2 : nullptr;
#endif
#if defined(SECATEUR_HAS_NEON)
    if (!std::strcmp(name, "neon")) return &kNeon;
#endif
    return std::strcmp(name, "portable") ? nullptr : &kPortable;
}

const Kernels* best() {
    const char* wanted = std::getenv("SECATEUR_ISA");
    const Kernels* found = wanted ? by_name(wanted) : nullptr;
    for (const char* name : {"avx512", "avx2", "neon", "portable"})
        if (!found) found = by_name(name);
    return found;
}

const Kernels* kernels = best();

// ---- threads: torch's own OpenMP pool

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
Parallel parallel = nullptr;

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

thread_local Scratch inputs, sums, gathered, projected, collected, arranged, offsets;
thread_local Scratch zeros;  // never written

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

int width_of(i64 n, bool jagged) {  // 0: the jagged layout
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

bool linear(Blob blob, const float* x, i64 n, const float* bias, float* y, bool accumulate, int threads) {
    const Kernels& k = *kernels;
    const Header& head = *blob.head;
    const i64 columns = head.columns, rows = head.rows;
    if (n == 0 || rows == 0) return true;
    const bool jagged = k.jagged && head.groups;
    if (i64(head.nonzeros) * n < kWorthSharing) threads = 1;
    auto arrange = [&](i64 i, float* panel) -> const float* {
        const Tile t(i, n, jagged);
        const float* from = x + t.first * columns;
        if (t.width == 1 || (t.width == 0 && t.n == 1 && columns % kTile == 0)) return from;
        if (t.width)
            k.panel_pack(from, columns, t.n, t.width, columns, panel);
        else
            k.small_pack(from, t.n, columns, panel);
        return panel;
    };
    auto compute = [&](i64 i, const float* in, i64 part, i64 parts) {
        const Tile t(i, n, jagged);
        float* to = y + t.first * rows;
        if (t.width == 0) {
            k.small(blob, in, t.n, bias, accumulate, to, u32(head.groups * part / parts),
                    u32(head.groups * (part + 1) / parts));
            return true;
        }
        float* out = sums.get(std::size_t(head.chunk) * kWidth);
        if (!out) return false;
        for (u32 c = u32(head.chunks * part / parts); c < u32(head.chunks * (part + 1) / parts); c++) {
            const i64 first = i64(c) * head.chunk, left = rows - first, count = left < head.chunk ? left : head.chunk;
            const float* start = bias ? bias : zeros.get(rows);
            if (!start) return false;
            if (accumulate) {
                k.panel_pack(to + first, rows, t.n, t.width, count, out);
                start = nullptr;
            }
            k.panel(blob, in, t.width, start, c, out);
            k.panel_unpack(out, t.n, t.width, count, to + first, rows);
        }
        return true;
    };
    const i64 tiles = Tile::count(n, jagged);
    return by_tiles(tiles, std::size_t(columns + kTile) * kWidth, head.chunks, threads, arrange, compute);
}

// All chunks of to[rows][width] = start + W panel, or to += W panel without start.
void multiply(Blob blob, const float* panel, int width, const float* start, float* to) {
    for (u32 i = 0; i < blob.head->chunks; i++)
        kernels->panel(blob, panel, width, start, i, to + i64(i) * blob.head->chunk * width);
}

// ---- layers one after the other

struct Chain {
    int layers;
    const void* const* blobs;
    const float* const* biases;
    const int32_t* relu;

    Blob blob(int i) const { return {static_cast<const Header*>(blobs[i])}; }
    i64 columns() const { return blob(0).head->columns; }
    i64 rows() const { return blob(layers - 1).head->rows; }
    i64 widest() const {
        i64 most = columns();
        for (int i = 0; i < layers; i++) most = blob(i).head->rows > most ? blob(i).head->rows : most;
        return most;
    }

    // layer after layer, activations [n][features]
    bool by_rows(const float* x, i64 n, float* y, int threads) const {
        const i64 most = widest() * n;
        float* between = gathered.get(2 * most);
        if (!between) return false;
        for (int i = 0; i < layers; i++) {
            float* to = i + 1 == layers ? y : between + (i % 2) * most;
            if (!linear(blob(i), x, n, biases[i], to, false, threads)) return false;
            if (relu[i]) kernels->relu(to, n * blob(i).head->rows);
            x = to;
        }
        return true;
    }

    // a tile through all layers, activations [features][width]
    bool by_panels(const float* x, const Tile& t, float* y) const {
        const i64 most = widest() * t.width;
        float* between = gathered.get(2 * most);
        const float* none = zeros.get(widest());
        if (!between || !none) return false;
        float *in = between, *to = between + most;
        kernels->panel_pack(x + t.first * columns(), columns(), t.n, t.width, columns(), in);
        for (int i = 0; i < layers; i++) {
            multiply(blob(i), in, t.width, biases[i] ? biases[i] : none, to);
            if (relu[i]) kernels->relu(to, blob(i).head->rows * t.width);
            float* swap = in;
            in = to, to = swap;
        }
        kernels->panel_unpack(in, t.n, t.width, rows(), y + t.first * rows(), rows());
        return true;
    }

    bool run(const float* x, i64 n, float* y, int threads) const {
        const bool jagged = kernels->jagged && blob(0).head->groups;
        const i64 tiles = Tile::count(n, jagged);
        if (tiles < threads) return by_rows(x, n, y, threads);
        std::atomic<bool> enough{true};
        share(tiles, threads, [&](i64 i) {
            const Tile t(i, n, jagged);
            if (!(t.width >= 8 ? by_panels(x, t, y)
                               : by_rows(x + t.first * columns(), t.n, y + t.first * rows(), 1)))
                enough = false;
        });
        return enough;
    }
};

// ---- convolution

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

// ---- recurrent layers

struct Recurrent {
    bool gru;
    Blob input, recurrent, projection;
    const float *x, *input_bias;
    float* gates;  // the input's part for all steps, if there is no blob for it
    const i64* sizes;
    i64 steps, batch, hidden, state;
    const float* bias;
    float *h, *c, *out;
    i64 out_stride;
    bool reverse;

    i64 gate_rows() const { return (gru ? 3 : 4) * hidden; }

    // Calls step(sequences of [begin, end) that are live, row of the first of them, the input's part of its gates) for
    // each step, in order. That part is computed for a few steps at a time, so that it stays in the cache.
    template <class Step>
    bool each(i64 begin, i64 end, const Step& step) const {
        const i64 n = end - begin, rows = gate_rows();
        const i64 together = n < kWidth ? kWidth / n : 1;
        float* part = input.head ? projected.get(together * n * rows) : gates;
        const i64 columns = input.head ? input.head->columns : 0;
        float* copies = input.head && n < batch ? collected.get(together * n * columns) : nullptr;
        if (!part || (input.head && n < batch && !copies)) return false;
        i64 offset = 0;  // of the first row of step t
        if (reverse)
            for (i64 t = 0; t < steps; t++) offset += sizes[t];
        i64 ready = 0, used = 0;  // rows of `part`, and how many of these are behind us
        for (i64 i = 0; i < steps; i++) {
            const i64 t = reverse ? steps - 1 - i : i, live = live_at(t, begin, end);
            if (reverse) offset -= sizes[t];
            if (live > 0) {
                const i64 row = offset + begin;
                if (!input.head) {
                    if (!step(live, row, part + row * rows)) return false;
                } else {
                    if (used == ready) {
                        ready = used = 0;
                        i64 last = offset;
                        for (i64 k = 0; k < together && i + k < steps; k++) {
                            const i64 s = reverse ? t - k : t + k, more = live_at(s, begin, end);
                            if (k > 0) last += reverse ? -sizes[s] : sizes[s - 1];
                            if (copies)
                                std::memcpy(copies + ready * columns, x + (last + begin) * columns,
                                            more > 0 ? more * columns * sizeof(float) : 0);
                            ready += more > 0 ? more : 0;
                        }
                        const float* from = copies ? copies : x + (reverse ? last : offset) * columns;
                        if (!linear(input, from, ready, input_bias, part, false, 1)) return false;
                    }
                    // rows are in the order of x; without copies a reverse pass takes them from the end
                    const i64 at = reverse && !copies ? ready - used - live : used;
                    used += live;
                    if (!step(live, row, part + at * rows)) return false;
                }
            }
            if (!reverse) offset += sizes[t];
        }
        return true;
    }

    i64 live_at(i64 t, i64 begin, i64 end) const { return (sizes[t] < end ? sizes[t] : end) - begin; }

    // The sequences [begin, end), at most kWidth, through all steps.
    bool run(i64 begin, i64 end) const {
        const int width = width_of(end - begin, kernels->jagged && recurrent.head->groups);
        return width >= 8 ? by_panels(begin, end, width) : by_rows(begin, end);
    }

    bool by_rows(i64 begin, i64 end) const {
        const i64 n = end - begin, rows = gate_rows();
        float* scratch = gathered.get(n * rows);
        if (!scratch) return false;
        return each(begin, end, [&](i64 live, i64 row, float* in) {
            float* h0 = h + begin * state;
            if (gru) {
                if (!linear(recurrent, h0, live, bias, scratch, false, 1)) return false;
                for (i64 b = 0; b < live; b++) kernels->gru(in + b * rows, scratch + b * rows, hidden, h0 + b * state);
            } else {
                float* to = projection.head ? scratch : h0;
                if (!linear(recurrent, h0, live, nullptr, in, true, 1)) return false;
                for (i64 b = 0; b < live; b++)
                    kernels->lstm(in + b * rows, hidden, c + (begin + b) * hidden, to + b * hidden);
                if (projection.head && !linear(projection, scratch, live, nullptr, h0, false, 1)) return false;
            }
            for (i64 b = 0; b < live; b++)
                std::memcpy(out + (row + b) * out_stride, h0 + b * state, state * sizeof(float));
            return true;
        });
    }

    // Everything [features][width] from the first step to the last, so that nothing but inputs and outputs is turned.
    bool by_panels(i64 begin, i64 end, int width) const {
        const Kernels& k = *kernels;
        const int n = int(end - begin);
        const i64 rows = gate_rows(), cells = hidden * width, states = state * width;
        float* part = gathered.get((2 * rows + 3 * hidden + 2 * state) * width);  // the input's part of the gates
        const float* start = bias ? bias : zeros.get(rows > state ? rows : state);
        if (!part || !start) return false;
        float *s = part + rows * width, *hp = s + rows * width, *fresh_h = hp + states, *cp = fresh_h + states;
        float *fresh_c = cp + cells, *before = fresh_c + cells;  // before the projection
        k.panel_pack(h + begin * state, state, n, width, state, hp);
        if (c) k.panel_pack(c + begin * hidden, hidden, n, width, hidden, cp);
        const bool done = each(begin, end, [&](i64 live, i64 row, const float* in) {
            const bool all = live == n;
            float *to_h = all ? hp : fresh_h, *to_c = all ? cp : fresh_c;
            k.panel_pack(in, rows, int(live), width, rows, part);
            if (gru) {
                multiply(recurrent, hp, width, start, s);
                if (!all) std::memcpy(to_h, hp, states * sizeof(float));
                k.gru(part, s, cells, to_h);
            } else {
                multiply(recurrent, hp, width, nullptr, part);
                if (!all) std::memcpy(to_c, cp, cells * sizeof(float));
                k.lstm(part, cells, to_c, projection.head ? before : to_h);
                if (projection.head) multiply(projection, before, width, zeros.get(state), to_h);
            }
            if (!all) {  // the other sequences have ended, or not begun
                keep(to_h, hp, states, width, live);
                if (c) keep(to_c, cp, cells, width, live);
            }
            k.panel_unpack(hp, int(live), width, state, out + row * out_stride, out_stride);
            return true;
        });
        if (!done) return false;
        k.panel_unpack(hp, n, width, state, h + begin * state, state);
        if (c) k.panel_unpack(cp, n, width, hidden, c + begin * hidden, hidden);
        return true;
    }

    static void keep(const float* from, float* to, i64 size, int width, i64 live) {
        for (i64 i = 0; i < size; i += width) std::memcpy(to + i, from + i, live * sizeof(float));
    }
};

bool valid(const void* blob) {
    auto head = static_cast<const Header*>(blob);
    return head && head->magic == kMagic && head->version == kVersion;
}

}  // namespace
}  // namespace secateur

using namespace secateur;

int32_t secateur_abi(void) { return SECATEUR_ABI; }

const char* secateur_isa(void) { return kernels->name; }

int32_t secateur_set_isa(const char* name) {
    const Kernels* found = by_name(name);
    if (!found) return -1;
    kernels = found;
    return 0;
}

void secateur_set_parallel(void* gomp_parallel) { parallel = reinterpret_cast<Parallel>(gomp_parallel); }

int64_t secateur_pack(const float* weight, int64_t rows, int64_t columns, int64_t groups, int32_t half, void* blob) {
    return pack(weight, rows, columns, groups, kernels->jagged, half != 0, blob);
}

int32_t secateur_linear(const void* blob, const float* x, int64_t n, const float* bias, float* y, int32_t threads) {
    if (!valid(blob) || n < 0) return -1;
    return linear({static_cast<const Header*>(blob)}, x, n, bias, y, false, threads) ? 0 : -2;
}

int32_t secateur_chain(int32_t layers, const void* const* blobs, const float* const* biases, const int32_t* relu,
                       const float* x, int64_t n, float* y, int32_t threads) {
    if (layers < 1 || n < 0) return -1;
    const Chain chain{layers, blobs, biases, relu};
    for (int i = 0; i < layers; i++)
        if (!valid(blobs[i]) || (i && chain.blob(i).head->columns != chain.blob(i - 1).head->rows)) return -1;
    return n == 0 || chain.run(x, n, y, threads) ? 0 : -2;
}

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

int32_t secateur_recurrent(int32_t kind, const void* input, const float* x, const float* input_bias, float* gates,
                           const void* recurrent, const void* projection, const int64_t* sizes, int64_t steps,
                           int64_t batch, const float* bias, float* h, float* c, float* out, int64_t out_stride,
                           int32_t reverse, int32_t threads) {
    if (!valid(recurrent) || (projection && !valid(projection)) || (kind == 0) != (c != nullptr)) return -1;
    if (input ? !valid(input) || !x : !gates) return -1;
    const Blob i{static_cast<const Header*>(input)}, r{static_cast<const Header*>(recurrent)},
        p{static_cast<const Header*>(projection)};
    const i64 count = kind ? 3 : 4, hidden = r.head->rows / count, state = r.head->columns;
    if (r.head->rows % count || (projection ? p.head->columns != hidden || p.head->rows != state : hidden != state))
        return -1;
    if (input && i.head->rows != r.head->rows) return -1;
    const Recurrent layer{kind == 1, i,     r,      p,     x,    input_bias, gates, sizes, steps,
                          batch,     hidden, state, bias, h,    c,          out,   out_stride, reverse != 0};
    // Sequences do not wait for each other: each part runs from the first step to the last, on one thread.
    const i64 fit = (batch + kWidth - 1) / kWidth, shared = batch / 8 < threads ? batch / 8 : threads;
    const i64 parts = fit > shared ? fit : shared;
    std::atomic<bool> enough{true};
    share(parts, threads, [&](i64 i) {
        if (!layer.run(batch * i / parts, batch * (i + 1) / parts)) enough = false;
    });
    return enough ? 0 : -2;
}
