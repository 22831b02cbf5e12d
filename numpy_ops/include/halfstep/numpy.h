/* The C interface of libhalfstep_numpy.so, which Python loads with ctypes. The meaning of each part: halfstep/shrink.h,
 * halfstep/policy.h.
 *
 * Compare halfstep_numpy_abi() with HALFSTEP_NUMPY_ABI before anything else is called. Functions that can fail return 0
 * on success, 1 for a mistake of the caller, 2 for anything else (such as no memory), and write why to `message`, at
 * most `message_size` bytes with the final 0, or to the text `out`; nothing else of the output is valid then. No
 * function keeps a pointer. All may be called from several threads at once, on different outputs, and in a process that
 * was forked.
 */
#ifndef HALFSTEP_NUMPY_H
#define HALFSTEP_NUMPY_H

#include <stdint.h>

#define HALFSTEP_NUMPY_ABI 2
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

/* ------------------------------------------------------------------------------------------------------- policies */

/* UTF-8 of `size` bytes; null for none where that is 0. What a function writes to `out`, whatever it was, is the result
 * or why there is none; a final 0 follows, which `size` does not count. It is the caller's, for halfstep_text_free().
 * Null if there was no memory for it. */
typedef struct {
  const char* data;
  int64_t size;
} halfstep_text;

typedef struct { /* halfstep::Layer */
  halfstep_text name;
  halfstep_text type;
  halfstep_text same_as;
} halfstep_layer;

/* Frees what a function of this interface has written, and makes it null. */
void halfstep_text_free(halfstep_text* text);

/* out = the JSON of a policy as PrecisionPolicy::to_json() writes it. `source`: what errors call it. */
int32_t halfstep_policy_read(const halfstep_text* json, const halfstep_text* source, halfstep_text* out);

/* out = the JSON of PrecisionPolicy::named(name). */
int32_t halfstep_policy_named(const halfstep_text* name, halfstep_text* out);

/* rules[i] = the number of the first rule that matches layers[i], -1 for the default. out = "". */
int32_t halfstep_policy_match(const halfstep_text* policy, const halfstep_layer* layers, int64_t count, int64_t* rules,
                              halfstep_text* out);

/* out = the JSON of the plan that a policy makes of `count` layers. */
int32_t halfstep_policy_plan(const halfstep_text* policy, const halfstep_layer* layers, int64_t count,
                             halfstep_text* out);

/* out = the JSON of the plan of a CustomPrecisionPolicy `name` that has said answers[i] of layers[i], not 0 for yes.
 * `half`: "float16" or "bfloat16". */
int32_t halfstep_plan_answers(const halfstep_text* name, const halfstep_text* half, const halfstep_layer* layers,
                              const int32_t* answers, int64_t count, halfstep_text* out);

/* out = the JSON of a plan as PrecisionPlan::to_json() writes it. `source`: what errors call it. */
int32_t halfstep_plan_read(const halfstep_text* json, const halfstep_text* source, halfstep_text* out);

/* out = PrecisionPlan::explain(). */
int32_t halfstep_plan_explain(const halfstep_text* plan, halfstep_text* out);

/* out = PrecisionPlan::diff(other). */
int32_t halfstep_plan_diff(const halfstep_text* plan, const halfstep_text* other, halfstep_text* out);

#ifdef __cplusplus
}
#endif

#endif
