/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The numbers of the policy `hash`: weighted rendezvous hashing, as `dispatcher-core` has it. Keys
 * and draws are those of the core; the logarithm is a polynomial, because programs have no floating
 * point. `src/decision/hash.rs` is the same in Rust.
 */
#ifndef STEER_HASH_H
#define STEER_HASH_H

#include <linux/types.h>

/* The finisher of SplitMix64: every bit of `z` counts for every bit of the result. */
static __always_inline __u64 mixed(__u64 z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

#define ROTATED(x, bits) ((x) << (bits) | (x) >> (64 - (bits)))

struct sip {
	__u64 v0, v1, v2, v3;
};

static __always_inline void sip_round(struct sip *s)
{
	s->v0 += s->v1;
	s->v2 += s->v3;
	s->v1 = ROTATED(s->v1, 13) ^ s->v0;
	s->v3 = ROTATED(s->v3, 16) ^ s->v2;
	s->v0 = ROTATED(s->v0, 32);
	s->v2 += s->v1;
	s->v0 += s->v3;
	s->v1 = ROTATED(s->v1, 17) ^ s->v2;
	s->v3 = ROTATED(s->v3, 21) ^ s->v0;
	s->v2 = ROTATED(s->v2, 32);
}

static __always_inline void sip_word(struct sip *s, __u64 word)
{
	s->v3 ^= word;
	sip_round(s);
	s->v0 ^= word;
}

/*
 * The key of a client's address: SipHash-1-3 (Aumasson and Bernstein, "SipHash: a fast short-input
 * PRF", 2012) of its 4 or 16 bytes.
 */
static __always_inline __u64 key_of(const __be32 *ip, __u32 is_v6)
{
	struct sip s = {
		STEER_KEY_0 ^ 0x736f6d6570736575ULL,
		STEER_KEY_1 ^ 0x646f72616e646f6dULL,
		STEER_KEY_0 ^ 0x6c7967656e657261ULL,
		STEER_KEY_1 ^ 0x7465646279746573ULL,
	};

	if (is_v6) {
		sip_word(&s, (__u64)ip[1] << 32 | ip[0]);
		sip_word(&s, (__u64)ip[3] << 32 | ip[2]);
		sip_word(&s, 16ULL << 56);
	} else {
		sip_word(&s, 4ULL << 56 | ip[3]);
	}
	s.v2 ^= 0xff;
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
}

/* At most the distance of the same draw, and cheap: -log2(u) >= (1 - u) / ln 2 >= 1.375 (1 - u). */
static __always_inline __u64 least_distance(__u64 drawn)
{
	__u64 rest = ~drawn >> 34;

	return rest + (rest >> 2) + (rest >> 3);
}

/* Without a branch: the verifier would follow 64 paths through it. */
#define HALVE(bits)                                                                                \
	do {                                                                                       \
		__u64 top = z >> (64 - (bits));                                                    \
		__u64 shift = (((top - 1) & ~top) >> 63) * (bits);                                 \
		z <<= shift;                                                                       \
		whole += shift;                                                                    \
	} while (0)

/*
 * -log2(drawn / 2^64) in units of 2^-30, at least 1. With z = 2^63 (1 + x) it is the number of
 * leading zeros plus 1 - log2(1 + x), and log2(1 + x) is x + x (1 - x) q(x); q interpolates at the
 * Chebyshev nodes. The error is below 2e-7. Not static: the verifier checks it once.
 */
__noinline __u64 distance(__u64 drawn)
{
	__u64 z = drawn | 1, whole = 0;
	__s64 x, y, q;

	HALVE(32);
	HALVE(16);
	HALVE(8);
	HALVE(4);
	HALVE(2);
	HALVE(1);
	x = (z >> 33) & 0x3fffffff;
	y = (1 << 30) - x;
	q = 9759190;
	q = -45890689 + ((q * x) >> 30);
	q = 102680175 + ((q * x) >> 30);
	q = -159061941 + ((q * x) >> 30);
	q = 215475628 + ((q * x) >> 30);
	q = -299100158 + ((q * x) >> 30);
	q = 475339163 + ((q * x) >> 30);
	y -= (((x * y) >> 30) * q) >> 30;
	/* A draw of nearly 1 has distance 0: then no weight would count. */
	return (whole << 30) + (y > 1 ? y : 1);
}

#endif
