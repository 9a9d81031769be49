// Linear layers, one or several one after the other.
#include "linear.h"

#include "secateur.h"

namespace secateur {

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

void multiply(Blob blob, const float* panel, int width, const float* start, float* to) {
    for (u32 i = 0; i < blob.head->chunks; i++)
        kernels->panel(blob, panel, width, start, i, to + i64(i) * blob.head->chunk * width);
}

namespace {

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

}  // namespace
}  // namespace secateur

using namespace secateur;

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
