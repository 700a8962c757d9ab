#include "double.h"

#define BAD_PARAMETER 2000 /* CUDNN_STATUS_BAD_PARAM */
#define UNSUPPORTED 3000   /* CUDNN_STATUS_NOT_SUPPORTED */

struct descriptor {
    struct object object;
    int type, count, sides[8], strides[8];
    size_t bytes; /* of the memory that it describes; 0: not known */
};

struct performance { /* cudnnConvolutionFwdAlgoPerf_t and the like */
    int algorithm, status;
    float milliseconds;
    size_t memory;
    int deterministic, math_type, reserved[3];
};

void *new_descriptor(void);
bool is_descriptor(const char *function, const char *name, void *, bool may_be_null);
bool is_data(const char *function, const char *name, const void *, size_t size);
size_t size_of(void *descriptor);
void offer_algorithms(int most, int *count, struct performance *);
size_t workspace_of(int algorithm);
int cudaRuntimeGetVersion(int *);
int double_number_of_complaints(void);
const char *double_complaint(int);
int double_unsupported(const char *, int);
