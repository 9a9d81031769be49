// What layers write that give images, and convolutions, which are among these.
#pragma once
#include "generated.h"

namespace secateur {

struct Result {
    Images to, add;  // no data: nothing is added
    Finish finish;   // without what is added

    // For channels from `first` on, of which what is added lies there.
    Finish at(i64 first, const float* added) const {
        return {finish.scale ? finish.scale + first : nullptr, finish.shift ? finish.shift + first : nullptr,
                add.data ? added : nullptr, add.frame.plane(), finish.activation};
    }
};

struct Convolution {
    Blob blob;
    const Generated* code;  // for this shape, or NULL
    Geometry shape;         // of whose batch nothing is asked
};

// Convolves so many images. What lies between the rows of the result may be overwritten. False if there is no memory for
// scratch.
bool convolve(const Convolution& convolution, const Images& from, i64 images, const Result& result, int threads);

}  // namespace secateur
