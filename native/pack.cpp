// Packing: from a dense matrix to a blob.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "threads.h"
#include "secateur.h"

namespace secateur {
namespace {

// As whole numbers are compared, which takes half of the time.
inline int nonzero(float x) {
    u32 bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits << 1) != 0;
}

constexpr int kAtOnce = 256;  // weights that are looked at before the non-zeros among them are used

struct Dense {
    const float* weight;
    i64 rows, columns, width, per_group;  // width: stored columns of a row

    i64 first(i64 row) const { return row / per_group * width; }
    // the non-zero columns of row `r` in [begin, end), as offsets from begin, and their values
    template <class F>
    void each(i64 r, i64 begin, i64 end, F f) const {
        const i64 shift = first(r);
        const i64 from = std::max<i64>(begin - shift, 0), to = std::min(end - shift, width);
        u16 found[kAtOnce];
        for (i64 j = from; j < to; j += kAtOnce) {
            const float* w = weight + r * width + j;
            const int n = int(std::min<i64>(kAtOnce, to - j));
            int count = 0;
            for (int i = 0; i < n; i++) found[count] = u16(i), count += nonzero(w[i]);  // as no branch would be foreseen
            for (int k = 0; k < count; k++) f(j + found[k] + shift - begin, w[found[k]]);
        }
    }
};

struct Arrays {
    std::vector<Chunk> chunks;
    std::vector<u32> run_counts;  // runs of each (chunk, block)
    std::vector<Run> runs;
    std::vector<u16> row_order;
    std::vector<u16> index;
    std::vector<float> value;
    std::vector<JaggedGroup> groups;
    std::vector<JaggedRun> jagged_runs;
    std::vector<u8> meta, jagged_index;
    std::vector<float> jagged_value;
    std::vector<u64> masked_table;
    std::vector<u8> masks;
    std::vector<float> masked_value;
};

void panel(const Dense& w, Header& head, Arrays& out) {
    const i64 nonzeros = head.nonzeros;
    out.index.reserve(nonzeros);
    out.value.reserve(nonzeros);
    std::vector<u16> index;
    std::vector<float> value;
    std::vector<u32> begin, order;
    for (i64 r0 = 0; r0 < w.rows; r0 += head.chunk) {
        const i64 r1 = std::min<i64>(w.rows, r0 + head.chunk), n = r1 - r0;
        out.chunks.push_back({out.value.size(), u32(out.row_order.size()), u32(out.runs.size())});
        for (u32 b = 0; b < head.blocks; b++) {
            index.clear(), value.clear(), begin.assign(1, 0);
            for (i64 r = r0; r < r1; r++) {
                w.each(r, i64(b) * head.block, std::min<i64>(w.columns, i64(b + 1) * head.block), [&](i64 j, float v) {
                    index.push_back(u16(j)), value.push_back(v);
                });
                begin.push_back(u32(value.size()));
            }
            order.resize(n);
            std::iota(order.begin(), order.end(), 0);
            auto length = [&](u32 r) { return begin[r + 1] - begin[r]; };
            std::stable_sort(order.begin(), order.end(), [&](u32 p, u32 q) { return length(p) < length(q); });
            const std::size_t first = out.runs.size();
            for (u32 r : order) {
                if (length(r) == 0) continue;
                if (out.runs.size() == first || out.runs.back().length != length(r))
                    out.runs.push_back({u16(length(r)), 0});
                out.runs.back().count++;
                out.row_order.push_back(u16(r));
                out.index.insert(out.index.end(), index.begin() + begin[r], index.begin() + begin[r + 1]);
                out.value.insert(out.value.end(), value.begin() + begin[r], value.begin() + begin[r + 1]);
            }
            out.run_counts.push_back(u32(out.runs.size() - first));
        }
    }
}

struct Tile {
    u16 column;
    u8 depth[2];
    u32 length[kGroup];
    u8 index[kGroup][kTile];
    float value[kGroup][kTile];
};

void jagged(const Dense& w, Arrays& out) {
    const i64 tiles = (w.columns + kTile - 1) / kTile;
    std::vector<Tile> all(tiles);
    std::vector<Tile*> order;
    for (i64 r0 = 0; r0 < w.rows; r0 += kGroup) {
        order.clear();
        for (i64 t = 0; t < tiles; t++) {
            Tile& tile = all[t];
            tile.column = u16(t);
            std::memset(tile.length, 0, sizeof tile.length);
        }
        for (i64 r = r0; r < std::min<i64>(w.rows, r0 + kGroup); r++)
            w.each(r, 0, w.columns, [&](i64 j, float v) {
                Tile& tile = all[j / kTile];
                const u32 at = tile.length[r - r0]++;
                tile.index[r - r0][at] = u8(j % kTile);
                tile.value[r - r0][at] = v;
            });
        for (Tile& tile : all) {
            u32 sorted[kGroup];
            std::copy_n(tile.length, kGroup, sorted);
            std::sort(sorted, sorted + kGroup, std::greater<u32>());
            tile.depth[0] = u8(sorted[0]), tile.depth[1] = u8(sorted[kGroup / 2]);
            if (sorted[0]) order.push_back(&tile);
        }
        std::stable_sort(order.begin(), order.end(), [](const Tile* p, const Tile* q) {
            return p->depth[1] != q->depth[1] ? p->depth[1] < q->depth[1] : p->depth[0] < q->depth[0];
        });
        const u32 first = u32(out.jagged_runs.size());
        out.groups.push_back({out.jagged_value.size(), out.meta.size(), first, 0});
        for (const Tile* tile : order) {
            if (out.jagged_runs.size() == first || out.jagged_runs.back().count == 0xffff ||
                std::memcmp(out.jagged_runs.back().depth, tile->depth, 2) != 0)
                out.jagged_runs.push_back({{tile->depth[0], tile->depth[1]}, 0});
            out.jagged_runs.back().count++;
            u8 row[kGroup], lane[kGroup];  // row in each lane, lane of each row
            std::iota(row, row + kGroup, u8(0));
            std::stable_sort(row, row + kGroup, [&](u8 p, u8 q) { return tile->length[p] > tile->length[q]; });
            for (int i = 0; i < kGroup; i++) lane[row[i]] = u8(i);
            out.meta.push_back(u8(tile->column));
            out.meta.push_back(u8(tile->column >> 8));
            out.meta.insert(out.meta.end(), lane, lane + kGroup);
            for (int half = 0; half < 2; half++)
                for (u32 d = 0; d < tile->depth[half]; d++) {
                    u8 n = 0;
                    for (int i = 0; i < kGroup / 2; i++) {
                        const int r = row[half * kGroup / 2 + i];
                        if (d >= tile->length[r]) break;
                        out.jagged_index.push_back(tile->index[r][d]);
                        out.jagged_value.push_back(tile->value[r][d]);
                        n++;
                    }
                    out.meta.push_back(n);
                }
        }
        out.groups.back().runs = u32(out.jagged_runs.size()) - first;
    }
}

i64 rounded_up(i64 n, i64 unit) { return (n + unit - 1) / unit * unit; }

void masked(const Dense& w, const Header& head, Arrays& out) {
    out.masks.reserve(head.chunks * rounded_up(head.chunk, kMaskRows) * rounded_up(w.columns, kMask) / kMask);
    out.masked_value.resize(head.nonzeros + 1);  // as one behind the last is written to
    float* value = out.masked_value.data();
    for (i64 r0 = 0; r0 < w.rows; r0 += head.chunk) {
        const i64 end = std::min<i64>(w.rows, r0 + head.chunk);
        out.masked_table.push_back(u64(value - out.masked_value.data()));
        for (i64 first = r0; first < r0 + head.chunk; first += kMaskRows)
            for (i64 j = 0; j < w.columns; j += kMask)
                for (i64 r = first; r < first + kMaskRows; r++) {
                    u8 mask = 0;
                    const i64 seen = r < end ? std::min<i64>(kMask, w.columns - j) : 0;
                    for (i64 k = 0; k < seen; k++) {  // without a branch, as none would be foreseen
                        *value = w.weight[r * w.columns + j + k];
                        mask |= u8(nonzero(*value) << k);
                        value += nonzero(*value);
                    }
                    out.masks.push_back(mask);
                }
    }
}

// The most columns of a block. Each row of a block costs by itself, above all with a single input, so it is to have some
// non-zeros. Values of 16 bits get longer blocks: they are used where tokens are decoded one by one.
i64 longest_block(const Dense& w, const Header& head, Values values) {
    const i64 wanted = values == kFloat32 ? 40 : 100, nonzeros = std::max<i64>(1, i64(head.nonzeros));
    return std::min<i64>(kLongest, std::max<i64>(kBlock, wanted * w.rows * w.width / nonzeros));
}

// Whether the masked layout is faster: by the share of non-zeros among all that masks stand for, as was measured.
bool dense_enough(const Header& head, Values values) {
    const i64 rows = i64(head.chunks) * rounded_up(head.chunk, kMaskRows), columns = rounded_up(head.columns, kMask);
    const double least = values == kFloat32 ? 0.4 : values == kFloat16 ? 0.28 : 0.22;
    return double(head.nonzeros) > least * double(rows * columns);
}

// Rounded to nearest even; what is too large becomes infinite.
u16 to_half(float x) {
    u32 bits;
    std::memcpy(&bits, &x, sizeof bits);
    const u32 sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return u16(sign | 0x7e00);   // NaN
    if (size >= 0x477ff000) return u16(sign | 0x7c00);  // from 65520 on
    if (size < 0x38800000) {                            // below 2^-14: a multiple of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &size, sizeof magnitude);
        const float rounded = magnitude + 0.5f;  // whose last place is 2^-24
        std::memcpy(&bits, &rounded, sizeof bits);
        return u16(sign | (bits - 0x3f000000));
    }
    return u16(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

// Rounded in the same way.
u16 to_bfloat(float x) {
    u32 bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return u16(bits >> 16 | 0x40);  // NaN
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The bytes of values as they are stored; `from` is no longer needed, and its memory is given back.
std::vector<u8> stored(std::vector<float>& from, Values values) {
    const std::size_t width = values == kFloat32 ? sizeof(float) : sizeof(u16);
    std::vector<u8> found(from.size() * width);
    if (values != kFloat32)
        std::transform(from.begin(), from.end(), reinterpret_cast<u16*>(found.data()),
                       values == kFloat16 ? to_half : to_bfloat);
    else if (!from.empty())
        std::memcpy(found.data(), from.data(), found.size());
    std::vector<float>().swap(from);
    return found;
}

// The next place for an array: at a multiple of 64, with 64 bytes behind it that a vector load may touch.
template <class T>
u64 place(u64& end, const std::vector<T>& array) {
    const u64 at = end;
    end = (at + array.size() * sizeof(T) + 64 + 63) / 64 * 64;
    return at;
}

template <class T>
void copy(void* blob, u64 at, const std::vector<T>& array) {
    if (!array.empty()) std::memcpy(static_cast<char*>(blob) + at, array.data(), array.size() * sizeof(T));
}

}  // namespace

i64 pack(const float* weight, i64 rows, i64 columns, i64 groups, const Kernels& made_for, Values values, void* blob,
         i64 room) {
    const i64 limit = i64(0xffff) * kTile;
    if (rows < 0 || columns < 0 || groups < 1 || rows % groups || columns % groups || rows > limit || columns > limit)
        return -1;
    const Dense w{weight, rows, columns, columns / groups, std::max<i64>(1, rows / groups)};
    Header head{};
    head.magic = kMagic, head.version = kVersion;
    head.rows = u32(rows), head.columns = u32(columns);
    for (i64 r = 0; r < rows; r++) {
        int found = 0;  // as wide as a float, for the compiler's vectors
        for (i64 i = 0; i < w.width; i++) found += nonzero(weight[r * w.width + i]);
        head.nonzeros += found;
    }
    const i64 block = made_for.jagged ? kBlock : longest_block(w, head, values);
    head.blocks = u32(std::max<i64>(1, (columns + block - 1) / block));
    head.block = u32(std::max<i64>(1, (columns + head.blocks - 1) / head.blocks));
    head.chunks = u32((rows + kChunk - 1) / kChunk);
    head.chunk = u32(head.chunks ? (rows + head.chunks - 1) / head.chunks : 1);
    Arrays a;
    panel(w, head, a);
    head.chunks = u32(a.chunks.size());
    if (made_for.jagged) jagged(w, a);
    head.groups = u32(a.groups.size());
    head.values = values;
    const bool with_masked = made_for.masked && groups == 1 && dense_enough(head, values);
    if (with_masked) masked(w, head, a);
    const std::vector<u8> value = stored(a.value, values), jagged_value = stored(a.jagged_value, values);
    const std::vector<u8> masked_value = stored(a.masked_value, values);
    u64 end = (sizeof(Header) + 63) / 64 * 64;
    head.chunk_table = place(end, a.chunks);
    head.run_counts = place(end, a.run_counts);
    head.runs = place(end, a.runs);
    head.row_order = place(end, a.row_order);
    head.index = place(end, a.index);
    head.value = place(end, value);
    head.group_table = place(end, a.groups);
    head.jagged_runs = place(end, a.jagged_runs);
    head.meta = place(end, a.meta);
    head.jagged_index = place(end, a.jagged_index);
    head.jagged_value = place(end, jagged_value);
    if (with_masked) {
        head.masked_table = place(end, a.masked_table);
        head.masks = place(end, a.masks);
        head.masked_value = place(end, masked_value);
    }
    head.bytes = end;
    if (i64(end) <= room) {
        std::memset(blob, 0, end);
        std::memcpy(blob, &head, sizeof head);
        copy(blob, head.chunk_table, a.chunks);
        copy(blob, head.run_counts, a.run_counts);
        copy(blob, head.runs, a.runs);
        copy(blob, head.row_order, a.row_order);
        copy(blob, head.index, a.index);
        copy(blob, head.group_table, a.groups);
        copy(blob, head.jagged_runs, a.jagged_runs);
        copy(blob, head.meta, a.meta);
        copy(blob, head.jagged_index, a.jagged_index);
        copy(blob, head.masked_table, a.masked_table);
        copy(blob, head.masks, a.masks);
        copy(blob, head.value, value);
        copy(blob, head.jagged_value, jagged_value);
        copy(blob, head.masked_value, masked_value);
    }
    return i64(end);
}

}  // namespace secateur

using namespace secateur;

int64_t secateur_pack(const float* weight, int64_t rows, int64_t columns, int64_t groups, int32_t values,
                      void* blob, int64_t room) {
    if (values < 0 || values > int32_t(kBfloat16)) return -1;
    return pack(weight, rows, columns, groups, *kernels, Values(values), blob, room);
}
