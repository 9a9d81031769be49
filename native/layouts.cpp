// Images between the layouts in which torch holds them: channels first, or last.
#include "secateur.h"
#include "threads.h"

using namespace secateur;

namespace {

constexpr i64 kSide = 16;  // of a square: its lines of both sides are in the first cache together

// Rows [first, end) of x[rows][columns] as columns of y.
void turn(const float* x, i64 rows, i64 columns, i64 first, i64 end, float* y) {
    for (i64 left = 0; left < columns; left += kSide) {
        const float* from = x + first * columns + left;
        float* to = y + left * rows + first;
        const i64 wide = columns - left < kSide ? columns - left : kSide;
        if (wide == kSide && end - first == kSide)  // counts that the compiler knows make it twice as fast
            for (i64 c = 0; c < kSide; c++)
                for (i64 r = 0; r < kSide; r++) to[c * rows + r] = from[r * columns + c];
        else
            for (i64 c = 0; c < wide; c++)
                for (i64 r = 0; r < end - first; r++) to[c * rows + r] = from[r * columns + c];
    }
}

}  // namespace

void secateur_transpose(const float* x, int64_t count, int64_t rows, int64_t columns, float* y, int32_t threads) {
    const i64 strips = (rows + kSide - 1) / kSide, all = rows * columns;
    share(count * strips, count * all < kWorthSharing ? 1 : threads, [&](i64 unit) {
        const i64 i = unit / strips, first = unit % strips * kSide;
        turn(x + i * all, rows, columns, first, first + kSide < rows ? first + kSide : rows, y + i * all);
    });
}
