/* PageArena: a GPU's memory in pages that are mapped wherever they are wanted.

   CuPy's own pool cuts large chunks up, gives none back that is cut, and so cannot use what is free in pieces. Here the
   driver's virtual memory makes one piece of many: where no free memory is large enough, free pages are unmapped and
   mapped again side by side. So free memory is usable however it is scattered, but for what lies free in pages that are
   partly in use.

   That takes driver calls, so it comes last. A freed block is kept as it is, in a list of its size, and serves the next
   allocation of that size: programs repeat themselves, and in the end most steps map nothing. What does not fit any
   list is cut from free memory that was merged; then new pages are taken, up to the limit; then free ones are mapped
   anew.

   The address space is a row of blocks in two zones, one for small blocks and one for the others: small ones among
   large ones would keep pages from being free.

   Invariants, whenever the lock is free:
   1. Blocks follow each other without a gap. A VOID block has whole pages, none of which is mapped. All pages that
      another block touches are mapped.
   2. No VOID block has a VOID neighbour in its zone, no FREE one a FREE neighbour of its zone and lane: they are merged
      at once. CACHED blocks are free and wait unmerged, each in the list of its size.
   3. Free memory belongs to the lane of the stream whose later work may use it at once: that which it was allocated on.
      Other streams get it only when they have been made to wait for that one (page_arena_adopt).
   4. A page's stamp is not less than the tick of the last free of anything in it. A page is unmapped only if it is free
      as a whole and idle: an event that was recorded on its lane's stream after its stamp has passed, or the whole GPU
      has been waited for. The driver's unmapping waits for no kernel.
   5. A CUDA graph refers to addresses for as long as it may be launched, which nobody knows. So what is allocated on a
      stream while that is captured belongs to a lane of its own. It may take free memory of its stream's other lane, and
      gives none back: its pages are not unmapped, and only later captures of the stream get what was freed of them. It
      counts as in use.
   6. Nobody who holds the lock waits for anything, and no Python runs: free may be called from any thread, with or
      without the interpreter's lock, to the very end of the process. */

#include "page_arena.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define GRAIN 512 /* bytes: as CuPy's pool, of which kernels expect the alignment */
#define ZONES 2
/* Lists of free blocks: up to 31 grains one for each size, from there on 16 for each power of two. */
#define BINS (32 + 16 * 40)
/* Lists of CACHED blocks by size: a table of as many. */
#define SIZES 2048
/* Events of a lane that have not been seen to pass. */
#define MARKS 64
/* While so much of the limit is freed, an event is recorded, so that older ones pass earlier; and for how many frees
   after pages were unmapped last. */
#define MARKED_SHARE 64
#define MARKED_FREES 8192

enum state { USED, CACHED, FREE, VOID, BUSY };

struct lane;

struct block {
    uint64_t start, size; /* bytes */
    struct block *before, *after; /* in the order of addresses */
    struct block *previous, *next; /* in the list that it is in; `next` also in the table of used ones */
    struct lane *lane; /* NULL: VOID */
    uint8_t state, zone;
};

struct size_list {
    uint64_t size;
    struct block *first;
};

struct mark {
    uint64_t tick;
    void *event;
    unsigned waiters;
};

struct lane {
    intptr_t stream;
    bool is_captured; /* it has what was allocated while a graph was captured of the stream */
    struct lane *next;
    uint64_t used, free; /* bytes */
    uint64_t freed;      /* bytes since the last mark */
    uint64_t passed;     /* what was freed until this tick is idle */
    struct mark marks[MARKS]; /* a ring, the oldest first */
    unsigned first_mark, n_marks;
    struct size_list sizes[SIZES];
    uint16_t filled_sizes[SIZES / 2]; /* the entries of the table that are in use */
    unsigned n_sizes;
    struct block *bins[ZONES][BINS];
    uint64_t filled[ZONES][(BINS + 63) / 64];
};

struct page_arena {
    pthread_mutex_t lock;
    const struct arena_driver *driver;
    void *context;
    uint64_t page_size, pages, small;
    uint64_t *page_at;  /* by the page of the address space: the driver's page, if one is mapped */
    uint64_t *stamp;    /* by the page of the address space */
    uint8_t *is_mapped; /* by the page of the address space */
    struct block *blocks, *voids[ZONES];
    struct block **used_table; /* by a hash of the offset */
    uint64_t used_mask, n_used;
    struct block *unused; /* block structures */
    void *chunks;
    struct lane *lanes;
    uint64_t *spare; /* pages that are mapped nowhere */
    uint64_t n_spare, spare_size, lost;
    uint64_t used, graphs, taken, limit, tick, settled; /* graphs: bytes that are free in lanes of captured streams */
    uint64_t unmapped; /* the tick when pages were last wanted */
    uint64_t *order; /* scratch: pages to choose from */
    uint64_t order_size;
    struct arena_counts counts;
};

/* Block structures, and the table of blocks in use. */

#define CHUNK 256

static bool have_unused(struct page_arena *arena, unsigned wanted)
{
    unsigned found = 0;
    for (struct block *block = arena->unused; block && found < wanted; block = block->next)
        found++;
    while (found < wanted) {
        struct block *chunk = calloc(CHUNK, sizeof *chunk);
        if (!chunk)
            return false;
        *(void **)chunk = arena->chunks; /* the first one only links the chunks */
        arena->chunks = chunk;
        for (unsigned n = 1; n < CHUNK; n++) {
            chunk[n].next = arena->unused;
            arena->unused = &chunk[n];
        }
        found += CHUNK - 1;
    }
    return true;
}

static struct block *new_block(struct page_arena *arena)
{
    struct block *block = arena->unused;
    arena->unused = block->next;
    return block;
}

static void drop_block(struct page_arena *arena, struct block *block)
{
    if (block->before)
        block->before->after = block->after;
    else
        arena->blocks = block->after;
    if (block->after)
        block->after->before = block->before;
    block->next = arena->unused;
    arena->unused = block;
}

static uint64_t hash_of(uint64_t number)
{
    return (number / GRAIN * 0x9e3779b97f4a7c15ull) >> 20;
}

static void add_used(struct page_arena *arena, struct block *block)
{
    struct block **first = &arena->used_table[hash_of(block->start) & arena->used_mask];
    block->next = *first;
    *first = block;
    arena->n_used++;
}

/* Has the table grow where it is full, if there is memory for that. */
static void grow_used(struct page_arena *arena)
{
    uint64_t mask = arena->used_mask * 2 + 1;
    struct block **table = calloc(mask + 1, sizeof *table), **old = arena->used_table;
    if (!table)
        return;
    uint64_t n = arena->used_mask + 1;
    arena->used_table = table;
    arena->used_mask = mask;
    arena->n_used = 0;
    for (uint64_t i = 0; i < n; i++)
        for (struct block *block = old[i], *next; block; block = next) {
            next = block->next;
            add_used(arena, block);
        }
    free(old);
}

static struct block *take_used(struct page_arena *arena, uint64_t offset)
{
    struct block **link = &arena->used_table[hash_of(offset) & arena->used_mask];
    while (*link && (*link)->start != offset)
        link = &(*link)->next;
    struct block *block = *link;
    if (block) {
        *link = block->next;
        arena->n_used--;
    }
    return block;
}

/* Lists. */

static void link_block(struct block **first, struct block *block)
{
    block->previous = NULL;
    block->next = *first;
    if (*first)
        (*first)->previous = block;
    *first = block;
}

static void unlink_block(struct block **first, struct block *block)
{
    if (block->previous)
        block->previous->next = block->next;
    else
        *first = block->next;
    if (block->next)
        block->next->previous = block->previous;
}

static unsigned bin_of(uint64_t size)
{
    uint64_t grains = size / GRAIN;
    if (grains < 32)
        return (unsigned)grains;
    unsigned log = 63 - (unsigned)__builtin_clzll(grains);
    return 32 + (log - 5) * 16 + ((grains >> (log - 4)) & 15);
}

/* Counts the size of a block as free in a lane, or no longer. */
static void count_free(struct page_arena *arena, struct lane *lane, uint64_t size, bool is_free)
{
    lane->free += is_free ? size : -size;
    if (lane->is_captured)
        __atomic_store_n(&arena->graphs, arena->graphs + (is_free ? size : -size), __ATOMIC_RELAXED);
}

static void remove_free(struct page_arena *arena, struct block *block)
{
    struct lane *lane = block->lane;
    unsigned bin = bin_of(block->size);
    unlink_block(&lane->bins[block->zone][bin], block);
    if (!lane->bins[block->zone][bin])
        lane->filled[block->zone][bin / 64] &= ~(1ull << bin % 64);
    count_free(arena, lane, block->size, false);
    block->state = BUSY;
}

static bool is_kin(const struct block *block, const struct block *other, enum state state)
{
    return other && other->state == state && other->zone == block->zone && other->lane == block->lane;
}

/* Makes a block that is in no list FREE, merged with its neighbours. */
static struct block *insert_free(struct page_arena *arena, struct block *block)
{
    struct block *before = block->before, *after = block->after;
    if (is_kin(block, after, FREE)) {
        remove_free(arena, after);
        block->size += after->size;
        drop_block(arena, after);
    }
    if (is_kin(block, before, FREE)) {
        remove_free(arena, before);
        before->size += block->size;
        drop_block(arena, block);
        block = before;
    }
    struct lane *lane = block->lane;
    unsigned bin = bin_of(block->size);
    block->state = FREE;
    count_free(arena, lane, block->size, true);
    link_block(&lane->bins[block->zone][bin], block);
    lane->filled[block->zone][bin / 64] |= 1ull << bin % 64;
    return block;
}

static void remove_void(struct page_arena *arena, struct block *block)
{
    unlink_block(&arena->voids[block->zone], block);
    block->state = BUSY;
}

static void insert_void(struct page_arena *arena, struct block *block)
{
    block->lane = NULL;
    struct block *before = block->before, *after = block->after;
    if (is_kin(block, after, VOID)) {
        remove_void(arena, after);
        block->size += after->size;
        drop_block(arena, after);
    }
    if (is_kin(block, before, VOID)) {
        remove_void(arena, before);
        before->size += block->size;
        drop_block(arena, block);
        block = before;
    }
    block->state = VOID;
    link_block(&arena->voids[block->zone], block);
}

/* Cuts a block that is in no list in two. Returns the second part, in no list either. There must be an unused structure. */
static struct block *cut(struct page_arena *arena, struct block *block, uint64_t at)
{
    struct block *rest = new_block(arena);
    *rest = (struct block){.start = at, .size = block->start + block->size - at, .before = block, .after = block->after,
                           .lane = block->lane, .state = block->state, .zone = block->zone};
    if (rest->after)
        rest->after->before = rest;
    block->after = rest;
    block->size = at - block->start;
    return rest;
}

/* Returns the list of CACHED blocks of a size; NULL if there is none and `make` is false, or no room for one. */
static struct size_list *size_list(struct lane *lane, uint64_t size, bool make)
{
    for (uint64_t n = hash_of(size);; n++) {
        struct size_list *list = &lane->sizes[n % SIZES];
        if (list->size == size)
            return list;
        if (!list->size) {
            if (!make || lane->n_sizes == SIZES / 2)
                return NULL;
            lane->filled_sizes[lane->n_sizes++] = (uint16_t)(n % SIZES);
            list->size = size;
            return list;
        }
    }
}

/* Merges the CACHED blocks of a lane with their neighbours. Returns whether there were any. */
static bool merge_cached(struct page_arena *arena, struct lane *lane)
{
    bool any = false;
    for (unsigned n = 0; n < lane->n_sizes; n++) {
        struct size_list *list = &lane->sizes[lane->filled_sizes[n]];
        for (struct block *block = list->first, *next; block; block = next) {
            next = block->next;
            count_free(arena, lane, block->size, false);
            insert_free(arena, block);
            any = true;
        }
        *list = (struct size_list){0};
    }
    lane->n_sizes = 0;
    return any;
}

static unsigned filled_bin(const uint64_t *filled, unsigned bin)
{
    for (unsigned word = bin / 64; word < (BINS + 63) / 64; word++) {
        uint64_t found = filled[word];
        if (word == bin / 64)
            found &= ~0ull << bin % 64;
        if (found)
            return word * 64 + (unsigned)__builtin_ctzll(found);
    }
    return BINS;
}

/* Returns the smallest FREE block of at least `size`; NULL if there is none. */
static struct block *best_fit(struct lane *lane, unsigned zone, uint64_t size)
{
    const uint64_t *filled = lane->filled[zone];
    for (unsigned bin = filled_bin(filled, bin_of(size)); bin < BINS; bin = filled_bin(filled, bin + 1)) {
        struct block *best = NULL;
        for (struct block *block = lane->bins[zone][bin]; block; block = block->next) {
            if (block->size >= size && (!best || block->size < best->size))
                best = block;
            if (block->size == size)
                return block;
        }
        if (best)
            return best;
    }
    return NULL;
}

/* Streams. */

static struct lane *find_lane(struct page_arena *arena, intptr_t stream, bool is_captured)
{
    struct lane *lane = arena->lanes;
    while (lane && (lane->stream != stream || lane->is_captured != is_captured))
        lane = lane->next;
    return lane;
}

static struct lane *lane_of(struct page_arena *arena, intptr_t stream, bool is_captured)
{
    struct lane *found = find_lane(arena, stream, is_captured), *idle = NULL;
    if (found)
        return found;
    for (struct lane *lane = arena->lanes; lane; lane = lane->next)
        if (!lane->used && !lane->free && !lane->n_marks)
            idle = lane;
    if (!idle) {
        idle = calloc(1, sizeof *idle);
        if (!idle)
            return NULL;
        idle->next = arena->lanes;
        arena->lanes = idle;
    }
    idle->stream = stream;
    idle->is_captured = is_captured;
    idle->freed = 0;
    idle->passed = 0;
    return idle;
}

/* Forgets the marks that have passed, the oldest first. */
static void see_marks(struct page_arena *arena, struct lane *lane)
{
    while (lane->n_marks) {
        struct mark *mark = &lane->marks[lane->first_mark];
        if (mark->tick > lane->passed && !arena->driver->is_done(arena->context, mark->event))
            return;
        if (mark->tick > lane->passed)
            lane->passed = mark->tick;
        if (mark->waiters)
            return;
        arena->driver->forget(arena->context, mark->event);
        lane->first_mark = (lane->first_mark + 1) % MARKS;
        lane->n_marks--;
    }
}

/* Records an event after all that was freed until now. Returns whether that could be done. */
static bool set_mark(struct page_arena *arena, struct lane *lane)
{
    see_marks(arena, lane);
    if (lane->n_marks == MARKS)
        return false;
    void *event = arena->driver->record(arena->context, lane->stream);
    if (!event)
        return false;
    lane->marks[(lane->first_mark + lane->n_marks++) % MARKS] = (struct mark){arena->tick, event, 0};
    lane->freed = 0;
    arena->counts.marks++;
    return true;
}

/* Finds the event that says that what was freed until `tick` is idle. Returns whether there is one. */
static bool find_mark(struct page_arena *arena, struct lane *lane, uint64_t tick, struct arena_wait *wait)
{
    for (int attempt = 0; attempt < 2; attempt++) {
        for (unsigned n = 0; n < lane->n_marks; n++) {
            struct mark *mark = &lane->marks[(lane->first_mark + n) % MARKS];
            if (mark->tick >= tick) {
                mark->waiters++;
                *wait = (struct arena_wait){.event = mark->event, .tick = mark->tick, .lane = lane};
                return true;
            }
        }
        if (attempt || (!set_mark(arena, lane) && !lane->n_marks))
            return false;
        if (lane->n_marks == MARKS && lane->marks[(lane->first_mark + MARKS - 1) % MARKS].tick < tick) {
            /* All events are waited for: when the oldest has passed there is room for another. */
            struct mark *mark = &lane->marks[lane->first_mark];
            mark->waiters++;
            *wait = (struct arena_wait){.event = mark->event, .tick = mark->tick, .lane = lane};
            return true;
        }
    }
    return false;
}

/* Pages. */

static uint64_t page_of(const struct page_arena *arena, uint64_t offset)
{
    return offset / arena->page_size;
}

static uint64_t rounded_up(const struct page_arena *arena, uint64_t offset)
{
    return (offset + arena->page_size - 1) / arena->page_size * arena->page_size;
}

static uint64_t rounded_down(const struct page_arena *arena, uint64_t offset)
{
    return offset / arena->page_size * arena->page_size;
}

static bool is_idle(const struct page_arena *arena, const struct lane *lane, uint64_t stamp)
{
    return stamp <= lane->passed || stamp <= arena->settled;
}

/* Has room for one more spare page. Returns whether there is. */
static bool can_spare(struct page_arena *arena)
{
    if (arena->n_spare < arena->spare_size)
        return true;
    uint64_t size = arena->spare_size ? 2 * arena->spare_size : 64;
    uint64_t *grown = realloc(arena->spare, size * sizeof *grown);
    if (!grown)
        return false;
    arena->spare = grown;
    arena->spare_size = size;
    return true;
}

/* Returns how many pages may be taken before the limit is reached. */
static uint64_t new_pages(const struct page_arena *arena)
{
    return arena->limit > arena->taken ? (arena->limit - arena->taken) / arena->page_size : 0;
}

/* Takes new pages of the GPU until `wanted` are spare, or the limit is reached, or the driver has no more. */
static void create_pages(struct page_arena *arena, uint64_t wanted)
{
    uint64_t page;
    while (arena->n_spare < wanted && new_pages(arena) && can_spare(arena) &&
           arena->driver->create(arena->context, &page)) {
        arena->counts.creates++;
        arena->spare[arena->n_spare++] = page;
        __atomic_store_n(&arena->taken, arena->taken + arena->page_size, __ATOMIC_RELAXED);
    }
}

/* A choice among pages is by the tick at which they became free, then by address: one word each. The address space has
   fewer than 2^24 pages, and ticks are counted from the first one on. */
#define PAGE_BITS 24

static int compare(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return (a > b) - (a < b);
}

/* Lists the free whole pages of a lane in the order in which they became free. Returns how many. */
static uint64_t list_pages(struct page_arena *arena, struct lane *lane)
{
    uint64_t n = 0;
    for (unsigned zone = 0; zone < ZONES; zone++)
        for (unsigned bin = filled_bin(lane->filled[zone], bin_of(arena->page_size)); bin < BINS; bin = filled_bin(lane->filled[zone], bin + 1))
            for (struct block *block = lane->bins[zone][bin]; block; block = block->next) {
                uint64_t first = rounded_up(arena, block->start) / arena->page_size, end = page_of(arena, block->start + block->size);
                for (uint64_t page = first; page < end; page++) {
                    if (n == arena->order_size) {
                        uint64_t size = n ? 2 * n : 256;
                        uint64_t *grown = realloc(arena->order, size * sizeof *grown);
                        if (!grown)
                            return n;
                        arena->order = grown;
                        arena->order_size = size;
                    }
                    arena->order[n++] = arena->stamp[page] << PAGE_BITS | page;
                }
            }
    if (n)
        qsort(arena->order, n, sizeof *arena->order, compare);
    return n;
}

/* Returns the FREE block that a whole page lies in. Pages that are asked for one after the other are near each other. */
static struct block *block_of(struct page_arena *arena, struct lane *lane, uint64_t page)
{
    uint64_t at = page * arena->page_size;
    for (unsigned zone = 0; zone < ZONES; zone++)
        for (unsigned bin = filled_bin(lane->filled[zone], bin_of(arena->page_size)); bin < BINS; bin = filled_bin(lane->filled[zone], bin + 1))
            for (struct block *block = lane->bins[zone][bin]; block; block = block->next)
                if (block->start <= at && at + arena->page_size <= block->start + block->size)
                    return block;
    return NULL;
}

/* Unmaps a row of pages inside of a FREE block, and makes them spare. Returns how many. */
static uint64_t unmap_row(struct page_arena *arena, struct block *block, uint64_t page, uint64_t pages)
{
    uint64_t done = 0;
    if (!have_unused(arena, 2))
        return 0;
    for (; done < pages; done++) {
        uint64_t at = page + done;
        if (!can_spare(arena) || !arena->driver->unmap(arena->context, at * arena->page_size))
            break;
        arena->counts.unmaps++;
        arena->is_mapped[at] = 0;
        arena->spare[arena->n_spare++] = arena->page_at[at];
    }
    if (!done)
        return 0;
    uint64_t start = page * arena->page_size, end = start + done * arena->page_size;
    remove_free(arena, block);
    if (block->start < start) {
        struct block *rest = cut(arena, block, start);
        insert_free(arena, block);
        block = rest;
    }
    if (block->start + block->size > end)
        insert_free(arena, cut(arena, block, end));
    insert_void(arena, block);
    return done;
}

/* Unmaps the first pages of the list that are not `kept` until `wanted` are spare. */
static void unmap_pages(struct page_arena *arena, struct lane *lane, uint64_t n, uint64_t wanted)
{
    for (uint64_t i = 0; i < n && arena->n_spare < wanted;) {
        uint64_t page = arena->order[i] & ((1ull << PAGE_BITS) - 1), pages = 1;
        if (!is_idle(arena, lane, arena->order[i] >> PAGE_BITS))
            return;
        struct block *block = block_of(arena, lane, page);
        uint64_t end = page_of(arena, block->start + block->size);
        while (i + pages < n && arena->n_spare + pages < wanted && page + pages < end && arena->order[i + pages] == arena->order[i] + pages)
            pages++;
        if (unmap_row(arena, block, page, pages) < pages)
            return;
        i += pages;
    }
}

/* Finds spare pages for a lane. Those that are unmapped for that are of `giver`, the lane itself but in captures, and may
   be NULL. */
static enum arena_result gather(struct page_arena *arena, struct lane *lane, struct lane *giver, uint64_t wanted, struct arena_wait *wait)
{
    if (arena->n_spare + new_pages(arena) >= wanted)
        create_pages(arena, wanted);
    if (arena->n_spare >= wanted)
        return ARENA_DONE;
    arena->unmapped = arena->tick;
    uint64_t n = 0;
    if (giver) {
        see_marks(arena, giver);
        n = list_pages(arena, giver);
    }
    bool others = false; /* none for a stream that is captured: it cannot wait for them */
    for (struct lane *other = arena->lanes; other && !lane->is_captured; other = other->next)
        others |= other != lane && other->free && !other->is_captured;
    if (arena->n_spare + new_pages(arena) + n >= wanted)
        create_pages(arena, wanted);
    wait->missing = arena->n_spare + n < wanted ? (wanted - arena->n_spare - n) * arena->page_size : 0;
    if (wait->missing)
        return others ? ARENA_ORDER : ARENA_FULL;
    if (arena->n_spare < wanted) {
        uint64_t last = arena->order[wanted - arena->n_spare - 1] >> PAGE_BITS;
        if (!is_idle(arena, giver, last)) {
            if (!find_mark(arena, giver, last, wait))
                return others ? ARENA_ORDER : ARENA_FULL;
            arena->counts.waits++;
            return ARENA_WAIT;
        }
        unmap_pages(arena, giver, n, wanted);
    }
    return arena->n_spare >= wanted ? ARENA_DONE : ARENA_FULL;
}

/* Places. */

/* Returns how many pages would have to be mapped for the bytes from `start` on, which lie in blocks from `block` on. */
static uint64_t missing_pages(const struct page_arena *arena, const struct block *block, uint64_t start, uint64_t size)
{
    uint64_t missing = 0, end = start + size;
    for (; block && block->start < end; block = block->after) {
        if (block->state != VOID || block->start + block->size <= start)
            continue;
        uint64_t from = block->start > start ? block->start : rounded_down(arena, start);
        uint64_t to = block->start + block->size < end ? block->start + block->size : rounded_up(arena, end);
        missing += (to - from) / arena->page_size;
    }
    return missing;
}

static bool is_place(const struct block *block, const struct lane *lane, unsigned zone)
{
    return block && block->zone == zone && (block->state == VOID || (block->state == FREE && block->lane == lane));
}

/* Finds where the fewest pages are missing. Returns the first block of the place; NULL if there is none. */
static struct block *find_place(struct page_arena *arena, struct lane *lane, unsigned zone, uint64_t size, uint64_t *start, uint64_t *missing)
{
    struct block *best = NULL;
    uint64_t best_total = 0;
    for (struct block *hole = arena->voids[zone]; hole; hole = hole->next) {
        struct block *first = hole;
        while (is_place(first->before, lane, zone) && first->before->state == FREE)
            first = first->before;
        if (first->before && first->before->state == VOID && first->before->zone == zone)
            continue; /* seen from there */
        struct block *last = first;
        while (is_place(last->after, lane, zone))
            last = last->after;
        uint64_t end = last->start + last->size, total = end - first->start;
        if (total < size)
            continue;
        bool is_top = !last->after || last->after->zone != zone;
        struct block *from = first;
        for (struct block *block = first;; block = block->after) {
            uint64_t block_end = block->start + block->size;
            for (int way = 0; way < 2; way++) {
                uint64_t at = way ? block_end - size : block->start;
                if (way ? block_end < first->start + size || (is_top && block == last) : end - at < size)
                    continue;
                uint64_t needed = missing_pages(arena, first, at, size);
                if (!best || needed < *missing || (needed == *missing && total < best_total)) {
                    best = from;
                    best_total = total;
                    *start = at;
                    *missing = needed;
                }
            }
            if (block == last)
                break;
        }
    }
    while (best && best->start + best->size <= *start)
        best = best->after;
    return best;
}

/* Sets what lies from `start` to `end` aside, so that nobody takes its pages: of VOID blocks whole pages. `block` is the
   first one there. Returns the first one that was set aside. There must be two unused structures. */
static struct block *set_aside(struct page_arena *arena, struct block *block, uint64_t start, uint64_t end)
{
    struct block *first = NULL;
    for (struct block *next; block && block->start < end; block = next) {
        bool is_void = block->state == VOID;
        uint64_t from = is_void ? rounded_down(arena, start) : start, to = is_void ? rounded_up(arena, end) : end;
        if (is_void)
            remove_void(arena, block);
        else
            remove_free(arena, block);
        struct block *left = NULL, *right = NULL;
        if (block->start < from) {
            left = block;
            block = cut(arena, block, from);
        }
        if (block->start + block->size > to)
            right = cut(arena, block, to);
        next = right ? NULL : block->after;
        for (int way = 0; way < 2; way++) {
            struct block *rest = way ? right : left;
            if (rest && is_void)
                insert_void(arena, rest);
            else if (rest)
                insert_free(arena, rest);
        }
        if (!first)
            first = block;
    }
    return first;
}

/* Undoes that: what is mapped becomes FREE, the rest VOID. */
static void put_back(struct page_arena *arena, struct lane *lane, struct block *block, uint64_t end)
{
    for (struct block *next; block && block->start < end; block = next) {
        next = block->after;
        if (arena->is_mapped[page_of(arena, block->start)]) {
            block->lane = lane;
            insert_free(arena, block);
        } else {
            insert_void(arena, block);
        }
    }
}

/* Maps spare pages to a block that was VOID. Returns whether all could be mapped. */
static bool map_block(struct page_arena *arena, struct block *block)
{
    uint64_t first = page_of(arena, block->start), pages = page_of(arena, block->size), done = 0;
    for (; done < pages; done++) {
        uint64_t at = first + done, page = arena->spare[arena->n_spare - 1];
        if (!arena->driver->map(arena->context, at * arena->page_size, page))
            break;
        arena->counts.maps++;
        arena->n_spare--;
        arena->page_at[at] = page;
        arena->is_mapped[at] = 1;
        arena->stamp[at] = 0;
    }
    if (done == pages && arena->driver->allow(arena->context, block->start, block->size)) {
        arena->counts.rows++;
        return true;
    }
    while (done--) {
        uint64_t at = first + done;
        arena->is_mapped[at] = 0;
        if (arena->driver->unmap(arena->context, at * arena->page_size)) {
            arena->counts.unmaps++;
            arena->spare[arena->n_spare++] = arena->page_at[at]; /* it was one: there is room */
        } else { /* the GPU is broken */
            arena->lost++;
        }
    }
    return false;
}

static void use(struct page_arena *arena, struct lane *lane, struct block *block, uint64_t *offset)
{
    block->state = USED;
    block->lane = lane;
    add_used(arena, block);
    lane->used += block->size;
    __atomic_store_n(&arena->used, arena->used + block->size, __ATOMIC_RELAXED);
    *offset = block->start;
}

/* Cuts `size` from `start` on out of a block that is in no list, and uses that. There must be two unused structures. */
static void use_part(struct page_arena *arena, struct lane *lane, struct block *block, uint64_t start, uint64_t size, uint64_t *offset)
{
    if (block->start < start) {
        struct block *rest = cut(arena, block, start);
        insert_free(arena, block);
        block = rest;
    }
    if (block->size > size)
        insert_free(arena, cut(arena, block, start + size));
    use(arena, lane, block, offset);
}

static enum arena_result map_anew(struct page_arena *arena, struct lane *lane, struct lane *giver, unsigned zone, uint64_t size, uint64_t *offset, struct arena_wait *wait)
{
    uint64_t start = 0, missing = 0;
    struct block *first = find_place(arena, lane, zone, size, &start, &missing);
    if (!first || !have_unused(arena, 4))
        return ARENA_FULL;
    first = set_aside(arena, first, start, start + size);
    enum arena_result result = gather(arena, lane, giver, missing, wait);
    /* Gathering has cut other blocks, but none of these. */
    bool is_mapped = result == ARENA_DONE && have_unused(arena, 2);
    for (struct block *block = first; is_mapped && block && block->start < start + size; block = block->after)
        if (!arena->is_mapped[page_of(arena, block->start)])
            is_mapped = map_block(arena, block);
    if (!is_mapped) {
        put_back(arena, lane, first, start + size);
        return result == ARENA_DONE ? ARENA_FULL : result;
    }
    while (first->after && first->after->state == BUSY) {
        struct block *after = first->after;
        first->size += after->size;
        drop_block(arena, after);
    }
    first->lane = lane;
    use_part(arena, lane, first, start, size, offset);
    arena->counts.mapped_anew++;
    return ARENA_DONE;
}

/* Takes a block of the list of its size, if there is one. */
static bool take_exact(struct page_arena *arena, struct lane *lane, struct lane *giver, uint64_t size, uint64_t *offset)
{
    struct size_list *list = giver ? size_list(giver, size, false) : NULL;
    if (!list || !list->first)
        return false;
    struct block *block = list->first;
    unlink_block(&list->first, block);
    count_free(arena, giver, size, false);
    use(arena, lane, block, offset);
    arena->counts.exact++;
    return true;
}

/* Cuts a block of free memory, if there is as much in one place. There must be two unused structures. */
static bool take_fitting(struct page_arena *arena, struct lane *lane, struct lane *giver, unsigned zone, uint64_t size, uint64_t *offset)
{
    struct block *block = giver ? best_fit(giver, zone, size) : NULL;
    if (!block && giver && merge_cached(arena, giver))
        block = best_fit(giver, zone, size);
    if (!block)
        return false;
    remove_free(arena, block);
    use_part(arena, lane, block, block->start, size, offset);
    arena->counts.fitted++;
    return true;
}

static enum arena_result allocate(struct page_arena *arena, uint64_t nbytes, intptr_t stream, bool is_captured, uint64_t *offset,
                                  struct arena_wait *wait)
{
    struct lane *lane = lane_of(arena, stream, is_captured);
    struct lane *giver = is_captured ? find_lane(arena, stream, false) : NULL;
    wait->missing = nbytes;
    if (!lane || nbytes > arena->pages * arena->page_size)
        return ARENA_FULL;
    uint64_t size = nbytes ? (nbytes + GRAIN - 1) / GRAIN * GRAIN : GRAIN;
    unsigned zone = size >= arena->small;
    if (arena->n_used > 2 * arena->used_mask)
        grow_used(arena);
    if (arena->unmapped && arena->tick < arena->unmapped + MARKED_FREES && lane->freed > arena->limit / MARKED_SHARE && !is_captured)
        set_mark(arena, lane);
    if (take_exact(arena, lane, lane, size, offset) || take_exact(arena, lane, giver, size, offset))
        return ARENA_DONE;
    if (!have_unused(arena, 2))
        return ARENA_FULL;
    if (take_fitting(arena, lane, lane, zone, size, offset) || take_fitting(arena, lane, giver, zone, size, offset))
        return ARENA_DONE;
    return map_anew(arena, lane, is_captured ? giver : lane, zone, size, offset, wait);
}

/* The interface. */

struct page_arena *page_arena_new(uint64_t pages, uint64_t page_size, uint64_t small, const struct arena_driver *driver, void *context)
{
    struct page_arena *arena = calloc(1, sizeof *arena);
    if (!arena)
        return NULL;
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&arena->lock, &recursive);
    pthread_mutexattr_destroy(&recursive);
    arena->driver = driver;
    arena->context = context;
    arena->pages = pages;
    arena->page_size = page_size;
    arena->small = small;
    arena->limit = UINT64_MAX;
    arena->used_mask = 1023;
    arena->used_table = calloc(arena->used_mask + 1, sizeof *arena->used_table);
    arena->page_at = calloc(pages, sizeof *arena->page_at);
    arena->stamp = calloc(pages, sizeof *arena->stamp);
    arena->is_mapped = calloc(pages, 1);
    if (pages < 8 || pages >> PAGE_BITS || !arena->used_table || !arena->page_at || !arena->stamp || !arena->is_mapped || !have_unused(arena, 2)) {
        page_arena_delete(arena);
        return NULL;
    }
    uint64_t end = 0;
    for (unsigned zone = 0; zone < ZONES; zone++) {
        struct block *block = new_block(arena), *before = arena->blocks;
        uint64_t size = (zone ? pages - pages / 4 : pages / 4) * page_size;
        *block = (struct block){.start = end, .size = size, .before = before, .zone = (uint8_t)zone};
        if (before)
            before->after = block;
        else
            arena->blocks = block;
        insert_void(arena, block);
        end += size;
    }
    return arena;
}

void page_arena_delete(struct page_arena *arena)
{
    for (struct lane *lane = arena->lanes, *next; lane; lane = next) {
        next = lane->next;
        free(lane);
    }
    for (void *chunk = arena->chunks, *next; chunk; chunk = next) {
        next = *(void **)chunk;
        free(chunk);
    }
    free(arena->used_table);
    free(arena->page_at);
    free(arena->stamp);
    free(arena->is_mapped);
    free(arena->spare);
    free(arena->order);
    pthread_mutex_destroy(&arena->lock);
    free(arena);
}

void page_arena_lock(struct page_arena *arena)
{
    pthread_mutex_lock(&arena->lock);
}

bool page_arena_try_lock(struct page_arena *arena)
{
    return !pthread_mutex_trylock(&arena->lock);
}

void page_arena_unlock(struct page_arena *arena)
{
    pthread_mutex_unlock(&arena->lock);
}

void page_arena_set_limit(struct page_arena *arena, uint64_t nbytes)
{
    page_arena_lock(arena);
    arena->limit = nbytes;
    page_arena_unlock(arena);
}

enum arena_result page_arena_allocate(struct page_arena *arena, uint64_t nbytes, intptr_t stream, bool is_captured, uint64_t *offset,
                                      struct arena_wait *wait)
{
    page_arena_lock(arena);
    enum arena_result result = allocate(arena, nbytes, stream, is_captured, offset, wait);
    arena->counts.orders += result == ARENA_ORDER;
    page_arena_unlock(arena);
    return result;
}

void page_arena_waited(struct page_arena *arena, const struct arena_wait *wait)
{
    struct lane *lane = wait->lane;
    page_arena_lock(arena);
    for (unsigned n = 0; n < lane->n_marks; n++) {
        struct mark *mark = &lane->marks[(lane->first_mark + n) % MARKS];
        if (mark->event == wait->event)
            mark->waiters--;
    }
    if (wait->tick > lane->passed)
        lane->passed = wait->tick;
    see_marks(arena, lane);
    page_arena_unlock(arena);
}

/* Gives a lane the free memory of all others that was freed until `tick`: its stream's later work comes after that. With
   `graphs` also what belongs to graphs. */
static void adopt(struct page_arena *arena, struct lane *lane, uint64_t tick, bool graphs)
{
    arena->tick++;
    for (struct lane *other = arena->lanes; lane && other; other = other->next) {
        if (other == lane || (other->is_captured && !graphs))
            continue;
        merge_cached(arena, other);
        for (unsigned zone = 0; zone < ZONES; zone++)
            for (unsigned bin = filled_bin(other->filled[zone], 0); bin < BINS; bin = filled_bin(other->filled[zone], bin + 1))
                for (struct block *block = other->bins[zone][bin], *next; block; block = next) {
                    uint64_t first = page_of(arena, block->start), last = page_of(arena, block->start + block->size - 1), page = first;
                    next = block->next;
                    while (page <= last && arena->stamp[page] <= tick)
                        page++;
                    if (page <= last)
                        continue;
                    /* The other lane's events say nothing about this one's work. */
                    for (page = first; page <= last; page++)
                        if (arena->stamp[page] > arena->settled)
                            arena->stamp[page] = arena->tick;
                    remove_free(arena, block);
                    block->lane = lane;
                    insert_free(arena, block);
                }
    }
}

void page_arena_adopt(struct page_arena *arena, intptr_t stream, uint64_t tick)
{
    page_arena_lock(arena);
    adopt(arena, lane_of(arena, stream, false), tick, false);
    page_arena_unlock(arena);
}

size_t page_arena_streams(struct page_arena *arena, intptr_t *streams, size_t most)
{
    size_t n = 0;
    page_arena_lock(arena);
    for (struct lane *lane = arena->lanes; lane && n < most; lane = lane->next)
        if (lane->free && !lane->is_captured)
            streams[n++] = lane->stream;
    page_arena_unlock(arena);
    return n;
}

bool page_arena_free(struct page_arena *arena, uint64_t offset)
{
    page_arena_lock(arena);
    struct block *block = take_used(arena, offset);
    if (block) {
        struct lane *lane = block->lane;
        uint64_t tick = ++arena->tick;
        for (uint64_t page = page_of(arena, offset); page * arena->page_size < offset + block->size; page++)
            arena->stamp[page] = tick;
        lane->used -= block->size;
        lane->freed += block->size;
        __atomic_store_n(&arena->used, arena->used - block->size, __ATOMIC_RELAXED);
        struct size_list *list = size_list(lane, block->size, true);
        if (list) {
            count_free(arena, lane, block->size, true);
            block->state = CACHED;
            link_block(&list->first, block);
        } else {
            insert_free(arena, block);
            merge_cached(arena, lane);
        }
    }
    page_arena_unlock(arena);
    return block;
}

uint64_t page_arena_now(struct page_arena *arena)
{
    page_arena_lock(arena);
    uint64_t tick = arena->tick;
    page_arena_unlock(arena);
    return tick;
}

void page_arena_settle(struct page_arena *arena, intptr_t stream, uint64_t tick, bool graphs)
{
    page_arena_lock(arena);
    if (tick > arena->settled)
        arena->settled = tick;
    adopt(arena, lane_of(arena, stream, false), tick, graphs);
    page_arena_unlock(arena);
}

uint64_t page_arena_trim(struct page_arena *arena, uint64_t nbytes)
{
    page_arena_lock(arena);
    uint64_t wanted = arena->taken > nbytes ? (arena->taken - nbytes + arena->page_size - 1) / arena->page_size : 0;
    for (struct lane *lane = arena->lanes; lane && arena->n_spare < wanted; lane = lane->next) {
        if (lane->is_captured)
            continue;
        see_marks(arena, lane);
        merge_cached(arena, lane);
        unmap_pages(arena, lane, list_pages(arena, lane), wanted);
    }
    for (; wanted && arena->n_spare; wanted--) {
        arena->driver->release(arena->context, arena->spare[--arena->n_spare]);
        arena->counts.releases++;
        __atomic_store_n(&arena->taken, arena->taken - arena->page_size, __ATOMIC_RELAXED);
    }
    uint64_t taken = arena->taken;
    page_arena_unlock(arena);
    return taken;
}

uint64_t page_arena_used(const struct page_arena *arena)
{
    return __atomic_load_n(&arena->used, __ATOMIC_RELAXED) + page_arena_graphs(arena);
}

uint64_t page_arena_graphs(const struct page_arena *arena)
{
    return __atomic_load_n(&arena->graphs, __ATOMIC_RELAXED);
}

uint64_t page_arena_taken(const struct page_arena *arena)
{
    return __atomic_load_n(&arena->taken, __ATOMIC_RELAXED);
}

struct arena_counts page_arena_counts(struct page_arena *arena)
{
    page_arena_lock(arena);
    struct arena_counts counts = arena->counts;
    page_arena_unlock(arena);
    return counts;
}

bool page_arena_each_row(struct page_arena *arena, bool (*visit)(void *context, uint64_t offset, uint64_t nbytes), void *context)
{
    bool goes_on = true;
    page_arena_lock(arena);
    for (struct block *block = arena->blocks; block && goes_on;) {
        struct block *end = block;
        while (end && end->state != VOID)
            end = end->after;
        if (end != block) {
            uint64_t stop = end ? end->start : arena->pages * arena->page_size;
            goes_on = visit(context, block->start, stop - block->start);
        }
        block = end ? end->after : NULL;
    }
    page_arena_unlock(arena);
    return goes_on;
}

static const char *check(struct page_arena *arena)
{
    uint64_t end = 0, used = 0, mapped = 0, n_used = 0, graphs = 0;
    for (struct block *block = arena->blocks, *before = NULL; block; before = block, block = block->after) {
        if (block->start != end || !block->size || block->before != before)
            return "the blocks do not follow each other";
        end += block->size;
        bool is_void = block->state == VOID;
        if (block->state == BUSY)
            return "a block was left aside";
        if (is_void && (block->start % arena->page_size || block->size % arena->page_size))
            return "a VOID block has part of a page";
        if ((is_void || block->state == FREE) && is_kin(block, before, block->state))
            return "two free neighbours are not merged";
        for (uint64_t page = page_of(arena, block->start); page * arena->page_size < end; page++)
            if (arena->is_mapped[page] == is_void)
                return is_void ? "a page of a VOID block is mapped" : "a page of a block is not mapped";
        if (block->state == USED) {
            used += block->size;
            n_used++;
        }
    }
    if (end != arena->pages * arena->page_size)
        return "the blocks do not fill the address space";
    for (uint64_t page = 0; page < arena->pages; page++)
        mapped += arena->is_mapped[page];
    if (used != arena->used || n_used != arena->n_used)
        return "what is in use is counted wrong";
    if ((mapped + arena->n_spare + arena->lost) * arena->page_size != arena->taken)
        return "what is taken is counted wrong";
    for (struct lane *lane = arena->lanes; lane; lane = lane->next) {
        uint64_t cached = 0, merged = 0, listed = 0, binned = 0;
        for (struct block *block = arena->blocks; block; block = block->after)
            if (block->lane == lane) {
                cached += block->state == CACHED ? block->size : 0;
                merged += block->state == FREE ? block->size : 0;
            }
        for (unsigned n = 0; n < SIZES; n++)
            for (struct block *block = lane->sizes[n].first; block; block = block->next) {
                if (block->state != CACHED || block->size != lane->sizes[n].size)
                    return "a list of one size has another block";
                listed += block->size;
            }
        for (unsigned zone = 0; zone < ZONES; zone++)
            for (unsigned bin = 0; bin < BINS; bin++)
                for (struct block *block = lane->bins[zone][bin]; block; block = block->next) {
                    if (block->state != FREE || bin_of(block->size) != bin || block->zone != zone)
                        return "a list of free blocks has another block";
                    binned += block->size;
                }
        if (cached != listed || merged != binned || lane->free != cached + merged)
            return "what is free is counted wrong";
        graphs += lane->is_captured ? lane->free : 0;
    }
    return graphs == arena->graphs ? NULL : "what graphs may use is counted wrong";
}

const char *page_arena_check(struct page_arena *arena)
{
    page_arena_lock(arena);
    const char *wrong = check(arena);
    page_arena_unlock(arena);
    return wrong;
}
