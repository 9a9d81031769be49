// The few instructions that generated code consists of, as their bytes (Intel's manual, volume 2: EVEX, VEX, ModRM).
#pragma once
#include <utility>
#include <vector>

#include "blob.h"

namespace secateur {

enum Register { kRax, kRcx, kRdx, kRbx, kRsp, kRbp, kRsi, kRdi, kR8, kR9, kR10, kR11 };

// Bases are none of kRsp and kRbp, which would be encoded otherwise. Vector registers are numbers from 0 to 31, of 512
// bits. Displacements fit into 32 bits, which the caller has checked.
class Assembler {
public:
    std::size_t at() const { return size_; }
    std::vector<u8> take() {
        bytes_.resize(size_);
        return std::move(bytes_);
    }

    void landing() { put(0xf3, 0x0f, 0x1e, 0xfa); }  // endbr64: where an indirect call may arrive
    void lea(Register to, Register base, i64 disp) { wide(to, base), put(0x8d), memory(to, base, disp, 1); }
    void add(Register to, i64 value) {
        wide(0, to), put(0x81, u8(0xc0 | (to & 7))), four(value);
    }
    void decrement(Register to) { wide(0, to), put(0xff, u8(0xc8 | (to & 7))); }
    void jump_if_not_zero(std::size_t target) { put(0x0f, 0x85), four(i64(target) - i64(at()) - 4); }
    void clear() { put(0xc5, 0xf8, 0x77); }  // vzeroupper: or older vector code would be slow from here on
    void ret() { put(0xc3); }
    void align() {
        while (at() % 64) put(0xcc);
    }

    void load(int to, Register base, i64 disp) { vector(kPlain, kNone, 0x10, to, 0, base, disp); }
    void store(Register base, i64 disp, int from) { vector(kPlain, kNone, 0x11, from, 0, base, disp); }
    void broadcast(int to, Register base, i64 disp) { vector(kFused, kWords, 0x18, to, 0, base, disp, 4); }
    // to += x * the float at base + disp
    void multiply_add(int to, int x, Register base, i64 disp) {
        vector(kFused, kWords, 0xb8, to, x, base, disp, 4, 0x10);
    }

    // Of registers alone: to = 0; to += x; and to = its lanes from lane `by` on, with the first ones behind them.
    void zero(int to) { registers(kPlain, kWords, 0xef, to, to, to); }                       // vpxord
    void accumulate(int to, int x) { registers(kPlain, kNone, 0x58, to, to, x); }                   // vaddps
    void rotate(int to, int by) { registers(kImmediate, kWords, 0x03, to, to, to), put(by); }  // valignd

    // prefetcht1 of what lies `ahead` bytes behind this instruction, or behind base
    void prefetch_code(i64 ahead) { put(0x0f, 0x18, 0x15), four(ahead); }
    void prefetch(Register base, i64 ahead) {
        if (base & 8) put(0x41);
        put(0x0f, 0x18, u8(0x90 | (base & 7))), four(ahead);
    }

private:
    enum Map : u8 { kPlain = 1, kFused = 2, kImmediate = 3 };  // 0F, 0F38 and 0F3A
    enum Prefix : u8 { kNone = 0, kWords = 1 };                // none, and 66

    template <class... Byte>
    void put(Byte... some) {
        if (bytes_.size() < size_ + sizeof...(some)) bytes_.resize(2 * size_ + 4096);
        u8* to = bytes_.data() + size_;
        ((*to++ = u8(some)), ...);
        size_ += sizeof...(some);
    }
    void four(i64 value) { put(value, value >> 8, value >> 16, value >> 24); }
    void wide(int reg, int base) { put(u8(0x48 | (reg & 8 ? 4 : 0) | (base & 8 ? 1 : 0))); }

    // [base + disp]; one byte holds a displacement that is a small multiple of `scale`
    void memory(int reg, Register base, i64 disp, int scale) {
        const bool near = disp % scale == 0 && disp / scale >= -128 && disp / scale <= 127;
        put(u8((near ? 0x40 : 0x80) | (reg & 7) << 3 | (base & 7)));
        near ? put(u8(disp / scale)) : four(disp);
    }
    void vector(Map map, Prefix prefix, u8 op, int reg, int first, Register base, i64 disp, int scale = 64,
                u8 spread = 0) {
        evex(map, prefix, op, reg, first, 0x40 | (base & 8 ? 0 : 0x20), spread);
        memory(reg, base, disp, scale);
    }
    void registers(Map map, Prefix prefix, u8 op, int reg, int first, int second) {
        evex(map, prefix, op, reg, first, (second & 16 ? 0 : 0x40) | (second & 8 ? 0 : 0x20), 0);
        put(u8(0xc0 | (reg & 7) << 3 | (second & 7)));
    }
    // other: the bits of the last operand
    void evex(Map map, Prefix prefix, u8 op, int reg, int first, int other, u8 spread) {
        put(0x62, u8((reg & 8 ? 0 : 0x80) | other | (reg & 16 ? 0 : 0x10) | map), u8((~first & 15) << 3 | 4 | prefix),
            u8(0x40 | spread | (first & 16 ? 0 : 8)), op);
    }

    std::vector<u8> bytes_;  // more than are written as yet
    std::size_t size_ = 0;
};

}  // namespace secateur
