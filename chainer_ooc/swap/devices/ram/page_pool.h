/* PagePool: memory for large arrays whose pages are used again, wherever in it they lie. See page_pool.c. */
#ifndef CHAINER_OOC_PAGE_POOL_H
#define CHAINER_OOC_PAGE_POOL_H

#include <stddef.h>
#include <stdint.h>

struct page_pool;

/* What the pool has asked of the kernel so far, and what it would find out by itself. For tests. */
struct page_pool_counts {
    size_t moves, maps, looks, boundaries;
};

/* Returns a pool with `nbytes` of address space, which takes no memory; NULL (errno is set) if there is none. */
struct page_pool *page_pool_new(size_t nbytes);
/* Unmaps a pool and all that is in it. */
void page_pool_delete(struct page_pool *pool);

/* Returns `nbytes` at the beginning of a page, all zero if `clear`; NULL if the address space is full. */
void *page_pool_allocate(struct page_pool *pool, size_t nbytes, int clear);
/* Takes back what page_pool_allocate() returned. */
void page_pool_free(struct page_pool *pool, void *address);
/* Whether an address lies in the pool. */
int page_pool_contains(const struct page_pool *pool, const void *address);
/* Returns the size of a block in use: what was asked for and a gap, in whole pages. */
size_t page_pool_size_of(const struct page_pool *pool, const void *address);
/* Returns how much of a block had no pages when it was handed out. */
size_t page_pool_untouched(const struct page_pool *pool, const void *address);

/* Caps the process's resident memory plus the pool's cached pages: what is cached beyond `nbytes` goes back to the
   system, also while memory grows unannounced. 0 disables caching. */
void page_pool_set_cached_limit(struct page_pool *pool, size_t nbytes);
/* Counts `nbytes` as resident that copies in under way are about to touch. */
void page_pool_set_arriving(struct page_pool *pool, size_t nbytes);
/* Gives at least `nbytes` of cached pages back to the system, or all there are. Returns how much. */
size_t page_pool_decommit(struct page_pool *pool, size_t nbytes);
/* Returns the bytes of cached pages: resident, and in no block in use. */
size_t page_pool_cached(struct page_pool *pool);
/* Returns resident and arriving memory less cached pages, all of one moment, and trims the cache to its limit. */
size_t page_pool_used(struct page_pool *pool);
/* Returns this process's resident memory. Any thread, any time, also with no pool. */
size_t resident_bytes(void);

struct page_pool_counts page_pool_counts(struct page_pool *pool);
uintptr_t page_pool_start(const struct page_pool *pool);
/* Sets when moving pages is worth it, and how many boundaries there may be; the move that fails (0: none). For tests. */
void page_pool_tune(struct page_pool *pool, size_t worth_moving, size_t most_boundaries, size_t failing_move);

#endif
