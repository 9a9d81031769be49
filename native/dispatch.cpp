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
                       __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma")
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
    float* data = nullptr;
    std::size_t size = 0;
    ~Scratch() { std::free(data); }
    float* get(std::size_t floats) {
        if (floats > size) {
            std::free(data);
            size = 0;
            void* fresh = nullptr;
#if defined(_WIN32)
            fresh = std::malloc(floats * sizeof(float));
#else
            if (posix_memalign(&fresh, 64, floats * sizeof(float))) fresh = nullptr;
#endif
            data = static_cast<float*>(fresh);
            if (data) size = floats;
        }
        return data;
    }
};

thread_local Scratch inputs, sums, gathered;

constexpr i64 kWorthSharing = 200000;  // multiplications below which waking another thread costs more than it gains

// ---- y[n][rows] = x[n][columns] W^T

// The inputs cut into pieces of at most 32, and the width at which each is computed.
struct Piece {
    i64 first;
    int n, width;
};
int width_of(i64 n, bool jagged) {
    return n > 16 ? 32 : n > 8 ? 16 : n > kSmall ? 8 : jagged ? 0 : n > 1 ? 4 : 1;  // 0: the jagged layout
}
Piece piece(i64 i, i64 n, bool jagged) {
    const i64 first = i * kWidth, left = n - first;
    const int take = int(left < kWidth ? left : kWidth);
    return {first, take, width_of(take, jagged)};
}

bool linear(Blob blob, const float* x, i64 n, const float* bias, float* y, bool accumulate, int threads) {
    const Kernels& k = *kernels;
    const Header& head = *blob.head;
    const i64 columns = head.columns, rows = head.rows, pieces = (n + kWidth - 1) / kWidth;
    if (n == 0 || rows == 0) return true;
    const bool jagged = k.jagged && head.groups;
    if (i64(head.nonzeros) * n < kWorthSharing) threads = 1;
    const std::size_t input_floats = std::size_t((columns + kTile) * kWidth), sum_floats = head.chunk * kWidth;
    std::atomic<bool> enough{true};
    auto compute = [&](const Piece& p, const float* in, u32 begin, u32 end) {
        if (p.width == 0) {
            k.small(blob, in, p.n, bias, accumulate, y + p.first * rows, begin, end);
            return;
        }
        float* scratch = sums.get(sum_floats);
        if (!scratch) {
            enough = false;
            return;
        }
        for (u32 c = begin; c < end; c++)
            k.panel(blob, in, p.n, p.width, bias, accumulate, y + p.first * rows, c, scratch);
    };
    auto arrange = [&](const Piece& p, float* in) -> const float* {
        const float* from = x + p.first * columns;
        if (p.width == 1 || (p.width == 0 && p.n == 1 && columns % kTile == 0)) return from;
        if (p.width)
            k.panel_pack(from, p.n, p.width, columns, in);
        else
            k.small_pack(from, p.n, columns, in);
        return in;
    };
    if (threads <= 1 || pieces >= 4 * threads || pieces % threads == 0) {  // a piece is a unit of work
        share(pieces, threads, [&](i64 i) {
            const Piece p = piece(i, n, jagged);
            if (float* in = inputs.get(input_floats))
                compute(p, arrange(p, in), 0, p.width ? head.chunks : head.groups);
            else
                enough = false;
        });
        return enough;
    }
    float* all = inputs.get(input_floats * pieces);  // shared: arranged first, then rows and pieces are divided
    if (!all) return false;
    share(pieces, threads, [&](i64 i) { arrange(piece(i, n, jagged), all + i * input_floats); });
    const i64 parts = head.chunks > 4 * i64(threads) ? 4 * i64(threads) : head.chunks;
    share(pieces * parts, threads, [&](i64 unit) {
        const i64 i = unit / parts, part = unit % parts;
        const Piece p = piece(i, n, jagged);
        const u64 count = p.width ? head.chunks : head.groups;
        const bool direct = p.width == 1 || (p.width == 0 && p.n == 1 && columns % kTile == 0);
        compute(p, direct ? x + p.first * columns : all + i * input_floats, u32(count * part / parts),
                u32(count * (part + 1) / parts));
    });
    return enough;
}

// ---- convolution

struct Geometry {
    i64 batch, channels, height, width, kh, kw, sh, sw, ph, pw, dh, dw;
    i64 oh() const { return (height + 2 * ph - dh * (kh - 1) - 1) / sh + 1; }
    i64 ow() const { return (width + 2 * pw - dw * (kw - 1) - 1) / sw + 1; }
};

// The padded image is laid out in planes, one for each channel, vertical phase (of the stride) and horizontal place in
// the kernel or phase, such that what a weight meets at neighbouring outputs lies at neighbouring addresses.
struct Planes {
    Geometry g;
    i64 pitch, height, variants, size;  // of a plane: floats a row, rows; planes a channel and phase; floats in all
    bool copies;                        // a plane for each kx, all rows aligned; else one a phase, shifted by the offset
    explicit Planes(const Geometry& g_, bool copies_) : g(g_), copies(copies_) {
        const i64 reach = copies ? 0 : (g.kw - 1) * g.dw / g.sw;
        pitch = g.ow() + reach;
        if (copies) pitch = (pitch + 15) / 16 * 16;
        height = g.oh() + (g.kh - 1) * g.dh / g.sh + 1;
        variants = copies ? g.kw : (g.sw < g.kw ? g.sw : g.kw);
        plane = (pitch * height + 15) / 16 * 16;
        size = g.channels * g.sh * variants * plane + 64;
    }
    i64 plane;
    i64 variant(i64 kx) const { return copies ? kx : (kx * g.dw) % g.sw; }
    i64 shift(i64 v) const { return copies ? v * g.dw : v; }
    i64 at(i64 c, i64 phase, i64 v) const { return ((c * g.sh + phase) * variants + v) * plane; }
    i64 offset(i64 c, i64 ky, i64 kx) const {
        const i64 y = ky * g.dh;
        return at(c, y % g.sh, variant(kx)) + y / g.sh * pitch + (copies ? 0 : kx * g.dw / g.sw);
    }
    // all planes of channel c of one image
    void fill(const float* image, i64 c, float* to) const {
        const float* from = image + c * g.height * g.width;
        for (i64 phase = 0; phase < g.sh; phase++)
            for (i64 v = 0; v < variants; v++) {
                float* row = to + at(c, phase, v);
                for (i64 q = 0; q < height; q++, row += pitch) {
                    const i64 y = q * g.sh + phase - g.ph;
                    // columns [begin, end) of the row come from the image, from x = p * sw + shift - pw
                    const i64 x0 = shift(v) - g.pw;
                    i64 begin = x0 >= 0 ? 0 : (-x0 + g.sw - 1) / g.sw, end = (g.width - x0 + g.sw - 1) / g.sw;
                    if (y < 0 || y >= g.height || end < 0) end = 0;
                    if (end > pitch) end = pitch;
                    if (begin > end) begin = end;
                    std::memset(row, 0, begin * sizeof(float));
                    const float* line = from + y * g.width + x0;
                    if (g.sw == 1)
                        std::memcpy(row + begin, line + begin, (end - begin) * sizeof(float));
                    else
                        for (i64 p = begin; p < end; p++) row[p] = line[p * g.sw];
                    std::memset(row + end, 0, (pitch - end) * sizeof(float));
                }
            }
    }
};

bool conv2d(Blob blob, const float* x, const Geometry& g, const float* bias, float* y, int threads) {
    const Kernels& k = *kernels;
    const Header& head = *blob.head;
    static const bool copies = std::getenv("SECATEUR_COPIES") != nullptr;
    const Planes planes(g, copies);
    const i64 oh = g.oh(), ow = g.ow(), rows = head.rows, places = (oh - 1) * planes.pitch + ow;
    if (i64(head.nonzeros) * places * g.batch < kWorthSharing) threads = 1;
    float* laid = inputs.get(planes.size + kWidth);
    const i64 taps = g.channels * g.kh * g.kw;
    u32* offset = reinterpret_cast<u32*>(gathered.get(taps));
    if (!laid || !offset) return false;
    for (i64 c = 0, j = 0; c < g.channels; c++)
        for (i64 ky = 0; ky < g.kh; ky++)
            for (i64 kx = 0; kx < g.kw; kx++, j++) offset[j] = u32(planes.offset(c, ky, kx));
    std::atomic<bool> enough{true};
    const i64 tiles = (places + kWidth - 1) / kWidth;
    for (i64 b = 0; b < g.batch; b++) {
        const float* image = x + b * g.channels * g.height * g.width;
        share(g.channels, threads, [&](i64 c) { planes.fill(image, c, laid); });
        share(tiles * head.chunks, threads, [&](i64 unit) {
            const i64 first = unit / head.chunks * kWidth;
            const u32 chunk = u32(unit % head.chunks);
            const int width = places - first > 16 ? 32 : 16;
            float* out = sums.get(head.chunk * kWidth);
            if (!out) {
                enough = false;
                return;
            }
            k.planes(blob, laid + first, offset, width, bias, chunk, out);
            const i64 r0 = i64(chunk) * head.chunk, r1 = r0 + head.chunk < rows ? r0 + head.chunk : rows;
            for (i64 p = first; p < first + width && p < places;) {  // pieces of output rows
                const i64 oy = p / planes.pitch, ox = p % planes.pitch;
                const i64 left = first + width - p, line = planes.pitch - ox;
                const i64 step = left < line ? left : line;
                const i64 take = ow - ox < step ? ow - ox : step;
                if (take > 0)
                    for (i64 r = r0; r < r1; r++)
                        std::memcpy(y + ((b * rows + r) * oh + oy) * ow + ox, out + (r - r0) * width + (p - first),
                                    take * sizeof(float));
                p += step;
            }
        });
    }
    return enough;
}

// ---- recurrent layers

struct Recurrent {
    bool gru;
    Blob recurrent, projection;
    float* gates;
    const i64* sizes;
    i64 steps, batch, hidden, state;
    const float* bias;
    float *h, *c, *out;
    i64 out_stride;
    bool reverse;

    // the sequences [begin, end) of the batch through all steps
    bool run(i64 begin, i64 end, int threads) const {
        const i64 width = (gru ? 3 : 4) * hidden, n = end - begin;
        float* scratch = gathered.get(gru ? n * width : n * hidden);
        if (!scratch) return false;
        i64 offset = 0;
        if (reverse)
            for (i64 t = 0; t < steps; t++) offset += sizes[t];
        for (i64 i = 0; i < steps; i++) {
            const i64 t = reverse ? steps - 1 - i : i;
            if (reverse) offset -= sizes[t];
            const i64 live = (sizes[t] < end ? sizes[t] : end) - begin;
            if (live > 0 && !step(begin, live, offset + begin, scratch, threads)) return false;
            if (!reverse) offset += sizes[t];
        }
        return true;
    }

    bool step(i64 begin, i64 n, i64 row, float* scratch, int threads) const {
        const i64 width = (gru ? 3 : 4) * hidden;
        float *in = gates + row * width, *state_h = h + begin * state, *to = out + row * out_stride;
        if (gru) {
            if (!linear(recurrent, state_h, n, bias, scratch, false, threads)) return false;
            for (i64 b = 0; b < n; b++) kernels->gru(in + b * width, scratch + b * width, hidden, state_h + b * state);
        } else {
            if (!linear(recurrent, state_h, n, nullptr, in, true, threads)) return false;
            float* hidden_h = projection.head ? scratch : state_h;
            for (i64 b = 0; b < n; b++)
                kernels->lstm(in + b * width, hidden, c + (begin + b) * hidden, hidden_h + b * hidden);
            if (projection.head && !linear(projection, scratch, n, nullptr, state_h, false, threads)) return false;
        }
        for (i64 b = 0; b < n; b++) std::memcpy(to + b * out_stride, state_h + b * state, state * sizeof(float));
        return true;
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

int64_t secateur_pack(const float* weight, int64_t rows, int64_t columns, int64_t groups, void* blob) {
    return pack(weight, rows, columns, groups, kernels->jagged, blob);
}

int32_t secateur_linear(const void* blob, const float* x, int64_t n, const float* bias, float* y, int32_t accumulate,
                        int32_t threads) {
    if (!valid(blob) || n < 0) return -1;
    return linear({static_cast<const Header*>(blob)}, x, n, bias, y, accumulate, threads) ? 0 : -2;
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

int32_t secateur_recurrent(int32_t kind, const void* recurrent, const void* projection, float* gates,
                           const int64_t* sizes, int64_t steps, int64_t batch, const float* bias, float* h, float* c,
                           float* out, int64_t out_stride, int32_t reverse, int32_t threads) {
    if (!valid(recurrent) || (projection && !valid(projection)) || (kind == 0) != (c != nullptr)) return -1;
    const Blob r{static_cast<const Header*>(recurrent)}, p{static_cast<const Header*>(projection)};
    const i64 count = kind ? 3 : 4, hidden = r.head->rows / count, state = r.head->columns;
    if (r.head->rows % count || (projection ? p.head->columns != hidden || p.head->rows != state : hidden != state))
        return -1;
    const Recurrent layer{kind == 1, r,    p, gates, sizes, steps,      batch,       hidden,
                          state,     bias, h, c,     out,   out_stride, reverse != 0};
    std::atomic<bool> enough{true};
    // threads take sequences of their own, with nothing to wait for at each step, if enough of them remain together
    const i64 parts = batch / 8 < threads ? batch / 8 : threads;
    if (parts > 1)
        share(parts, threads, [&](i64 i) {
            if (!layer.run(batch * i / parts, batch * (i + 1) / parts, 1)) enough = false;
        });
    else
        enough = layer.run(0, batch, threads);
    return enough ? 0 : -2;
}
