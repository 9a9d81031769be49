// Whether objects of Python are still where they were. Python is reached through the one function that is given.
#include <cstddef>

#include "secateur.h"

namespace {

using Next = int (*)(void* dict, std::ptrdiff_t* at, const void** key, const void** value);

// Whether a dictionary holds the entries up to NULL and no others; moves on behind that.
bool same(Next next, void* dict, const void* const*& entries) {
    std::ptrdiff_t at = 0;
    const void *key, *value;
    while (next(dict, &at, &key, &value)) {
        if (key != entries[0] || (entries[1] && value != entries[1])) return false;  // NULL is no key
        entries += 2;
    }
    return !*entries++;
}

}  // namespace

int32_t secateur_same(const void* next, void* own, int32_t count, void* const* dicts, const void* const* entries) {
    const Next step = reinterpret_cast<Next>(const_cast<void*>(next));
    if (!same(step, own, entries)) return 0;
    for (int32_t i = 0; i < count; i++)
        if (!same(step, dicts[i], entries)) return 0;
    return 1;
}
