"""Put the host of an expexp.py in trouble, and tell what expexp makes of it: print a table.

    .venv/bin/python bench/host.py                        # all cases
    .venv/bin/python bench/host.py --only clock killed    # these
    .venv/bin/python bench/host.py --expexp FILE          # another file

Everything happens on the loopback and in namespaces of its own, is bounded in number and time, and
ends with the script. bench/README.md says what the rows mean. The exit status is 1 if a bound does
not hold.
"""

from __future__ import annotations

import sys

import host_cases as cases
import host_life as life
from hostile import Attack, make_parser, perform

OUTAGE = "a scrape succeeds within 5 s"
BACK = "everything is given back; TERM ends it"
LOUD = "the dropped lines are counted; the log goes on in 1 s with whole lines"

CASES = (
    Attack("descriptors", "64 descriptors, 60 clients; then none is free",
           f"{OUTAGE}; the log or a metric says so; {BACK}", cases.case_descriptors),
    Attack("memory", "room for some threads alone, 40 clients of a silent module",
           f"a scrape succeeds within 10 s; rejections are counted; {BACK}", cases.case_memory),
    Attack("memory-start", "less and less address space at the start",
           "expexp serves or ends, and says why", cases.case_memory_start),
    Attack("memory-group", "a command takes more than a control group has",
           f"{OUTAGE}; the command alone is killed, the log says so; {BACK}",
           cases.case_memory_group),
    Attack("processes", "other processes of its user fill the limit of 40",
           f"open connections are served; the log says so; {BACK}", cases.case_processes),
    Attack("proc", "no /proc", f"{OUTAGE}; /metrics lacks what /proc has; {BACK}",
           cases.case_proc),
    Attack("read-only", "all file systems are read-only",
           f"{OUTAGE}; a command that writes fails alone, the log says so; {BACK}",
           cases.case_read_only),
    Attack("disk", "the disk under the log is full", f"{OUTAGE}; {LOUD}; {BACK}",
           cases.case_disk),
    Attack("pipe", "a pipe under the log that nobody reads", f"{OUTAGE}; {LOUD}; {BACK}",
           cases.case_pipe),
    Attack("closed", "descriptors 0, 1, 2 are closed, each and all",
           f"right answers; lines without stderr are counted; {BACK}", cases.case_closed),
    Attack("clock", "the time of day jumps forward and backward",
           f"{OUTAGE}; no deadline moves; certificates are judged by the new time; {BACK}",
           life.case_clock),
    Attack("first", "process 1 of a container, with orphans",
           f"{OUTAGE}; orphans are reaped; {BACK}", life.case_first),
    Attack("hangups", "many SIGHUPs in two bursts", f"{OUTAGE}; the last one counts; {BACK}",
           life.case_hangups),
    Attack("hangups-apart", "many SIGHUPs, one at a time", f"{OUTAGE}; each counts; {BACK}",
           life.case_hangups_apart),
    Attack("killed", "SIGKILL while commands run, and a start on the same port",
           f"{OUTAGE}; the port is free; commands end when they write; {BACK}", life.case_killed),
)  # fmt: skip


def main() -> int:
    """Run the cases as the command line says."""
    parser = make_parser("Put the host of an expexp.py in trouble.", CASES)
    parser.add_argument(
        "--hangups", type=int, default=1000, dest="repeats", help="SIGHUPs of a case (1000)"
    )
    parser.add_argument(
        "--require-all",
        action="store_true",
        default=False,
        help="a case that the machine does not allow does not hold",
    )
    return perform(parser, CASES)


if __name__ == "__main__":
    sys.exit(main())
