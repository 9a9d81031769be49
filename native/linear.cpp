// Linear layers, one or several one after the other.
#include "linear.h"

#include <utility>

#include "generated.h"
#include "secateur.h"

namespace secateur {

namespace {

constexpr int kProducts = 16;  // the most that one call computes of one input

// What is asked of several products of one input that are computed together.
struct Needs {
    i64 columns, most_rows = 0, nonzeros = 0, parts = 0;
    explicit Needs(const Product* all, int count) : columns(all->blob.head->columns) {
        for (const Product* p = all; p < all + count; p++) {
            const Header& head = *p->blob.head;
            most_rows = head.rows > most_rows ? head.rows : most_rows;
            parts = head.chunks > parts ? head.chunks : parts;
            nonzeros += i64(head.nonzeros);
        }
    }
};

bool linear(const Product* all, int count, const float* x, i64 n, bool accumulate, int threads) {
    const Kernels& k = *kernels;
    const Needs needs(all, count);
    const i64 columns = needs.columns;
    if (n == 0 || needs.most_rows == 0) return true;
    const bool jagged = k.jagged && all->blob.head->groups;
    if (needs.nonzeros * n < kWorthSharing) threads = 1;
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
    auto multiply = [&](const Product& p, const Tile& t, const float* in, i64 part, i64 parts) {
        const Header& head = *p.blob.head;
        const i64 rows = head.rows;
        float* to = p.y + t.first * rows;
        if (t.width == 0) {
            k.small(p.blob, in, t.n, p.bias, accumulate, to, u32(head.groups * part / parts),
                    u32(head.groups * (part + 1) / parts));
            return true;
        }
        float* out = sums.get(std::size_t(head.chunk) * kWidth);
        if (!out) return false;
        for (u32 c = u32(head.chunks * part / parts); c < u32(head.chunks * (part + 1) / parts); c++) {
            const i64 first = i64(c) * head.chunk, left = rows - first, size = left < head.chunk ? left : head.chunk;
            const float* start = p.bias ? p.bias : zeros.get(rows);
            if (!start) return false;
            if (accumulate) {
                k.panel_pack(to + first, rows, t.n, t.width, size, out);
                start = nullptr;
            }
            k.panel(p.blob, in, t.width, start, c, out);
            k.panel_unpack(out, t.n, t.width, size, to + first, rows);
        }
        return true;
    };
    auto compute = [&](i64 i, const float* in, i64 part, i64 parts) {
        const Tile t(i, n, jagged);
        for (const Product* p = all; p < all + count; p++)
            if (!multiply(*p, t, in, part, parts)) return false;
        return true;
    };
    const i64 tiles = Tile::count(n, jagged);
    return by_tiles(tiles, std::size_t(columns + kTile) * kWidth, needs.parts, threads, arrange, compute);
}

bool product_by_code(const Product& p, const float* panels, const Groups& groups, i64 i, i64 part, i64 parts) {
    const Generated& code = *p.code;
    const i64 rows = code.rows;
    const float* start = p.bias ? p.bias : zeros.get(rows);
    float* out = sums.get(groups.together * rows * kLanes);
    if (!start || !out) return false;
    const i64 end = code.blocks * (part + 1) / parts;
    i64 block = code.blocks * part / parts, turned = code.row(block);
    while (block < end) {
        const i64 next = block + kStrip < end ? block + kStrip : end;
        code.run(block, next, panels, groups.of(i), start, out);
        block = next;
        const i64 ready = code.row(block) - turned, turn = block == end ? ready : ready / kLanes * kLanes;
        groups.each(i, [&](i64 t, i64 at, int n) {
            kernels->panel_unpack(out + (t * rows + turned) * kLanes, n, kLanes, turn, p.y + at * rows + turned, rows);
        });
        turned += turn;
    }
    return true;
}

bool by_code(const Product* all, int count, const float* x, const Groups& groups, int threads) {
    const i64 columns = all->code->columns;
    i64 blocks = 0;
    for (int i = 0; i < count; i++) blocks = all[i].code->blocks > blocks ? all[i].code->blocks : blocks;
    auto arrange = [&](i64 i, float* panels) -> const float* {
        groups.each(i, [&](i64 t, i64 at, int n) {
            kernels->panel_pack(x + at * columns, columns, n, kLanes, columns, panels + t * columns * kLanes);
        });
        return panels;
    };
    auto compute = [&](i64 i, const float* panels, i64 part, i64 parts) {
        for (const Product* p = all; p < all + count; p++)
            if (!product_by_code(*p, panels, groups, i, part, parts)) return false;
        return true;
    };
    return by_tiles(groups.count(), groups.together * columns * kLanes, blocks, threads, arrange, compute);
}

// Whether products can have their input arranged once: all by code or none, and all in the same layouts.
bool alike(const Product* all, int count) {
    for (int i = 1; i < count; i++)
        if (!all[i].code != !all->code || !all[i].blob.head->groups != !all->blob.head->groups) return false;
    return true;
}

}  // namespace

bool linear(Blob blob, const float* x, i64 n, const float* bias, float* y, bool accumulate, int threads) {
    const Product one{blob, nullptr, bias, y};
    return linear(&one, 1, x, n, accumulate, threads);
}

bool linear(Blob blob, const Generated* code, const float* x, i64 n, const float* bias, float* y, int threads) {
    Product one{blob, code, bias, y};
    return products(&one, 1, x, n, threads);
}

bool products(Product* all, int count, const float* x, i64 n, int threads) {
    if (count > 1 && !alike(all, count)) {
        for (int i = 0; i < count; i++)
            if (!products(all + i, 1, x, n, threads)) return false;
        return true;
    }
    if (!all->code) return linear(all, count, x, n, false, threads);
    const Needs needs(all, count);
    if (n == 0 || needs.most_rows == 0) return true;
    if (needs.nonzeros * n < kWorthSharing || threads < 1) threads = 1;
    const Groups groups(needs.most_rows + needs.columns, n, threads);
    if (groups.tiles && !by_code(all, count, x, groups, threads)) return false;
    const i64 rest = n - groups.inputs;
    for (int i = 0; i < count; i++) all[i].y += groups.inputs * all[i].code->rows;
    return rest == 0 || linear(all, count, x + groups.inputs * needs.columns, rest, false, threads);
}

bool fits(const Generated* code, Blob blob, bool adds) {
    return !code || (code->runs && !code->shape.channels && code->program.adds == adds &&
                     i64(blob.head->rows) == code->rows && i64(blob.head->columns) == code->columns);
}

void multiply(Blob blob, const Generated* code, const float* panel, int width, const float* start, float* to) {
    if (code && width == kLanes) return code->run(0, code->blocks, panel, 1, start, to);
    for (u32 i = 0; i < blob.head->chunks; i++)
        kernels->panel(blob, panel, width, start, i, to + i64(i) * blob.head->chunk * width);
}

namespace {

// ---- layers one after the other

constexpr i64 kWorthActivating = 16384;  // values for which a thread is woken

void activate(Activation kind, float* x, i64 count, int threads) {
    const i64 parts = kind == Activation::kNone ? 0 : (count + kWorthActivating - 1) / kWorthActivating;
    share(parts, threads, [&](i64 i) {
        const i64 first = i * kWorthActivating, left = count - first;
        kernels->activate(kind, x + first, left < kWorthActivating ? left : kWorthActivating);
    });
}

// In the number of an activation: the next layer has the same input, and is multiplied before its own activation.
constexpr int32_t kGate = 16;

void gate(const float* __restrict held, float* __restrict x, i64 count) {
    for (i64 i = 0; i < count; i++) x[i] *= held[i];
}

struct Chain {
    int layers;
    const void* const* blobs;
    const void* const* codes;
    const float* const* biases;
    const int32_t* activations;

    Blob blob(int i) const { return {static_cast<const Header*>(blobs[i])}; }
    const Generated* code(int i) const { return codes ? static_cast<const Generated*>(codes[i]) : nullptr; }
    bool gates(int i) const { return i >= 0 && (activations[i] & kGate); }
    Activation after(int i) const { return static_cast<Activation>(activations[i] & ~kGate); }
    bool follows(int i) const {  // whether what layer i - 1 leaves is for it
        const Header &head = *blob(i).head, &before = *blob(i - 1).head;
        return gates(i - 1) ? head.columns == before.columns && head.rows == before.rows : head.columns == before.rows;
    }
    bool sound() const {
        for (int i = 0; i < layers; i++)
            if (!valid(blobs[i]) || !fits(code(i), blob(i), false) || (i && !follows(i)) || activations[i] < 0 ||
                after(i) >= Activation::kEnd || (gates(i) && (gates(i - 1) || i + 1 == layers)))
                return false;
        return true;
    }
    bool generated() const {
        for (int i = 0; i < layers; i++)
            if (code(i)) return true;
        return false;
    }
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
        float* between = gathered.get(3 * most);
        if (!between) return false;
        float *to = between, *other = to + most, *held = other + most;
        for (int i = 0; i < layers; i++) {
            const i64 count = n * blob(i).head->rows;
            float* out = i + 1 == layers ? y : to;
            if (!linear(blob(i), code(i), x, n, biases[i], out, threads)) return false;
            if (gates(i - 1)) gate(held, out, count);
            activate(after(i), out, count, threads);
            if (!gates(i)) x = out;
            std::swap(to, gates(i) ? held : other);
        }
        return true;
    }

    // The panels of some tiles through all layers, activations [tile][features][width]. `each` calls its argument with
    // each tile's number, first input and how many it has.
    template <class Each>
    bool by_panels(const float* x, i64 tiles, int width, const Each& each, float* y) const {
        const i64 most = widest() * width * tiles;
        float* between = gathered.get(3 * most);
        const float* none = zeros.get(widest());
        if (!between || !none) return false;
        float *in = between, *to = in + most, *held = to + most;
        each([&](i64 t, i64 first, int n) {
            kernels->panel_pack(x + first * columns(), columns(), n, width, columns(), in + t * columns() * width);
        });
        for (int i = 0; i < layers; i++) {
            const Header& head = *blob(i).head;
            const float* start = biases[i] ? biases[i] : none;
            if (code(i) && width == kLanes)  // all tiles at once
                code(i)->run(0, code(i)->blocks, in, tiles, start, to);
            else
                for (i64 t = 0; t < tiles; t++)
                    multiply(blob(i), nullptr, in + t * head.columns * width, width, start, to + t * head.rows * width);
            if (gates(i - 1)) gate(held, to, head.rows * width * tiles);
            kernels->activate(after(i), to, head.rows * width * tiles);
            std::swap(to, gates(i) ? held : in);
        }
        each([&](i64 t, i64 first, int n) {
            kernels->panel_unpack(in + t * rows() * width, n, width, rows(), y + first * rows(), rows());
        });
        return true;
    }

    bool by_code(const float* x, i64 n, float* y, int threads) const {
        const Groups groups(widest() * 2, n, threads);
        std::atomic<bool> enough{true};
        share(groups.count(), threads, [&](i64 i) {
            auto each = [&](const auto& f) { groups.each(i, f); };
            if (!by_panels(x, groups.of(i), kLanes, each, y)) enough = false;
        });
        const i64 rest = n - groups.inputs;
        x += groups.inputs * columns(), y += groups.inputs * rows();
        return enough && (rest == 0 || by_tiles(x, rest, y, threads));
    }

    bool by_tiles(const float* x, i64 n, float* y, int threads) const {
        const bool jagged = kernels->jagged && blob(0).head->groups;
        const i64 tiles = Tile::count(n, jagged);
        if (tiles < threads) return by_rows(x, n, y, threads);
        std::atomic<bool> enough{true};
        share(tiles, threads, [&](i64 i) {
            const Tile t(i, n, jagged);
            auto each = [&](const auto& f) { f(0, t.first, t.n); };
            if (!(t.width >= 8 ? by_panels(x, 1, t.width, each, y)
                               : by_rows(x + t.first * columns(), t.n, y + t.first * rows(), 1)))
                enough = false;
        });
        return enough;
    }

    bool run(const float* x, i64 n, float* y, int threads) const {
        if (!generated()) return by_tiles(x, n, y, threads);
        return n < kLanes * threads ? by_rows(x, n, y, threads) : by_code(x, n, y, threads);
    }
};

}  // namespace
}  // namespace secateur

using namespace secateur;

int32_t secateur_linear(const void* blob, const void* code, const float* x, int64_t n, const float* bias, float* y,
                        int32_t threads) {
    if (!valid(blob) || n < 0) return -1;
    const Blob packed{static_cast<const Header*>(blob)};
    const Generated* made = static_cast<const Generated*>(code);
    if (!fits(made, packed, false)) return -1;
    return linear(packed, made, x, n, bias, y, threads) ? 0 : -2;
}

int32_t secateur_products(int32_t count, const void* const* blobs, const void* const* codes, const float* const* biases,
                          const float* x, int64_t n, float* const* ys, int32_t threads) {
    if (count < 1 || count > kProducts || n < 0) return -1;
    Product all[kProducts];
    for (int i = 0; i < count; i++) {
        const Generated* code = codes ? static_cast<const Generated*>(codes[i]) : nullptr;
        all[i] = {{static_cast<const Header*>(blobs[i])}, code, biases[i], ys[i]};
        if (!valid(blobs[i]) || !fits(code, all[i].blob, false)) return -1;
        if (all[i].blob.head->columns != all->blob.head->columns) return -1;
    }
    return products(all, count, x, n, threads) ? 0 : -2;
}

int32_t secateur_chain(int32_t layers, const void* const* blobs, const void* const* codes, const float* const* biases,
                       const int32_t* activations, const float* x, int64_t n, float* y, int32_t threads) {
    if (layers < 1 || n < 0) return -1;
    const Chain chain{layers, blobs, codes, biases, activations};
    if (!chain.sound()) return -1;
    return n == 0 || chain.run(x, n, y, threads < 1 ? 1 : threads) ? 0 : -2;
}
