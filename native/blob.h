// How a sparse matrix lies in memory: in one or two layouts of the same weights, in a piece of position-independent bytes.
// Values are float32, or float16 or bfloat16 where that was asked for.
//
// panel (any n >= 1, every instruction set): the columns are cut into blocks whose part of the input stays in the cache,
//   the rows into chunks, the units of work of threads. In a block, rows with equally many non-zeros are neighbours and
//   form a run, so that the inner loop's trip count, and with it the branch predictor, changes rarely.
// jagged (n <= 4, AVX-512): tiles of 32 rows by 32 columns. In a tile the rows are sorted by their non-zeros, the sixteen
//   longest before the others; slot d holds the d-th non-zero of each row that has one, and these rows are the first
//   lanes. So values and 5-bit columns are stored without gaps, a vector load takes them, and a permutation of two
//   registers fetches the inputs: 5.4 bytes a non-zero at 90 %, and no gather. A permutation puts the sums of a tile back
//   into the order of rows.
// masked (one input, AVX2, of matrices that are dense enough): of eight rows by eight columns, a byte a row tells which
//   columns are there; their values follow one another. A shuffle spreads them, so inputs are loaded as vectors, once for
//   eight rows, rather than one by one.
#pragma once
#include <cstdint>

namespace secateur {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

enum Values : u32 { kFloat32, kFloat16, kBfloat16 };

struct Bfloat16 {
    u16 bits;  // the upper ones of a float32
};

constexpr u32 kMagic = 0x54434553;  // "SECT"
constexpr u32 kVersion = 2;
constexpr int kGroup = 32;      // rows of a jagged tile
constexpr int kTile = 32;       // columns of a jagged tile
constexpr int kSmall = 4;       // the most inputs for which the jagged layout is used
constexpr int kMask = 8;        // columns of a mask
constexpr int kMaskRows = 8;    // rows whose masks are neighbours
constexpr int kWidth = 32;      // the widest panel of inputs
constexpr int kBlock = 384;     // the most columns of a block
constexpr int kLongest = 1024;  // the same where rows would be short, without AVX-512
constexpr int kChunk = 128;     // about as many rows are a unit of work

struct Run {
    u16 length;  // non-zeros of a row in this block
    u16 count;   // rows one after the other that have as many
};

struct Chunk {
    u64 entry;  // its first non-zero
    u32 row;    // index into rows
    u32 run;    // index into runs
};

struct JaggedRun {
    u8 depth[2];  // slots for the sixteen longest rows, and for the others
    u16 count;    // tiles one after the other that have as many
};

struct JaggedGroup {
    u64 entry;  // its first non-zero
    u64 meta;   // offset of its first tile's bytes
    u32 run;    // index into jagged_runs
    u32 runs;   // how many
};

// Per tile in `meta`: u16 column tile; 32 bytes, the lane that holds row r's sum; one byte a slot, the rows in it.

struct Header {
    u32 magic, version;
    u64 bytes;
    u32 rows, columns;
    u32 block, blocks;  // columns of a block, blocks
    u32 chunk, chunks;  // rows of a chunk, chunks
    u32 groups;         // of the jagged layout; 0: it is absent
    u32 values;         // what they are: see Values
    u64 nonzeros;
    // offsets of the arrays from the start of the blob, each a multiple of 64
    u64 chunk_table, run_counts, runs, row_order, index, value;
    u64 group_table, jagged_runs, meta, jagged_index, jagged_value;
    u64 masked_table, masks, masked_value;  // 0: this layout is absent; the table: u64, the first value of each chunk
};

struct Blob {
    const Header* head;

    template <class T>
    const T* at(u64 offset) const {
        return reinterpret_cast<const T*>(reinterpret_cast<const char*>(head) + offset);
    }
};

}  // namespace secateur
