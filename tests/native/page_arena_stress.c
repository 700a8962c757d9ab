/* The page arena against a model of a GPU: random allocations on several streams whose work is late, driver calls that
   fail, limits that change, threads.

       cc -g -O1 -fsanitize=address,undefined page_arena_stress.c -o stress -pthread && ./stress 10000000 1

   Arguments: the number of steps, and a seed. It is silent and returns 0 where all is well.

   The model knows for each 512 bytes of physical memory which stream's work has used them last. Memory may be handed to
   a stream only if that work comes before the stream's own; a page may be unmapped only when its work is done. What was
   allocated in a capture is only for captures of that stream, until all graphs are forgotten. */

#define _GNU_SOURCE
#include "../../chainer_ooc/swap/devices/cuda/page_arena.c"

#include "check.h"
#include <stdio.h>

enum { PAGE = 4096, PAGES = 2048, UNITS = PAGE / GRAIN, STREAMS = 3, BLOCKS = 512, PHYSICAL = 1024 };

struct event {
    int stream;
    uint64_t given;
    struct event *next;
};

struct gpu {
    struct page_arena *arena;
    uint64_t random;
    uint64_t given[STREAMS], done[STREAMS]; /* work */
    uint64_t before[STREAMS][STREAMS];      /* how much of the second one's work comes before the first one's next */
    bool is_made[PHYSICAL], is_reachable[PAGES];
    uint64_t last[PHYSICAL][UNITS][STREAMS]; /* by the work that used these bytes */
    int page_at[PAGES];                      /* -1: none */
    int failing;                             /* in a thousand */
    bool failed, in_call;
    uint64_t n_events;
    struct {
        uint64_t start, size;
        int stream;
    } blocks[BLOCKS];
    bool is_used[PAGES * UNITS];
    bool captures[STREAMS];
    int graph_of[PAGES * UNITS]; /* a stream and 1, if its graphs may use these bytes */
};

static uint64_t below(struct gpu *gpu, uint64_t bound)
{
    gpu->random ^= gpu->random << 13;
    gpu->random ^= gpu->random >> 7;
    gpu->random ^= gpu->random << 17;
    return gpu->random % bound;
}

static bool fails(struct gpu *gpu)
{
    bool now = gpu->failing && below(gpu, 1000) < (uint64_t)gpu->failing;
    gpu->failed |= now;
    return now;
}

static bool create(void *context, uint64_t *page)
{
    struct gpu *gpu = context;
    if (fails(gpu))
        return false;
    for (int n = 0; n < PHYSICAL; n++)
        if (!gpu->is_made[n]) {
            gpu->is_made[n] = true;
            *page = (uint64_t)n;
            return true;
        }
    gpu->failed = true;
    return false;
}

static void give_back(void *context, uint64_t page)
{
    struct gpu *gpu = context;
    CHECK(gpu->is_made[page]);
    for (int n = 0; n < PAGES; n++)
        CHECK(gpu->page_at[n] != (int)page);
    gpu->is_made[page] = false;
}

static bool map(void *context, uint64_t offset, uint64_t page)
{
    struct gpu *gpu = context;
    CHECK(offset % PAGE == 0 && offset / PAGE < PAGES && gpu->is_made[page] && gpu->page_at[offset / PAGE] < 0);
    if (fails(gpu))
        return false;
    for (int n = 0; n < PAGES; n++)
        CHECK(gpu->page_at[n] != (int)page);
    gpu->page_at[offset / PAGE] = (int)page;
    gpu->is_reachable[offset / PAGE] = false;
    return true;
}

static bool allow(void *context, uint64_t offset, uint64_t nbytes)
{
    struct gpu *gpu = context;
    CHECK(nbytes && nbytes % PAGE == 0);
    if (fails(gpu))
        return false;
    for (uint64_t n = offset / PAGE; n < (offset + nbytes) / PAGE; n++) {
        CHECK(gpu->page_at[n] >= 0);
        gpu->is_reachable[n] = true;
    }
    return true;
}

static bool unmap(void *context, uint64_t offset)
{
    struct gpu *gpu = context;
    int page = gpu->page_at[offset / PAGE];
    CHECK(offset % PAGE == 0 && page >= 0);
    for (int unit = 0; unit < UNITS; unit++) {
        CHECK(!gpu->is_used[offset / GRAIN + (uint64_t)unit] && !gpu->graph_of[offset / GRAIN + (uint64_t)unit]);
        for (int stream = 0; stream < STREAMS; stream++)
            CHECK(gpu->last[page][unit][stream] <= gpu->done[stream]);
    }
    gpu->page_at[offset / PAGE] = -1;
    return true;
}

static void *record(void *context, intptr_t stream)
{
    struct gpu *gpu = context;
    if (fails(gpu) || gpu->captures[stream])
        return NULL;
    struct event *event = malloc(sizeof *event);
    *event = (struct event){(int)stream, gpu->given[stream], NULL};
    gpu->n_events++;
    return event;
}

static bool is_done(void *context, void *event)
{
    struct gpu *gpu = context;
    struct event *asked = event;
    return gpu->done[asked->stream] >= asked->given;
}

static void forget(void *context, void *event)
{
    struct gpu *gpu = context;
    gpu->n_events--;
    free(event);
}

static const struct arena_driver driver = {create, give_back, map, allow, unmap, record, is_done, forget};

/* Lets a stream do its work, and first what that comes after. What was put in order is done as of now: that is early, but
   not too late for anybody. */
static void run(struct gpu *gpu, int stream, uint64_t until)
{
    if (gpu->done[stream] >= until)
        return;
    gpu->done[stream] = until;
    for (int other = 0; other < STREAMS; other++)
        if (other != stream)
            run(gpu, other, gpu->before[stream][other]);
}

static void settle(struct gpu *gpu, bool graphs)
{
    uint64_t now = page_arena_now(gpu->arena);
    for (int stream = 0; stream < STREAMS; stream++)
        run(gpu, stream, gpu->given[stream]);
    page_arena_settle(gpu->arena, 0, now, graphs);
    for (int n = 0; graphs && n < PAGES * UNITS; n++)
        if (!gpu->is_used[n])
            gpu->graph_of[n] = 0;
}

/* Lets a stream use a block, whose bytes must be its own by now. */
static void use_block(struct gpu *gpu, int n, int stream)
{
    uint64_t work = ++gpu->given[stream];
    for (uint64_t at = gpu->blocks[n].start; at < gpu->blocks[n].start + gpu->blocks[n].size; at += GRAIN) {
        int page = gpu->page_at[at / PAGE];
        CHECK(page >= 0 && gpu->is_reachable[at / PAGE]);
        uint64_t *last = gpu->last[page][at % PAGE / GRAIN];
        for (int other = 0; other < STREAMS; other++)
            CHECK(other == stream || last[other] <= gpu->before[stream][other] || last[other] <= gpu->done[other]);
        last[stream] = work;
    }
}

/* Returns how many pages are free as a whole, mapped or not. */
static uint64_t free_pages(const struct gpu *gpu)
{
    uint64_t n = gpu->arena->n_spare;
    for (int page = 0; page < PAGES; page++) {
        bool is_free = gpu->page_at[page] >= 0;
        for (int unit = 0; unit < UNITS; unit++)
            is_free &= !gpu->is_used[page * UNITS + unit] && !gpu->graph_of[page * UNITS + unit];
        n += is_free;
    }
    return n;
}

static void give(struct gpu *gpu, int n)
{
    use_block(gpu, n, gpu->blocks[n].stream);
    for (uint64_t at = gpu->blocks[n].start; at < gpu->blocks[n].start + gpu->blocks[n].size; at += GRAIN)
        gpu->is_used[at / GRAIN] = false;
    CHECK(page_arena_free(gpu->arena, gpu->blocks[n].start));
    CHECK(!page_arena_free(gpu->arena, gpu->blocks[n].start));
    gpu->blocks[n].size = 0;
}

static bool take(struct gpu *gpu, int n, uint64_t nbytes, int stream)
{
    struct arena_wait wait;
    uint64_t offset, size = nbytes ? (nbytes + GRAIN - 1) / GRAIN * GRAIN : GRAIN;
    gpu->failed = false;
    for (int tries = 0;; tries++) {
        enum arena_result result = page_arena_allocate(gpu->arena, nbytes, stream, gpu->captures[stream], &offset, &wait);
        CHECK(tries < 100 + MARKS);
        if (result == ARENA_DONE)
            break;
        if (result == ARENA_FULL) {
            uint64_t new = new_pages(gpu->arena);
            CHECK(gpu->failed || gpu->captures[stream] || free_pages(gpu) + new < size / PAGE + 2);
            return false;
        }
        if (result == ARENA_WAIT) {
            struct event *event = wait.event;
            run(gpu, event->stream, event->given);
            page_arena_waited(gpu->arena, &wait);
        } else {
            CHECK(!gpu->captures[stream]);
            uint64_t tick = page_arena_now(gpu->arena);
            for (int other = 0; other < STREAMS; other++)
                gpu->before[stream][other] = gpu->given[other];
            gpu->given[stream]++; /* to wait is work, too */
            for (int other = (int)below(gpu, 2) ? BLOCKS : (int)below(gpu, BLOCKS); other < BLOCKS; other++)
                if (gpu->blocks[other].size && gpu->blocks[other].stream != stream) {
                    give(gpu, other); /* another thread does, too late */
                    break;
                }
            page_arena_adopt(gpu->arena, stream, tick);
        }
    }
    gpu->blocks[n].start = offset;
    gpu->blocks[n].size = size;
    gpu->blocks[n].stream = stream;
    for (uint64_t at = offset; at < offset + size; at += GRAIN) {
        int graph = gpu->captures[stream] ? stream + 1 : 0;
        CHECK(!gpu->is_used[at / GRAIN] && (!gpu->graph_of[at / GRAIN] || gpu->graph_of[at / GRAIN] == graph));
        gpu->is_used[at / GRAIN] = true;
        gpu->graph_of[at / GRAIN] = graph;
    }
    use_block(gpu, n, stream);
    return true;
}

static bool add_row(void *context, uint64_t offset, uint64_t nbytes)
{
    CHECK(offset % PAGE == 0 && nbytes % PAGE == 0);
    *(uint64_t *)context += nbytes / PAGE;
    return true;
}

static void check_all(struct gpu *gpu)
{
    const char *wrong = page_arena_check(gpu->arena);
    if (wrong)
        fprintf(stderr, "%s\n", wrong);
    CHECK(!wrong);
    uint64_t made = 0, mapped = 0, rows = 0;
    for (int n = 0; n < PHYSICAL; n++)
        made += gpu->is_made[n];
    for (int n = 0; n < PAGES; n++)
        mapped += gpu->page_at[n] >= 0;
    CHECK(made * PAGE == page_arena_taken(gpu->arena));
    uint64_t used = 0;
    for (int n = 0; n < PAGES * UNITS; n++)
        used += gpu->is_used[n] || gpu->graph_of[n];
    CHECK(used * GRAIN <= page_arena_used(gpu->arena)); /* the rest of pages that were mapped in captures is kept, too */
    CHECK(page_arena_each_row(gpu->arena, add_row, &rows) && rows == mapped);
}

static void end(struct gpu *gpu)
{
    for (struct lane *lane = gpu->arena->lanes; lane; lane = lane->next)
        for (unsigned n = 0; n < lane->n_marks; n++)
            forget(gpu, lane->marks[(lane->first_mark + n) % MARKS].event);
    CHECK(!gpu->n_events);
    page_arena_delete(gpu->arena);
    free(gpu);
}

static void random_steps(uint64_t steps, uint64_t seed)
{
    struct gpu *gpu = calloc(1, sizeof *gpu);
    gpu->random = seed * 0x9e3779b97f4a7c15ull + 1;
    memset(gpu->page_at, -1, sizeof gpu->page_at);
    gpu->arena = page_arena_new(PAGES, PAGE, PAGE / 2, &driver, gpu);
    CHECK(gpu->arena);
    uint64_t limit = 100 * PAGE;
    page_arena_set_limit(gpu->arena, limit);
    int streams = 1;
    uint64_t sizes[12];
    for (int n = 0; n < 12; n++)
        sizes[n] = 1 + below(gpu, n < 6 ? PAGE / 2 : 12 * PAGE);
    for (uint64_t step = 0; step < steps; step++) {
        int n = (int)below(gpu, BLOCKS);
        uint64_t what = below(gpu, 100000);
        if (gpu->blocks[n].size) {
            give(gpu, n);
        } else {
            /* Programs take the same sizes again and again. */
            uint64_t nbytes = below(gpu, 4) ? sizes[below(gpu, 12)] : below(gpu, below(gpu, 8) ? PAGE : 30 * PAGE);
            for (int other = 0; !take(gpu, n, nbytes, (int)below(gpu, (uint64_t)streams)) && other < 2; other++)
                for (int tries = 0, victim = (int)below(gpu, BLOCKS); tries < BLOCKS / 4; tries++)
                    if (gpu->blocks[(victim + tries) % BLOCKS].size)
                        give(gpu, (victim + tries) % BLOCKS);
        }
        int stream = (int)below(gpu, STREAMS);
        if (below(gpu, 8) == 0)
            run(gpu, stream, gpu->done[stream] + below(gpu, gpu->given[stream] - gpu->done[stream] + 1));
        if (what < 100) {
            limit = (10 + below(gpu, 400)) * PAGE;
            page_arena_set_limit(gpu->arena, limit);
        } else if (what < 150) {
            settle(gpu, true);
            CHECK(page_arena_trim(gpu->arena, 0) == (uint64_t)page_arena_taken(gpu->arena));
            CHECK(!free_pages(gpu));
        } else if (what < 200) {
            if (below(gpu, 2))
                settle(gpu, false);
            uint64_t before = page_arena_taken(gpu->arena), wanted = below(gpu, 100) * PAGE;
            CHECK(page_arena_trim(gpu->arena, wanted) <= before);
        } else if (what < 300) {
            streams = 1 + (int)below(gpu, STREAMS);
        } else if (what < 400) {
            gpu->failing = below(gpu, 2) ? 0 : (int)below(gpu, 100);
        } else if (what < 450) {
            gpu->captures[stream] ^= true;
        } else if (what < 500) {
            sizes[below(gpu, 12)] = 1 + below(gpu, 16 * PAGE);
        }
        if (step % 512 == 0 || what < 200)
            check_all(gpu);
    }
    for (int n = 0; n < BLOCKS; n++)
        if (gpu->blocks[n].size)
            give(gpu, n);
    gpu->failing = 0;
    settle(gpu, true);
    CHECK(page_arena_used(gpu->arena) == 0 && page_arena_trim(gpu->arena, 0) == 0);
    check_all(gpu);
    struct arena_counts counts = page_arena_counts(gpu->arena);
    CHECK(steps < 100000 || (counts.exact && counts.fitted && counts.mapped_anew && counts.unmaps && counts.waits && counts.orders));
    end(gpu);
}

/* A program that repeats itself maps nothing in the end, though its sizes do not fill pages. */
static void repeats_itself(void)
{
    struct gpu *gpu = calloc(1, sizeof *gpu);
    gpu->random = 1;
    memset(gpu->page_at, -1, sizeof gpu->page_at);
    gpu->arena = page_arena_new(PAGES, PAGE, PAGE / 2, &driver, gpu);
    uint64_t sizes[9], before = 0, limit = 150 * PAGE;
    for (int n = 0; n < 9; n++)
        sizes[n] = 1 + below(gpu, 12 * PAGE);
    page_arena_set_limit(gpu->arena, limit + 20 * PAGE);
    for (int round = 0; round < 20; round++) {
        before = page_arena_counts(gpu->arena).maps;
        for (int n = 0, oldest = 0; n < 128; n++) {
            uint64_t nbytes = n < 64 ? sizes[n * n % 9] : 0;
            while (n < 64 ? page_arena_used(gpu->arena) + nbytes > limit : oldest < 64)
                give(gpu, oldest++);
            CHECK(!nbytes || take(gpu, n, nbytes, 0));
        }
    }
    CHECK(page_arena_counts(gpu->arena).maps == before);
    end(gpu);
}

/* Threads: with no streams' work, but for that of the lock. */

static bool always(void *context, uint64_t offset, uint64_t nbytes)
{
    (void)context, (void)offset, (void)nbytes;
    return true;
}

static bool count_up(void *context, uint64_t *page)
{
    *page = ++*(uint64_t *)context;
    return true;
}

static void no_release(void *context, uint64_t page)
{
    (void)context, (void)page;
}

static bool always_unmapped(void *context, uint64_t offset)
{
    (void)context, (void)offset;
    return true;
}

static void *one_event(void *context, intptr_t stream)
{
    (void)stream;
    return context;
}

static bool is_over(void *context, void *event)
{
    (void)context, (void)event;
    return true;
}

static void no_forget(void *context, void *event)
{
    (void)context, (void)event;
}

static const struct arena_driver simple = {count_up, no_release, always, always, always_unmapped, one_event, is_over, no_forget};
static struct page_arena *shared;
static uint64_t steps_of_threads;
static _Atomic uint64_t handed[64]; /* blocks that another thread frees */

static void *thread(void *argument)
{
    struct gpu random = {.random = (uintptr_t)argument * 77 + 1};
    struct arena_wait wait;
    uint64_t offset;
    for (uint64_t step = 0; step < steps_of_threads; step++) {
        enum arena_result result = page_arena_allocate(shared, 1 + below(&random, 5 * PAGE), (intptr_t)argument, step % 1024 < 16, &offset, &wait);
        if (result == ARENA_DONE) {
            uint64_t old = __atomic_exchange_n(&handed[below(&random, 64)], offset + 1, __ATOMIC_ACQ_REL);
            if (old)
                CHECK(page_arena_free(shared, old - 1));
        } else if (result == ARENA_ORDER) {
            page_arena_adopt(shared, (intptr_t)argument, page_arena_now(shared));
        } else if (result == ARENA_WAIT) {
            page_arena_waited(shared, &wait);
        }
        if (step % 1000 == 0)
            CHECK(!page_arena_check(shared) && page_arena_used(shared) <= page_arena_taken(shared));
    }
    return NULL;
}

int main(int count, char **given)
{
    uint64_t steps = count > 1 ? strtoull(given[1], NULL, 10) : 1000000, seed = count > 2 ? strtoull(given[2], NULL, 10) : 1;
    repeats_itself();
    for (uint64_t part = 0; part < 10; part++)
        random_steps(steps / 10, seed * 10 + part);
    uint64_t pages = 0;
    shared = page_arena_new(PAGES, PAGE, PAGE / 2, &simple, &pages);
    page_arena_set_limit(shared, 160 * PAGE);
    steps_of_threads = steps / 40;
    pthread_t threads[4];
    for (uintptr_t n = 0; n < 4; n++)
        CHECK(!pthread_create(&threads[n], NULL, thread, (void *)n));
    for (int n = 0; n < 4; n++)
        pthread_join(threads[n], NULL);
    CHECK(!page_arena_check(shared));
    page_arena_delete(shared);
    return 0;
}
