// The product with a single input by the masked layout; a part of kernels.cpp, where vectors have eight lanes.

// For each mask of eight bits, where a shuffle finds what belongs to each lane: the k-th of the values if its bit is the
// k-th that is set, zero if it is not. A lane has kBytes; the value is its last kSize of them.
template <int kBytes, int kSize>
struct Places {
    alignas(8 * kBytes) u8 at[256][8 * kBytes] = {};
    constexpr Places() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0, k = 0; lane < 8; lane++) {
                const bool set = mask >> lane & 1;
                for (int i = 0; i < kBytes; i++) {
                    const int byte = i - (kBytes - kSize);
                    at[mask][lane * kBytes + i] = set && byte >= 0 ? u8(k * kSize + byte) : 0x80;
                }
                k += set;
            }
    }
};

template <class T> struct Spread;  // eight weights of which a mask tells which are there, as float32

template <> struct Spread<Bfloat16> {
    static constexpr Places<4, 2> places{};
    INLINE vec of(const Bfloat16* value, u32 mask) {
        const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(value)));
        return vec(_mm256_shuffle_epi8(all, *reinterpret_cast<const __m256i*>(places.at[mask])));
    }
};

template <> struct Spread<u16> {
    static constexpr Places<2, 2> places{};
    INLINE vec of(const u16* value, u32 mask) {
        const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value));
        return vec(_mm256_cvtph_ps(_mm_shuffle_epi8(all, *reinterpret_cast<const __m128i*>(places.at[mask]))));
    }
};

template <> struct Spread<float> {
    static constexpr Places<1, 1> places{};
    INLINE vec of(const float* value, u32 mask) {
        const __m256i at = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(places.at[mask])));
        const __m256 all = _mm256_permutevar8x32_ps(_mm256_loadu_ps(value), at);
        return vec(_mm256_blendv_ps(all, _mm256_setzero_ps(), _mm256_castsi256_ps(at)));
    }
};

INLINE float total(vec v) {
    const Of<4>::type a = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
    return (a[0] + a[1]) + (a[2] + a[3]);
}

// Whether a pruned weight times each of these is zero.
bool all_finite(const float* x, i64 count) {
    vec zeros = {};
    i64 i = 0;
    for (; i + LANES <= count; i += LANES) zeros += 0.f * load<vec>(x + i);
    float sum = total(zeros);
    for (; i < count; i++) sum += 0.f * x[i];
    return sum == 0;
}

// sums[row] += the chunk's rows times the input. Columns beyond the last count as zeros.
template <class T>
void masked_product(Blob blob, const float* input, u32 chunk, i64 rows, float* sums) {
    const Header& head = *blob.head;
    const i64 columns = head.columns, whole = columns / kMask;
    float rest[kMask] = {};
    for (i64 j = whole * kMask; j < columns; j++) rest[j - whole * kMask] = input[j];
    const T* value = blob.at<T>(head.masked_value) + blob.at<u64>(head.masked_table)[chunk];
    const i64 blocks = (columns + kMask - 1) / kMask, strips = (head.chunk + kMaskRows - 1) / kMaskRows;
    const u8* mask = blob.at<u8>(head.masks) + chunk * strips * blocks * kMaskRows;
    for (i64 row = 0; row < rows; row += kMaskRows) {
        vec s[kMaskRows] = {};
        for (i64 b = 0; b < blocks; b++) {
            const vec x = load<vec>(b < whole ? input + b * kMask : rest);
            u32 masks[kMaskRows / 4];
            __builtin_memcpy(masks, mask, sizeof masks);  // one load for four rows: loads are what bounds it
            UNROLL for (int r = 0; r < kMaskRows; r++) {
                const u32 one = masks[r / 4] & 0xff;
                s[r] += Spread<T>::of(value, one) * x;
                value += __builtin_popcount(one);
                masks[r / 4] >>= 8;
            }
            mask += kMaskRows;
            __builtin_prefetch(value + kAhead);
            __builtin_prefetch(mask + kAhead);
        }
        for (int r = 0; r < least(kMaskRows, int(rows - row)); r++) sums[row + r] += total(s[r]);
    }
}
