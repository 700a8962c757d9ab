/* PagePool: memory for large arrays whose pages are used again, wherever in it they lie.

   Memory that went back to the system must be cleared by the kernel, page by page, before a process has it again, at
   a gigabyte or two per second. Here a free block keeps its pages (it is *committed*), and they serve the next
   allocation. Where no committed block is large enough, pages of several are moved to where they are wanted: the
   kernel changes page tables for that (mremap) and copies nothing, so that cached pages serve any allocation, however
   they are scattered.

   The address space is a row of blocks. Each page has an entry in a side table; nothing is written to the blocks.

   Invariants, whenever the lock is free:
   1. Every page belongs to one block. The first entry of a block has its state and its length; the last entry of a
      free block of two pages or more has the state LAST and the length. All other entries have the state NOTHING.
   2. A COMMITTED and a DECOMMITTED block have no neighbour of the same state: they are merged at once. CACHED blocks
      are free and committed, and wait unmerged for an allocation of just their size.
   3. All pages of CACHED and COMMITTED blocks are in memory, no page of a DECOMMITTED block is. `cached` is the sum of
      the former.
   4. Where two mappings of the kernel meet inside the pool, the bit of the first page of the second is set in
      `boundaries`. (It may be set elsewhere: mappings merge as they like.)
   5. No Python runs under the lock, and nobody who holds it waits for anything but the kernel: free may be called from
      any thread, with or without the interpreter's lock, to the very end of the process. */

#include "page_pool.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4 /* since Linux 5.7 */
#endif

/* At least so many bytes lie between two blocks. NumPy 1 has other loops, with other bits, for a result that begins
   where an operand ends, as blocks of malloc never do. */
#define GAP 16
/* Pages in mappings of fewer pages, on average, are given back and taken anew: that takes less time than to move
   them, which is a call of the kernel for each mapping. */
#define WORTH_MOVING 16
/* Linux lets a process have 65,530 mappings; beyond this many of ours the free ones are made one again. */
#define MOST_BOUNDARIES 8192
/* Memory that grows unannounced is looked at as often as this (nanoseconds). */
#define GUARD_PERIOD 10000000

/* Lists of CACHED blocks by exact size: a table of as many sizes. */
#define SIZES 1024
/* Lists of free blocks: up to 31 pages one for each size, from there on 16 for each power of two. */
#define BINS (32 + 16 * 27)

enum state { NOTHING, LAST, USED, CACHED, COMMITTED, DECOMMITTED };

typedef uint32_t number; /* of a page, from 1 on; of pages */

struct entry {
    number pages;
    number next, previous; /* in the list that the block is in; 0: none */
    number untouched;      /* pages of a USED block that were not there when it was handed out */
    uint8_t state;
};

struct free_list {
    number bins[BINS];
    uint64_t filled[(BINS + 63) / 64];
};

struct size_list {
    number pages, first;
};

struct page_pool {
    pthread_mutex_t lock;
    char *start;
    size_t size;
    number pages;
    unsigned shift; /* log2 of the size of a page */
    struct entry *entries;
    size_t entries_size;
    uint64_t *boundaries;
    size_t boundaries_size;
    struct size_list sizes[SIZES];
    unsigned distinct_sizes;
    struct free_list committed, decommitted;
    size_t cached;       /* bytes */
    size_t arriving;     /* bytes that copies in under way are about to touch */
    size_t cached_limit; /* bytes of resident memory; SIZE_MAX: no limit; 0: nothing is cached */
    bool can_move;
    size_t worth_moving, most_boundaries, failing_move;
    struct page_pool_counts counts;
    struct page_pool *next_pool;
    /* The thread that trims the cache while memory grows unannounced. */
    pthread_t guard;
    pid_t guard_id;
    pthread_cond_t guard_wakes;
    enum { NO_GUARD, GUARDED, GUARD_ENDS } guarding;
};

static struct page_pool *all_pools; /* changed and walked under pools_lock */
static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;

/* Resident memory. */

static int statm = -1; /* the kernel's file of this process */

size_t resident_bytes(void)
{
    char text[128];
    int file = __atomic_load_n(&statm, __ATOMIC_ACQUIRE);
    if (file < 0) {
        file = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
        int expected = -1;
        if (file >= 0 && !__atomic_compare_exchange_n(&statm, &expected, file, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            close(file);
            file = expected;
        }
    }
    ssize_t n = pread(file, text, sizeof text - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = 0;
    const char *second = strchr(text, ' ');
    return second ? (size_t)strtoull(second, NULL, 10) * (size_t)sysconf(_SC_PAGESIZE) : 0;
}

/* Free blocks. */

static char *address_of(const struct page_pool *pool, number page)
{
    return pool->start + ((size_t)(page - 1) << pool->shift);
}

static number page_of(const struct page_pool *pool, const void *address)
{
    return (number)(((size_t)((const char *)address - pool->start) >> pool->shift) + 1);
}

static size_t bytes(const struct page_pool *pool, number pages)
{
    return (size_t)pages << pool->shift;
}

static unsigned bin_of(number pages)
{
    if (pages < 32)
        return pages;
    unsigned log = 31 - (unsigned)__builtin_clz(pages);
    return 32 + (log - 5) * 16 + ((pages >> (log - 4)) & 15);
}

static struct free_list *list_of(struct page_pool *pool, enum state state)
{
    return state == COMMITTED ? &pool->committed : &pool->decommitted;
}

static void link_block(struct page_pool *pool, number *first, number page)
{
    struct entry *entry = &pool->entries[page];
    entry->next = *first;
    entry->previous = 0;
    if (*first)
        pool->entries[*first].previous = page;
    *first = page;
}

static void unlink_block(struct page_pool *pool, number *first, number page)
{
    struct entry *entry = &pool->entries[page];
    if (entry->previous)
        pool->entries[entry->previous].next = entry->next;
    else
        *first = entry->next;
    if (entry->next)
        pool->entries[entry->next].previous = entry->previous;
}

/* Takes a whole block out of the list of its state; it has no state then. */
static void remove_free(struct page_pool *pool, number page)
{
    struct entry *entry = &pool->entries[page];
    struct free_list *list = list_of(pool, entry->state);
    unsigned bin = bin_of(entry->pages);
    unlink_block(pool, &list->bins[bin], page);
    if (!list->bins[bin])
        list->filled[bin / 64] &= ~(1ull << bin % 64);
    if (entry->state == COMMITTED)
        pool->cached -= bytes(pool, entry->pages);
    pool->entries[page + entry->pages - 1].state = NOTHING;
    entry->state = NOTHING;
}

/* Adds a free block, merged with its neighbours of the same state. */
static void insert_free(struct page_pool *pool, number page, number pages, enum state state)
{
    struct entry *after = &pool->entries[page + pages], *before = &pool->entries[page - 1];
    if (after->state == state) {
        number more = after->pages;
        remove_free(pool, page + pages);
        pages += more;
    }
    number first = before->state == LAST ? page - before->pages : page - 1;
    if (pool->entries[first].state == state) {
        number more = pool->entries[first].pages;
        remove_free(pool, first);
        page -= more;
        pages += more;
    }
    struct free_list *list = list_of(pool, state);
    unsigned bin = bin_of(pages);
    pool->entries[page + pages - 1].state = LAST;
    pool->entries[page + pages - 1].pages = pages;
    pool->entries[page].state = state;
    pool->entries[page].pages = pages;
    link_block(pool, &list->bins[bin], page);
    list->filled[bin / 64] |= 1ull << bin % 64;
    if (state == COMMITTED)
        pool->cached += bytes(pool, pages);
}

/* Returns the first bin from `bin` on, or the last of all, that has blocks; BINS if none has. */
static unsigned filled_bin(const struct free_list *list, unsigned bin, bool last)
{
    const unsigned words = (BINS + 63) / 64;
    if (last) {
        for (unsigned word = words; word-- > 0;)
            if (list->filled[word])
                return word * 64 + 63 - (unsigned)__builtin_clzll(list->filled[word]);
        return BINS;
    }
    for (unsigned word = bin / 64; word < words; word++) {
        uint64_t found = list->filled[word];
        if (word == bin / 64)
            found &= ~0ull << bin % 64;
        if (found)
            return word * 64 + (unsigned)__builtin_ctzll(found);
    }
    return BINS;
}

/* Returns the smallest free block of at least `pages`, among the first that a list has of its size; 0 if there is none. */
static number best_fit(struct page_pool *pool, enum state state, number pages)
{
    const struct free_list *list = list_of(pool, state);
    for (unsigned bin = filled_bin(list, bin_of(pages), false); bin < BINS; bin = filled_bin(list, bin + 1, false)) {
        number best = 0;
        for (number page = list->bins[bin]; page; page = pool->entries[page].next) {
            number have = pool->entries[page].pages;
            if (have >= pages && (!best || have < pool->entries[best].pages))
                best = page;
            if (have == pages)
                return page;
        }
        if (best)
            return best;
    }
    return 0;
}

/* Cuts `pages` off the beginning of the free block that fits best; 0 if there is none. */
static number take_free(struct page_pool *pool, enum state state, number pages)
{
    number page = best_fit(pool, state, pages);
    if (page) {
        number have = pool->entries[page].pages;
        remove_free(pool, page);
        if (have > pages)
            insert_free(pool, page + pages, have - pages, state);
    }
    return page;
}

/* Returns the largest committed block; 0 if there is none. */
static number largest_committed(struct page_pool *pool)
{
    unsigned bin = filled_bin(&pool->committed, 0, true);
    number largest = 0;
    if (bin < BINS)
        for (number page = pool->committed.bins[bin]; page; page = pool->entries[page].next)
            if (!largest || pool->entries[page].pages > pool->entries[largest].pages)
                largest = page;
    return largest;
}

/* Boundaries of the kernel's mappings. */

static void set_boundary(struct page_pool *pool, number page)
{
    uint64_t bit = 1ull << page % 64, *word = &pool->boundaries[page / 64];
    pool->counts.boundaries += !(*word & bit);
    *word |= bit;
}

/* Forgets the boundaries inside of a block, those at its ends not included. */
static void clear_boundaries(struct page_pool *pool, number page, number pages)
{
    for (size_t n = (size_t)page + 1, end = (size_t)page + pages; n < end;) {
        uint64_t *word = &pool->boundaries[n / 64], mask = ~0ull << n % 64;
        size_t next = (n / 64 + 1) * 64;
        if (next > end)
            mask &= ~(~0ull << end % 64);
        pool->counts.boundaries -= (size_t)__builtin_popcountll(*word & mask);
        *word &= ~mask;
        n = next;
    }
}

/* Returns the first boundary after `page` and before `end`; `end` if there is none. */
static number next_boundary(const struct page_pool *pool, number page, number end)
{
    for (size_t n = (size_t)page + 1; n < end; n = (n / 64 + 1) * 64) {
        uint64_t found = pool->boundaries[n / 64] & ~0ull << n % 64;
        if (found) {
            size_t at = n / 64 * 64 + (size_t)__builtin_ctzll(found);
            return at < end ? (number)at : end;
        }
    }
    return end;
}

/* Pages. */

/* Maps new memory of zeros in place of what is there, its pages and its boundaries; it takes none until it is touched. */
static void map_anew(struct page_pool *pool, number page, number pages)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    size_t nbytes = bytes(pool, pages);
    pool->counts.maps++;
    if (mmap(address_of(pool, page), nbytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) {
        /* Too many mappings: the pages go all the same. */
        madvise(address_of(pool, page), nbytes, MADV_DONTNEED);
        return;
    }
    clear_boundaries(pool, page, pages);
    set_boundary(pool, page);
    set_boundary(pool, page + pages);
}

/* Gives the pages of a block that is in no list back to the system. */
static void decommit_block(struct page_pool *pool, number page, number pages)
{
    map_anew(pool, page, pages);
    insert_free(pool, page, pages, DECOMMITTED);
}

/* Returns whether all pages of a block are in memory. */
static bool is_resident(struct page_pool *pool, number page, number pages)
{
    unsigned char there[4096];
    pool->counts.looks++;
    for (number n; pages; page += n, pages -= n) {
        n = pages < sizeof there ? pages : (number)sizeof there;
        if (mincore(address_of(pool, page), bytes(pool, n), there))
            return false;
        for (number i = 0; i < n; i++)
            if (!(there[i] & 1))
                return false;
    }
    return true;
}

/* Moves the pages of a block, mapping by mapping, which leaves it mapped and without pages. Returns whether it could. */
static bool move_pages(struct page_pool *pool, number from, number pages, number to)
{
    number end = from + pages;
    clear_boundaries(pool, to, pages);
    for (number n = from, next; n < end; n = next) {
        next = next_boundary(pool, n, end);
        size_t nbytes = bytes(pool, next - n);
        char *wanted = address_of(pool, to + (n - from));
        int flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
        void *moved = MAP_FAILED;
        if (++pool->counts.moves != pool->failing_move)
            moved = mremap(address_of(pool, n), nbytes, nbytes, flags, wanted);
        if (moved != wanted) {
            /* An old kernel, or too many mappings: from now on new pages are taken instead. */
            pool->can_move = false;
            map_anew(pool, to, pages);
            return false;
        }
        set_boundary(pool, to + (n - from));
    }
    set_boundary(pool, to + pages);
    return true;
}

/* Makes each decommitted block one mapping; if that is not enough, decommits all. */
static void merge_mappings(struct page_pool *pool)
{
    for (unsigned bin = 0; bin < BINS; bin++)
        for (number page = pool->decommitted.bins[bin]; page; page = pool->entries[page].next)
            map_anew(pool, page, pool->entries[page].pages);
    number page;
    if (pool->counts.boundaries > pool->most_boundaries / 2)
        while ((page = largest_committed(pool))) {
            number pages = pool->entries[page].pages;
            remove_free(pool, page);
            decommit_block(pool, page, pages);
        }
}

/* Moves committed pages to the beginning of a block, as many as there are and as are worth it.

   Those that are not go back to the system instead, so that the block's new pages take no more memory. Returns the
   number of those that were moved. */
static number gather(struct page_pool *pool, number to, number wanted)
{
    number place = to, left = wanted, from;
    while (left && (from = largest_committed(pool))) {
        number have = pool->entries[from].pages, pages = have < left ? have : left, mappings = 1;
        remove_free(pool, from);
        if (have > pages)
            insert_free(pool, from + pages, have - pages, COMMITTED);
        for (number n = from; (n = next_boundary(pool, n, from + pages)) < from + pages;)
            mappings++;
        left -= pages;
        if (pool->can_move && pages >= pool->worth_moving * mappings && move_pages(pool, from, pages, place)) {
            insert_free(pool, from, pages, DECOMMITTED);
            place += pages;
        } else {
            decommit_block(pool, from, pages);
        }
    }
    if (pool->counts.boundaries > pool->most_boundaries)
        merge_mappings(pool);
    return place - to;
}

/* Blocks by their exact size: networks ask for the same sizes again and again. */

/* Returns the list of a size; NULL if there is none. With `make`, there is one then. */
static struct size_list *size_list(struct page_pool *pool, number pages, bool make)
{
    unsigned n = pages * 2654435761u % SIZES;
    while (pool->sizes[n].pages && pool->sizes[n].pages != pages)
        n = (n + 1) % SIZES;
    if (!pool->sizes[n].pages) {
        if (!make)
            return NULL;
        pool->sizes[n].pages = pages;
        pool->distinct_sizes++;
    }
    return &pool->sizes[n];
}

/* Merges all CACHED blocks with their neighbours. */
static void merge_cached(struct page_pool *pool)
{
    for (struct size_list *list = pool->sizes; list < pool->sizes + SIZES; list++)
        for (number page = list->first, next; page; page = next) {
            next = pool->entries[page].next;
            pool->entries[page].state = NOTHING;
            pool->cached -= bytes(pool, list->pages);
            insert_free(pool, page, list->pages, COMMITTED);
        }
    memset(pool->sizes, 0, sizeof pool->sizes);
    pool->distinct_sizes = 0;
}

static void cache(struct page_pool *pool, number page, number pages)
{
    if (pool->distinct_sizes > SIZES / 2)
        merge_cached(pool);
    pool->entries[page].state = CACHED;
    pool->cached += bytes(pool, pages);
    link_block(pool, &size_list(pool, pages, true)->first, page);
}

static size_t decommit(struct page_pool *pool, size_t nbytes)
{
    size_t given = 0;
    number page;
    if (nbytes > pool->cached)
        nbytes = pool->cached;
    merge_cached(pool);
    while (given < nbytes && (page = largest_committed(pool))) {
        number have = pool->entries[page].pages;
        size_t wanted = (nbytes - given + bytes(pool, 1) - 1) >> pool->shift;
        number pages = wanted < have ? (number)wanted : have;
        remove_free(pool, page);
        if (have > pages)
            insert_free(pool, page + pages, have - pages, COMMITTED);
        decommit_block(pool, page, pages);
        given += bytes(pool, pages);
    }
    return given;
}

/* Gives back what is cached beyond the limit. Returns what was in use: resident or arriving, and not cached. */
static size_t trim(struct page_pool *pool)
{
    size_t resident = resident_bytes() + pool->arriving, cached = pool->cached;
    if (cached && resident > pool->cached_limit)
        decommit(pool, resident - pool->cached_limit);
    return resident > cached ? resident - cached : 0;
}

/* The guard: gives cached pages back as memory grows that nobody announces, as for snapshots, decoders, imports. */

static void *guard(void *argument)
{
    struct page_pool *pool = argument;
    pthread_mutex_lock(&pool->lock);
    pool->guard_id = (pid_t)syscall(SYS_gettid);
    while (pool->guarding == GUARDED) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += GUARD_PERIOD;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&pool->guard_wakes, &pool->lock, &until);
        if (pool->cached && pool->guarding == GUARDED)
            trim(pool);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Starts the guard where there is something to guard. Under the lock. */
static void have_guard(struct page_pool *pool)
{
    if (pool->guarding != NO_GUARD || !pool->cached_limit || pool->cached_limit == SIZE_MAX)
        return;
    sigset_t all, before;
    sigfillset(&all); /* signals are for the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pool->guarding = GUARDED;
    if (pthread_create(&pool->guard, NULL, guard, pool))
        pool->guarding = NO_GUARD;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Ends the guard, and waits until the kernel has forgotten it. Not under the lock. */
static void end_guard(struct page_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    bool is_mine = pool->guarding == GUARDED; /* else there is none, or another thread ends it */
    if (is_mine) {
        pool->guarding = GUARD_ENDS;
        pthread_cond_signal(&pool->guard_wakes);
    }
    pthread_mutex_unlock(&pool->lock);
    if (!is_mine)
        return;
    pthread_join(pool->guard, NULL);
    for (int n = 0; n < 100000 && !syscall(SYS_tgkill, getpid(), pool->guard_id, 0); n++)
        sched_yield();
    pthread_mutex_lock(&pool->lock);
    pool->guarding = NO_GUARD;
    pthread_mutex_unlock(&pool->lock);
}

/* Forks. The child has a copy of all blocks, as they are between two calls. The guard is not there while a process
   forks, so that a program with no other thread is not warned of threads; it starts again with the next call. */

static void before_fork(void)
{
    pthread_mutex_lock(&pools_lock);
    for (struct page_pool *pool = all_pools; pool; pool = pool->next_pool)
        for (;;) {
            end_guard(pool);
            pthread_mutex_lock(&pool->lock);
            if (pool->guarding == NO_GUARD)
                break;
            pthread_mutex_unlock(&pool->lock); /* another thread ends it, or has started it again */
            sched_yield();
        }
}

static void after_fork(void)
{
    for (struct page_pool *pool = all_pools; pool; pool = pool->next_pool)
        pthread_mutex_unlock(&pool->lock);
    pthread_mutex_unlock(&pools_lock);
}

static void after_fork_in_child(void)
{
    if (statm >= 0) /* it tells of the parent */
        close(statm);
    statm = -1;
    after_fork();
}

/* The interface. */

static void *map(size_t nbytes)
{
    void *address = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return address == MAP_FAILED ? NULL : address;
}

struct page_pool *page_pool_new(size_t nbytes)
{
    struct rlimit limit;
    if (!getrlimit(RLIMIT_AS, &limit) && limit.rlim_cur != RLIM_INFINITY) {
        errno = ENOMEM; /* the program needs the address space that it may have */
        return NULL;
    }
    struct page_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return NULL;
    pool->shift = (unsigned)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE));
    if (nbytes >> pool->shift == 0 || nbytes >> pool->shift >= UINT32_MAX - 64) {
        free(pool);
        errno = ENOMEM;
        return NULL;
    }
    pool->pages = (number)(nbytes >> pool->shift);
    pool->size = bytes(pool, pool->pages);
    pool->entries_size = ((size_t)pool->pages + 2) * sizeof *pool->entries;
    pool->boundaries_size = ((size_t)pool->pages + 2) / 8 + 8;
    pool->start = map(pool->size);
    pool->entries = map(pool->entries_size);
    pool->boundaries = map(pool->boundaries_size);
    pool->cached_limit = SIZE_MAX;
    pool->can_move = true;
    page_pool_tune(pool, WORTH_MOVING, MOST_BOUNDARIES, 0);
    if (!pool->start || !pool->entries || !pool->boundaries) {
        if (pool->start)
            munmap(pool->start, pool->size);
        if (pool->entries)
            munmap(pool->entries, pool->entries_size);
        free(pool);
        errno = ENOMEM;
        return NULL;
    }
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&pool->guard_wakes, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&pool->lock, NULL);
    insert_free(pool, 1, pool->pages, DECOMMITTED);
    pthread_mutex_lock(&pools_lock);
    static bool follows_forks;
    if (!follows_forks)
        follows_forks = !pthread_atfork(before_fork, after_fork, after_fork_in_child);
    pool->next_pool = all_pools;
    all_pools = pool;
    pthread_mutex_unlock(&pools_lock);
    return pool;
}

void page_pool_delete(struct page_pool *pool)
{
    pthread_mutex_lock(&pools_lock);
    struct page_pool **link = &all_pools;
    while (*link != pool)
        link = &(*link)->next_pool;
    *link = pool->next_pool;
    pthread_mutex_unlock(&pools_lock);
    end_guard(pool);
    munmap(pool->start, pool->size);
    munmap(pool->entries, pool->entries_size);
    munmap(pool->boundaries, pool->boundaries_size);
    pthread_cond_destroy(&pool->guard_wakes);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

void *page_pool_allocate(struct page_pool *pool, size_t nbytes, int clear)
{
    size_t wanted = nbytes > pool->size ? SIZE_MAX : (nbytes + GAP + bytes(pool, 1) - 1) >> pool->shift;
    if (wanted > pool->pages)
        return NULL;
    number pages = (number)wanted, committed = pages, page = 0;
    pthread_mutex_lock(&pool->lock);
    have_guard(pool);
    struct size_list *list = size_list(pool, pages, false);
    if (list && list->first) {
        page = list->first;
        unlink_block(pool, &list->first, page);
        pool->cached -= bytes(pool, pages);
    } else {
        page = take_free(pool, COMMITTED, pages);
        if (!page) {
            merge_cached(pool);
            page = take_free(pool, COMMITTED, pages);
        }
        if (!page && (page = take_free(pool, DECOMMITTED, pages))) {
            /* In no list while it is filled: a free block that is given back must not be merged with it. */
            pool->entries[page].state = USED;
            committed = gather(pool, page, pages);
        }
    }
    if (page) {
        pool->entries[page].state = USED;
        pool->entries[page].pages = pages;
        pool->entries[page].untouched = 0;
    }
    if (committed < pages) {
        /* The last page may be the gap alone, which nobody would touch: all of a block is there, or not. */
        *(volatile char *)(address_of(pool, page + pages) - 1) = 0;
        pool->entries[page].untouched = pages - committed - 1;
    }
    pthread_mutex_unlock(&pool->lock);
    if (page && clear) {
        size_t dirty = bytes(pool, committed);
        memset(address_of(pool, page), 0, dirty < nbytes ? dirty : nbytes);
    }
    return page ? address_of(pool, page) : NULL;
}

void page_pool_free(struct page_pool *pool, void *address)
{
    number page = page_of(pool, address);
    struct entry *entry = &pool->entries[page];
    pthread_mutex_lock(&pool->lock);
    number pages = entry->pages;
    bool is_whole = !entry->untouched || is_resident(pool, page, pages);
    entry->state = NOTHING;
    entry->untouched = 0;
    if (is_whole && pool->cached_limit)
        cache(pool, page, pages);
    else
        decommit_block(pool, page, pages);
    pthread_mutex_unlock(&pool->lock);
}

int page_pool_contains(const struct page_pool *pool, const void *address)
{
    return (size_t)((const char *)address - pool->start) < pool->size;
}

size_t page_pool_size_of(const struct page_pool *pool, const void *address)
{
    return bytes(pool, pool->entries[page_of(pool, address)].pages);
}

size_t page_pool_untouched(const struct page_pool *pool, const void *address)
{
    return bytes(pool, pool->entries[page_of(pool, address)].untouched);
}

void page_pool_set_cached_limit(struct page_pool *pool, size_t nbytes)
{
    pthread_mutex_lock(&pool->lock);
    pool->cached_limit = nbytes;
    if (!nbytes)
        decommit(pool, SIZE_MAX);
    have_guard(pool);
    pthread_mutex_unlock(&pool->lock);
    if (!nbytes)
        end_guard(pool);
}

void page_pool_set_arriving(struct page_pool *pool, size_t nbytes)
{
    pthread_mutex_lock(&pool->lock);
    pool->arriving = nbytes;
    pthread_mutex_unlock(&pool->lock);
}

size_t page_pool_decommit(struct page_pool *pool, size_t nbytes)
{
    pthread_mutex_lock(&pool->lock);
    size_t given = decommit(pool, nbytes);
    pthread_mutex_unlock(&pool->lock);
    return given;
}

size_t page_pool_cached(struct page_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    size_t cached = pool->cached;
    pthread_mutex_unlock(&pool->lock);
    return cached;
}

size_t page_pool_used(struct page_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    have_guard(pool);
    size_t used = trim(pool);
    pthread_mutex_unlock(&pool->lock);
    return used;
}

struct page_pool_counts page_pool_counts(struct page_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    struct page_pool_counts counts = pool->counts;
    pthread_mutex_unlock(&pool->lock);
    return counts;
}

uintptr_t page_pool_start(const struct page_pool *pool)
{
    return (uintptr_t)pool->start;
}

void page_pool_tune(struct page_pool *pool, size_t worth_moving, size_t most_boundaries, size_t failing_move)
{
    pool->worth_moving = worth_moving;
    pool->most_boundaries = most_boundaries;
    pool->failing_move = failing_move;
}
