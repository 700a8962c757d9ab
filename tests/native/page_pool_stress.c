/* The page pool against a model: random allocations, invariants after them, threads, forks.

       cc -g -O1 -fsanitize=address,undefined page_pool_stress.c -o stress -pthread && ./stress 10000000 1

   Arguments: the number of steps, and a seed. It is silent and returns 0 where all is well. `make sanitize` runs it. */

#define _GNU_SOURCE
#include "../../chainer_ooc/swap/devices/ram/page_pool.c"

#include "check.h"
#include <stdio.h>
#include <sys/wait.h>

#define BLOCKS 512

struct model {
    struct page_pool *pool;
    uint64_t random;
    unsigned char *blocks[BLOCKS];
    size_t sizes[BLOCKS];
    unsigned char values[BLOCKS];
};

static uint64_t below(struct model *model, uint64_t bound)
{
    model->random ^= model->random << 13;
    model->random ^= model->random >> 7;
    model->random ^= model->random << 17;
    return model->random % bound;
}

/* Each page belongs to one block; free neighbours are merged; what is said to be cached is, in memory, too. */
static void check_invariants(struct page_pool *pool, bool look)
{
    size_t cached = 0, listed[6] = {0}, walked[6] = {0};
    enum state before = NOTHING;
    for (number page = 1; page <= pool->pages;) {
        struct entry *entry = &pool->entries[page];
        CHECK(entry->state == USED || entry->state == CACHED || entry->state == COMMITTED || entry->state == DECOMMITTED);
        CHECK(entry->pages && page + entry->pages <= pool->pages + 1);
        bool is_free = entry->state == COMMITTED || entry->state == DECOMMITTED;
        CHECK(!is_free || entry->state != before);
        for (number n = 1; n < entry->pages; n++)
            CHECK(entry[n].state == (is_free && n == entry->pages - 1 ? LAST : NOTHING));
        CHECK(!is_free || entry[entry->pages - 1].pages == entry->pages);
        if (entry->state == CACHED || entry->state == COMMITTED) {
            cached += bytes(pool, entry->pages);
            CHECK(!look || is_resident(pool, page, entry->pages));
        }
        walked[entry->state]++;
        before = entry->state;
        page += entry->pages;
    }
    CHECK(cached == pool->cached);
    for (unsigned bin = 0; bin < BINS; bin++)
        for (int n = 0; n < 2; n++) {
            struct free_list *list = n ? &pool->committed : &pool->decommitted;
            CHECK(!list->bins[bin] == !(list->filled[bin / 64] >> bin % 64 & 1));
            for (number page = list->bins[bin]; page; page = pool->entries[page].next) {
                CHECK(pool->entries[page].state == (n ? COMMITTED : DECOMMITTED));
                CHECK(bin_of(pool->entries[page].pages) == bin);
                listed[n ? COMMITTED : DECOMMITTED]++;
            }
        }
    for (int n = 0; n < SIZES; n++)
        for (number page = pool->sizes[n].first; page; page = pool->entries[page].next) {
            CHECK(pool->entries[page].state == CACHED && pool->entries[page].pages == pool->sizes[n].pages);
            listed[CACHED]++;
        }
    for (int state = CACHED; state <= DECOMMITTED; state++)
        CHECK(listed[state] == walked[state]);
}

/* The kernel's mappings begin only where the pool knows. */
static void check_boundaries(struct page_pool *pool)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    while (fgets(line, sizeof line, maps)) {
        char *start = (char *)strtoull(line, NULL, 16);
        if (start > pool->start && start < pool->start + pool->size) {
            number page = page_of(pool, start);
            CHECK(pool->boundaries[page / 64] >> page % 64 & 1);
        }
    }
    fclose(maps);
}

static void check_block(const unsigned char *block, size_t size, unsigned char value)
{
    CHECK(block[0] == value && block[size - 1] == value && block[size / 2] == value);
}

static void step(struct model *model)
{
    struct page_pool *pool = model->pool;
    unsigned n = (unsigned)below(model, BLOCKS);
    if (model->blocks[n]) {
        check_block(model->blocks[n], model->sizes[n], model->values[n]);
        CHECK(page_pool_size_of(pool, model->blocks[n]) >= model->sizes[n] + GAP);
        page_pool_free(pool, model->blocks[n]);
        model->blocks[n] = NULL;
    } else {
        static const size_t usual[] = {4096, 65536 - GAP, 65536, 100000, 300000, 1 << 20};
        size_t size = below(model, 4) ? usual[below(model, 6)] : 1 + below(model, 1 << below(model, 22));
        bool clear = !below(model, 8);
        unsigned char *block = page_pool_allocate(pool, size, clear);
        if (block) {
            CHECK(page_pool_contains(pool, block) && page_pool_contains(pool, block + size - 1));
            CHECK((uintptr_t)block % 4096 == 0);
            if (clear)
                for (size_t at = 0; at < size; at += 1 + below(model, 9999))
                    CHECK(!block[at]);
            if (below(model, 4)) { /* not all that is allocated is touched */
                if (below(model, 2))
                    memset(block, (int)n, size);
                block[0] = block[size / 2] = block[size - 1] = (unsigned char)n;
            } else {
                block[0] = block[size / 2] = block[size - 1] = (unsigned char)n;
            }
            model->blocks[n] = block, model->sizes[n] = size, model->values[n] = (unsigned char)n;
        }
    }
    switch (below(model, 2000)) {
    case 0:
        page_pool_decommit(pool, below(model, 64 << 20));
        break;
    case 1:
        page_pool_set_cached_limit(pool, below(model, 3) ? SIZE_MAX : resident_bytes() + below(model, 64 << 20) - (32 << 20));
        break;
    case 2:
        page_pool_set_cached_limit(pool, 0);
        page_pool_set_cached_limit(pool, SIZE_MAX);
        break;
    case 3:
        page_pool_used(pool);
    }
}

static void end(struct model *model)
{
    for (unsigned n = 0; n < BLOCKS; n++)
        if (model->blocks[n]) {
            check_block(model->blocks[n], model->sizes[n], model->values[n]);
            page_pool_free(model->pool, model->blocks[n]);
        }
}

struct worker {
    struct page_pool *pool;
    uint64_t steps, seed;
};

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct model model = {worker->pool, worker->seed * 0x9e3779b97f4a7c15ull + 1, {0}, {0}, {0}};
    for (uint64_t n = 0; n < worker->steps; n++)
        step(&model);
    end(&model);
    return NULL;
}

int main(int count, char **arguments)
{
    uint64_t steps = count > 1 ? strtoull(arguments[1], NULL, 10) : 1000000;
    uint64_t seed = count > 2 ? strtoull(arguments[2], NULL, 10) : 1;

    /* One thread against the model; small pools are full now and then, and have too many mappings. */
    for (unsigned kind = 0; kind < 3; kind++) {
        struct model model = {page_pool_new(kind == 1 ? 64 << 20 : 1ull << 30), seed + kind, {0}, {0}, {0}};
        CHECK(model.pool);
        if (kind == 2)
            page_pool_tune(model.pool, 1, 64, 0);
        for (uint64_t n = 0; n < steps / 3; n++) {
            step(&model);
            if (n % (steps / 60 + 1) == 0) {
                pthread_mutex_lock(&model.pool->lock);
                check_invariants(model.pool, true);
                check_boundaries(model.pool);
                pthread_mutex_unlock(&model.pool->lock);
            }
        }
        end(&model);
        page_pool_set_cached_limit(model.pool, 0);
        check_invariants(model.pool, true);
        CHECK(page_pool_cached(model.pool) == 0);
        CHECK(page_pool_allocate(model.pool, model.pool->size - GAP, 0)); /* no address is lost */
        page_pool_delete(model.pool);
    }

    /* Threads, and forks in their midst. */
    struct page_pool *pool = page_pool_new(1ull << 31);
    page_pool_set_cached_limit(pool, resident_bytes() + (256 << 20));
    struct worker workers[4];
    pthread_t threads[4];
    for (unsigned n = 0; n < 4; n++) {
        workers[n] = (struct worker){pool, steps / 40, seed + n};
        pthread_create(&threads[n], NULL, work, &workers[n]);
    }
#ifdef __SANITIZE_THREAD__
    const unsigned forks = 0; /* that sanitizer does not follow them */
#else
    const unsigned forks = 10;
#endif
    for (unsigned n = 0; n < forks; n++) {
        usleep(20000);
        pid_t child = fork();
        if (!child) {
            check_invariants(pool, false);
            struct model model = {pool, seed + n + 9, {0}, {0}, {0}};
            for (unsigned k = 0; k < 1000; k++)
                step(&model);
            end(&model);
            pthread_mutex_lock(&pool->lock); /* its guard is there again */
            check_invariants(pool, false);
            _exit(0);
        }
        int status;
        waitpid(child, &status, 0);
        CHECK(status == 0);
    }
    for (unsigned n = 0; n < 4; n++)
        pthread_join(threads[n], NULL);
    page_pool_set_cached_limit(pool, 0);
    check_invariants(pool, true);
    CHECK(page_pool_allocate(pool, pool->size - GAP, 0));
    page_pool_delete(pool);
    return 0;
}
