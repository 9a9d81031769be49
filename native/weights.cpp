// Whether dense weights are still those that were packed. Everything is looked at in turn, a piece a call; a few
// non-zeros, spread over the tensor, at every call.
#include <atomic>
#include <cstring>

#include "blob.h"
#include "secateur.h"

namespace secateur {
namespace {

constexpr i64 kAnchors = 8;       // non-zeros that every call looks at
constexpr i64 kPieces = 2048;    // the most calls until everything was looked at
constexpr i64 kSmallest = 256;   // floats of a piece, at least
constexpr i64 kAhead = 8;        // cache lines of a piece that are asked for beforehand
constexpr u64 kOdd = 0x9E3779B97F4A7C15;

struct Watch {
    i64 count, piece, pieces, anchors;
    std::atomic<i64> turn;  // the piece that is next
    i64 at[kAnchors];
    u32 bits[kAnchors];
    u64 sums[1];  // of each piece

    static i64 size(i64 pieces) { return i64(sizeof(Watch) + pieces * sizeof(u64)); }
    i64 length(i64 i) const { return count - i * piece < piece ? count - i * piece : piece; }
    u64 sum(const float* weight, i64 i) const { return checksum(weight + i * piece, length(i)); }

    // Each step is one to one in what it reads, so a change within eight bytes always shows.
    static u64 checksum(const float* from, i64 floats) {
        u64 lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8}, words[8], total = u64(floats);
        i64 i = 0;
        for (; i + 16 <= floats; i += 16) {
            std::memcpy(words, from + i, sizeof words);
            for (int k = 0; k < 8; k++) lanes[k] = (lanes[k] ^ words[k]) * kOdd;
        }
        for (; i < floats; i++) {
            u32 word;
            std::memcpy(&word, from + i, sizeof word);
            total = (total ^ word) * kOdd;
        }
        for (u64 lane : lanes) total = (total ^ lane ^ lane >> 32) * kOdd;
        return total;
    }
};

u32 bits_at(const float* weight, i64 i) {
    u32 found;
    std::memcpy(&found, weight + i, sizeof found);
    return found;
}

u64 count_nonzeros(const float* from, i64 floats) {
    int found = 0;  // as wide as a float, for the compiler's vectors
    for (i64 i = 0; i < floats; i++) found += from[i] != 0;
    return u64(found);
}

void fetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

// Ask for what `changed` will read: almost all of it is far away, and so it comes at once.
void fetch(const float* weight, const Watch& watch) {
    const i64 i = watch.turn.load(std::memory_order_relaxed), first = i * watch.piece;
    fetch(watch.sums + i);
    for (i64 k = 0; k < watch.anchors; k++) fetch(weight + watch.at[k]);
    for (i64 k = 0; k < kAhead && first + k * 16 < watch.count; k++) fetch(weight + first + k * 16);
}

bool changed(const float* weight, Watch& watch, bool all) {
    for (i64 k = 0; k < watch.anchors; k++)
        if (bits_at(weight, watch.at[k]) != watch.bits[k]) return true;
    if (all) {
        for (i64 i = 0; i < watch.pieces; i++)
            if (watch.sum(weight, i) != watch.sums[i]) return true;
        return false;
    }
    const i64 i = watch.turn.load(std::memory_order_relaxed);
    watch.turn.store(i + 1 < watch.pieces ? i + 1 : 0, std::memory_order_relaxed);
    return watch.pieces && watch.sum(weight, i) != watch.sums[i];
}

}  // namespace
}  // namespace secateur

using namespace secateur;

int64_t secateur_watch(const float* weight, int64_t count, void* memory) {
    i64 piece = (count + kPieces - 1) / kPieces;
    piece = ((piece < kSmallest ? kSmallest : piece) + 15) / 16 * 16;
    const i64 pieces = (count + piece - 1) / piece;
    if (!memory) return Watch::size(pieces);
    auto& watch = *static_cast<Watch*>(memory);
    std::memset(memory, 0, std::size_t(Watch::size(pieces)));
    watch.count = count, watch.piece = piece, watch.pieces = pieces;
    i64 nonzeros = 0, seen = 0;  // first of each piece, where its sum will be
    for (i64 p = 0; p < pieces; p++) nonzeros += watch.sums[p] = count_nonzeros(weight + p * piece, watch.length(p));
    const i64 wanted = nonzeros < kAnchors ? nonzeros : kAnchors;
    for (i64 p = 0; p < pieces; p++) {
        const i64 first = p * piece, behind = seen + i64(watch.sums[p]);
        auto next = [&] { return nonzeros * watch.anchors / wanted; };  // by its number among the non-zeros
        for (i64 i = first; watch.anchors < wanted && next() < behind; i++)
            if (weight[i] != 0 && seen++ >= next()) {
                watch.at[watch.anchors] = i;
                watch.bits[watch.anchors++] = bits_at(weight, i);
            }
        seen = behind;
    }
    for (i64 i = 0; i < pieces; i++) watch.sums[i] = watch.sum(weight, i);
    return Watch::size(pieces);
}

int32_t secateur_changed(int32_t tensors, const float* const* weights, void* const* watches, int32_t all) {
    if (!all) {
        for (int i = 0; i < tensors; i++)
            for (std::size_t k = 0; k < sizeof(Watch); k += 64) fetch(static_cast<const char*>(watches[i]) + k);
        for (int i = 0; i < tensors; i++) fetch(weights[i], *static_cast<const Watch*>(watches[i]));
    }
    for (int i = 0; i < tensors; i++)
        if (changed(weights[i], *static_cast<Watch*>(watches[i]), all != 0)) return 1;
    return 0;
}
