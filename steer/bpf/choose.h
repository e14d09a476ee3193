/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The choice of a worker for one SYN. `src/decision.rs` is the same in Rust: change them together.
 * Needs the maps and `load_of`.
 *
 * Every policy chooses among the usable workers below their maximum, trusted ones before suspect
 * ones. Most compare a cost by weight in one scan; ties go to the first worker after the last
 * choice.
 */
#ifndef STEER_CHOOSE_H
#define STEER_CHOOSE_H

#include "hash.h"

struct choice {
	__u32 workers;
	__u32 start;
	__u32 second;
	__u32 is_v6;
	__u32 policy;
	/* With failover: workers of a lower priority stand by. */
	__u32 top;
	__u64 turn;
	__u64 seed;
	/* With hash: of the client. With round-robin: the virtual clock. */
	__u64 key;
	/* Of the best worker so far. */
	__u64 cost;
	__u64 weight;
	/* Of the last worker that was looked at. */
	__u64 last_weight;
	__u32 worker;
	__u32 found;
	__u32 suspect;
	/* A usable worker is at its maximum. */
	__u32 full;
	/* Trusted workers with room among the draws. */
	__u32 drawn;
	/* No trusted worker with room has a lower cost than this; 0: that is not known. */
	__u32 bound;
	/* Two workers have different weights. */
	__u32 mixed;
	/* With a weighted draw: the worker that is not drawn again. */
	__u32 other;
	/* With a weighted draw: the weights of the workers with room, trusted and suspect ones. */
	__u64 weights[2];
	/* With a weighted draw: the weight that is left to skip. */
	__u64 rest;
};

static __always_inline int is_usable(const struct steer_worker *w, const struct steer_counts *c,
				     __u32 is_v6)
{
	int v4, v6;

	if (!w->weight || w->draining)
		return 0;
	v4 = c->listeners[0] && !is_v6;
	v6 = c->listeners[1] && (is_v6 || c->no_v4_at != c->listens);
	return (v4 || v6) && c->lost_at != c->listens;
}

static __always_inline __u64 weight_of(const struct steer_worker *w)
{
	return (__u64)w->weight * w->slow_start;
}

/* Virtual time from `now` until the worker's next turn. A worker does not catch up on turns that it
 * missed. The sum wraps; a distance that is too long is a time in the past. */
static __always_inline __u64 ahead(__u64 last, __u64 weight, __u64 now)
{
	__u64 ahead = last + STEER_TURN / weight - now;

	return ahead < STEER_TURN_FAR ? ahead : 0;
}

static __always_inline __u64 random_of(const struct choice *choice, __u32 draw)
{
	__u64 n = choice->turn * STEER_DRAWS + draw + 1;

	return mixed(choice->seed + n * 0x9e3779b97f4a7c15ULL);
}

/* Notes the worker if it is the best so far. Always 0. */
__noinline int consider(__u32 worker, struct choice *choice)
{
	struct steer_worker *w = bpf_map_lookup_elem(&workers, &worker);
	struct steer_counts *c = bpf_map_lookup_elem(&counts, &worker);
	__u64 load, cost, weight, drawn = 0;
	__u32 suspect;

	if (!choice || !w || !c || !w->weight)
		return 0;
	weight = weight_of(w);
	choice->mixed |= choice->last_weight && choice->last_weight != weight;
	choice->last_weight = weight;
	if (!is_usable(w, c, choice->is_v6) || w->priority < choice->top)
		return 0;
	load = load_of(c, choice->second);
	if (w->maximum && load >= w->maximum) {
		choice->full = 1;
		return 0;
	}
	suspect = w->suspect != 0;
	choice->drawn += !suspect;
	cost = load + 1;
	if (choice->policy == STEER_ROUND_ROBIN) {
		cost = ahead(c->last_turn, weight, choice->key);
		weight = 1;
	} else if (choice->policy == STEER_HASH) {
		drawn = mixed(choice->key ^ (w->node ?: worker + 1));
		/* This saves nearly all logarithms. */
		cost = least_distance(drawn);
	}
	if (choice->found) {
		if (suspect > choice->suspect)
			return 0;
		/* Costs are below 2^37, weights below 2^26, turns have none: no overflow. */
		if (suspect == choice->suspect && cost * choice->weight >= choice->cost * weight)
			return 0;
	}
	if (choice->policy == STEER_HASH) {
		cost = distance(drawn);
		if (choice->found && suspect == choice->suspect &&
		    cost * choice->weight >= choice->cost * weight)
			return 0;
	}
	choice->found = 1;
	choice->suspect = suspect;
	choice->cost = cost;
	choice->weight = weight;
	choice->worker = worker;
	return 0;
}

static long scan(__u32 i, struct choice *choice)
{
	__u32 worker = choice->start + i;

	if (worker >= choice->workers)
		worker -= choice->workers;
	consider(worker, choice);
	return choice->bound && choice->found && !choice->suspect &&
	       choice->cost == choice->bound;
}

static long draw(__u32 i, struct choice *choice)
{
	consider((__u32)(random_of(choice, i) >> 32) % choice->workers, choice);
	return choice->drawn >= 2;
}

/* ---- failover ---- */

/* Raises `top` to the priority of a worker that is up: usable and trusted, even if full. */
__noinline int rank(__u32 worker, struct choice *choice)
{
	struct steer_worker *w = bpf_map_lookup_elem(&workers, &worker);
	struct steer_counts *c = bpf_map_lookup_elem(&counts, &worker);

	if (choice && w && c && !w->suspect && w->priority > choice->top &&
	    is_usable(w, c, choice->is_v6))
		choice->top = w->priority;
	return 0;
}

static long rank_each(__u32 worker, struct choice *choice)
{
	rank(worker, choice);
	return 0;
}

/* ---- weighted draws ---- */

/* The weight of a worker with room, or 0. */
static __always_inline __u64 weight_with_room(__u32 worker, struct choice *choice, __u32 *suspect)
{
	struct steer_worker *w = bpf_map_lookup_elem(&workers, &worker);
	struct steer_counts *c = bpf_map_lookup_elem(&counts, &worker);

	if (!w || !c || !is_usable(w, c, choice->is_v6))
		return 0;
	if (w->maximum && load_of(c, choice->second) >= w->maximum) {
		choice->full = 1;
		return 0;
	}
	*suspect = w->suspect != 0;
	return weight_of(w);
}

/* Adds up the weights. Always 0. */
__noinline int weigh(__u32 worker, struct choice *choice)
{
	__u32 suspect = 0;
	__u64 weight;

	if (!choice)
		return 0;
	weight = weight_with_room(worker, choice, &suspect);
	if (suspect)
		choice->weights[1] += weight;
	else
		choice->weights[0] += weight;
	return 0;
}

/* 1 if this is the drawn worker; then it is noted. */
__noinline int is_drawn(__u32 worker, struct choice *choice)
{
	__u32 suspect = 0;
	__u64 weight;

	if (!choice || worker == choice->other)
		return 0;
	weight = weight_with_room(worker, choice, &suspect);
	if (suspect != choice->suspect)
		return 0;
	if (choice->rest >= weight) {
		choice->rest -= weight;
		return 0;
	}
	choice->worker = worker;
	choice->weight = weight;
	choice->found = 1;
	return 1;
}

static long weigh_each(__u32 worker, struct choice *choice)
{
	weigh(worker, choice);
	return 0;
}

static long draw_each(__u32 worker, struct choice *choice)
{
	return is_drawn(worker, choice) != 0;
}

/*
 * Draws a worker in proportion to weights; with two choices another one, too, and takes the less
 * loaded. Nothing is found if no worker has room, or if that changed meanwhile.
 */
static __always_inline void sample(struct choice *choice)
{
	__u64 all;
	__u32 first;

	choice->weights[0] = choice->weights[1] = 0;
	bpf_loop(choice->workers, weigh_each, choice, 0);
	choice->suspect = !choice->weights[0];
	all = choice->suspect ? choice->weights[1] : choice->weights[0];
	if (!all)
		return;
	choice->other = STEER_MAX_WORKERS;
	choice->rest = random_of(choice, 0) % all;
	bpf_loop(choice->workers, draw_each, choice, 0);
	if (!choice->found || choice->policy != STEER_TWO_CHOICES || all <= choice->weight)
		return;
	first = choice->worker;
	choice->found = 0;
	choice->other = first;
	choice->rest = random_of(choice, 1) % (all - choice->weight);
	bpf_loop(choice->workers, draw_each, choice, 0);
	if (!choice->found)
		return;
	choice->other = choice->worker;
	choice->found = 0;
	consider(first, choice);
	consider(choice->other, choice);
}

/* ---- all policies ---- */

/* One for each processor: a stack has no room for it beside the copy of `choose`. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct choice);
} choices SEC(".maps");

static __always_inline int is_mapped_v4(const __be32 *ip)
{
	return !ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff);
}

static __always_inline void prepare(struct choice *choice, const struct steer_settings *conf,
				    struct steer_state *st, const struct steer_remote *remote,
				    __u32 second, __u32 is_v6)
{
	choice->second = second;
	choice->is_v6 = is_v6;
	choice->workers = conf->workers;
	if (choice->workers > STEER_MAX_WORKERS)
		choice->workers = STEER_MAX_WORKERS;
	choice->start = *(volatile __u32 *)&st->last + 1;
	if (choice->start >= choice->workers)
		choice->start = 0;
	choice->turn = __sync_fetch_and_add(&st->turn, 1);
	choice->seed = conf->seed;
	choice->policy = conf->policy;
	if (choice->policy == STEER_ROUND_ROBIN)
		choice->key = *(volatile __u64 *)&st->clock;
	if (choice->policy == STEER_HASH) {
		choice->key = key_of(remote->ip, !is_mapped_v4(remote->ip));
		choice->start = 0;
	}
}

/* ---- bounds ---- */

static __always_inline int is_bounded(const struct choice *choice)
{
	/* What is no SYN is compared without pending connections, in a second that is far away. */
	return choice->policy == STEER_LEAST_CONNECTIONS && !(choice->second >> 31) &&
	       choice->workers > STEER_BOUND_WORKERS && choice->workers <= STEER_SCAN_WORKERS;
}

/* Compares all workers, or as many as are needed; and notes the least cost for the next scan. */
static __always_inline void scan_all(struct choice *choice)
{
	__u32 is_v6 = choice->is_v6 != 0, second = choice->second & 0xffff;
	struct steer_bound *bound = NULL;
	__u64 before = 0, after;

	if (is_bounded(choice))
		bound = bpf_map_lookup_elem(&bounds, &is_v6);
	if (bound) {
		/* From now on the word changes when a load falls. */
		before = __sync_val_compare_and_swap(&bound->word, 0, STEER_BOUND_CHANGE);
		if (!before)
			before = STEER_BOUND_CHANGE;
		if (((before >> 16) & 0xffff) == second)
			choice->bound = before & STEER_BOUND_COST;
	}
	bpf_loop(choice->workers, scan, choice, 0);
	if (!bound || !choice->found || choice->suspect || choice->mixed ||
	    choice->cost == choice->bound || choice->cost > STEER_BOUND_COST)
		return;
	after = (before & ~0xffffffffULL) | (__u64)second << 16 | choice->cost;
	__sync_val_compare_and_swap(&bound->word, before, after);
}

/*
 * True if a worker was found. bpf_loop wants its argument on the stack of the caller, hence the
 * copy.
 */
__noinline int choose(struct choice *result)
{
	struct choice choice;
	__u32 found = 0;

	if (!result)
		return 0;
	choice = *result;
	choice.found = 0;
	choice.full = 0;
	choice.drawn = 0;
	choice.bound = 0;
	choice.mixed = 0;
	choice.last_weight = 0;
	choice.top = 0;
	if (choice.policy == STEER_FAILOVER) {
		bpf_loop(choice.workers, rank_each, &choice, 0);
	} else if (choice.policy == STEER_RANDOM || choice.policy == STEER_TWO_CHOICES) {
		sample(&choice);
		found = choice.found;
	} else if (choice.policy == STEER_LEAST_CONNECTIONS &&
		   choice.workers > STEER_SCAN_WORKERS) {
		bpf_loop(STEER_DRAWS, draw, &choice, 0);
		found = choice.drawn;
	}
	if (!found) {
		choice.found = 0;
		scan_all(&choice);
	}
	*result = choice;
	return choice.found;
}

/*
 * With round-robin: the chosen worker has had its turn, and the virtual clock goes on to it. If two
 * processors gave the worker the same turn, it has had two.
 */
__noinline int take_turn(const struct choice *choice)
{
	struct steer_worker *w;
	struct steer_counts *c;
	struct steer_state *st;
	__u32 zero = 0, worker;

	if (!choice)
		return 0;
	worker = choice->worker;
	w = bpf_map_lookup_elem(&workers, &worker);
	c = bpf_map_lookup_elem(&counts, &worker);
	st = bpf_map_lookup_elem(&state, &zero);
	if (!w || !c || !st || !w->weight || !w->slow_start)
		return 0;
#pragma unroll
	for (int i = 0; i < TRIES; i++) {
		__u64 old = *(volatile __u64 *)&c->last_turn;
		__u64 new = choice->key + ahead(old, weight_of(w), choice->key);

		if (__sync_val_compare_and_swap(&c->last_turn, old, new) == old)
			break;
	}
#pragma unroll
	for (int i = 0; i < TRIES; i++) {
		__u64 old = *(volatile __u64 *)&st->clock;
		__u64 new = choice->key + choice->cost;

		if ((__s64)(new - old) <= 0 ||
		    __sync_val_compare_and_swap(&st->clock, old, new) == old)
			break;
	}
	return 0;
}

#endif
