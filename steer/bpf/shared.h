/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Workers that share a port: a group of listeners (SO_REUSEPORT) at each public address, one for
 * each worker. `steer_shared` runs for each segment that the kernel looks up in a group and chooses
 * the listener; it also runs for each connection in the queue of a listener that closes.
 * `steer_shared_events` counts. `steer_guard` keeps the program attached. Needs the choice, the
 * counts and the events of `steer.bpf.c`.
 *
 * A group has one more listener, its sink: what it is given is dropped. Only the loader's process
 * has its descriptor, so without a sink that process has ended. Then nothing may be counting any
 * more, and the program leaves the choice to the kernel.
 */
#ifndef STEER_SHARED_H
#define STEER_SHARED_H

#define STEER_MAX_GROUPS 32
/* Index in `group_listeners` of a worker's listener in a group; the sink is one more worker. */
#define STEER_GROUP_LISTENER(group, worker) ((group) * (STEER_MAX_WORKERS + 1) + (worker))

#define SOL_SOCKET 1
#define SO_DETACH_REUSEPORT_BPF 68
#define TCP_FLAGS_AT 13
#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16
#define IPV4_SOURCE_AT 12
#define IPV6_SOURCE_AT 8

/* Map `shared`, one entry. The loader writes it. */
struct steer_shared_settings {
	/* Boolean: connections are counted although no process has the sinks. */
	__u32 pinned;
	/* Boolean: `directed` may have entries. */
	__u32 directs;
};

/* Map `moves`, one entry. The programs write it. */
struct steer_moves {
	/* Connections that went from the queue of a closed listener to another one. */
	__u64 migrated;
	/* Those that were reset, because no other listener was open. */
	__u64 lost;
	/* Entries of `moved`. */
	__u64 open;
};

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, STEER_MAX_GROUPS * (STEER_MAX_WORKERS + 1));
	__type(key, __u32);
	__type(value, __u64);
} group_listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct steer_shared_settings);
} shared SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct steer_moves);
} moves SEC(".maps");

/*
 * By the cookie of a listener: its worker, for the program that migrates, which cannot read
 * `owners`. The loader writes it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, STEER_MAX_GROUPS * STEER_MAX_WORKERS);
	__type(key, __u64);
	__type(value, __u32);
} listener_workers SEC(".maps");

/*
 * By the cookie of a connection that was migrated and counts: its present worker. The loader makes
 * entries with STEER_NOT_COUNTED for connections that waited in a queue before any was counted.
 */
#define STEER_NOT_COUNTED (~0U)
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, STEER_MAX_REMOTES);
	__type(key, __u64);
	__type(value, __u32);
} moved SEC(".maps");

/* By the client's end of a connection that the loader makes: the worker that it is for. As long as it
 * has an entry it does not move to another one. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, STEER_MAX_WORKERS);
	__type(key, struct steer_remote);
	__type(value, __u32);
} directed SEC(".maps");

/* ---- the choice ---- */

/* 0, or the error; then the worker is marked so that the next choice leaves it out. */
__noinline int select_worker(struct sk_reuseport_md *ctx, __u32 group, __u32 worker)
{
	struct steer_counts *c = bpf_map_lookup_elem(&counts, &worker);
	__u32 listens, index;
	long error;

	if (!c)
		return -1;
	listens = *(volatile __u32 *)&c->listens;
	index = STEER_GROUP_LISTENER(group, worker);
	error = bpf_sk_select_reuseport(ctx, &group_listeners, &index, 0);
	if (error)
		c->lost_at = listens;
	return error;
}

/* The worker of the prepared choice, or -1. Then `full` says whether some were full. */
__noinline int select_best(struct sk_reuseport_md *ctx, __u32 group)
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
		if (!select_worker(ctx, group, worker))
			return worker;
		__sync_fetch_and_add(&st->failed, 1);
	}
	return -1;
}

/* ---- migration ---- */

/* The best worker for a connection that would be lost otherwise. */
struct refuge {
	__u32 is_v6;
	__u32 second;
	__u32 found;
	__u32 worker;
	__u32 draining;
	__u32 reserved;
	__u64 load;
};

/* Notes the worker if it has a listener: a maximum or a drain is no reason to lose a connection. */
__noinline int shelter(__u32 worker, struct refuge *refuge)
{
	struct steer_worker *w = bpf_map_lookup_elem(&workers, &worker);
	struct steer_counts *c = bpf_map_lookup_elem(&counts, &worker);
	__u32 draining;
	__u64 load;
	int v4, v6;

	if (!refuge || !w || !c)
		return 0;
	v4 = c->listeners[0] && !refuge->is_v6;
	v6 = c->listeners[1] && refuge->is_v6;
	if (!w->weight || !(v4 || v6) || c->lost_at == c->listens)
		return 0;
	load = load_of(c, refuge->second);
	draining = w->draining != 0;
	if (refuge->found && (draining > refuge->draining ||
			      (draining == refuge->draining && load >= refuge->load)))
		return 0;
	refuge->found = 1;
	refuge->worker = worker;
	refuge->draining = draining;
	refuge->load = load;
	return 0;
}

static long seek(__u32 worker, struct refuge *refuge)
{
	shelter(worker, refuge);
	return 0;
}

__noinline int select_refuge(struct sk_reuseport_md *ctx, __u32 group, __u32 many, __u32 second,
			     __u32 is_v6)
{
	struct refuge refuge = { .is_v6 = is_v6, .second = second };

	bpf_loop(many, seek, &refuge, 0);
	if (!refuge.found || select_worker(ctx, group, refuge.worker))
		return -1;
	return refuge.worker;
}

/*
 * Counts a connection of the queue of a listener for its new worker. The socket is locked: it cannot
 * end now. If there is no room to note it, the count stays with the first worker.
 */
__noinline int move_live(__u64 listener, __u64 cookie, __u32 worker)
{
	struct steer_counts *from, *to;
	__u32 zero = 0, *known, former;
	struct steer_moves *m;
	int is_new;

	m = bpf_map_lookup_elem(&moves, &zero);
	known = bpf_map_lookup_elem(&moved, &cookie);
	is_new = !known;
	if (is_new)
		known = bpf_map_lookup_elem(&listener_workers, &listener);
	if (!known || !m)
		return 0;
	former = *known;
	if (former == STEER_NOT_COUNTED)
		return 0;
	from = bpf_map_lookup_elem(&counts, &former);
	to = bpf_map_lookup_elem(&counts, &worker);
	if (!from || !to || bpf_map_update_elem(&moved, &cookie, &worker, BPF_ANY))
		return 0;
	if (is_new)
		__sync_fetch_and_add(&m->open, 1);
	has_fallen(__sync_fetch_and_add(&from->live, -1) - 1);
	__sync_fetch_and_add(&to->live, 1);
	__sync_fetch_and_add(&from->moved_out, 1);
	__sync_fetch_and_add(&to->moved_in, 1);
	return 1;
}

/* Counts a handshake for its new worker. */
__noinline int move_pending(struct steer_remote *remote, __u32 worker, __u64 now)
{
	struct steer_handshake *known, handshake = {};

	if (!remote)
		return 0;
	known = bpf_map_lookup_elem(&remotes, remote);
	if (!known)
		return 0;
	if (!(__sync_fetch_and_and(&known->flags, ~STEER_COUNTED) & STEER_COUNTED))
		return 1;
	pending_remove(known->worker, SECOND(known->at));
	handshake.worker = worker;
	handshake.at = now;
	handshake.flags = STEER_REQUESTED | (pending_add(worker, SECOND(now)) ? STEER_COUNTED : 0);
	bpf_map_update_elem(&remotes, remote, &handshake, BPF_ANY);
	return 1;
}

/* A connection that is for one worker only leaves its queue without being accepted: it is reset. */
__noinline int count_reset(__u64 listener)
{
	__u32 *found = bpf_map_lookup_elem(&listener_workers, &listener), worker;
	struct steer_counts *c;

	if (!found)
		return 0;
	worker = *found;
	c = bpf_map_lookup_elem(&counts, &worker);
	if (!c)
		return 0;
	__sync_fetch_and_add(&c->moved_out, 1);
	return 1;
}

__noinline int migrate(struct sk_reuseport_md *ctx, __u32 group, __u32 is_v6)
{
	__u64 now = bpf_ktime_get_ns();
	struct steer_remote remote = {};
	struct choice *choice;
	struct steer_settings *conf;
	struct steer_state *st;
	struct steer_moves *m;
	struct steer_shared_settings *own;
	struct bpf_sock *sk, *listener = ctx->sk;
	__u32 zero = 0, is_request;
	int worker;

	own = bpf_map_lookup_elem(&shared, &zero);
	conf = bpf_map_lookup_elem(&settings, &zero);
	st = bpf_map_lookup_elem(&state, &zero);
	m = bpf_map_lookup_elem(&moves, &zero);
	choice = bpf_map_lookup_elem(&choices, &zero);
	if (!own || !conf || !st || !m || !choice)
		return SK_DROP;
	sk = ctx->migrating_sk;
	if (!sk)
		return SK_DROP;
	is_request = sk->state == BPF_TCP_NEW_SYN_RECV;
	remote.port = bpf_ntohs(sk->dst_port);
	remote.local_port = sk->src_port;
	read_ip(remote.ip, sk, dst, is_v6);
	/* The request of an IPv4 client at an IPv6 listener has an IPv4 address. */
	if (is_request && is_v6 && !bpf_map_lookup_elem(&remotes, &remote))
		read_ip(remote.ip, sk, dst, 0);
	if (own->directs && bpf_map_lookup_elem(&directed, &remote)) {
		if (!is_request && !has_ended(sk->state))
			count_reset(bpf_get_socket_cookie(listener));
		return SK_DROP;
	}
	prepare(choice, conf, st, &remote, SECOND(now), is_v6);
	worker = select_best(ctx, group);
	if (worker >= 0 && choice->policy == STEER_ROUND_ROBIN)
		take_turn(choice);
	if (worker < 0)
		worker = select_refuge(ctx, group, choice->workers, choice->second, is_v6);
	if (worker < 0) {
		__sync_fetch_and_add(&m->lost, 1);
		return SK_DROP;
	}
	st->last = worker;
	__sync_fetch_and_add(&m->migrated, 1);
	if (is_request)
		move_pending(&remote, worker, now);
	else if (!has_ended(sk->state))
		move_live(bpf_get_socket_cookie(listener), bpf_get_socket_cookie(sk), worker);
	return SK_PASS;
}

/* ---- new connections ---- */

/* Reads the sender, and true if the segment begins a connection. */
static __always_inline int read_segment(struct sk_reuseport_md *ctx, struct steer_remote *remote)
{
	__u8 flags = 0;
	__be16 port = 0;

	bpf_skb_load_bytes(ctx, TCP_FLAGS_AT, &flags, sizeof(flags));
	bpf_skb_load_bytes(ctx, 0, &port, sizeof(port));
	remote->port = bpf_ntohs(port);
	if (ctx->eth_protocol == bpf_htons(0x86dd)) {
		bpf_skb_load_bytes_relative(ctx, IPV6_SOURCE_AT, remote->ip, 16, BPF_HDR_START_NET);
	} else {
		remote->ip[2] = bpf_htonl(0xffff);
		bpf_skb_load_bytes_relative(ctx, IPV4_SOURCE_AT, &remote->ip[3], 4,
					    BPF_HDR_START_NET);
	}
	return (flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

/*
 * With round-robin, what answers a SYN cookie goes where its SYN went: that worker had a turn. True
 * if it did.
 */
static __always_inline int select_again(struct sk_reuseport_md *ctx, __u32 group,
					const struct steer_settings *conf,
					const struct steer_remote *remote)
{
	struct steer_handshake *known;

	if (conf->policy != STEER_ROUND_ROBIN)
		return 0;
	known = bpf_map_lookup_elem(&remotes, remote);
	return known && !select_worker(ctx, group, known->worker);
}

/* Counts the SYN as pending, and no longer what the same client sent before. */
static __always_inline void count_syn(const struct steer_remote *remote, __u32 worker, __u64 now,
				      struct steer_undecided *last)
{
	struct steer_handshake *known, handshake = {};

	known = bpf_map_lookup_elem(&remotes, remote);
	if (known && __sync_fetch_and_and(&known->flags, ~STEER_COUNTED) & STEER_COUNTED)
		pending_remove(known->worker, SECOND(known->at));
	handshake.worker = worker;
	handshake.at = now;
	handshake.flags = pending_add(worker, SECOND(now)) ? STEER_COUNTED : 0;
	bpf_map_update_elem(&remotes, remote, &handshake, BPF_ANY);
	last->remote = *remote;
	last->armed = 1;
}

SEC("sk_reuseport/migrate")
int steer_shared(struct sk_reuseport_md *ctx)
{
	struct steer_address public = {};
	struct steer_remote remote = {};
	struct steer_shared_settings *own;
	struct steer_undecided *last;
	struct steer_settings *conf;
	struct choice *choice;
	struct steer_state *st;
	struct bpf_sock *sk = ctx->sk;
	__u32 zero = 0, group, index, is_v6, is_syn;
	__u32 *found, *to;
	int no_sink, worker;
	__u64 now;

	if (ctx->ip_protocol != IPPROTO_TCP)
		return SK_PASS;
	is_v6 = sk->family == AF_INET6;
	public.port = sk->src_port;
	read_ip(public.ip, sk, src, is_v6);
	found = bpf_map_lookup_elem(&publics, &public);
	conf = bpf_map_lookup_elem(&settings, &zero);
	own = bpf_map_lookup_elem(&shared, &zero);
	st = bpf_map_lookup_elem(&state, &zero);
	last = bpf_map_lookup_elem(&undecided, &zero);
	choice = bpf_map_lookup_elem(&choices, &zero);
	if (!found || !conf || !own || !st || !last || !choice)
		return SK_PASS;
	group = *found;
	/* What is selected later replaces it; if nothing is, the segment is dropped. */
	index = STEER_GROUP_LISTENER(group, STEER_MAX_WORKERS);
	no_sink = bpf_sk_select_reuseport(ctx, &group_listeners, &index, 0) != 0;
	if (no_sink && !own->pinned)
		return SK_PASS;
	if (ctx->migrating_sk)
		return migrate(ctx, group, is_v6);
	settle(last);

	remote.local_port = public.port;
	is_syn = read_segment(ctx, &remote);
	now = bpf_ktime_get_ns();
	to = own->directs ? bpf_map_lookup_elem(&directed, &remote) : NULL;
	if (to) {
		if (select_worker(ctx, group, *to))
			return SK_DROP;
		if (is_syn)
			count_syn(&remote, *to, now, last);
		return SK_PASS;
	}
	if (!is_syn && select_again(ctx, group, conf, &remote)) {
		__sync_fetch_and_add(&st->repeated, 1);
		return SK_PASS;
	}
	/*
	 * What is no SYN answers a SYN cookie or is stray. Any listener of the group accepts it, so
	 * it goes where the fewest connections are, whatever is pending: in a second that is far
	 * away, no handshake counts.
	 */
	prepare(choice, conf, st, &remote, SECOND(now) + (is_syn ? 0 : 1U << 31), is_v6);
	worker = select_best(ctx, group);
	if (worker >= 0) {
		if (st->unserved_since)
			st->unserved_since = 0;
		if (is_syn) {
			if (choice->policy == STEER_ROUND_ROBIN)
				take_turn(choice);
			st->last = worker;
			st->second = choice->second;
			__sync_fetch_and_add(&st->chosen, 1);
			count_syn(&remote, worker, now, last);
		} else {
			__sync_fetch_and_add(&st->repeated, 1);
		}
		return SK_PASS;
	}
	if (choice->full)
		__sync_fetch_and_add(&st->full, 1);
	else if (!is_waiting(st, conf->wait_ns, now))
		return SK_DROP;
	if (!no_sink)
		return SK_PASS;
	__sync_fetch_and_add(&st->no_sink, 1);
	return SK_DROP;
}

/* ---- events of sockets ---- */

/* The loader has made the worker the listener's owner. */
static __always_inline void shared_listening(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	struct steer_owner *owner = bpf_sk_storage_get(&owners, sk, 0, 0);
	struct steer_counts *c;
	struct steer_state *st;
	__u32 zero = 0;

	if (!owner)
		return;
	c = bpf_map_lookup_elem(&counts, &owner->worker);
	st = bpf_map_lookup_elem(&state, &zero);
	if (!c || !st)
		return;
	__sync_fetch_and_add(&c->listens, 1);
	count_listener(c, ops->family == AF_INET6, 1);
	lower(0);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	st->unserved_since = 0;
}

static __always_inline void shared_changed(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	__u32 zero = 0, *present;
	struct steer_moves *m = bpf_map_lookup_elem(&moves, &zero);
	struct steer_owner *owner;
	__u64 cookie;

	if (m && m->open && has_ended(ops->args[1])) {
		owner = bpf_sk_storage_get(&owners, sk, 0, 0);
		cookie = bpf_get_socket_cookie(ops);
		present = bpf_map_lookup_elem(&moved, &cookie);
		if (owner && owner->counted && present && *present != STEER_NOT_COUNTED) {
			owner->worker = *present;
			bpf_map_delete_elem(&moved, &cookie);
			__sync_fetch_and_add(&m->open, -1);
		}
	}
	changed(ops, sk);
}

SEC("sockops")
int steer_shared_events(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk;

	switch (ops->op) {
	case BPF_SOCK_OPS_TIMEOUT_INIT:
		requested(ops);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		sk = ops->sk;
		if (sk)
			shared_listening(ops, sk);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		sk = ops->sk;
		if (sk)
			established(ops, sk);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		sk = ops->sk;
		if (sk)
			shared_changed(ops, sk);
		break;
	}
	return 1;
}

/*
 * Keeps a worker from detaching the program from the group of its listener: the kernel lets each
 * member of a group do so, and SO_LOCK_FILTER forbids only to attach another one.
 */
SEC("cgroup/setsockopt")
int steer_guard(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (ctx->level != SOL_SOCKET || ctx->optname != SO_DETACH_REUSEPORT_BPF || !sk)
		return 1;
	return !bpf_sk_storage_get(&owners, sk, 0, 0);
}

#endif
