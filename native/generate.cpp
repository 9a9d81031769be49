// Code for one packed matrix. For each non-zero there is one instruction that multiplies an input vector by a weight,
// spread from memory, and adds it to the sum of its row. The sums of 28 rows stay in registers, an input vector is loaded
// once for all of them, and weights lie in the order in which they are met: no index is ever loaded.
#include "generate.h"

#include <algorithm>

#include "assembler.h"

namespace secateur {
namespace {

constexpr i64 kNear = 8192;      // bytes that a displacement of one byte reaches, in vectors
constexpr i64 kFew = 512;        // the same in floats
constexpr i64 kAheadBytes = 8192;   // so far ahead code is fetched where the whole does not stay in the cache
constexpr i64 kCached = 512 << 10;  // bytes of code and weights that do
constexpr i64 kReach = i64(1) << 30;  // displacements and code stay below

// ---- from the blob to rows of columns and values; nothing is taken on trust

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
    const float* value = array<float>(blob, h.value, h.nonzeros);
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
                        f(u32(r), u32(j), value[entry]);
                    }
                }
    }
    return entry == h.nonzeros;
}

// ---- code

class Writer {
public:
    Writer(const Rows& rows, const Header& head, const Layout& layout, Program& program)
        : rows_(rows), head_(head), layout_(layout), program_(program),
          fetch_(i64(head.nonzeros) * 15 > kCached), next_(rows.begin.begin(), rows.begin.end() - 1) {}

    bool write() {
        if (64 * i64(head_.rows) > kReach || layout_.tile > kReach) return false;
        for (i64 j = 0; j < head_.columns; j++)
            if (column(j) < 0 || column(j) > kReach) return false;
        const i64 blocks = (i64(head_.rows) + kSums - 1) / kSums, parts = std::max<i64>(1, head_.blocks);
        for (i64 b = 0; b < blocks; b++) {
            const i64 first = head_.rows * b / blocks, last = head_.rows * (b + 1) / blocks;
            for (i64 p = 0; p < parts; p++) {
                const i64 begin = p * head_.block, end = std::min<i64>(head_.columns, begin + head_.block);
                unit(first, last - first, begin, end);
                if (i64(code_.at()) > kReach) return false;
            }
        }
        program_.code = code_.take();
        program_.weights.resize(program_.weights.size() + kLanes);  // the last of a vector may be looked at
        return true;
    }

private:
    i64 column(i64 j) const { return layout_.columns[j]; }

    // Of rows [first, first + n) by columns [begin, end). kRdi x, kRsi weights, kRdx sums, kRcx tiles, kR8 bias.
    void unit(i64 first, i64 n, i64 begin, i64 end) {
        code_.align();
        program_.units.push_back({i64(code_.at()), i64(program_.weights.size()), first, n});
        start_ = program_.weights.size();
        code_.landing();
        const std::size_t top = code_.at();
        line_ = top / 64;
        weight_ = kFew, code_.lea(kR10, kRsi, weight_);
        const bool starts = begin == 0 && !program_.adds;
        if (starts) {
            code_.lea(kR11, kR8, 4 * first);
            for (int r = 0; r < n; r++) code_.broadcast(r, kR11, 4 * r);
        }
        code_.lea(kR11, kRdx, 64 * first);
        if (!starts)
            for (int r = 0; r < n; r++) code_.load(r, kR11, 64 * r);
        columns(first, n, begin, end);
        for (int r = 0; r < n; r++) code_.store(kR11, 64 * r, r);
        code_.add(kRdi, layout_.tile);
        code_.add(kRdx, 64 * i64(head_.rows));
        code_.decrement(kRcx);
        code_.jump_if_not_zero(top);
        code_.clear();
        code_.ret();
    }

    void columns(i64 first, i64 n, i64 begin, i64 end) {
        if (begin == end) return;
        sort(first, n, begin, end);
        input_ = column(begin) + kNear, code_.lea(kR9, kRdi, input_);
        for (i64 j = begin, k = 0, held = 0; j < end; j++) {
            const i64 last = starts_[j - begin + 1];
            if (k == last) continue;
            const int x = kSums + int(held++ % (32 - kSums));
            code_.load(x, kR9, near(column(j)));
            for (; k < last; k++) {
                code_.multiply_add(row_[k], x, kR10, weight());
                program_.weights.push_back(value_[k]);
                if (fetch_) fetch();
            }
        }
    }

    // The non-zeros of a unit, by column.
    void sort(i64 first, i64 n, i64 begin, i64 end) {
        starts_.assign(end - begin + 2, 0);
        i64 count = 0;
        for (i64 r = first; r < first + n; r++)
            for (u32 k = next_[r]; k < rows_.begin[r + 1] && rows_.column[k] < end; k++, count++)
                starts_[rows_.column[k] - begin + 2]++;
        for (i64 j = 2; j < end - begin + 2; j++) starts_[j] += starts_[j - 1];
        row_.resize(count), value_.resize(count);
        for (i64 r = first; r < first + n; r++)
            for (u32& k = next_[r]; k < rows_.begin[r + 1] && rows_.column[k] < end; k++) {
                const u32 to = starts_[rows_.column[k] - begin + 1]++;
                row_[to] = u8(r - first), value_[to] = rows_.value[k];
            }
    }

    // Displacements from pointers that are moved along, so that they fit into a byte where they can.
    i64 near(i64 at) {
        if (at % 64 == 0 && (at - input_ < -kNear || at - input_ >= kNear))
            input_ = at + kNear, code_.lea(kR9, kRdi, input_);
        return at - input_;
    }
    i64 weight() {
        const i64 at = 4 * i64(program_.weights.size() - start_);
        if (at - weight_ >= kFew) weight_ += 2 * kFew, code_.add(kR10, 2 * kFew);
        return at - weight_;
    }
    void fetch() {
        if (code_.at() / 64 != line_) line_ = code_.at() / 64, code_.prefetch_code(kAheadBytes);
        const i64 n = i64(program_.weights.size() - start_);
        if (n % kLanes == 0) code_.prefetch(kR10, 4 * n - weight_ + kAheadBytes * 2 / 5);  // 4 bytes for 10 of code
    }

    const Rows& rows_;
    const Header& head_;
    const Layout& layout_;
    Program& program_;
    Assembler code_;
    const bool fetch_;
    std::vector<u32> next_;  // of each row, the first non-zero that has no code yet
    std::vector<u32> starts_;
    std::vector<u8> row_;
    std::vector<float> value_;
    std::size_t start_ = 0, line_ = 0;  // of the unit's weights; the last line that was fetched for
    i64 input_ = 0, weight_ = 0;        // where kR9 and kR10 point, from kRdi and kRsi
};

}  // namespace

bool read(const void* bytes, i64 size, Rows& out) {
    const Blob blob{static_cast<const Header*>(bytes)};
    if (!bytes || size < i64(sizeof(Header))) return false;
    const Header& h = *blob.head;
    const u64 most = u64(0xffff) * kTile;
    if (h.magic != kMagic || h.version != kVersion || h.bytes != u64(size) || h.half) return false;
    if (h.rows > most || h.columns > most || h.nonzeros > 0xffffffff || !h.block || !h.chunk) return false;
    if (u64(h.block) * h.blocks < h.columns || u64(h.chunk) * h.chunks < h.rows || h.chunks > h.rows) return false;
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

bool generate(const Rows& rows, const Header& head, const Layout& layout, Program& program) {
    return Writer(rows, head, layout, program).write();
}

}  // namespace secateur
