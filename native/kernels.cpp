// The kernels, in GCC's vector extensions; compiled once for each instruction set. Nothing here may be inlined into or
// shared with code for other CPUs: everything lives in an anonymous namespace, and no standard header with code is used.
#include "kernels.h"

#if !defined(__GNUC__)
#error "needs GCC's vector extensions: use gcc, clang or clang-cl"
#endif

#define avx512 1
#define avx2 2
#define neon 3
#define portable 4
#if SECATEUR_ISA == avx512
#define LANES 16
#define NAME "avx512"
#define TABLE kAvx512
#elif SECATEUR_ISA == avx2
#define LANES 8
#define NAME "avx2"
#define TABLE kAvx2
#elif SECATEUR_ISA == neon
#define LANES 4
#define NAME "neon"
#define TABLE kNeon
#else
#define LANES 4
#define NAME "portable"
#define TABLE kPortable
#endif
#undef avx512
#undef avx2
#undef neon
#undef portable
#if LANES >= 8
#include <immintrin.h>
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "columns are read by fours, from the lowest"
#endif

#define UNROLL _Pragma("GCC unroll 16")
#if defined(__aarch64__)
#define OPAQUE(v) asm("" : "+w"(v))
#elif defined(__x86_64__)
#define OPAQUE(v) asm("" : "+v"(v))
#else
#define OPAQUE(v)
#endif
#define INLINE static inline __attribute__((always_inline))

namespace secateur {
namespace {

// type: a vector of N floats; loose: the same in memory, at any address
template <int N> struct Of;
#define VECTOR(N)                                                                      \
    template <> struct Of<N> {                                                         \
        typedef float type __attribute__((vector_size(4 * N)));                        \
        typedef float loose __attribute__((vector_size(4 * N), aligned(4), may_alias)); \
    }
VECTOR(16);
VECTOR(8);
VECTOR(4);
template <> struct Of<1> { using type = float; using loose = float; };

constexpr int least(int a, int b) { return a < b ? a : b; }

using vec = Of<LANES>::type;
typedef int vint __attribute__((vector_size(LANES * 4)));

template <int N> struct Count { static constexpr int value = N; };
template <class V> using Loose = Of<sizeof(V) / 4>;
template <class V> INLINE V load(const float* p) { return *reinterpret_cast<const typename Loose<V>::loose*>(p); }
template <class V> INLINE void store(float* p, V v) { *reinterpret_cast<typename Loose<V>::loose*>(p) = v; }
INLINE vec splat(float x) { return vec{} + x; }

// ---- transposes of N x N, by log2(N) rounds of interleaving row i with row i + N / 2

[[maybe_unused]] INLINE void interleave(Of<16>::type a, Of<16>::type b, Of<16>::type& low, Of<16>::type& high) {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
[[maybe_unused]] INLINE void interleave(Of<8>::type a, Of<8>::type b, Of<8>::type& low, Of<8>::type& high) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
INLINE void interleave(Of<4>::type a, Of<4>::type b, Of<4>::type& low, Of<4>::type& high) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

template <int N>
INLINE void transpose(typename Of<N>::type (&a)[N]) {
    for (int round = 1; round < N; round *= 2) {
        typename Of<N>::type b[N];
        UNROLL for (int i = 0; i < N / 2; i++) interleave(a[i], a[i + N / 2], b[2 * i], b[2 * i + 1]);
        UNROLL for (int i = 0; i < N; i++) a[i] = b[i];
    }
}

// to[columns][to_stride] = from[rows][from_stride]^T; rows from `rows` to `padded` count as zeros.
template <int N>
void transposed_by(const float* from, i64 from_stride, i64 rows, i64 padded, i64 columns, float* to, i64 to_stride) {
    using V = typename Of<N>::type;
    i64 j = 0;
    for (; j + N <= columns; j += N)
        for (i64 r = 0; r < padded; r += N) {
            V a[N];
            if (r + N <= rows) {
                UNROLL for (int i = 0; i < N; i++) a[i] = load<V>(from + (r + i) * from_stride + j);
            } else {
                UNROLL for (int i = 0; i < N; i++) a[i] = r + i < rows ? load<V>(from + (r + i) * from_stride + j) : V{};
            }
            transpose<N>(a);
            UNROLL for (int i = 0; i < N; i++) store(to + (j + i) * to_stride + r, a[i]);
        }
    for (; j < columns; j++) {
        for (i64 r = 0; r < rows; r++) to[j * to_stride + r] = from[r * from_stride + j];
        for (i64 r = rows; r < padded; r++) to[j * to_stride + r] = 0;
    }
}

void transposed(const float* from, i64 from_stride, i64 rows, i64 padded, i64 columns, float* to, i64 to_stride) {
    if (padded % LANES == 0)
        transposed_by<LANES>(from, from_stride, rows, padded, columns, to, to_stride);
    else if (padded % 8 == 0)
        transposed_by<least(LANES, 8)>(from, from_stride, rows, padded, columns, to, to_stride);
    else if (padded % 4 == 0)
        transposed_by<4>(from, from_stride, rows, padded, columns, to, to_stride);
    else
        for (i64 j = 0; j < columns; j++) to[j * to_stride] = from[j];
}

// y[n][rows] = sums[rows][width]^T, of whose columns the first n count
template <int N>
void unpack(const float* sums, int width, i64 rows, int n, float* y, i64 stride) {
    using V = typename Of<N>::type;
    i64 r = 0;
    for (; r + N <= rows; r += N)
        for (int i = 0; i < n; i += N) {
            V a[N];
            UNROLL for (int k = 0; k < N; k++) a[k] = load<V>(sums + (r + k) * width + i);
            transpose<N>(a);
            if (i + N <= n) {
                UNROLL for (int k = 0; k < N; k++) store(y + (i + k) * stride + r, a[k]);
            } else {
                UNROLL for (int k = 0; k < N; k++)
                    if (i + k < n) store(y + (i + k) * stride + r, a[k]);
            }
        }
    for (; r < rows; r++)
        for (int i = 0; i < n; i++) y[i * stride + r] = sums[r * width + i];
}

void panel_pack(const float* x, i64 stride, int n, int width, i64 columns, float* panel) {
    transposed(x, stride, n, width, columns, panel, width);
}

// ---- packed values, float32, float16 or bfloat16

template <class V> INLINE V values(const float* p) { return load<V>(p); }

// vectors of N integers, and of N halves of them in memory
template <int N> struct Ints {
    typedef int type __attribute__((vector_size(4 * N)));
    typedef u16 half __attribute__((vector_size(2 * N), aligned(2), may_alias));
};
template <class V> INLINE V values(const Bfloat16* p) {
    constexpr int lanes = sizeof(V) / 4;
    if constexpr (lanes == 1) {
        const u32 bits = u32(p->bits) << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    } else if constexpr (lanes == 4) {  // behind zeros: compilers take a conversion of so few apart
        u64 four;
        __builtin_memcpy(&four, p, sizeof four);
        typedef u64 Wide __attribute__((vector_size(16)));
        const auto half = reinterpret_cast<Ints<8>::half>(Wide{four, 0});
        return reinterpret_cast<V>(__builtin_shufflevector(Ints<8>::half{}, half, 0, 8, 1, 9, 2, 10, 3, 11));
    } else {
        using I = Ints<lanes>;
        const auto half = *reinterpret_cast<const typename I::half*>(p);
        return reinterpret_cast<V>(__builtin_convertvector(half, typename I::type) << 16);
    }
}

// float16 to float32 by integers: the exponents differ by 112
INLINE Of<4>::type widened(Ints<4>::half h) {
    using V = Of<4>::type;
    using I = Ints<4>::type;
    const I bits = __builtin_convertvector(h, I);
    const I shifted = (bits & 0x7fff) << 13;
    const V magnitude = reinterpret_cast<V>(shifted) * 5.192296858534828e+33f;  // 2^112, right for subnormals too
    const I inf = (bits & 0x7c00) == 0x7c00 ? shifted | 0x7f800000 : reinterpret_cast<I>(magnitude);
    return reinterpret_cast<V>(inf | (bits & 0x8000) << 16);
}
template <class V> INLINE V values(const u16* p) {
    constexpr int lanes = sizeof(V) / 4;
#if LANES >= 8
    if constexpr (lanes == 16)
        return V(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    else if constexpr (lanes == 8)
        return V(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    else if constexpr (lanes == 4)
        return V(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    else
        return _cvtsh_ss(*p);
#else
    if constexpr (lanes == 4)
        return widened(*reinterpret_cast<const Ints<4>::half*>(p));
    else
        return widened(Ints<4>::half{*p})[0];
#endif
}

// ---- products

constexpr int kAhead = 512;  // non-zeros ahead that are fetched, as rows are too short for the CPU to foresee

// All lanes of the result are lane u of w.
template <int u> INLINE Of<16>::type lane(Of<16>::type w) {
    return __builtin_shufflevector(w, w, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u);
}
template <int u> INLINE Of<8>::type lane(Of<8>::type w) { return __builtin_shufflevector(w, w, u, u, u, u, u, u, u, u); }
template <int u> INLINE Of<4>::type lane(Of<4>::type w) { return __builtin_shufflevector(w, w, u, u, u, u); }

// Non-zeros u, u + 1, ... G - 1 of a group: s[u % A] += their weight times their input.
template <int u, int G, bool kInRegister, class V, class T, int C, int A>
INLINE void group(V w, const T* value, const u16* index, const float* in, V (&s)[A][C]) {
    constexpr int lanes = sizeof(V) / 4;
    if constexpr (u < G) {
        const float* x = in + u64(index[u]) * (lanes * C);
        V weight;
        if constexpr (kInRegister)
            weight = lane<u>(w);
        else
            weight = V{} + values<float>(value + u);
        UNROLL for (int c = 0; c < C; c++) s[u % A][c] += weight * load<V>(x + c * lanes);
        group<u + 1, G, kInRegister>(w, value, index, in, s);
    }
}

// Non-zeros u, u + 1, ... 3 of four, the same with their weights in both halves of w and their columns in one number.
template <int u, class V, int C, int A>
INLINE void four(V w, u64 index, const float* in, V (&s)[A][C]) {
    if constexpr (u < 4) {
        const float* x = in + (index >> 16 * u & 0xffff) * (sizeof(V) / 4 * C);
        const V weight = __builtin_shufflevector(w, w, u, u, u, u, u + 4, u + 4, u + 4, u + 4);
        UNROLL for (int c = 0; c < C; c++) s[u % A][c] += weight * load<V>(x + c * sizeof(V) / 4);
        four<u + 1>(w, index, in, s);
    }
}

// Calls f(rows in the chunk, how many, first column of the block, non-zeros of each row there, their columns in it, their
// values), for rows with equally many.
template <class T, class F>
INLINE void each_run(Blob blob, u32 chunk, const F& f) {
    const Header& head = *blob.head;
    const Chunk& at = blob.at<Chunk>(head.chunk_table)[chunk];
    const u32* counts = blob.at<u32>(head.run_counts) + u64(chunk) * head.blocks;
    const Run* run = blob.at<Run>(head.runs) + at.run;
    const u16* row = blob.at<u16>(head.row_order) + at.row;
    const u16* index = blob.at<u16>(head.index) + at.entry;
    const T* value = blob.at<T>(head.value) + at.entry;
    for (u32 b = 0; b < head.blocks; b++)
        for (const Run* end = run + counts[b]; run < end; run++) {
            const int rows = run->count, length = run->length;
            f(row, rows, u64(b) * head.block, length, index, value);
            row += rows, index += rows * length, value += rows * length;
        }
}

template <class T>
INLINE void fetch(const u16* index, const T* value, int count) {
    for (int i = 0; i < count; i += 16) __builtin_prefetch(value + kAhead + i);
    for (int i = 0; i < count; i += 32) __builtin_prefetch(index + kAhead + i);
}

// sums[row][C vectors] += the chunk's rows times the inputs, with A partial sums to hide the latency of additions.
// Loads are what bounds it: so weights come as vectors of G, and each is spread over a register by a shuffle rather than
// by a load of its own.
template <class V, int C, int A, class T>
INLINE void product(Blob blob, const float* inputs, u32 chunk, float* sums) {
    constexpr int lanes = sizeof(V) / 4, width = lanes * C, G = least(lanes, 8);
    constexpr bool in_register = C <= 2 || sizeof(T) == 2;
    auto add = [&](float* out, const float* in, int length, const u16* index, const T* value) {
        V s[A][C];
        UNROLL for (int c = 0; c < C; c++) s[0][c] = load<V>(out + c * lanes);
        UNROLL for (int a = 1; a < A; a++)
            UNROLL for (int c = 0; c < C; c++) s[a][c] = V{};
        int i = 0;
        auto some = [&](auto count) {
            V w{};
            if constexpr (in_register) {
                w = values<V>(value + i);
                OPAQUE(w);  // or the compiler turns the shuffles back into loads
            }
            group<0, decltype(count)::value, in_register>(w, value + i, index + i, in, s);
            i += decltype(count)::value;
        };
#if LANES == 8
        if constexpr (C == 4 && sizeof(T) == 4)  // one load for four weights, and one for four columns
            for (; i + 4 <= length; i += 4) {
                V w = V(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(value + i)));
                u64 columns;
                __builtin_memcpy(&columns, index + i, sizeof columns);
                OPAQUE(w);
                asm("" : "+r"(columns));  // for the same reason
                four<0>(w, columns, in, s);
            }
#endif
        while (i + G <= length) some(Count<G>{});
        if (G > 4 && i + 4 <= length) some(Count<4>{});
        for (; i < length; i++) {
            const float* x = in + u64(index[i]) * width;
            UNROLL for (int c = 0; c < C; c++) s[A - 1][c] += values<float>(value + i) * load<V>(x + c * lanes);
        }
        UNROLL for (int a = 1; a < A; a++)
            UNROLL for (int c = 0; c < C; c++) s[0][c] += s[a][c];
        UNROLL for (int c = 0; c < C; c++) store(out + c * lanes, s[0][c]);
    };
    each_run<T>(blob, chunk, [&](const u16* row, int rows, u64 column, int length, const u16* index, const T* value) {
        for (; rows > 0; rows--, index += length, value += length) {
            add(sums + u64(*row++) * width, inputs + column * width, length, index, value);
            fetch(index, value, length);
        }
    });
}

// Sums of R rows for a single input: its values are collected by fours, as the weights lie. What is left of a row goes
// without a branch, as rows are short and the processor would guess it wrong.
template <int R, class T>
INLINE void rows_of_one(const u16* row, int length, const float* in, const u16* index, const T* value, float* sums) {
    using V = Of<4>::type;
    using I = Ints<4>::type;
    V s[R] = {};
    int i = 0;
    for (; i + 4 <= length; i += 4)
        UNROLL for (int r = 0; r < R; r++) {
            u64 at;
            __builtin_memcpy(&at, index + r * length + i, sizeof at);
            asm("" : "+r"(at));  // one load for four columns: loads are what bounds it
            const V x = {in[at & 0xffff], in[at >> 16 & 0xffff], in[at >> 32 & 0xffff], in[at >> 48]};
            s[r] += values<V>(value + r * length + i) * x;
        }
    if (const int m = length - i) {
        const int second = -(m > 1), third = -(m > 2);
        const I some = {-1, second, third, 0};
        UNROLL for (int r = 0; r < R; r++) {
            const u16* at = index + r * length + i;
            const V x = {in[at[0]], in[at[1] & second], in[at[2] & third], 0};
            const V w = reinterpret_cast<V>(reinterpret_cast<I>(values<V>(value + r * length + i)) & some);
            s[r] += w * reinterpret_cast<V>(reinterpret_cast<I>(x) & some);
        }
    }
    UNROLL for (int r = 0; r < R; r++) sums[row[r]] += (s[r][0] + s[r][1]) + (s[r][2] + s[r][3]);
}

INLINE u32 chunk_rows(const Header& head, u32 chunk) {
    const u32 first = chunk * head.chunk, left = head.rows - first;
    return left < head.chunk ? left : head.chunk;
}

#if LANES == 8
#include "masked.h"
#endif

// The same for a single input. Two rows go side by side, or one addition would wait for the one before.
template <class T>
INLINE void product_of_one(Blob blob, const float* input, u32 chunk, float* sums) {
#if LANES == 8
    if (blob.head->masked_table && all_finite(input, blob.head->columns))
        return masked_product<T>(blob, input, chunk, chunk_rows(*blob.head, chunk), sums);
#endif
    each_run<T>(blob, chunk, [&](const u16* row, int rows, u64 column, int length, const u16* index, const T* value) {
        auto some = [&](auto count) {
            constexpr int R = decltype(count)::value;
            rows_of_one<R>(row, length, input + column, index, value, sums);
            fetch(index, value, R * length);
            row += R, rows -= R, index += R * length, value += R * length;
        };
        while (rows >= 2) some(Count<2>{});
        if (rows) some(Count<1>{});
    });
}

// In vectors of at most LANES, with about as many sums at a time as the latency of an addition asks for.
template <int kWidth>
void product_of_width(Blob blob, const float* inputs, u32 chunk, float* sums) {
    constexpr int lanes = least(kWidth, LANES), vectors = kWidth / lanes;
    constexpr int partial = vectors >= 8 ? 1 : vectors >= 2 ? 2 : 4;
    auto run = [&](auto value) {
        using T = decltype(value);
        if constexpr (kWidth == 1)
            product_of_one<T>(blob, inputs, chunk, sums);
        else
            product<typename Of<lanes>::type, vectors, partial, T>(blob, inputs, chunk, sums);
    };
    switch (blob.head->values) {
        case kFloat16: return run(u16{});
        case kBfloat16: return run(Bfloat16{});
        default: return run(float{});
    }
}

// sums[chunk rows][width] = bias
template <int kWidth>
void bias_sums(const float* bias, i64 rows, float* sums) {
    using V = typename Of<least(kWidth, LANES)>::type;
    for (i64 r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < kWidth; i += least(kWidth, LANES)) store(sums + r * kWidth + i, V{} + bias[r]);
}

template <int kWidth>
void panel_of(Blob blob, const float* inputs, const float* bias, u32 chunk, float* sums) {
    if (bias) bias_sums<kWidth>(bias + i64(chunk) * blob.head->chunk, chunk_rows(*blob.head, chunk), sums);
    product_of_width<kWidth>(blob, inputs, chunk, sums);
}

void panel(Blob blob, const float* inputs, int width, const float* bias, u32 chunk, float* sums) {
    switch (width) {
        case 32: return panel_of<32>(blob, inputs, bias, chunk, sums);
        case 16: return panel_of<16>(blob, inputs, bias, chunk, sums);
        case 8: return panel_of<8>(blob, inputs, bias, chunk, sums);
        case 4: return panel_of<4>(blob, inputs, bias, chunk, sums);
        default: return panel_of<1>(blob, inputs, bias, chunk, sums);
    }
}

void panel_unpack(const float* sums, int n, int width, i64 rows, float* y, i64 stride) {
    switch (least(width, LANES)) {
        case 16: return unpack<least(LANES, 16)>(sums, width, rows, n, y, stride);
        case 8: return unpack<least(LANES, 8)>(sums, width, rows, n, y, stride);
        case 4: return unpack<4>(sums, width, rows, n, y, stride);
        default:
            for (i64 r = 0; r < rows; r++) y[r] = sums[r];
    }
}

// A vector of every kStride-th float.
[[maybe_unused]] INLINE void evens(Of<16>::type& a, Of<16>::type b) {
    a = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
[[maybe_unused]] INLINE void evens(Of<8>::type& a, Of<8>::type b) {
    a = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
INLINE void evens(Of<4>::type& a, Of<4>::type b) { a = __builtin_shufflevector(a, b, 0, 2, 4, 6); }

template <class V, int kStride>
INLINE V strided(const float* p) {
    static_assert(kStride <= kStrides, "");
    V v = load<V>(p);
    if constexpr (kStride == 2 && sizeof(V) > sizeof(float)) evens(v, load<V>(p + sizeof(V) / 4));
    return v;
}

// kMoves vectors of each row, each from its place in the planes to its lane.
template <class V, int kStride, int kWidth, int kMoves>
void gather_moves(const float* planes, const i64* offset, i64 columns, const i64* from, const int* lane, float* panel) {
    const float* at[kMoves];
    UNROLL for (int m = 0; m < kMoves; m++) at[m] = planes + from[m];
    for (i64 j = 0; j < columns; j++, panel += kWidth)
        UNROLL for (int m = 0; m < kMoves; m++) store(panel + lane[m], strided<V, kStride>(at[m] + offset[j]));
}

template <int kWidth, int kStride>
void gather_by(const float* planes, const i64* offset, i64 columns, const Piece* pieces, int count, float* panel) {
    constexpr int lanes = least(kWidth, LANES), full = kWidth / lanes;
    using V = typename Of<lanes>::type;
    i64 from[kWidth + 2];  // the last two for no panel, but compilers warn of cases 1 and 2 below
    int lane[kWidth + 2], moves = 0;
    for (const Piece* p = pieces; p < pieces + count; p++)
        for (int k = 0; k < p->n; k += lanes, moves++) from[moves] = p->from + k * kStride, lane[moves] = p->lane + k;
    switch (moves - full) {
        case 0: return gather_moves<V, kStride, kWidth, full>(planes, offset, columns, from, lane, panel);
        case 1: return gather_moves<V, kStride, kWidth, full + 1>(planes, offset, columns, from, lane, panel);
        case 2: return gather_moves<V, kStride, kWidth, full + 2>(planes, offset, columns, from, lane, panel);
    }
    for (i64 j = 0; j < columns; j++, panel += kWidth)
        for (int m = 0; m < moves; m++) store(panel + lane[m], strided<V, kStride>(planes + offset[j] + from[m]));
}

template <int kStride>
void gather_of(const float* planes, const i64* offset, i64 columns, int width, const Piece* pieces, int count,
               float* panel) {
    switch (width) {
        case 32: return gather_by<32, kStride>(planes, offset, columns, pieces, count, panel);
        case 16: return gather_by<16, kStride>(planes, offset, columns, pieces, count, panel);
        case 8: return gather_by<8, kStride>(planes, offset, columns, pieces, count, panel);
        case 4: return gather_by<4, kStride>(planes, offset, columns, pieces, count, panel);
        default: return gather_by<1, kStride>(planes, offset, columns, pieces, count, panel);
    }
}

void gather(const float* planes, int stride, const i64* offset, i64 columns, int width, const Piece* pieces, int count,
            float* panel) {
    (stride == 1 ? gather_of<1> : gather_of<2>)(planes, offset, columns, width, pieces, count, panel);
}

// ---- the jagged layout: one to four inputs

void small_pack(const float* x, int n, i64 columns, float* tiles) {
    const i64 whole = columns / kTile;
    for (i64 t = 0; t < whole; t++)
        for (int i = 0; i < n; i++)
            for (int k = 0; k < kTile; k += LANES)
                store(tiles + (t * n + i) * kTile + k, load<vec>(x + i * columns + t * kTile + k));
    if (const i64 rest = columns % kTile)
        for (int i = 0; i < n; i++)
            for (int k = 0; k < kTile; k++)
                tiles[(whole * n + i) * kTile + k] = k < rest ? x[i * columns + whole * kTile + k] : 0;
}

#if LANES == 16
INLINE __m512i bytes(const u8* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE __mmask16 first(i64 n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

template <int N, class T>
void small_n(Blob blob, const float* tiles, const float* bias, bool accumulate, float* y, u32 begin, u32 end) {
    const Header& head = *blob.head;
    const i64 rows = head.rows;
    for (u32 g = begin; g < end; g++) {
        const JaggedGroup& group = blob.at<JaggedGroup>(head.group_table)[g];
        const u8* meta = blob.at<u8>(head.meta) + group.meta;
        const u8* index = blob.at<u8>(head.jagged_index) + group.entry;
        const T* value = blob.at<T>(head.jagged_value) + group.entry;
        const JaggedRun* run = blob.at<JaggedRun>(head.jagged_runs) + group.run;
        __m512 sum[N][2];
        const i64 at = i64(g) * kGroup;
        UNROLL for (int i = 0; i < N; i++)
            UNROLL for (int h = 0; h < 2; h++) {
                const float* from = accumulate ? y + i * rows : bias;
                sum[i][h] = from ? _mm512_maskz_loadu_ps(first(rows - at - 16 * h), from + at + 16 * h)
                                 : _mm512_setzero_ps();
            }
        for (const JaggedRun* last = run + group.runs; run < last; run++) {
            const int depth[2] = {run->depth[0], run->depth[1]};
            for (int c = run->count; c > 0; c--) {
                const float* in = tiles + (meta[0] | meta[1] << 8) * i64(kTile * N);
                const u8* lanes = meta + 2;
                meta += 2 + kGroup;
                __m512 x[N][2], s[2][N];
                UNROLL for (int i = 0; i < N; i++) {
                    x[i][0] = _mm512_loadu_ps(in + i * kTile);
                    x[i][1] = _mm512_loadu_ps(in + i * kTile + 16);
                    s[0][i] = s[1][i] = _mm512_setzero_ps();
                }
                UNROLL for (int h = 0; h < 2; h++)
                    for (int d = depth[h]; d > 0; d--) {
                        const u32 n = *meta++;
                        const __mmask16 k = _bzhi_u32(0xffff, n);
                        const __m512i at_columns = bytes(index);
                        const __m512 w = __m512(values<vec>(value));
                        UNROLL for (int i = 0; i < N; i++) {
                            const __m512 seen = _mm512_permutex2var_ps(x[i][0], at_columns, x[i][1]);
                            // masked, as the lanes behind belong to other rows, which a NaN must not reach
                            s[h][i] = _mm512_mask3_fmadd_ps(w, seen, s[h][i], k);
                        }
                        value += n, index += n;
                    }
                if (N > 1) {  // a single input is bound by the memory as it is
                    UNROLL for (int i = 0; i < 7; i++) __builtin_prefetch(value + kAhead + 16 * i);
                    UNROLL for (int i = 0; i < 2; i++) __builtin_prefetch(index + kAhead + 64 * i);
                    __builtin_prefetch(meta + kAhead / 3);
                }
                const __m512i to0 = bytes(lanes), to1 = bytes(lanes + 16);
                UNROLL for (int i = 0; i < N; i++) {
                    sum[i][0] = _mm512_add_ps(sum[i][0], _mm512_permutex2var_ps(s[0][i], to0, s[1][i]));
                    sum[i][1] = _mm512_add_ps(sum[i][1], _mm512_permutex2var_ps(s[0][i], to1, s[1][i]));
                }
            }
        }
        UNROLL for (int i = 0; i < N; i++)
            UNROLL for (int h = 0; h < 2; h++)
                _mm512_mask_storeu_ps(y + i * rows + at + 16 * h, first(rows - at - 16 * h), sum[i][h]);
    }
}

template <class T>
void small_of(Blob blob, const float* tiles, int n, const float* bias, bool accumulate, float* y, u32 begin, u32 end) {
    switch (n) {
        case 1: return small_n<1, T>(blob, tiles, bias, accumulate, y, begin, end);
        case 2: return small_n<2, T>(blob, tiles, bias, accumulate, y, begin, end);
        case 3: return small_n<3, T>(blob, tiles, bias, accumulate, y, begin, end);
        default: return small_n<4, T>(blob, tiles, bias, accumulate, y, begin, end);
    }
}

void small(Blob blob, const float* tiles, int n, const float* bias, bool accumulate, float* y, u32 begin, u32 end) {
    switch (blob.head->values) {
        case kFloat16: return small_of<u16>(blob, tiles, n, bias, accumulate, y, begin, end);
        case kBfloat16: return small_of<Bfloat16>(blob, tiles, n, bias, accumulate, y, begin, end);
        default: return small_of<float>(blob, tiles, n, bias, accumulate, y, begin, end);
    }
}
#else
void small(Blob, const float*, int, const float*, bool, float*, u32, u32) {}
#endif

// ---- nonlinearities. Those of recurrent layers: tanh(x) = n / d, a minimax fraction (the coefficients are those of
// Eigen's ptanh), absolute error about 1e-7. sigmoid(x) = (1 + tanh(x / 2)) / 2. As fractions, a cell takes two divisions.

struct Fraction {
    vec n, d;
};
INLINE Fraction tangent(vec x) {  // a NaN stays one
    x = x > 9.f ? splat(9.f) : x;
    x = x < -9.f ? splat(-9.f) : x;
    const vec z = x * x;
    vec n = z * -2.76076847742355e-16f + 2.00018790482477e-13f;
    n = n * z + -8.60467152213735e-11f;
    n = n * z + 5.12229709037114e-08f;
    n = n * z + 1.48572235717979e-05f;
    n = n * z + 6.37261928875436e-04f;
    n = n * z + 4.89352455891786e-03f;
    vec d = z * 1.19825839466702e-06f + 1.18534705686654e-04f;
    d = d * z + 2.26843463243900e-03f;
    d = d * z + 4.89352518554385e-03f;
    return {n * x, d};
}

// f on vectors of LANES units of `count` arrays at once; the last, incomplete one by way of copies.
template <int kIn, int kOut, class F>
INLINE void units(i64 hidden, const float* const (&in)[kIn], float* const (&out)[kOut], F f) {
    i64 i = 0;
    for (; i + LANES <= hidden; i += LANES) {
        vec a[kIn], b[kOut];
        UNROLL for (int k = 0; k < kIn; k++) a[k] = load<vec>(in[k] + i);
        f(a, b);
        UNROLL for (int k = 0; k < kOut; k++) store(out[k] + i, b[k]);
    }
    if (const i64 rest = hidden - i) {
        vec a[kIn] = {}, b[kOut];
        for (int k = 0; k < kIn; k++)
            for (i64 j = 0; j < rest; j++) a[k][j] = in[k][i + j];
        f(a, b);
        for (int k = 0; k < kOut; k++)
            for (i64 j = 0; j < rest; j++) out[k][i + j] = b[k][j];
    }
}

// erf(z), a minimax fraction with the coefficients of Eigen's perf, absolute error below 1e-7; z from -4 to 4
INLINE Fraction error_function(vec x) {
    const vec z = x * x;
    vec n = z * -2.72614225801306e-10f + 2.77068142495902e-08f;
    n = n * z + -2.10102402082508e-06f;
    n = n * z + -5.69250639462346e-05f;
    n = n * z + -7.34990630326855e-04f;
    n = n * z + -2.95459980854025e-03f;
    n = n * z + -1.60960333262415e-02f;
    vec d = z * -1.45660718464996e-05f + -2.13374055278905e-04f;
    d = d * z + -1.68282697438203e-03f;
    d = d * z + -7.37332916720468e-03f;
    d = d * z + -1.42647390514189e-02f;
    return {n * x, d};
}

// exp(x) = 2^n exp(r) with |r| <= log(2) / 2, of which the series is taken; relative error about 1e-7
INLINE vec exponential(vec x) {
    const vec most = splat(88.f), least = splat(-87.f);
    const vec in = x > most ? most : x < least ? least : x;
    const vec round = splat(12582912.f);  // 1.5 * 2^23: beside it a float has no bits for fractions
    const vec shifted = in * 1.44269504088896f + round, n = shifted - round;
    const vec r = (in - n * 0.693359375f) + n * 2.12194440054691e-4f;  // log(2) in two parts, the first of few bits
    vec e = r * 1.38888888888889e-3f + 8.33333333333333e-3f;
    e = e * r + 4.16666666666667e-2f;
    e = e * r + 1.66666666666667e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.f;
    e = e * r + 1.f;
    typedef u32 bits __attribute__((vector_size(LANES * 4)));
    const bits power = (reinterpret_cast<bits>(shifted) << 23) + (127u << 23);  // of `shifted` the last bits are n
    return x > most ? splat(__builtin_inff()) : e * reinterpret_cast<vec>(power);
}

// gelu(x) = x (1 + erf(x / sqrt(2))) / 2, but 0 x where this is no more than rounding
INLINE vec gelu(vec x) {
    const vec half = x * 0.707106781186548f, most = splat(4.f);
    const Fraction e = error_function(half > most ? most : half < -most ? -most : half);
    return x * (half < -most ? vec{} : 0.5f + 0.5f * (e.n / e.d));
}
INLINE vec gelu_tanh(vec x) {  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
    return x / (1.f + exponential(x * (x * x * -0.0713548162726f + -1.59576912160573f)));
}

template <class F>
INLINE void each(float* x, i64 count, F f) {
    const float* const in[1] = {x};
    float* const out[1] = {x};
    units(count, in, out, [&](const vec(&a)[1], vec(&b)[1]) { b[0] = f(a[0]); });
}

INLINE vec between(float least, vec x, float most) { return x < least ? splat(least) : x > most ? splat(most) : x; }

void activate(Activation kind, float* x, i64 count) {
    switch (kind) {
        case Activation::kRelu: return each(x, count, [](vec v) { return v < 0.f ? vec{} : v; });
        case Activation::kRelu6: return each(x, count, [](vec v) { return between(0.f, v, 6.f); });
        case Activation::kGelu: return each(x, count, gelu);
        case Activation::kGeluTanh: return each(x, count, gelu_tanh);
        case Activation::kSilu: return each(x, count, [](vec v) { return v / (1.f + exponential(-v)); });
        case Activation::kTanh:
            return each(x, count, [](vec v) {
                const Fraction t = tangent(v);
                return t.n / t.d;
            });
        case Activation::kSigmoid: return each(x, count, [](vec v) { return 1.f / (1.f + exponential(-v)); });
        case Activation::kHardswish:
            return each(x, count, [](vec v) { return v * (between(0.f, v + 3.f, 6.f) * (1.f / 6.f)); });
        case Activation::kHardsigmoid:
            return each(x, count, [](vec v) { return between(0.f, v + 3.f, 6.f) * (1.f / 6.f); });
        default: return;
    }
}

// ---- what is done to sums

// f(i) for i in steps of N below n, of which there are at least N; the last step may overlap the one before.
template <int N, class F>
INLINE void steps(i64 n, const F& f) {
    i64 i = 0;
    for (; i + N <= n; i += N) f(i);
    if (i < n) f(n - N);
}

template <int N, Activation kActivation, bool kBare = false>
void finish_by(const float* sums, i64 width, i64 rows, i64 n, const Finish& finish, float* to, i64 stride) {
    using V = typename Of<N>::type;
    for (i64 r = 0; r < rows; r++, sums += width, to += stride) {
        const float scale = finish.scale ? finish.scale[r] : 1, shift = finish.shift ? finish.shift[r] : 0;
        const float* add = finish.add ? finish.add + r * finish.add_stride : nullptr;
        auto some = [&](i64 i) {
            V v = load<V>(sums + i);
            if (!kBare) v = v * scale + shift;
            if (!kBare && add) v += load<V>(add + i);
            if (kActivation == Activation::kRelu || kActivation == Activation::kRelu6) v = v < 0.f ? V{} : v;
            if (kActivation == Activation::kRelu6) v = v > 6.f ? V{} + 6.f : v;
            store(to + i, v);
        };
        if (n == 4 * N)
            UNROLL for (int i = 0; i < 4; i++) some(i * N);
        else
            steps<N>(n, some);
        if (kActivation == Activation::kEnd) activate(finish.activation, to, n);
    }
}

template <int N>
void finish_of(const float* sums, i64 width, i64 rows, i64 n, const Finish& finish, float* to, i64 stride) {
    switch (finish.activation) {
        case Activation::kNone:
            if (!finish.scale && !finish.shift && !finish.add)
                return finish_by<N, Activation::kNone, true>(sums, width, rows, n, finish, to, stride);
            return finish_by<N, Activation::kNone>(sums, width, rows, n, finish, to, stride);
        case Activation::kRelu: return finish_by<N, Activation::kRelu>(sums, width, rows, n, finish, to, stride);
        case Activation::kRelu6: return finish_by<N, Activation::kRelu6>(sums, width, rows, n, finish, to, stride);
        default: return finish_by<N, Activation::kEnd>(sums, width, rows, n, finish, to, stride);
    }
}

void finish(const float* sums, i64 width, i64 rows, i64 n, const Finish& f, float* to, i64 stride) {
    if (n >= LANES)
        finish_of<LANES>(sums, width, rows, n, f, to, stride);
    else if (n >= 8)
        finish_of<least(LANES, 8)>(sums, width, rows, n, f, to, stride);
    else if (n >= 4)
        finish_of<4>(sums, width, rows, n, f, to, stride);
    else
        finish_of<1>(sums, width, rows, n, f, to, stride);
}

// ---- pooling

// a + b, or the greater of both; a NaN if one of them is
template <bool kMaxima, class V>
INLINE V pooled(V a, V b) {
    if constexpr (!kMaxima) return a + b;
    a = b > a ? b : a;
    return b == b ? a : b;
}

template <bool kMaxima>
void pool_rows_by(const float* from, i64 step, i64 rows, i64 n, float* to) {
    auto some = [&](auto lanes, i64 i) {
        using V = typename Of<decltype(lanes)::value>::type;
        V v = load<V>(from + i);
        for (i64 r = 1; r < rows; r++) v = pooled<kMaxima>(v, load<V>(from + r * step + i));
        store(to + i, v);
    };
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) some(Count<LANES>{}, i);
    for (; i < n; i++) some(Count<1>{}, i);
}

void pool_rows(bool maxima, const float* from, i64 step, i64 rows, i64 n, float* to) {
    (maxima ? pool_rows_by<true> : pool_rows_by<false>)(from, step, rows, n, to);
}

template <bool kMaxima, int kStride, int N>
INLINE void pool_row_by(const float* row, i64 taps, i64 spread, i64 n, float* to) {
    using V = typename Of<N>::type;
    steps<N>(n, [&](i64 i) {
        const float* from = row + i * kStride;
        V v = strided<V, kStride>(from);
        for (i64 k = 1; k < taps; k++) v = pooled<kMaxima>(v, strided<V, kStride>(from += spread));
        store(to + i, v);
    });
}

template <bool kMaxima, int kStride>
void pool_row_of(const float* row, i64 taps, i64 spread, i64 n, float* to) {
    if (n >= LANES)
        pool_row_by<kMaxima, kStride, LANES>(row, taps, spread, n, to);
    else if (n >= 4)
        pool_row_by<kMaxima, kStride, 4>(row, taps, spread, n, to);
    else
        pool_row_by<kMaxima, kStride, 1>(row, taps, spread, n, to);
}

template <bool kMaxima>
void pool_row_strided(const float* row, i64 taps, i64 spread, i64 stride, i64 n, float* to) {
    switch (stride) {
        case 1: return pool_row_of<kMaxima, 1>(row, taps, spread, n, to);
        case 2: return pool_row_of<kMaxima, 2>(row, taps, spread, n, to);
    }
    for (i64 i = 0; i < n; i++) pool_row_by<kMaxima, 1, 1>(row + i * stride, taps, spread, 1, to + i);
}

void pool_row(bool maxima, const float* row, i64 taps, i64 spread, i64 stride, i64 n, float* to) {
    (maxima ? pool_row_strided<true> : pool_row_strided<false>)(row, taps, spread, stride, n, to);
}

void lstm(const float* gates, i64 units_, float* c, float* h) {
    const float* const in[5] = {gates, gates + units_, gates + 2 * units_, gates + 3 * units_, c};
    float* const out[2] = {c, h};
    units(units_, in, out, [](const vec(&a)[5], vec(&b)[2]) {
        const Fraction i = tangent(0.5f * a[0]), f = tangent(0.5f * a[1]), g = tangent(a[2]), o = tangent(0.5f * a[3]);
        b[0] = (a[4] * (f.d + f.n) * (i.d * g.d) + (i.d + i.n) * (g.n * f.d)) / (2.f * f.d * (i.d * g.d));
        const Fraction t = tangent(b[0]);
        b[1] = (o.d + o.n) * t.n / (2.f * o.d * t.d);
    });
}

void gru(const float* x, const float* s, i64 units_, float* h) {
    const float* const in[7] = {x, x + units_, x + 2 * units_, s, s + units_, s + 2 * units_, h};
    float* const out[1] = {h};
    units(units_, in, out, [](const vec(&a)[7], vec(&b)[1]) {
        const Fraction r = tangent(0.5f * (a[0] + a[3])), z = tangent(0.5f * (a[1] + a[4]));
        const Fraction n = tangent(a[2] + a[5] * (r.d + r.n) / (2.f * r.d));
        b[0] = (n.n * (z.d - z.n) + a[6] * n.d * (z.d + z.n)) / (2.f * z.d * n.d);
    });
}

}  // namespace

const Kernels TABLE = {NAME,   LANES == 16, LANES == 8, small_pack, small, panel_pack, panel, panel_unpack,
                       gather, finish,      pool_rows,  pool_row, activate,  lstm,  gru};

}  // namespace secateur
