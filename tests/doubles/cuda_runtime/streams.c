/* Streams, which do their work at once, events and captures. */

#include "double.h"

#include <time.h>

struct stream {
    struct object object;
    unsigned flags;
    int priority;
    bool captures, invalidated;
    int mode;           /* of its capture, which this thread has begun */
    pthread_t thread;
    struct graph *graph;
    struct stream *next; /* that captures */
    long due;    /* when its work is done */
    double time; /* on the simulated clock */
};

/* Of what is captured copies are kept: a graph refers to addresses. */
struct graph {
    struct object object;
    struct node {
        void *target;
        const void *source;
        size_t size;
        int kind;
    } *nodes;
    size_t count;
};

struct event {
    struct object object;
    unsigned flags;
    bool recorded, captured;
    double milliseconds;
    long due;
};

enum { DISABLE_TIMING = 2 };                      /* cudaEventDisableTiming */
enum { NON_BLOCKING = 1 };                        /* cudaStreamNonBlocking */
enum { NO_CAPTURE, ACTIVE_CAPTURE, INVALIDATED }; /* cudaStreamCaptureStatus */
enum { GLOBAL, THREAD_LOCAL, RELAXED };           /* cudaStreamCaptureMode */

static struct stream legacy = {.object.kind = STREAM}, per_thread = {.object.kind = STREAM};
static struct stream *capturing; /* the first one */
static _Thread_local int thread_mode = GLOBAL;

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

/* Which calls spoil a capture (CUDA Runtime API, cudaThreadExchangeStreamCaptureMode, cudaStreamIsCapturing; CUDA C++
   Programming Guide, "Prohibited and Unhandled Operations"):
   1. "Potentially unsafe API calls": a thread may make none while it captures itself, nor while another thread does in
      the mode "global", as it is by default. The mode of the thread, or of the capture, may allow them. NVIDIA names
      cudaMalloc; here they are all calls that allocate, free, map, wait or ask.
   2. In every mode, to wait for a stream that is captured, for an event of the graph, or for the device; or to ask them.
   3. In every mode, any use of the legacy stream while a stream is captured that is not non-blocking. */

int unsafe_call(void)
{
    bool is_forbidden = false;
    for (struct stream *stream = capturing; stream && thread_mode != RELAXED; stream = stream->next) {
        bool is_own = pthread_equal(stream->thread, pthread_self());
        if (is_own ? stream->mode == RELAXED : thread_mode != GLOBAL || stream->mode != GLOBAL)
            continue;
        is_forbidden = stream->invalidated = true;
    }
    return is_forbidden ? failed(CAPTURE_UNSUPPORTED) : OK;
}

/* The legacy stream comprises all blocking ones. */
static bool is_entangled(const struct stream *stream, const struct stream *captured)
{
    return stream == &legacy && !(captured->flags & NON_BLOCKING);
}

int use_stream(struct stream *stream)
{
    bool is_forbidden = false;
    for (struct stream *captured = capturing; captured; captured = captured->next)
        if (is_entangled(stream, captured))
            is_forbidden = captured->invalidated = true;
    return is_forbidden ? failed(CAPTURE_IMPLICIT) : OK;
}

/* Wait for a stream, or ask it. */
static int watch_stream(struct stream *stream)
{
    int error = use_stream(stream);
    if (!error && stream->captures) {
        stream->invalidated = true;
        error = failed(CAPTURE_UNSUPPORTED);
    }
    return error ? error : unsafe_call();
}

static int watch_device(void)
{
    for (struct stream *stream = capturing; stream; stream = stream->next)
        stream->invalidated = true;
    return capturing ? failed(CAPTURE_UNSUPPORTED) : OK;
}

static void stop_capturing(struct stream *stream)
{
    struct stream **link = &capturing;
    while (*link != stream)
        link = &(*link)->next;
    *link = stream->next;
    stream->captures = false;
}

int cudaThreadExchangeStreamCaptureMode(int *mode)
{
    ENTER_ANYWAY;
    int before = thread_mode;
    if (!mode || *mode < GLOBAL || *mode > RELAXED)
        return failed(INVALID_VALUE);
    thread_mode = *mode;
    *mode = before;
    return OK;
}

bool keep_copy(struct stream *stream, void *target, const void *source, size_t size, int kind)
{
    struct graph *graph = stream->graph;
    if (!stream->captures)
        return false;
    graph->nodes = realloc(graph->nodes, (graph->count + 1) * sizeof *graph->nodes);
    graph->nodes[graph->count++] = (struct node){target, source, size, kind};
    return true;
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
    if (stream->captures)
        stop_capturing(stream);
    return OK;
}

int cudaStreamSynchronize(void *pointer)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    int error = watch_stream(stream);
    if (error)
        return error;
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
    int error = watch_stream(stream);
    return error ? error : ask(stream->due);
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
    int error = watch_device();
    if (error)
        return error;
    wait_for_all();
    trim_pools();
    return OK;
}

/* Captures. */

int cudaStreamBeginCapture(void *pointer, int mode)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    if (stream == &legacy || stream->captures || mode < GLOBAL || mode > RELAXED)
        return failed(CAPTURE_UNSUPPORTED);
    stream->captures = true;
    stream->invalidated = false;
    stream->mode = mode;
    stream->thread = pthread_self();
    stream->graph = new_object(GRAPH, sizeof *stream->graph);
    stream->next = capturing;
    capturing = stream;
    return OK;
}

int cudaStreamEndCapture(void *pointer, void **graph)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream || !stream->captures)
        return failed(INVALID_VALUE);
    if (stream->mode != RELAXED && !pthread_equal(stream->thread, pthread_self()))
        return failed(908); /* cudaErrorStreamCaptureWrongThread */
    stop_capturing(stream);
    *graph = stream->invalidated ? NULL : stream->graph;
    return stream->invalidated ? failed(901) : OK; /* cudaErrorStreamCaptureInvalidated */
}

int cudaStreamIsCapturing(void *pointer, int *status)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    for (struct stream *captured = capturing; captured; captured = captured->next)
        if (is_entangled(stream, captured))
            return failed(CAPTURE_IMPLICIT); /* that spoils nothing */
    *status = !stream->captures ? NO_CAPTURE : stream->invalidated ? INVALIDATED : ACTIVE_CAPTURE;
    return OK;
}

int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags)
{
    ENTER;
    (void)flags;
    *executable = object(graph, GRAPH, "graph");
    return *executable ? OK : failed(INVALID_VALUE);
}

int cudaGraphLaunch(void *pointer, void *on)
{
    ENTER;
    struct graph *graph = object(pointer, GRAPH, "graph");
    struct stream *stream = stream_of(on);
    if (!graph || !stream)
        return failed(INVALID_VALUE);
    int error = use_stream(stream);
    for (size_t n = 0; !error && n < graph->count; n++) {
        struct node *node = &graph->nodes[n];
        error = copy_memory("cudaGraphLaunch", node->target, node->source, node->size, node->kind);
    }
    return error;
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
    int error = use_stream(stream);
    if (error)
        return error;
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
    int error = unsafe_call();
    return error ? error : ask(event->due);
}

int cudaEventSynchronize(void *pointer)
{
    ENTER;
    struct event *event = object(pointer, EVENT, "event");
    if (!event)
        return failed(INVALID_HANDLE);
    if (event->captured)
        return failed(CAPTURED_EVENT);
    int error = unsafe_call();
    if (error)
        return error;
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
    int error = use_stream(stream);
    if (error)
        return error;
    if (stream->captures && event->recorded && !event->captured) {
        stream->invalidated = true;
        return failed(CAPTURE_ISOLATION);
    }
    if (event->captured && !stream->captures) /* it would be captured as well, until its capture is joined */
        return MISTAKE(CAPTURE_ISOLATION, "cudaStreamWaitEvent: the event belongs to a graph, the stream does not");
    if (simulates_time && stream->time < event->milliseconds)
        stream->time = event->milliseconds;
    return OK;
}
