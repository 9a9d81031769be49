// Code for one packed matrix. For each non-zero there is one instruction that multiplies an input vector by a weight,
// spread from memory, and adds it to the sum of its row. The sums of 28 rows stay in registers, an input vector is loaded
// once for all of them, and weights lie in the order in which they are met: no index is ever loaded.
//
// Shifted sums are for convolutions. What the three taps of a row of a 3 x 3 kernel meet are the same inputs, one further
// each. Rather than load them three times, twice across two cache lines, there is a sum for each tap, and in the end
// these are shifted and added: 16 inputs give 14 outputs.
#include "generate.h"

#include <algorithm>

#include "assembler.h"

namespace secateur {
namespace {

constexpr i64 kNear = 8192;         // bytes that a displacement of one byte reaches, as it counts vectors
constexpr i64 kFew = 512;           // the same where it counts floats
constexpr i64 kAheadBytes = 8192;   // so far ahead code is fetched where the whole does not stay in the cache
constexpr i64 kCached = 512 << 10;  // bytes of code and weights that do
constexpr i64 kReach = i64(1) << 30;  // displacements and code stay below

// ---- code

class Writer {
public:
    Writer(const Rows& rows, const Header& head, const Layout& layout, Program& program)
        : rows_(rows), head_(head), layout_(layout), program_(program), taps_(layout.taps()),
          fetch_(i64(head.nonzeros) * 15 > kCached), next_(rows.begin.begin(), rows.begin.end() - 1) {}

    bool write() {
        if (64 * i64(head_.rows) > kReach || layout_.tile > kReach) return false;
        for (i64 j = 0; j < head_.columns; j++)
            if (column(j) < 0 || column(j) > kReach) return false;
        const i64 most = layout_.rows(), blocks = (i64(head_.rows) + most - 1) / most;
        const i64 width = i64(head_.block) * taps_;  // whole blocks, as the rows are in their order
        const i64 parts = std::max<i64>(1, (head_.columns + width - 1) / width);
        for (i64 b = 0; b < blocks; b++) {
            const i64 first = head_.rows * b / blocks, last = head_.rows * (b + 1) / blocks;
            for (i64 p = 0; p < parts; p++) {
                const i64 begin = p * width, end = std::min<i64>(head_.columns, begin + width);
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
            for (int r = 0; r < n; r++) code_.broadcast(r * taps_, kR11, 4 * r);
        }
        code_.lea(kR11, kRdx, 64 * first);
        if (!starts)
            for (int r = 0; r < n; r++) code_.load(r * taps_, kR11, 64 * r);
        for (int s = 0; s < n * taps_; s++)
            if (s % taps_) code_.zero(s);
        columns(first, n, begin, end);
        for (int s = 0; s < n * taps_; s++)
            if (s % taps_) code_.rotate(s, s % taps_), code_.accumulate(s - s % taps_, s);
        for (int r = 0; r < n; r++) code_.store(kR11, 64 * r, r * taps_);
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
        const int sums = layout_.rows() * taps_;
        int x = sums;
        for (i64 j = begin, k = 0, held = 0, place = -1; j < end; j++) {
            const i64 last = starts_[j - begin + 1];
            if (k == last) continue;
            if (column(j) != place) {
                place = column(j), x = sums + int(held++ % (32 - sums));
                code_.load(x, kR9, near(place));
            }
            for (; k < last; k++) {
                code_.multiply_add(row_[k] * taps_ + int(j % taps_), x, kR10, weight());
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
    const int taps_;
    const bool fetch_;
    std::vector<u32> next_;  // of each row, the first non-zero that has no code yet
    std::vector<u32> starts_;
    std::vector<u8> row_;
    std::vector<float> value_;
    std::size_t start_ = 0, line_ = 0;  // of the unit's weights; the last line that was fetched for
    i64 input_ = 0, weight_ = 0;        // where kR9 and kR10 point, from kRdi and kRsi
};

}  // namespace

bool generate(const Rows& rows, const Header& head, const Layout& layout, Program& program) {
    return Writer(rows, head, layout, program).write();
}

}  // namespace secateur
