// From a blob back to rows of columns and values, or to the dense matrix; nothing is taken on trust.
#include <cstring>

#include "generate.h"
#include "secateur.h"

namespace secateur {
namespace {

// The number at `from`, as a float32.
float value_at(const u8* from, u32 values) {
    float found;
    if (values == kFloat32) {
        std::memcpy(&found, from, sizeof found);
        return found;
    }
    u16 half;
    std::memcpy(&half, from, sizeof half);
    u32 bits = u32(half) << 16;
    if (values == kFloat16) {
        bits = u32(half & 0x7fff) << 13;
        std::memcpy(&found, &bits, sizeof found);
        found *= 5.192296858534828e+33f;  // 2^112, as the exponents differ by 112
        std::memcpy(&bits, &found, sizeof bits);
        bits = ((half & 0x7c00) == 0x7c00 ? u32(half & 0x7fff) << 13 | 0x7f800000 : bits) | u32(half & 0x8000) << 16;
    }
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

// An array in the blob, or NULL if it does not lie in it whole.
template <class T>
const T* array(Blob blob, u64 offset, u64 count) {
    const u64 bytes = blob.head->bytes;
    return offset % 64 || offset > bytes || count > (bytes - offset) / sizeof(T) ? nullptr : blob.at<T>(offset);
}

// Calls f(row, column, value) for each non-zero; false if the blob contradicts itself.
template <class F>
bool each(Blob blob, const F& f) {
    const Header& h = *blob.head;
    const u64 parts = u64(h.chunks) * h.blocks;
    const Chunk* chunk = array<Chunk>(blob, h.chunk_table, h.chunks);
    const u32* counts = array<u32>(blob, h.run_counts, parts);
    if (!chunk || !counts) return false;
    u64 runs = 0, rows = 0, entry = 0, run = 0, row = 0;
    for (u64 i = 0; i < parts; i++) runs += counts[i];
    const Run* all = array<Run>(blob, h.runs, runs);
    for (u64 i = 0; all && i < runs; i++) rows += all[i].count;
    const u16* order = array<u16>(blob, h.row_order, rows);
    const u16* index = array<u16>(blob, h.index, h.nonzeros);
    const u64 bytes = h.values == kFloat32 ? 4 : 2;
    const u8* value = array<u8>(blob, h.value, bytes * h.nonzeros);
    if (!all || !order || !index || !value) return false;
    for (u32 c = 0; c < h.chunks; c++) {
        const u64 first = u64(c) * h.chunk;
        if (chunk[c].entry != entry || chunk[c].row != row || chunk[c].run != run) return false;
        for (u32 b = 0; b < h.blocks; b++)
            for (u32 k = counts[u64(c) * h.blocks + b]; k > 0; k--, run++)
                for (u16 i = 0; i < all[run].count; i++, row++) {
                    const u64 r = first + order[row], length = all[run].length;
                    if (order[row] >= h.chunk || r >= h.rows || length > h.nonzeros - entry) return false;
                    for (const u64 end = entry + length; entry < end; entry++) {
                        const u64 j = u64(b) * h.block + index[entry];
                        if (index[entry] >= h.block || j >= h.columns) return false;
                        f(u32(r), u32(j), value_at(value + bytes * entry, h.values));
                    }
                }
    }
    return entry == h.nonzeros;
}

bool sound(const void* bytes, i64 size) {
    if (!bytes || size < i64(sizeof(Header))) return false;
    const Header& h = *static_cast<const Header*>(bytes);
    const u64 most = u64(0xffff) * kTile;
    if (h.magic != kMagic || h.version != kVersion || h.bytes != u64(size) || h.values > kBfloat16) return false;
    if (h.rows > most || h.columns > most || h.nonzeros > 0xffffffff || !h.block || !h.chunk) return false;
    return u64(h.block) * h.blocks >= h.columns && u64(h.chunk) * h.chunks >= h.rows && h.chunks <= h.rows;
}

}  // namespace

bool read(const void* bytes, i64 size, Rows& out) {
    if (!sound(bytes, size)) return false;
    const Blob blob{static_cast<const Header*>(bytes)};
    const Header& h = *blob.head;
    out.begin.assign(u64(h.rows) + 2, 0);
    if (!each(blob, [&](u32 r, u32, float) { out.begin[r + 2]++; })) return false;
    for (u32 r = 0; r < h.rows; r++) out.begin[r + 2] += out.begin[r + 1];
    out.column.resize(h.nonzeros), out.value.resize(h.nonzeros);
    each(blob, [&](u32 r, u32 j, float v) {
        const u32 at = out.begin[r + 1]++;
        out.column[at] = j, out.value[at] = v;
    });
    out.begin.pop_back();
    return true;
}

}  // namespace secateur

using namespace secateur;

int32_t secateur_unpack(const void* blob, int64_t bytes, int64_t rows, int64_t columns, int64_t groups, float* weight) {
    if (groups < 1 || rows % groups || columns % groups || !sound(blob, bytes)) return -1;
    const Header& head = *static_cast<const Header*>(blob);
    if (rows != head.rows || columns != head.columns) return -1;
    const i64 width = columns / groups;
    std::memset(weight, 0, std::size_t(rows * width) * sizeof(float));
    bool inside = true;  // of the blocks of the groups
    const bool whole = each({&head}, [&](i64 r, i64 column, float value) {
        const i64 j = column - r / (rows / groups) * width;
        if (j < 0 || j >= width)
            inside = false;
        else
            weight[r * width + j] = value;
    });
    return whole && inside ? 0 : -1;
}
