/* The C interface of libhalfstep_numpy.so, which Python loads with ctypes. The meaning of each part: halfstep/shrink.h.
 *
 * Compare halfstep_numpy_abi() with HALFSTEP_NUMPY_ABI before anything else is called. Functions that can fail return 0
 * on success, 1 for a mistake of the caller, 2 for anything else (such as no memory), and write why to `message`, at
 * most `message_size` bytes with the final 0; nothing of the output is valid then. No function keeps a pointer. All may
 * be called from several threads at once, on different outputs, and in a process that was forked.
 */
#ifndef HALFSTEP_NUMPY_H
#define HALFSTEP_NUMPY_H

#include <stdint.h>

#define HALFSTEP_NUMPY_ABI 1
#define HALFSTEP_NUMPY_MAX_DIMENSIONS 64

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  void* data;
  int32_t type;       /* halfstep::ArrayType */
  int32_t swapped;    /* not 0: the byte order is not this machine's */
  int32_t dimensions; /* 0 to HALFSTEP_NUMPY_MAX_DIMENSIONS */
  int32_t unused;
  const int64_t* shape;
  const int64_t* strides; /* in bytes */
} halfstep_array;

typedef struct { /* halfstep::ColumnStats */
  double minimum;
  double maximum;
  double error;
  int64_t low;
  int64_t high;
  int32_t fractional;
  int32_t unused;
} halfstep_column;

int32_t halfstep_numpy_abi(void);
const char* halfstep_numpy_version(void);

/* Makes `count` columns those of no elements of `type`. */
int32_t halfstep_shrink_reset(int32_t type, int64_t count, halfstep_column* columns, char* message,
                              int64_t message_size);

/* Scans `in` and converts it into `out`, unless that is null; adds to `columns`, of which there is one for each index
 * along `column_axis`, or a single one if that is -1. `streaming`: not 0 writes around the caches. Asks for huge pages
 * where the output is large and starts at no file. */
int32_t halfstep_shrink(const halfstep_array* in, const halfstep_array* out, int32_t column_axis,
                        halfstep_column* columns, int32_t streaming, int32_t threads, char* message,
                        int64_t message_size);

/* blocked[i] = halfstep::decide_float(columns[i], mode, rules); integer_like[i] likewise, unless that is null. */
int32_t halfstep_shrink_decide(const halfstep_column* columns, int64_t count, int32_t mode, int32_t rules,
                               int32_t* blocked, int32_t* integer_like, char* message, int64_t message_size);

/* types[i] = halfstep::decide_integer(columns[i], type). */
int32_t halfstep_shrink_integers(const halfstep_column* columns, int64_t count, int32_t type, int32_t* types,
                                 char* message, int64_t message_size);

/* positions[i] = where what blocked[i] speaks of is seen first in column i of a float64 array, -1 for none. */
int32_t halfstep_shrink_find(const halfstep_array* in, int32_t column_axis, const int32_t* blocked, int64_t* positions,
                             char* message, int64_t message_size);

#ifdef __cplusplus
}
#endif

#endif
