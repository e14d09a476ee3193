/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The choice of a worker for one SYN. `src/decision.rs` is the same in Rust: change them together.
 * Needs the maps and `load_of`.
 */
#ifndef STEER_CHOOSE_H
#define STEER_CHOOSE_H

struct choice {
	__u32 workers;
	__u32 start;
	__u32 second;
	__u32 is_v6;
	__u64 turn;
	/* Of the best worker so far. */
	__u64 cost;
	__u64 weight;
	__u32 worker;
	__u32 found;
	__u32 suspect;
	/* A usable worker is at its maximum. */
	__u32 full;
	/* Trusted workers with room among the draws. */
	__u32 drawn;
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

/* Notes the worker if it is the best so far. Always 0. */
__noinline int consider(__u32 worker, struct choice *choice)
{
	struct steer_worker *w = bpf_map_lookup_elem(&workers, &worker);
	struct steer_counts *c = bpf_map_lookup_elem(&counts, &worker);
	__u64 load, weight;
	__u32 suspect;

	if (!choice || !w || !c || !is_usable(w, c, choice->is_v6))
		return 0;
	load = load_of(c, choice->second);
	if (w->maximum && load >= w->maximum) {
		choice->full = 1;
		return 0;
	}
	suspect = w->suspect != 0;
	choice->drawn += !suspect;
	weight = (__u64)w->weight * w->slow_start;
	if (choice->found) {
		if (suspect > choice->suspect)
			return 0;
		/* load + 1 is below 2^37, a weight below 2^26: no overflow. */
		if (suspect == choice->suspect && (load + 1) * choice->weight >= choice->cost * weight)
			return 0;
	}
	choice->found = 1;
	choice->suspect = suspect;
	choice->cost = load + 1;
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
	return 0;
}

static long draw(__u32 i, struct choice *choice)
{
	__u64 z = (choice->turn * STEER_DRAWS + i + 1) * 0x9e3779b97f4a7c15ULL;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	z ^= z >> 31;
	consider((__u32)(z >> 32) % choice->workers, choice);
	return choice->drawn >= 2;
}

/*
 * True if a worker was found. bpf_loop wants its argument on the stack of the caller, hence the
 * copy.
 */
__noinline int choose(struct choice *result)
{
	struct choice choice;

	if (!result)
		return 0;
	choice = *result;
	choice.found = 0;
	choice.full = 0;
	choice.drawn = 0;
	if (choice.workers > STEER_SCAN_WORKERS)
		bpf_loop(STEER_DRAWS, draw, &choice, 0);
	if (!choice.drawn) {
		choice.found = 0;
		bpf_loop(choice.workers, scan, &choice, 0);
	}
	*result = choice;
	return choice.found;
}

#endif
