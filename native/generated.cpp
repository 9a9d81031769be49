// Making code, and running it.
#include "generated.h"

#include <new>

#include "secateur.h"

namespace secateur {

bool Generated::make(const void* blob, i64 bytes, const i64* shape_, int32_t adds, int run_) {
    if (!read(blob, bytes, matrix)) return false;
    const Header& head = *static_cast<const Header*>(blob);
    rows = head.rows, columns = head.columns, nonzeros = i64(head.nonzeros), runs = run_ != 0, program.adds = adds != 0;
    layout.columns.resize(columns);
    if (shape_) {
        std::memcpy(&shape, shape_, sizeof shape);
        if (!shape.good() || shape.channels * shape.kh * shape.kw != columns) return false;
        layout.shifted = shifted = Lines::suit(shape);
        if (shifted)
            Lines(shape).offsets(columns, layout.columns.data());
        else
            Planes(shape).offsets(columns, layout.columns.data());
        for (i64& at : layout.columns) at *= i64(sizeof(float));
        layout.tile = kLanes * i64(sizeof(float));
    } else {
        for (i64 j = 0; j < columns; j++) layout.columns[j] = j * kLanes * i64(sizeof(float));
        layout.tile = columns * kLanes * i64(sizeof(float));
    }
    if (!generate(matrix, head, layout, program)) return false;
    blocks = (rows + layout.rows() - 1) / layout.rows(), code_bytes = i64(program.code.size());
    if (run_ == kInterpreted) return true;
    matrix = Rows(), layout = Layout();
    if (!run_ || !code_bytes) return true;
    const bool held = memory.hold(program.code.data(), program.code.size());
    std::vector<u8>().swap(program.code);
    return held;
}

void Generated::run(i64 begin, i64 end, const float* x, i64 tiles, const float* bias, float* sums) const {
    if (!layout.columns.empty()) return interpret(row(begin), row(end), x, tiles, bias, sums);
    for (i64 i = begin * parts(); i < end * parts(); i++) {
        const Unit& unit = program.units[i];
        const auto call = reinterpret_cast<Call>(reinterpret_cast<std::uintptr_t>(memory.at(unit.code)));
        call(x, program.weights.data() + unit.weights, sums, tiles, bias);
    }
}

void Generated::interpret(i64 begin, i64 end, const float* x, i64 tiles, const float* bias, float* sums) const {
    for (i64 t = 0; t < tiles; t++)
        for (i64 r = begin; r < end; r++)
            for (int i = 0; i <= kLanes - layout.taps(); i++) {
                float& sum = sums[(t * rows + r) * kLanes + i];
                if (!program.adds) sum = bias[r];
                for (u32 k = matrix.begin[r]; k < matrix.begin[r + 1]; k++) {
                    const u32 j = matrix.column[k];
                    sum += matrix.value[k] * x[(t * layout.tile + layout.columns[j]) / 4 + i + j % layout.taps()];
                }
            }
}

}  // namespace secateur

using namespace secateur;

void* secateur_generate(const void* blob, int64_t bytes, const int64_t* shape, int32_t adds, int32_t run) {
    if (run == 1 && !secateur_generates()) return nullptr;
    Generated* made = new (std::nothrow) Generated{};
    if (made && made->make(blob, bytes, shape, adds, run)) return made;
    delete made;
    return nullptr;
}

void secateur_discard(void* code) { delete static_cast<Generated*>(code); }

int64_t secateur_generated(const void* code, int32_t part, void* to) {
    const Generated& made = *static_cast<const Generated*>(code);
    auto copy = [&](const auto& from) {
        const std::size_t bytes = from.size() * sizeof from[0];
        if (to && bytes) std::memcpy(to, from.data(), bytes);
        return i64(bytes);
    };
    switch (part) {
        case 0: return copy(made.program.code), made.code_bytes;  // which may be in executable memory by now
        case 1: return copy(made.program.weights);
        default: return copy(made.program.units);
    }
}

int32_t secateur_generates(void) {
#if defined(__x86_64__) || defined(_M_X64)
    if (std::strcmp(kernels->name, "avx512") != 0) return 0;
    const u8 nothing = 0xc3;  // ret
    return Executable().hold(&nothing, 1);
#else
    return 0;
#endif
}
