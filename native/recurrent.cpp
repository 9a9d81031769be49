// LSTM, GRU and plain RNN: one layer and direction from the first step to the last, or one step of a cell.
#include <cstring>

#include "generated.h"
#include "linear.h"
#include "secateur.h"

namespace secateur {
namespace {

enum Kind : int32_t { kLstm, kGru, kTanh, kRelu };

constexpr i64 kGates[] = {4, 3, 1, 1};  // of each kind

struct Recurrent {
    int32_t kind;
    Blob input, recurrent, projection;
    const Generated *input_code, *recurrent_code, *projection_code;
    const float *x, *input_bias;
    float* gates;  // the input's part for all steps, if there is no blob for it
    const i64* sizes;
    i64 steps, batch, hidden, state;
    const float* bias;
    float *h, *c, *out;  // out: NULL, if the last states are enough
    i64 out_stride;
    bool reverse;
    int threads;  // of a product

    i64 gate_rows() const { return kGates[kind] * hidden; }

    // The states of `units` units, of one sequence or of a panel of them, from their gates in[gates][units]; the cells of
    // an LSTM are updated.
    void activate(const float* in, i64 units, float* cells, float* to) const {
        if (kind == kLstm) return kernels->lstm(in, units, cells, to);
        std::memcpy(to, in, units * sizeof(float));
        kernels->activate(kind == kTanh ? Activation::kTanh : Activation::kRelu, to, units);
    }

    // Calls step(sequences of [begin, end) that are live, row of the first of them, the input's part of its gates) for
    // each step, in order. That part is computed for a few steps at a time, so that it stays in the cache.
    template <class Step>
    bool each(i64 begin, i64 end, const Step& step) const {
        const i64 n = end - begin, rows = gate_rows();
        const i64 together = n < kWidth ? kWidth / n : 1;
        float* part = input.head ? projected.get(together * n * rows) : gates;
        const i64 columns = input.head ? input.head->columns : 0;
        float* copies = input.head && n < batch ? collected.get(together * n * columns) : nullptr;
        if (!part || (input.head && n < batch && !copies)) return false;
        i64 offset = 0;  // of the first row of step t
        if (reverse)
            for (i64 t = 0; t < steps; t++) offset += sizes[t];
        i64 ready = 0, used = 0;  // rows of `part`, and how many of these are behind us
        for (i64 i = 0; i < steps; i++) {
            const i64 t = reverse ? steps - 1 - i : i, live = live_at(t, begin, end);
            if (reverse) offset -= sizes[t];
            if (live > 0) {
                const i64 row = offset + begin;
                if (!input.head) {
                    if (!step(live, row, part + row * rows)) return false;
                } else {
                    if (used == ready) {
                        ready = used = 0;
                        i64 last = offset;
                        for (i64 k = 0; k < together && i + k < steps; k++) {
                            const i64 s = reverse ? t - k : t + k, more = live_at(s, begin, end);
                            if (k > 0) last += reverse ? -sizes[s] : sizes[s - 1];
                            if (copies)
                                std::memcpy(copies + ready * columns, x + (last + begin) * columns,
                                            more > 0 ? more * columns * sizeof(float) : 0);
                            ready += more > 0 ? more : 0;
                        }
                        const float* from = copies ? copies : x + (reverse ? last : offset) * columns;
                        if (!linear(input, input_code, from, ready, input_bias, part, threads)) return false;
                    }
                    // rows are in the order of x; without copies a reverse pass takes them from the end
                    const i64 at = reverse && !copies ? ready - used - live : used;
                    used += live;
                    if (!step(live, row, part + at * rows)) return false;
                }
            }
            if (!reverse) offset += sizes[t];
        }
        return true;
    }

    i64 live_at(i64 t, i64 begin, i64 end) const { return (sizes[t] < end ? sizes[t] : end) - begin; }

    // The sequences [begin, end), at most kWidth, through all steps.
    bool run(i64 begin, i64 end) const {
        const int width = width_of(end - begin, kernels->jagged && recurrent.head->groups);
        return width >= 8 ? by_panels(begin, end, width) : by_rows(begin, end);
    }

    bool by_rows(i64 begin, i64 end) const {
        const i64 n = end - begin, rows = gate_rows();
        float* scratch = gathered.get(n * rows);
        if (!scratch) return false;
        return each(begin, end, [&](i64 live, i64 row, float* in) {
            float* h0 = h + begin * state;
            if (kind == kGru) {
                if (!linear(recurrent, h0, live, bias, scratch, false, threads)) return false;
                for (i64 b = 0; b < live; b++) kernels->gru(in + b * rows, scratch + b * rows, hidden, h0 + b * state);
            } else {
                float* to = projection.head ? scratch : h0;
                if (!linear(recurrent, h0, live, nullptr, in, true, threads)) return false;
                for (i64 b = 0; b < live; b++)
                    activate(in + b * rows, hidden, c ? c + (begin + b) * hidden : c, to + b * hidden);
                if (projection.head && !linear(projection, scratch, live, nullptr, h0, false, threads)) return false;
            }
            for (i64 b = 0; out && b < live; b++)
                std::memcpy(out + (row + b) * out_stride, h0 + b * state, state * sizeof(float));
            return true;
        });
    }

    // Everything [features][width] from the first step to the last, so that nothing but inputs and outputs is turned.
    bool by_panels(i64 begin, i64 end, int width) const {
        const Kernels& k = *kernels;
        const int n = int(end - begin);
        const i64 rows = gate_rows(), cells = hidden * width, states = state * width;
        float* part = gathered.get((2 * rows + 3 * hidden + 2 * state) * width);  // the input's part of the gates
        const float* start = bias ? bias : zeros.get(rows > state ? rows : state);
        if (!part || !start) return false;
        float *s = part + rows * width, *hp = s + rows * width, *fresh_h = hp + states, *cp = fresh_h + states;
        float *fresh_c = cp + cells, *before = fresh_c + cells;  // before the projection
        k.panel_pack(h + begin * state, state, n, width, state, hp);
        if (c) k.panel_pack(c + begin * hidden, hidden, n, width, hidden, cp);
        const bool done = each(begin, end, [&](i64 live, i64 row, const float* in) {
            const bool all = live == n;
            float *to_h = all ? hp : fresh_h, *to_c = all ? cp : fresh_c;
            k.panel_pack(in, rows, int(live), width, rows, part);
            if (kind == kGru) {
                multiply(recurrent, recurrent_code, hp, width, start, s);
                if (!all) std::memcpy(to_h, hp, states * sizeof(float));
                k.gru(part, s, cells, to_h);
            } else {
                multiply(recurrent, recurrent_code, hp, width, nullptr, part);
                if (c && !all) std::memcpy(to_c, cp, cells * sizeof(float));
                activate(part, cells, to_c, projection.head ? before : to_h);
                if (projection.head) multiply(projection, projection_code, before, width, zeros.get(state), to_h);
            }
            if (!all) {  // the other sequences have ended, or not begun
                keep(to_h, hp, states, width, live);
                if (c) keep(to_c, cp, cells, width, live);
            }
            if (out) k.panel_unpack(hp, int(live), width, state, out + row * out_stride, out_stride);
            return true;
        });
        if (!done) return false;
        k.panel_unpack(hp, n, width, state, h + begin * state, state);
        if (c) k.panel_unpack(cp, n, width, hidden, c + begin * hidden, hidden);
        return true;
    }

    static void keep(const float* from, float* to, i64 size, int width, i64 live) {
        for (i64 i = 0; i < size; i += width) std::memcpy(to + i, from + i, live * sizeof(float));
    }
};

}  // namespace
}  // namespace secateur

using namespace secateur;

int32_t secateur_recurrent(int32_t kind, const void* const* codes, const void* input, const float* x,
                           const float* input_bias, float* gates, const void* recurrent, const void* projection,
                           const int64_t* sizes, int64_t steps, int64_t batch, const float* bias, float* h, float* c,
                           float* out, int64_t out_stride, int32_t reverse, int32_t threads) {
    if (kind < kLstm || kind > kRelu || (kind == kLstm) != (c != nullptr) || (projection && kind != kLstm)) return -1;
    if (!valid(recurrent) || (projection && !valid(projection)) || (input ? !valid(input) || !x : !gates)) return -1;
    const Blob i{static_cast<const Header*>(input)}, r{static_cast<const Header*>(recurrent)},
        p{static_cast<const Header*>(projection)};
    const i64 count = kGates[kind], hidden = r.head->rows / count, state = r.head->columns;
    if (r.head->rows % count || (projection ? p.head->columns != hidden || p.head->rows != state : hidden != state))
        return -1;
    if (input && i.head->rows != r.head->rows) return -1;
    const Generated* code[3] = {};
    for (int k = 0; codes && k < 3; k++) code[k] = static_cast<const Generated*>(codes[k]);
    if (input ? !fits(code[0], i, false) : code[0] != nullptr) return -1;
    if (!fits(code[1], r, kind != kGru) || (projection ? !fits(code[2], p, false) : code[2] != nullptr)) return -1;
    // Sequences do not wait for each other: each part runs from the first step to the last, on one thread. A single step
    // of few sequences has nothing but its products to share.
    const i64 widest = code[1] ? kLanes : kWidth, fit = (batch + widest - 1) / widest;
    const i64 shared = batch / 8 < threads ? batch / 8 : threads;
    const i64 parts = fit > shared ? fit : shared;
    const int each = parts == 1 && steps == 1 ? threads : 1;
    const Recurrent layer{kind,    i,     r,     p,      code[0], code[1], code[2], x, input_bias, gates,
                          sizes,   steps, batch, hidden, state,   bias,    h,       c, out,        out_stride,
                          reverse != 0, each};
    std::atomic<bool> enough{true};
    share(parts, threads, [&](i64 i) {
        if (!layer.run(batch * i / parts, batch * (i + 1) / parts)) enough = false;
    });
    return enough ? 0 : -2;
}

int32_t secateur_cell(int32_t kind, const void* input, const float* x, float* gates, const void* recurrent, int64_t n,
                      const float* input_bias, const float* bias, const float* h, const float* c, float* next_h,
                      float* next_c, int32_t threads) {
    if (!valid(recurrent) || n < 0) return -1;
    const Header& head = *static_cast<const Header*>(recurrent);
    const std::size_t state = n * head.columns * sizeof(float);
    auto start = [&](const float* from, float* to) {
        if (from && to) std::memcpy(to, from, state);
        if (!from && to) std::memset(to, 0, state);
    };
    start(h, next_h);
    start(c, next_c);
    if (kind != kGru && input_bias && bias) {
        float* both = biases.get(head.rows);
        if (!both) return -2;
        for (u32 r = 0; r < head.rows; r++) both[r] = input_bias[r] + bias[r];
        input_bias = both;
    }
    return secateur_recurrent(kind, nullptr, input, x, input_bias, gates, recurrent, nullptr, &n, 1, n, bias, next_h,
                              next_c, nullptr, 0, 0, threads);
}
