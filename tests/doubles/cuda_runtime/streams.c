/* Streams, which do their work at once, events and captures. */

#include "double.h"

#include <time.h>

struct stream {
    struct object object;
    unsigned flags;
    int priority;
    bool captures, invalidated;
    long spoilt; /* how many captures had been when this one began */
    long due;    /* when its work is done */
    double time; /* on the simulated clock */
};

struct event {
    struct object object;
    unsigned flags;
    bool recorded, captured;
    double milliseconds;
    long due;
};

enum { DISABLE_TIMING = 2 };                      /* cudaEventDisableTiming */
enum { NO_CAPTURE, ACTIVE_CAPTURE, INVALIDATED }; /* cudaStreamCaptureStatus */

static struct stream legacy = {.object.kind = STREAM}, per_thread = {.object.kind = STREAM};
static int captures; /* streams that capture */
static long spoilt;  /* how often a call was made that none may make while any stream captures */


/* All work is done at once, but with a lag it is said to be under way: each query is a tick of the clock, and work is
   over that many ticks after it was given, in this order, or when somebody waits for it. */
static long now, lag;

void double_set_lag(int queries) { lag = queries; }

static void wait_until(long due)
{
    if (now < due)
        now = due;
}

static int ask(long due)
{
    if (now >= due)
        return OK;
    now++;
    return NOT_READY;
}

struct stream *stream_of(void *pointer)
{
    if (pointer == NULL || pointer == (void *)1)
        return &legacy;
    return pointer == (void *)2 ? &per_thread : object(pointer, STREAM, "stream");
}

/* With a simulated clock events tell the time at which the work before them would have ended, had each piece taken
   what it is given below: the same in each run. Else they tell the host's time. */
static bool simulates_time;

void double_simulate_time(int yes) { simulates_time = yes; }

void stream_works(struct stream *stream, double milliseconds)
{
    stream->due = now + lag;
    stream->time += milliseconds;
}

void handle_works(void *pointer, double milliseconds)
{
    struct stream *stream = stream_of(pointer);
    if (stream)
        stream_works(stream, milliseconds);
}
void wait_for_all(void) { wait_until(now + lag); }
bool any_capture(void) { return captures > 0; }

static int capture_is_spoilt(struct stream *stream)
{
    stream->invalidated = true;
    return failed(CAPTURE_UNSUPPORTED);
}

static bool is_invalidated(const struct stream *stream) { return stream->invalidated || stream->spoilt != spoilt; }

/* "Potentially unsafe API calls" are forbidden to all threads (cudaStreamBeginCapture, the mode "global"). */
static int captures_are_spoilt(void)
{
    spoilt++;
    return failed(CAPTURE_UNSUPPORTED);
}

int cudaStreamCreateWithPriority(void **pointer, unsigned flags, int priority)
{
    ENTER;
    struct stream *stream = *pointer = new_object(STREAM, sizeof *stream);
    stream->flags = flags;
    stream->priority = priority;
    return OK;
}

int cudaStreamCreateWithFlags(void **pointer, unsigned flags)
{
    return cudaStreamCreateWithPriority(pointer, flags, 0);
}

int cudaStreamCreate(void **pointer) { return cudaStreamCreateWithPriority(pointer, 0, 0); }

int cudaStreamDestroy(void *pointer)
{
    ENTER;
    struct stream *stream = object(pointer, STREAM, "stream");
    if (!stream)
        return failed(INVALID_HANDLE);
    stream->object.destroyed = true;
    captures -= stream->captures;
    return OK;
}

int cudaStreamSynchronize(void *pointer)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    if (captures)
        return captures_are_spoilt();
    wait_until(stream->due);
    trim_pools();
    return OK;
}

int cudaStreamQuery(void *pointer)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    if (captures)
        return captures_are_spoilt();
    return ask(stream->due);
}

int cudaStreamGetFlags(void *pointer, unsigned *flags)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    *flags = stream->flags;
    return OK;
}

int cudaStreamGetPriority(void *pointer, int *priority)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    *priority = stream->priority;
    return OK;
}

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    ENTER;
    *least = 0;
    *greatest = -5;
    return OK;
}

int cudaLaunchHostFunc(void *pointer, void (*function)(void *), void *argument)
{
    ENTER;
    if (!stream_of(pointer))
        return failed(INVALID_HANDLE);
    function(argument);
    return OK;
}

int cudaStreamAddCallback(void *pointer, void (*function)(void *, int, void *), void *argument, unsigned flags)
{
    ENTER;
    if (!stream_of(pointer) || flags)
        return failed(INVALID_HANDLE);
    function(pointer, OK, argument);
    return OK;
}

int cudaDeviceSynchronize(void)
{
    ENTER;
    if (captures)
        return captures_are_spoilt();
    wait_for_all();
    trim_pools();
    return OK;
}

/* Captures: nothing is kept of what is captured, since nothing is computed. */

int cudaStreamBeginCapture(void *pointer, int mode)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    if (stream == &legacy || stream->captures || mode < 0 || mode > 2)
        return failed(CAPTURE_UNSUPPORTED);
    stream->captures = true;
    stream->invalidated = false;
    stream->spoilt = spoilt;
    captures++;
    return OK;
}

int cudaStreamEndCapture(void *pointer, void **graph)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream || !stream->captures)
        return failed(INVALID_VALUE);
    stream->captures = false;
    captures--;
    bool invalidated = is_invalidated(stream);
    *graph = invalidated ? NULL : new_object(GRAPH, sizeof(struct object));
    return invalidated ? failed(901) : OK; /* cudaErrorStreamCaptureInvalidated */
}

int cudaStreamIsCapturing(void *pointer, int *status)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    *status = !stream->captures ? NO_CAPTURE : is_invalidated(stream) ? INVALIDATED : ACTIVE_CAPTURE;
    return OK;
}

int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags)
{
    ENTER;
    (void)flags;
    *executable = object(graph, GRAPH, "graph");
    return *executable ? OK : failed(INVALID_VALUE);
}

int cudaGraphLaunch(void *graph, void *stream)
{
    ENTER;
    return object(graph, GRAPH, "graph") && stream_of(stream) ? OK : failed(INVALID_VALUE);
}

int cudaGraphUpload(void *graph, void *stream)
{
    ENTER;
    return object(graph, GRAPH, "graph") && stream_of(stream) ? OK : failed(INVALID_VALUE);
}

int cudaGraphDestroy(void *graph)
{
    ENTER;
    return object(graph, GRAPH, "graph") ? OK : failed(INVALID_VALUE);
}

int cudaGraphExecDestroy(void *graph)
{
    ENTER;
    return object(graph, GRAPH, "graph") ? OK : failed(INVALID_VALUE);
}

/* Events. */

int cudaEventCreateWithFlags(void **pointer, unsigned flags)
{
    ENTER;
    struct event *event = *pointer = new_object(EVENT, sizeof *event);
    event->flags = flags;
    return OK;
}

int cudaEventCreate(void **pointer) { return cudaEventCreateWithFlags(pointer, 0); }

int cudaEventDestroy(void *pointer)
{
    ENTER;
    struct event *event = object(pointer, EVENT, "event");
    if (!event)
        return failed(INVALID_HANDLE);
    event->object.destroyed = true;
    return OK;
}

int cudaEventRecord(void *pointer, void *on)
{
    ENTER;
    struct event *event = object(pointer, EVENT, "event");
    struct stream *stream = event ? stream_of(on) : NULL;
    if (!stream)
        return failed(INVALID_HANDLE);
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    event->milliseconds = simulates_time ? stream->time : time.tv_sec * 1e3 + time.tv_nsec / 1e6;
    event->recorded = true;
    event->captured = stream->captures;
    event->due = now + lag;
    return OK;
}

int cudaEventQuery(void *pointer)
{
    ENTER;
    struct event *event = object(pointer, EVENT, "event");
    if (!event)
        return failed(INVALID_HANDLE);
    if (event->captured)
        return failed(CAPTURED_EVENT);
    if (captures)
        return captures_are_spoilt();
    return ask(event->due);
}

int cudaEventSynchronize(void *pointer)
{
    ENTER;
    struct event *event = object(pointer, EVENT, "event");
    if (!event)
        return failed(INVALID_HANDLE);
    if (event->captured)
        return failed(CAPTURED_EVENT);
    if (captures)
        return captures_are_spoilt();
    wait_until(event->due);
    trim_pools();
    return OK;
}

int cudaEventElapsedTime(float *milliseconds, void *from, void *to)
{
    ENTER;
    struct event *begin = object(from, EVENT, "event"), *end = object(to, EVENT, "event");
    if (!begin || !end)
        return failed(INVALID_HANDLE);
    if (!begin->recorded || !end->recorded || ((begin->flags | end->flags) & DISABLE_TIMING))
        return MISTAKE(INVALID_HANDLE, "cudaEventElapsedTime: an event was not recorded, or takes no time");
    if (now < begin->due || now < end->due)
        return NOT_READY;
    *milliseconds = end->milliseconds - begin->milliseconds;
    return OK;
}

int cudaStreamWaitEvent(void *pointer, void *on, unsigned flags)
{
    ENTER;
    (void)flags;
    struct stream *stream = stream_of(pointer);
    struct event *event = object(on, EVENT, "event");
    if (!stream || !event)
        return failed(INVALID_HANDLE);
    if (stream->captures && event->recorded && !event->captured) {
        capture_is_spoilt(stream);
        return failed(CAPTURE_ISOLATION);
    }
    if (event->captured && !stream->captures) /* it would be captured as well, until its capture is joined */
        return MISTAKE(CAPTURE_ISOLATION, "cudaStreamWaitEvent: the event belongs to a graph, the stream does not");
    if (simulates_time && stream->time < event->milliseconds)
        stream->time = event->milliseconds;
    return OK;
}
