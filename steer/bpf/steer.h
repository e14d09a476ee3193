/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The maps that the programs and the loader share. `src/layout.rs` has the same types; its tests
 * compare sizes and offsets with those in the compiled object.
 *
 * Each map has one writer. The loader writes `settings`, `workers`, `members` and `publics`, with
 * shared ports also `directed` and `listener_workers`; the programs write everything else. So no
 * counter is overwritten by a change of a weight. There are two exceptions, for listeners that were
 * open before and for corrections: the loader adds to `counts` atomically, and makes entries of
 * `owners` and `moved`. After each of its changes the loader also removes the `bounds`, atomically.
 *
 * Addresses are IPv6 or IPv4-mapped IPv6, in network byte order. Ports are in host byte order.
 * A second is CLOCK_MONOTONIC divided by 10^9. Fields without a name in words are padding, zero.
 */
#ifndef STEER_H
#define STEER_H

#include <linux/types.h>

/* Changes when a layout or the meaning of a field changes. */
#define STEER_VERSION 4

#define STEER_MAX_WORKERS 1024
/* With more workers than this, two random ones are compared instead of all. */
#define STEER_SCAN_WORKERS 256
/* With more workers than this, the scan ends at the first worker that no other one is below. */
#define STEER_BOUND_WORKERS 2
/* Random draws for two choices; if none of them has room, all workers are compared. */
#define STEER_DRAWS 8
/* The factor of slow start of a worker at full speed. */
#define STEER_FULL_SPEED 1000
/* Seconds in which a pending connection counts: the current one and those before it. */
#define STEER_PENDING_SECONDS 4
/* Handshakes that are remembered, in the whole pool; the least recently used are forgotten. */
#define STEER_MAX_REMOTES 65536

/* An ACK that comes later than this is not taken for the answer to a SYN cookie: clients send a SYN
 * again after a second, and that one may go to another worker. In nanoseconds. */
#define STEER_COOKIE_NS 900000000ULL

/* With round-robin: virtual time between two turns of a worker with the least weight, at the
 * slowest of its slow start. */
#define STEER_TURN (1ULL << 40)
/* A turn that is further ahead than this is one that was missed. */
#define STEER_TURN_FAR (1ULL << 50)

/* With hash: keys of the hash of addresses, those of `dispatcher-core`. */
#define STEER_KEY_0 0x6469737061746368ULL
#define STEER_KEY_1 0x616666696e697479ULL

/* Policies. */
#define STEER_LEAST_CONNECTIONS 0
#define STEER_ROUND_ROBIN 1
#define STEER_RANDOM 2
#define STEER_TWO_CHOICES 3
#define STEER_HASH 4
#define STEER_FAILOVER 5

/* Index in `listeners`: IPv4 and IPv6 of each worker; the sinks follow as one more worker. */
#define STEER_LISTENER(worker, is_v6) (2 * (worker) + (is_v6))

/* Map `settings`, one entry. */
struct steer_settings {
	__u32 version;
	/* Workers from 0 to this number, exclusive, are looked at. */
	__u32 workers;
	/* Cookie of the network namespace of the pool: listeners elsewhere do not register. */
	__u64 netns;
	/* How long SYNs are dropped while no worker is usable, in nanoseconds; then they are reset. */
	__u64 wait_ns;
	/* Random: the source of draws, with the number of the decision. */
	__u64 seed;
	__u32 policy;
	__u32 reserved;
};

/* Map `workers`, by worker. */
struct steer_worker {
	/* 1 to 65535; 0: there is no such worker. */
	__u32 weight;
	/* 1 to STEER_FULL_SPEED: the part of its weight that the worker has now. */
	__u32 slow_start;
	/* Most connections, pending ones included; 0: no limit. */
	__u32 maximum;
	/* Boolean: gets no new connections. */
	__u8 draining;
	/* Boolean: gets new connections only if no other worker has room. */
	__u8 suspect;
	/* With failover: workers of the highest priority get all connections. */
	__u16 priority;
	/* With hash: what the worker's draws depend on; 0: on its number. */
	__u64 node;
};

/* Map `counts`, by worker. */
struct steer_counts {
	/* Connections whose handshake is complete and that neither side has ended completely. */
	__s64 live;
	/* Connections whose handshake was completed, ever. */
	__u64 total;
	/* Handshakes under way, by the second of their SYN modulo STEER_PENDING_SECONDS: the second
	 * in the upper half, their number in the lower one. Older seconds do not count. */
	__u64 pending[STEER_PENDING_SECONDS];
	/* Open listeners: IPv4, IPv6. */
	__u32 listeners[2];
	/* Number of registered listeners, ever. */
	__u32 listens;
	/* `listens` when the map had no usable socket although one was open: the worker is unusable. */
	__u32 lost_at;
	/* `listens` when the IPv6 listener refused an IPv4 connection (IPV6_V6ONLY). */
	__u32 no_v4_at;
	/* The error with which the last listener could not be registered, negative; 0 if it was. */
	__s32 refused;
	/* With round-robin: the virtual time of its last turn. */
	__u64 last_turn;
	/* With shared ports: connections that came from the queue of another worker, ever. */
	__u64 moved_in;
	/* Connections that went from its queue to another worker or were reset there, ever. */
	__u64 moved_out;
};

/* Map `state`, one entry. */
struct steer_state {
	/* Decisions, ever. */
	__u64 turn;
	/* Since when there is no usable worker, CLOCK_MONOTONIC in nanoseconds; 0: there is one. */
	__u64 unserved_since;
	/* The worker of the last decision: ties go to the next one. */
	__u32 last;
	/* The second of the last decision. */
	__u32 second;
	/* SYNs given to a worker. */
	__u64 chosen;
	/* Those that went to the worker of the same client's last SYN (SYN cookies). */
	__u64 repeated;
	/* SYNs dropped because all workers were at their maximum. */
	__u64 full;
	/* SYNs dropped while no worker was usable. */
	__u64 waited;
	/* SYNs reset because no worker was usable. */
	__u64 unserved;
	/* SYNs reset instead of dropped, because the sink was missing. */
	__u64 no_sink;
	/* Workers whose listener could not be given a connection. */
	__u64 failed;
	/* With round-robin: the virtual time of the last turn. */
	__u64 clock;
};

/*
 * Map `bounds`, two entries: for clients with IPv4 and with IPv6. What the scan for least connections
 * needs not look below: no trusted worker with room has a lower cost (load plus one), and all workers
 * have the same weight. From the upper bits: 32 bits that change when a load falls or a worker
 * changes, 16 bits of the second of the scan that found the cost, 16 bits of the cost. A cost of 0 is
 * no bound. 0: there was no scan yet. A program that lowers a load lowers the bound afterwards; a scan
 * raises it only if the word is still the one that it read before it began.
 */
struct steer_bound {
	__u64 word;
};

#define STEER_BOUND_CHANGE (1ULL << 32)
#define STEER_BOUND_COST 0xffffULL

/* Key of `members` (value: the worker) and `publics` (value: 1). */
struct steer_address {
	__be32 ip[4];
	__u32 port;
};

/* Key of `remotes`: a handshake. */
struct steer_remote {
	__be32 ip[4];
	__u16 port;
	__u16 local_port;
};

/* The handshake counts in `pending` of its worker. */
#define STEER_COUNTED 1
/* The kernel remembers the handshake: it did not answer with a SYN cookie. */
#define STEER_REQUESTED 2

/* Value of `remotes`. */
struct steer_handshake {
	/* When the worker was chosen, CLOCK_MONOTONIC in nanoseconds. */
	__u64 at;
	__u32 worker;
	__u32 flags;
};

/* Value of `owners`, storage of a listener and of the connections that it accepts. */
struct steer_owner {
	__u32 worker;
	/* Boolean: this connection counts in `live`. */
	__u32 counted;
};

/* Map `undecided`, one entry for each processor: the last handshake that it gave to a worker. */
struct steer_undecided {
	struct steer_remote remote;
	/* Boolean: the kernel has not remembered it yet. */
	__u32 armed;
};

#endif
