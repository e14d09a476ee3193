#!/usr/bin/env python3
"""Where the time goes between two system calls, for each thread: medians and 90th percentiles in microseconds.

    perf record -a -o trace.data -e sched:sched_switch,raw_syscalls:sys_enter,raw_syscalls:sys_exit -- sleep 1
    perf script -i trace.data --ns -F comm,tid,time,event,trace | python3 bench/segments.py dispatcher bench

`name>` is the start of a system call, `name<` its end, `out` and `in` are the thread leaving and getting a core.
Only what happened at least `LEAST` times is shown, so that the pattern stands out.
"""

import collections
import re
import statistics
import sys

LEAST = 50
# x86-64
NAMES = {
    1: "write", 3: "close", 16: "ioctl", 24: "sched_yield", 41: "socket", 42: "connect", 44: "sendto", 45: "recvfrom",
    46: "sendmsg", 47: "recvmsg", 48: "shutdown", 54: "setsockopt", 55: "getsockopt", 202: "futex", 230: "nanosleep",
    232: "epoll_wait", 233: "epoll_ctl", 286: "timerfd_settime", 288: "accept4",
}


def main(wanted):
    last, segments, names = {}, collections.OrderedDict(), {}

    def note(tid, what, now):
        if tid in last:
            before, then = last[tid]
            segments.setdefault((tid, before, what), []).append(now - then)
        last[tid] = (what, now)

    for line in sys.stdin:
        found = re.match(r"\s*(.+?)\s+(\d+)\s+([\d.]+):\s+(\S+):\s+(.*)", line)
        if not found:
            continue
        comm, tid, now, event, rest = found.groups()
        now = float(now) * 1e6
        if event.endswith("sched_switch"):
            switch = re.search(r"prev_pid=(\d+) .*prev_state=(\S+) .*next_pid=(\d+)", rest)
            if switch:
                before, state, after = switch.groups()
                note(before, "out" if state.startswith("S") else "out, still ready", now)
                note(after, "in", now)
            continue
        names[tid] = comm
        call = re.match(r"NR (-?\d+)", rest)
        if call:
            name = NAMES.get(int(call.group(1)), "call " + call.group(1))
            end = "<" if event.endswith("sys_exit") else ">"
            note(tid, name + end + (" EAGAIN" if rest.endswith("= -11") else ""), now)
    for (tid, before, after), times in segments.items():
        if len(times) >= LEAST and names.get(tid) in wanted:
            times.sort()
            p90 = times[len(times) * 9 // 10]
            print(f"{names[tid]} {tid:>7}  {before:>22} -> {after:<22} {len(times):5} times {statistics.median(times):8.1f} {p90:8.1f}")


main(sys.argv[1:])
