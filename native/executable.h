// Memory that holds code. It is written first and made executable then, and never both at once.
#pragma once
#include <cstring>

#if defined(_WIN32)  // not tried
#include <windows.h>
#elif !defined(__unix__) && !defined(__APPLE__)
#error "no way to make memory executable is known here"
#else
#include <sys/mman.h>
#endif

#include "blob.h"

namespace secateur {

class Executable {
public:
    Executable() = default;
    Executable(const Executable&) = delete;
    Executable& operator=(const Executable&) = delete;

    // False where the system refuses: no memory, or none that may be executed (SELinux, MDWE, a hardened container).
    bool hold(const u8* code, std::size_t bytes) {
        if (!bytes) return false;
        size_ = bytes;
#if defined(_WIN32)
        DWORD before;
        memory_ = VirtualAlloc(nullptr, bytes, MEM_COMMIT | MEM_RESERVE, PAGE_READWRITE);
        if (!memory_) return false;
        std::memcpy(memory_, code, bytes);
        return VirtualProtect(memory_, bytes, PAGE_EXECUTE_READ, &before) &&
               FlushInstructionCache(GetCurrentProcess(), memory_, bytes);
#else
        void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (found == MAP_FAILED) return false;
        memory_ = found;
        std::memcpy(memory_, code, bytes);
        return mprotect(memory_, bytes, PROT_READ | PROT_EXEC) == 0;
#endif
    }
    ~Executable() {
        if (!memory_) return;
#if defined(_WIN32)
        VirtualFree(memory_, 0, MEM_RELEASE);
#else
        munmap(memory_, size_);
#endif
    }
    const u8* at(i64 offset) const { return static_cast<const u8*>(memory_) + offset; }

private:
    void* memory_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace secateur
