// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Gives each new connection of a pool to the worker that the policy of the pool chooses.
 *
 * `steer_lookup` runs for each SYN, and for each segment without a socket, in a network namespace
 * and chooses the listener. `steer_events` runs for sockets of a cgroup: it registers listeners and
 * counts connections.
 *
 * The look-up does not see TCP flags. It counts a connection as pending at once, so that a burst
 * does not go to one worker. If the kernel then does not remember the handshake (a SYN cookie, a
 * stray ACK, a full backlog), the next look-up on the same processor takes the count back.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "steer.h"
#include "maps.h"

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define EAFNOSUPPORT 97
#define SECOND_NS 1000000000ULL
#define SECOND(ns) ((__u32)((ns) / SECOND_NS))
/* Attempts to change a word that other processors change, too. */
#define TRIES 8
/* Workers tried for one SYN; one that cannot be given it is marked, so the next choice differs. */
#define ASSIGN_TRIES 4

char _license[] SEC("license") = "Dual MIT/GPL";

/*
 * An address of a context. All words are read, whatever the family: otherwise the compiler merges
 * the loads of both branches into one through a computed pointer, which the verifier refuses.
 */
#define FIELD(field) (*(volatile __u32 *)&(field))
#define read_ip(to, ctx, side, is_v6)                                                              \
	do {                                                                                       \
		__u32 v4 = FIELD((ctx)->side##_ip4), a = FIELD((ctx)->side##_ip6[0]),              \
		      b = FIELD((ctx)->side##_ip6[1]), c = FIELD((ctx)->side##_ip6[2]),            \
		      d = FIELD((ctx)->side##_ip6[3]);                                             \
		(to)[0] = (is_v6) ? a : 0;                                                         \
		(to)[1] = (is_v6) ? b : 0;                                                         \
		(to)[2] = (is_v6) ? c : bpf_htonl(0xffff);                                         \
		(to)[3] = (is_v6) ? d : v4;                                                        \
	} while (0)

static __always_inline int is_remote(const struct steer_remote *a, const struct steer_remote *b)
{
	return a->ip[0] == b->ip[0] && a->ip[1] == b->ip[1] && a->ip[2] == b->ip[2] &&
	       a->ip[3] == b->ip[3] && a->port == b->port && a->local_port == b->local_port;
}

/*
 * Counts an open listener (1) or a closed one (-1). Both counters are one word here: the verifier
 * refuses a computed pointer into an entry to users without CAP_PERFMON.
 */
static __always_inline void count_listener(struct steer_counts *counts, int is_v6, __s64 change)
{
	__sync_fetch_and_add((__u64 *)counts->listeners, is_v6 ? change << 32 : change);
}

/* ---- bounds ---- */

/* A worker may have this cost now, in one family. */
static __always_inline void lower_in(__u32 is_v6, __u64 cost)
{
	struct steer_bound *bound = bpf_map_lookup_elem(&bounds, &is_v6);

	if (!bound || !*(volatile __u64 *)&bound->word)
		return;
	__sync_fetch_and_add(&bound->word, STEER_BOUND_CHANGE);
#pragma unroll
	for (int i = 0; i < TRIES; i++) {
		__u64 old = *(volatile __u64 *)&bound->word;

		if ((old & STEER_BOUND_COST) <= cost)
			return;
		if (__sync_val_compare_and_swap(&bound->word, old,
						(old & ~STEER_BOUND_COST) | cost) == old)
			return;
	}
	__sync_fetch_and_and(&bound->word, ~STEER_BOUND_COST);
}

/* A worker may have this cost now; 0: anything may have changed. Always 0. */
__noinline int lower(__u64 cost)
{
	if (cost > STEER_BOUND_COST)
		cost = STEER_BOUND_COST;
	lower_in(0, cost);
	lower_in(1, cost);
	return 0;
}

/* The load of a worker has fallen to these live connections and what is pending. */
static __always_inline void has_fallen(__s64 live)
{
	lower(live > 0 ? live + 1 : 1);
}

/* ---- pending connections ---- */

/*
 * Functions that are not static are checked once by the verifier, not for each call. Loops are
 * unrolled: without CAP_PERFMON it also follows paths that a processor might only speculate on.
 */

/* 1 if the connection counts now. */
__noinline int pending_add(__u32 worker, __u32 second)
{
	struct steer_counts *c = bpf_map_lookup_elem(&counts, &worker);
	__u64 *slot;

	if (!c)
		return 0;
	slot = &c->pending[second % STEER_PENDING_SECONDS];
#pragma unroll
	for (int i = 0; i < TRIES; i++) {
		__u64 old = *(volatile __u64 *)slot;
		__u64 new = (old >> 32) == second ? old + 1 : ((__u64)second << 32 | 1);

		if (__sync_val_compare_and_swap(slot, old, new) == old)
			return 1;
	}
	return 0;
}

/* 1 if there was one to remove. */
__noinline int pending_remove(__u32 worker, __u32 second)
{
	struct steer_counts *c = bpf_map_lookup_elem(&counts, &worker);
	__u64 *slot;

	if (!c)
		return 0;
	slot = &c->pending[second % STEER_PENDING_SECONDS];
#pragma unroll
	for (int i = 0; i < TRIES; i++) {
		__u64 old = *(volatile __u64 *)slot;

		if ((old >> 32) != second || !(__u32)old)
			return 0;
		if (__sync_val_compare_and_swap(slot, old, old - 1) == old) {
			has_fallen(*(volatile __s64 *)&c->live);
			return 1;
		}
	}
	return 0;
}

static __always_inline __u64 load_of(const struct steer_counts *counts, __u32 second)
{
	__u64 load = counts->live > 0 ? counts->live : 0;

	for (int i = 0; i < STEER_PENDING_SECONDS; i++) {
		__u64 slot = counts->pending[i];

		if (second - (__u32)(slot >> 32) < STEER_PENDING_SECONDS)
			load += (__u32)slot;
	}
	return load;
}

/* Takes back what the last look-up on this processor counted, unless the kernel remembers it. */
static __always_inline void settle(struct steer_undecided *last)
{
	struct steer_handshake *handshake;

	if (!last->armed)
		return;
	last->armed = 0;
	handshake = bpf_map_lookup_elem(&remotes, &last->remote);
	if (!handshake || handshake->flags & STEER_REQUESTED)
		return;
	if (__sync_fetch_and_and(&handshake->flags, ~STEER_COUNTED) & STEER_COUNTED)
		pending_remove(handshake->worker, SECOND(handshake->at));
}

#include "choose.h"

/* ---- look-up ---- */

static __always_inline int drop(struct bpf_sk_lookup *ctx, struct steer_state *state)
{
	__u32 sink = STEER_LISTENER(STEER_MAX_WORKERS, ctx->family == AF_INET6);
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &sink);
	long error;

	if (sk) {
		/* A listener whose filter drops every segment. */
		error = bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
		if (!error)
			return SK_PASS;
	}
	__sync_fetch_and_add(&state->no_sink, 1);
	return SK_DROP;
}

/* No worker is usable: true if the SYN is to be dropped, false if it is to be reset. */
static __always_inline int is_waiting(struct steer_state *state, __u64 wait_ns, __u64 now)
{
	__u64 since = *(volatile __u64 *)&state->unserved_since;

	if (!since) {
		__sync_val_compare_and_swap(&state->unserved_since, 0, now);
		since = now;
	}
	/* Another processor may have read the clock later. */
	if (wait_ns && (since > now || now - since < wait_ns)) {
		__sync_fetch_and_add(&state->waited, 1);
		return 1;
	}
	__sync_fetch_and_add(&state->unserved, 1);
	return 0;
}

/*
 * 0, or the error; then the worker is marked so that the next choice leaves it out. A function of
 * its own, with its own stack: a place for a pointer may not be used for a number without
 * CAP_PERFMON.
 */
__noinline int assign(struct bpf_sk_lookup *ctx, __u32 worker, __u32 is_v6)
{
	struct steer_counts *c = bpf_map_lookup_elem(&counts, &worker);
	__u32 listens, index;
	struct bpf_sock *sk;
	long error;

	if (!c)
		return -1;
	listens = *(volatile __u32 *)&c->listens;
	is_v6 = is_v6 || !c->listeners[0];
	index = STEER_LISTENER(worker, is_v6);
	sk = bpf_map_lookup_elem(&listeners, &index);
	if (!sk) {
		c->lost_at = listens;
		return -1;
	}
	error = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	if (error == -EAFNOSUPPORT && ctx->family == AF_INET)
		c->no_v4_at = listens;
	else if (error)
		c->lost_at = listens;
	return error;
}

/* Gives the client to the best worker of the prepared choice: its number, or -1. Then `full` says
 * whether some were full. */
__noinline int assign_best(struct bpf_sk_lookup *ctx, __u32 is_v6)
{
	__u32 zero = 0, worker;
	struct choice *choice = bpf_map_lookup_elem(&choices, &zero);
	struct steer_state *st = bpf_map_lookup_elem(&state, &zero);

	if (!choice || !st)
		return -1;
#pragma unroll
	for (int i = 0; i < ASSIGN_TRIES; i++) {
		if (!choose(choice))
			return -1;
		worker = choice->worker;
		if (!assign(ctx, worker, is_v6))
			return worker;
		__sync_fetch_and_add(&st->failed, 1);
	}
	return -1;
}

SEC("sk_lookup")
int steer_lookup(struct bpf_sk_lookup *ctx)
{
	struct steer_address public = {};
	struct steer_remote remote = {};
	struct steer_handshake *known, handshake = {};
	struct steer_settings *conf;
	struct steer_undecided *last;
	struct steer_state *st;
	struct choice *choice;
	__u32 zero = 0, is_v6 = ctx->family == AF_INET6;
	__u64 now;
	int worker;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	public.port = ctx->local_port;
	read_ip(public.ip, ctx, local, is_v6);
	if (!bpf_map_lookup_elem(&publics, &public)) {
		if (is_v6)
			public.ip[0] = public.ip[1] = public.ip[2] = 0;
		public.ip[3] = 0;
		if (!bpf_map_lookup_elem(&publics, &public))
			return SK_PASS;
	}
	conf = bpf_map_lookup_elem(&settings, &zero);
	st = bpf_map_lookup_elem(&state, &zero);
	last = bpf_map_lookup_elem(&undecided, &zero);
	choice = bpf_map_lookup_elem(&choices, &zero);
	if (!conf || !st || !last || !choice)
		return SK_PASS;
	settle(last);

	remote.port = bpf_ntohs(ctx->remote_port);
	remote.local_port = public.port;
	read_ip(remote.ip, ctx, remote, is_v6);
	now = bpf_ktime_get_ns();
	known = bpf_map_lookup_elem(&remotes, &remote);
	if (known) {
		/*
		 * Perhaps the ACK of a SYN cookie: only a listener that sent one accepts it, so it
		 * goes where the SYN went. With a remembered handshake it would not come here.
		 */
		if (!(known->flags & STEER_REQUESTED) && now - known->at < STEER_COOKIE_NS &&
		    !assign(ctx, known->worker, is_v6)) {
			__sync_fetch_and_add(&st->repeated, 1);
			return SK_PASS;
		}
		if (__sync_fetch_and_and(&known->flags, ~STEER_COUNTED) & STEER_COUNTED)
			pending_remove(known->worker, SECOND(known->at));
	}

	prepare(choice, conf, st, &remote, SECOND(now), is_v6);
	st->second = choice->second;
	worker = assign_best(ctx, is_v6);
	if (worker >= 0)
		goto chosen;
	if (choice->full) {
		__sync_fetch_and_add(&st->full, 1);
		return drop(ctx, st);
	}
	return is_waiting(st, conf->wait_ns, now) ? drop(ctx, st) : SK_DROP;

chosen:
	if (choice->policy == STEER_ROUND_ROBIN)
		take_turn(choice);
	st->last = worker;
	if (st->unserved_since)
		st->unserved_since = 0;
	__sync_fetch_and_add(&st->chosen, 1);
	handshake.worker = worker;
	handshake.at = now;
	handshake.flags = pending_add(worker, choice->second) ? STEER_COUNTED : 0;
	bpf_map_update_elem(&remotes, &remote, &handshake, BPF_ANY);
	last->remote = remote;
	last->armed = 1;
	return SK_PASS;
}

/* ---- events of sockets ---- */

static __always_inline void remote_of(struct bpf_sock_ops *ops, struct steer_remote *remote,
				      int is_v6)
{
	remote->port = bpf_ntohl(ops->remote_port);
	remote->local_port = ops->local_port;
	read_ip(remote->ip, ops, remote, is_v6);
}

/*
 * The handshake that this event belongs to. The request of an IPv4 client at an IPv6 listener has
 * the family of the listener and an IPv4 address, so both forms are tried.
 */
static __always_inline struct steer_handshake *handshake_of(struct bpf_sock_ops *ops,
							    struct steer_remote *remote)
{
	struct steer_handshake *handshake;

	if (ops->family == AF_INET6) {
		remote_of(ops, remote, 1);
		handshake = bpf_map_lookup_elem(&remotes, remote);
		if (handshake)
			return handshake;
	}
	remote_of(ops, remote, 0);
	return bpf_map_lookup_elem(&remotes, remote);
}

static __always_inline void decided(const struct steer_remote *remote)
{
	__u32 zero = 0;
	struct steer_undecided *last = bpf_map_lookup_elem(&undecided, &zero);

	if (last && last->armed && is_remote(&last->remote, remote))
		last->armed = 0;
}

static __always_inline void listening(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	struct steer_address address = {};
	struct steer_settings *conf;
	struct steer_owner *owner;
	struct steer_counts *c;
	struct steer_state *st;
	__u32 zero = 0, *member, worker, index, is_v6 = ops->family == AF_INET6;
	long error;

	conf = bpf_map_lookup_elem(&settings, &zero);
	st = bpf_map_lookup_elem(&state, &zero);
	if (!conf || !st || bpf_get_netns_cookie(ops) != conf->netns)
		return;
	address.port = ops->local_port;
	read_ip(address.ip, ops, local, is_v6);
	member = bpf_map_lookup_elem(&members, &address);
	if (!member)
		return;
	worker = *member;
	c = bpf_map_lookup_elem(&counts, &worker);
	if (!c)
		return;
	owner = bpf_sk_storage_get(&owners, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!owner) {
		c->refused = -12 /* ENOMEM */;
		return;
	}
	owner->worker = worker;
	owner->counted = 0;
	index = STEER_LISTENER(worker, is_v6);
	error = bpf_sock_map_update(ops, &listeners, &index, BPF_ANY);
	if (error) {
		bpf_sk_storage_delete(&owners, sk);
		c->refused = error;
		return;
	}
	c->refused = 0;
	__sync_fetch_and_add(&c->listens, 1);
	count_listener(c, is_v6, 1);
	lower(0);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	st->unserved_since = 0;
}

static __always_inline void established(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	struct steer_owner *owner = bpf_sk_storage_get(&owners, sk, 0, 0);
	struct steer_remote remote = {};
	struct steer_handshake *handshake;
	struct steer_counts *c;

	if (!owner || owner->counted)
		return;
	c = bpf_map_lookup_elem(&counts, &owner->worker);
	if (!c)
		return;
	owner->counted = 1;
	__sync_fetch_and_add(&c->live, 1);
	__sync_fetch_and_add(&c->total, 1);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	handshake = handshake_of(ops, &remote);
	if (!handshake)
		return;
	if (__sync_fetch_and_and(&handshake->flags, ~STEER_COUNTED) & STEER_COUNTED)
		pending_remove(handshake->worker, SECOND(handshake->at));
	bpf_map_delete_elem(&remotes, &remote);
	decided(&remote);
}

/* The client's half-close (CLOSE_WAIT) leaves the worker with the connection. With TCP Fast Open a
 * connection counts from SYN_RECV on. */
static __always_inline int has_ended(__u32 state)
{
	return state != BPF_TCP_ESTABLISHED && state != BPF_TCP_CLOSE_WAIT &&
	       state != BPF_TCP_SYN_RECV;
}

static __always_inline void changed(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	struct steer_owner *owner = bpf_sk_storage_get(&owners, sk, 0, 0);
	__u32 old = ops->args[0], new = ops->args[1];
	struct steer_counts *c;

	if (!owner)
		return;
	c = bpf_map_lookup_elem(&counts, &owner->worker);
	if (!c)
		return;
	if (old == BPF_TCP_LISTEN) {
		count_listener(c, ops->family == AF_INET6, -1);
		return;
	}
	if (!owner->counted || !has_ended(new))
		return;
	owner->counted = 0;
	has_fallen(__sync_fetch_and_add(&c->live, -1) - 1);
}

/* Of a request: the kernel remembers it, so this is no SYN cookie. */
static __always_inline void requested(struct bpf_sock_ops *ops)
{
	struct steer_handshake *handshake;
	struct steer_remote remote = {};

	if (ops->is_fullsock)
		return;
	handshake = handshake_of(ops, &remote);
	if (!handshake)
		return;
	__sync_fetch_and_or(&handshake->flags, STEER_REQUESTED);
	decided(&remote);
}

SEC("sockops")
int steer_events(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk;

	switch (ops->op) {
	case BPF_SOCK_OPS_TIMEOUT_INIT:
		requested(ops);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		sk = ops->sk;
		if (sk)
			listening(ops, sk);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		sk = ops->sk;
		if (sk)
			established(ops, sk);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		sk = ops->sk;
		if (sk)
			changed(ops, sk);
		break;
	}
	return 1;
}

#include "shared.h"
