/* What the parts of the double share: calls that are counted and can be made to fail, and tables of what is there. */

#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* cudaError_t and CUresult: these have the same numbers. */
enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
};

#define KIB 1024ull
#define MIB (KIB * KIB)
#define GRANULARITY (2 * MIB) /* of physical memory */

/* One lock for all that is below. It is recursive: a call may use another. */
extern pthread_mutex_t double_lock;
#define LOCKED __attribute__((cleanup(unlock_double))) int locked = lock_double()
int lock_double(void);
void unlock_double(int *);

/* Begin a call: count it, and return from it with an error if it was told to fail, if a kernel has failed before (the
   error of a context is for ever), or in a child that was forked: CUDA works in none. */
#define ENTER                                          \
    LOCKED;                                            \
    (void)locked;                                      \
    do {                                               \
        static struct call *call;                      \
        int error = enter(&call, __func__, true);      \
        if (error)                                     \
            return error;                              \
    } while (0)
/* The same for calls that a broken device answers, too. */
#define ENTER_ANYWAY                                   \
    LOCKED;                                            \
    (void)locked;                                      \
    do {                                               \
        static struct call *call;                      \
        int error = enter(&call, __func__, false);     \
        if (error)                                     \
            return error;                              \
    } while (0)

struct call;
int enter(struct call **call, const char *name, bool needs_device);
/* Return an error that the calling thread's cudaGetLastError() gives, too. */
int failed(int error);
/* Note a mistake of the caller that hardware may not show; Python reads them. */
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Begin a call that is "potentially unsafe" while a graph is captured. */
#define ENTER_UNSAFE                                   \
    ENTER;                                             \
    do {                                               \
        int error = unsafe_call();                     \
        if (error)                                     \
            return error;                              \
    } while (0)
#define MISTAKE(error, ...) (complain(__VA_ARGS__), failed(error))

/* Ranges of addresses that do not overlap, in order. */
struct range {
    uintptr_t start;
    size_t size;
    int kind;
    size_t charged; /* bytes of the device's memory */
    void *object;
};
struct ranges {
    struct range *items;
    size_t count, room;
};
size_t range_index(const struct ranges *, uintptr_t address); /* of the first that ends after it */
struct range *range_at(const struct ranges *, uintptr_t address);      /* that contains it, or NULL */
struct range *range_from(const struct ranges *, uintptr_t address);    /* that begins there, or NULL */
bool ranges_overlap(const struct ranges *, uintptr_t start, size_t size);
void range_add(struct ranges *, struct range);
void range_remove(struct ranges *, struct range *);

/* Streams, events and the like. They are marked as destroyed, and never freed, so that use after that is found. */
enum kind { STREAM = 0x51, EVENT, POOL, GRAPH, MODULE, FUNCTION, PHYSICAL, DESCRIPTOR };
struct object {
    enum kind kind;
    bool destroyed;
};
void *new_object(enum kind, size_t size);
/* Return the object, or NULL and complain if it is none of that kind, or destroyed. */
void *object(void *, enum kind, const char *what);

/* Device memory: bytes in use of `total`. */
struct memory {
    size_t total, used, peak;
    size_t allocated;                 /* by cudaMalloc */
    size_t pool_used, pool_reserved;  /* of cudaMallocAsync */
    size_t physical, mapped, reserved; /* of the driver's virtual memory: memory, memory that is mapped, addresses */
    size_t pinned, pinned_peak;       /* page-locked host memory */
    size_t copied_in, copied_out, copied_within, copied_pageable;
};
extern struct memory memory;
extern bool moves_data;
bool take_memory(size_t); /* false: there is not as much */
void give_memory(size_t);
void *reserve_addresses(size_t size, size_t alignment, bool usable);
bool is_device_memory(uintptr_t start, size_t size); /* all of it, and readable and writable */
bool touches_device_memory(uintptr_t start, size_t size);
bool is_mapped(uintptr_t start, size_t size); /* by the driver's virtual memory, with access */
bool touches_reserved(uintptr_t start, size_t size);
void trim_pools(void); /* what a synchronization does */

struct stream;
struct stream *stream_of(void *); /* NULL and a complaint: there is none such */
void stream_works(struct stream *, double milliseconds);
void handle_works(void *stream, double milliseconds); /* a library's */
void wait_for_all(void);
int unsafe_call(void);             /* an error if a capture forbids the thread to make one, which spoils that */
int use_stream(struct stream *);   /* an error if a capture forbids to use that stream, which spoils the capture */
/* If the stream is captured: a copy belongs to the graph. Whether it is. */
bool keep_copy(struct stream *, void *target, const void *source, size_t size, int kind);
int copy_memory(const char *name, void *target, const void *source, size_t size, int kind);

/* What work takes on the simulated clock (milliseconds); bytes are copied at 50 GB/s. */
#define KERNEL_TIME 0.05
#define PRODUCT_TIME 0.5
#define COPY_TIME(bytes) ((bytes) / 50e6)
