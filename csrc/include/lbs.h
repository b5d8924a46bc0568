/* lbs.h: run a packed network (*.lbs.safetensors) from C, without Python and torch. docs/c.md has an example.
 *
 * A file may come from anybody: it is refused before anything is allocated from a number in it, and no function ends the
 * process. Functions may be called from several threads at once, also on one network. */
#ifndef LBS_H
#define LBS_H

#include <stdint.h>

#if defined(__GNUC__)
#define LBS_API __attribute__((visibility("default")))
#else
#define LBS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lbs_status {
    LBS_OK = 0,
    LBS_ARGUMENT = 1,    /* a null pointer, a count below 0 or beyond memory, no thread, a budget that is no positive number */
    LBS_FILE = 2,        /* missing, damaged, foreign, newer, claims what it does not hold, or costs more than the budget */
    LBS_UNSUPPORTED = 3, /* a network of several programs or with parts in float: Python runs it */
    LBS_BACKEND = 4,     /* LBS_ISA or LBS_SPIN_US says what this processor or library does not have */
    LBS_MEMORY = 5,      /* there is not enough */
    LBS_INTERNAL = 6     /* a fault of this library */
} lbs_status;

typedef enum lbs_dtype {
    LBS_FLOAT32 = 0, /* normalised as the network was trained */
    LBS_UINT8 = 1    /* the bytes of pictures, which the network normalises itself */
} lbs_dtype;

typedef enum lbs_layout {
    LBS_CHANNELS_FIRST = 0, /* [count][channels][height][width] */
    LBS_CHANNELS_LAST = 1   /* [count][height][width][channels] */
} lbs_layout;

/* Of one image, or of what one image becomes. */
typedef struct lbs_shape {
    lbs_dtype dtype;
    int rank;         /* 3: channels, height, width; 1: channels */
    int64_t sizes[3]; /* 1 beyond the rank, so that their product is the number of elements */
} lbs_shape;

typedef struct lbs_network lbs_network;

/* Read a file and lay its weights out for this processor. budget: how many times what a file may cost by itself one image
 * may (2^27 elements, 2^36 products, 2^13 operations): 1 unless you trust the file, INFINITY for any. *network is what
 * lbs_close frees, null after an error. */
LBS_API lbs_status lbs_open(const char* path, double budget, lbs_network** network);

/* Free it; null is fine. No call on it may be under way. */
LBS_API void lbs_close(lbs_network* network);

/* What lbs_run reads and writes, per image. */
LBS_API lbs_status lbs_input(const lbs_network* network, lbs_shape* shape);
LBS_API lbs_status lbs_output(const lbs_network* network, lbs_shape* shape);

/* Run `count` images on at most `threads` threads. images: count times lbs_input elements, without gaps, in `layout` (an lbs_layout);
 * output: count times lbs_output elements, written channels first. Neither depends on the number of threads. */
LBS_API lbs_status lbs_run(const lbs_network* network, const void* images, int layout, int64_t count, int threads,
                           float* output);

/* What the last error of the calling thread was, with the value, the rule and the way out; "" before the first. Names from
 * a file stand in it without control characters. Valid until the thread's next error. */
LBS_API const char* lbs_error(void);

#ifdef __cplusplus
}
#endif
#endif
