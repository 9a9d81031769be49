/* The C ABI of secateur's sparse kernels: raw pointers, float32, no torch headers.
 *
 * A "blob" is a packed sparse matrix: position-independent bytes made by secateur_pack. Functions that compute return 0,
 * -1 if the arguments make no sense (a blob of another version, ...), or -2 if there is no memory for scratch.
 */
#ifndef SECATEUR_H
#define SECATEUR_H
#include <stdint.h>

#if defined(_WIN32)
#define SECATEUR_API __declspec(dllexport)
#else
#define SECATEUR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SECATEUR_ABI 18

/* SECATEUR_ABI of the library. */
SECATEUR_API int32_t secateur_abi(void);

/* The text of this header: the functions of this library, and what they take. */
SECATEUR_API const char* secateur_header(void);

/* The instruction set in use: "avx512", "avx2", "neon" or "portable": the best one that this CPU has, or the one
 * named by the environment variable SECATEUR_ISA when the library was loaded, if the CPU has it. */
SECATEUR_API const char* secateur_isa(void);

/* Chooses an instruction set by name; 0, or -1 if this CPU or build does not have it. For tests. */
SECATEUR_API int32_t secateur_set_isa(const char* name);

/* The address of GOMP_parallel in the OpenMP library that torch has loaded, or NULL: work is then not shared. */
SECATEUR_API void secateur_set_parallel(void* gomp_parallel);

/* Packs the dense row-major matrix weight[rows][columns] into blob and returns the bytes needed. With less room in blob
 * it only counts. groups > 1: the matrix is block-diagonal, weight holds rows of columns / groups each, and row r sees the
 * (r / (rows / groups))-th block of columns (a grouped convolution). values: 0 float32, and rounded
 * to the nearest, 1 float16, 2 bfloat16. Its layouts are those of the instruction set in use, of which any other one takes
 * the panels. -1 if it cannot be packed. */
SECATEUR_API int64_t secateur_pack(const float* weight, int64_t rows, int64_t columns, int64_t groups, int32_t values,
                                   void* blob, int64_t room);

/* The dense matrix that a blob was packed from, as secateur_pack takes it: weight[rows][columns / groups], with +0 for what
 * was zero. 0, or -1 if the bytes are no packed matrix of this size. */
SECATEUR_API int32_t secateur_unpack(const void* blob, int64_t bytes, int64_t rows, int64_t columns, int64_t groups,
                                     float* weight);

/* Whether code generated here can run: 1 with "avx512" in use and memory that may be made executable, else 0. */
SECATEUR_API int32_t secateur_generates(void);

/* Machine code for one packed matrix, which it holds no pointer to: for Linear layers, or for convolutions of this shape,
 * of whatever batch. NULL if the bytes are no packed matrix, or there is no memory. adds != 0: for products that
 * are added to what is there, as those with the states of an LSTM or plain RNN are. run: 1 to be run, and NULL where
 * nothing generated can; 0 only to be looked at; 2, for tests on any CPU, to have what it computes computed without it.
 * Threads may share it. */
SECATEUR_API void* secateur_generate(const void* blob, int64_t bytes, const int64_t* shape, int32_t adds,
                                     int32_t run);

/* Frees what secateur_generate returned. */
SECATEUR_API void secateur_discard(void* code);

/* Copies a part of generated code, 0: the bytes of code (if not to be run), 1: the floats it reads as weights, 2: its
 * units, int64[4] each: offset of the code in bytes, offset of the weights in floats, first row, rows. Returns the bytes
 * of the part; with to == NULL only that. */
SECATEUR_API int64_t secateur_generated(const void* code, int32_t part, void* to);

/* y[n][rows] = x[n][columns] * W^T + bias; bias may be NULL. code: generated from this blob to be run, for where n is 12
 * or more; or NULL. */
SECATEUR_API int32_t secateur_linear(const void* blob, const void* code, const float* x, int64_t n, const float* bias,
                                     float* y, int32_t threads);

/* Products of one input, as secateur_linear computes each: ys[i][n][rows of blob i] = x[n][columns] * W_i^T + bias i. At
 * most 16, all of as many columns. An entry of codes, or codes, and an entry of biases may be NULL. */
SECATEUR_API int32_t secateur_products(int32_t count, const void* const* blobs, const void* const* codes,
                                       const float* const* biases, const float* x, int64_t n, float* const* ys,
                                       int32_t threads);

/* y[n][rows of the last blob]: x[n][columns of the first] through `layers` products, each with its code (an entry, or
 * codes, may be NULL; as for secateur_linear) and its bias (an entry may be NULL). After it comes the activation of this
 * number: 0: none, 1: ReLU, 2: ReLU6, 3: GELU, 4: its tanh form, 5: SiLU, 6: tanh, 7: sigmoid, 8: hardswish, 9: hardsigmoid.
 * With 16 added it is a gate: the next layer, of the same shape and no gate, has the same input, and its result is
 * multiplied by this one before its own activation. Between layers values keep the kernels' layout. */
SECATEUR_API int32_t secateur_chain(int32_t layers, const void* const* blobs, const void* const* codes,
                                    const float* const* biases, const int32_t* activations, const float* x,
                                    int64_t n, float* y, int32_t threads);

/* y[batch][out][oh][ow] = conv(x[batch][channels][height][width]); columns of the blob = channels * kh * kw.
 * shape: batch, channels, height, width, kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w.
 * Grouped convolutions are packed with groups. Padding is with zeros. code: generated from this blob, or NULL; it is
 * passed over for other shapes, and if it is only to be looked at. */
SECATEUR_API int32_t secateur_conv2d(const void* blob, const void* code, const float* x, const int64_t shape[12],
                                     const float* bias, float* y, int32_t threads);

/* y[count][columns][rows] = the transpose of each of x[count][rows][columns]: an image with its channels last from one
 * with its channels first, or the other way round. */
SECATEUR_API void secateur_transpose(const float* x, int64_t count, int64_t rows, int64_t columns, float* y,
                                     int32_t threads);

/* One step of a network of convolutions. Values are images, and numbered: 0 is x, and each step writes one of 1 to the
 * number of steps, which no other writes: activation(scale * (W from, or from pooled, or from) + shift + add). */
typedef struct {
    int32_t kind;       /* 0: convolution, 1: maxima, 2: averages, 3: neither, just what is done after these */
    int32_t from, to;   /* the value read, and the one written */
    int32_t add;        /* a value of the size of what is written, or -1 */
    int32_t activation; /* by its number, as for secateur_chain */
    int32_t counted;    /* averages: != 0 divides by the window, else by what of it lies in the image */
    int32_t times;      /* kind 3 without a scale: a value of one pixel a channel, by which `from` is multiplied; or -1 */
    const void* blob;   /* of a convolution, else not looked at */
    const void* code;   /* generated from it for this shape, or NULL; as for secateur_conv2d */
    const float* scale; /* [channels written], or NULL: 1 */
    const float* shift; /* [channels written], or NULL: 0 */
    int64_t shape[12];  /* as for secateur_conv2d, the batch not looked at; kh and kw are the window of maxima and averages,
                         * the latter without dilation; of kind 3 only channels, height and width are looked at */
} secateur_step;

/* y = the value that the last step writes, from x[batch][channels][height][width]. Between steps images keep the layout
 * in which convolutions read them. */
SECATEUR_API int32_t secateur_network(const secateur_step* steps, int32_t count, int64_t batch, const float* x, float* y,
                                      int32_t threads);

/* One layer and direction of an LSTM (kind 0; gates i f g o), a GRU (kind 1; gates r z n) or a plain RNN (one gate; kind
 * 2: tanh, 3: ReLU) over `steps` steps.
 * Rows of all steps lie one after the other (time-major); step t has sizes[t] rows, its first sequences (as in a
 * packed sequence; all equal to batch otherwise).
 *   codes      NULL, or code, entries of which may be NULL, generated from input, recurrent (of the latter to add, but
 *              for a GRU) and projection
 *   input      blob of weight_ih; x [rows of all steps][input] is what it sees, input_bias is added (GRU: b_ih;
 *              others: b_ih + b_hh; or NULL). Or NULL: then gates holds all this,
 *   gates      [rows of all steps][gates * hidden], overwritten; else NULL
 *   recurrent  blob of weight_hh, [gates * hidden][state]; state = hidden, or proj if projection != NULL
 *   projection blob of weight_hr [proj][hidden] of an LSTM, or NULL
 *   bias       GRU: b_hh [3 * hidden], or NULL
 *   h          [batch][state], c [batch][hidden] (LSTM, else NULL): initial state in, final state out
 *   out        h of every step, rows out_stride floats apart, or NULL
 *   reverse    != 0: from the last step to the first */
SECATEUR_API int32_t secateur_recurrent(int32_t kind, const void* const* codes, const void* input, const float* x,
                                        const float* input_bias, float* gates, const void* recurrent,
                                        const void* projection, const int64_t* sizes, int64_t steps, int64_t batch,
                                        const float* bias, float* h, float* c, float* out, int64_t out_stride,
                                        int32_t reverse, int32_t threads);

/* One step of such a cell: next_h [n][hidden] and, of an LSTM, next_c [n][hidden] (else NULL) from h and c, which may be
 * NULL: zeros. input, x, gates and recurrent as above, for one step of n rows; input_bias is b_ih and bias is b_hh, each
 * [gates * hidden], or both are NULL. With gates these hold b_ih and, unless it is a GRU, b_hh already. */
SECATEUR_API int32_t secateur_cell(int32_t kind, const void* input, const float* x, float* gates, const void* recurrent,
                                   int64_t n, const float* input_bias, const float* bias, const float* h,
                                   const float* c, float* next_h, float* next_c, int32_t threads);

/* Takes down what count floats are into watch, memory on 8 bytes, and returns the bytes needed. With watch == NULL only
 * counts. */
SECATEUR_API int64_t secateur_watch(const float* weight, int64_t count, void* watch);

/* Whether one of the tensors is seen to differ from what its watch took down: 1, or 0. all != 0 reads every weight.
 * Otherwise a call reads 8 non-zeros of each tensor, spread over it, and the next of its pieces: after 2048 calls every
 * weight was read. A piece has a 2048th of the weights, at least 256. */
SECATEUR_API int32_t secateur_changed(int32_t tensors, const float* const* weights, void* const* watches, int32_t all);

/* Whether dictionaries of Python hold the very objects that they held: 1, or 0. Whoever calls it has Python's lock.
 *   next     the address of PyDict_Next
 *   own      a dictionary, which is looked at first; dicts are `count` further ones
 *   entries  for each of them key and value by turns, in its order, where a value that is NULL may be any; then NULL */
SECATEUR_API int32_t secateur_same(const void* next, void* own, int32_t count, void* const* dicts,
                                   const void* const* entries);

#ifdef __cplusplus
}
#endif
#endif
