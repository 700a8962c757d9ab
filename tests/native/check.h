/* Ends a stress test where something does not hold. */
#include <stdio.h>
#include <stdlib.h>

#define CHECK(what)                                                         \
    do {                                                                    \
        if (!(what)) {                                                      \
            fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #what); \
            abort();                                                        \
        }                                                                   \
    } while (0)
