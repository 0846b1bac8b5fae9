"""Attack an expexp.py, and tell whether it stays: print a Markdown table.

    .venv/bin/python bench/hostile.py                         # all attacks
    .venv/bin/python bench/hostile.py --only unit hangup    # these
    .venv/bin/python bench/hostile.py --expexp FILE         # another file

Everything happens on the loopback, is bounded in number and time, and ends with the script.
bench/README.md says what the rows mean. The exit status is 1 if a bound does not hold.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable, NamedTuple

import hostile_attacks as attacks
import hostile_faults as faults
import hostile_slow as slow
from compare import REPOSITORY, BenchError, describe_file, end, output_of
from hostile_attacks import Figure
from hostile_peers import Bench, MissingError, open_bench


class Attack(NamedTuple):
    """One attack: what is done, and what has to hold."""

    name: str
    row: str
    bound: str
    run: Callable[[Bench], list[Figure]]


SERVED = "p99 of a healthy scrape at most 250 ms"
IN = "the right one at cost 14 gets in; one processor"
BACK = "everything is given back"
FREED = f"{SERVED}; threads free in 2 s; {BACK}"
HUNG = f"{SERVED}; all 2,000 are answered; at most 50 threads hang; TERM ends it; {BACK}"
OUTAGE = f"a scrape succeeds within 5 s; {BACK}"
SLOW = f"median at most {slow.MEDIAN_RATIO} times the control's; {SERVED}; {BACK}"
LOUD = f"{SERVED}; 100 bytes of log a second; {BACK}"

ATTACKS = (
    Attack("unit", "a UNIT line of 312 bytes in gzip, five at once", f"{SERVED}; {BACK}",
           attacks.attack_unit),
    Attack("protobuf", "16 MiB of empty fields in 16 KiB of gzip",
           f"{SERVED}; time linear, memory 2.5 times the body; {BACK}", attacks.attack_protobuf),
    Attack("head", "a target's headers of 6.2 MB", f"{SERVED}; none accepted; {BACK}",
           attacks.attack_head),
    Attack("bodies", "50 MB for 40 clients", f"{SERVED}; at most 80 MB stay",
           attacks.attack_bodies),
    Attack("bodies-gzip", "50 MB for 40 clients, sent in gzip", f"{SERVED}; at most 80 MB stay",
           attacks.attack_bodies_gzip),
    Attack("hangup", "520 requests for a silent module, connections closed", FREED,
           attacks.attack_hangup),
    Attack("hangup-day", "the same with a timeout header of 86400", FREED,
           attacks.attack_hangup_day),
    Attack("hangup-tls", "the same over TLS", FREED, attacks.attack_hangup_tls),
    Attack("hangup-cache", "the same for a module with a cache", FREED,
           attacks.attack_hangup_cache),
    Attack("hangup-fifo", "the same for a FIFO that nobody writes", FREED,
           attacks.attack_hangup_fifo),
    Attack("hangup-exec", "the same for a command that sleeps", FREED, attacks.attack_hangup_exec),
    Attack("hangup-cached-exec", "the same for a cached command", FREED,
           attacks.attack_hangup_cached_exec),
    Attack("half-closed", "the same, writing shut down alone", f"{FREED}; 502 for each",
           attacks.attack_half_closed),
    Attack("half-closed-tls", "the same over TLS", f"{FREED}; 502 for each",
           attacks.attack_half_closed_tls),
    Attack("stay", "520 clients that wait for a silent module", f"{FREED}; all pages answered",
           attacks.attack_stay),
    Attack("stay-spread", "522 clients for three silent modules together",
           "p99 of /-/healthy at most 250 ms; all pages answered", attacks.attack_stay_spread),
    Attack("stay-all", "520 clients for each of three silent modules",
           "p99 of /-/healthy at most 2 s; all pages answered", attacks.attack_stay_all),
    Attack("fifo", "2,000 scrapes of a FIFO that nobody writes", HUNG, attacks.attack_fifo),
    Attack("hung-stat", "2,000 scrapes of a file whose stat hangs", HUNG,
           attacks.attack_hung_stat),
    Attack("hung-open", "2,000 scrapes of a file whose open hangs", HUNG,
           attacks.attack_hung_open),
    Attack("hung-read", "2,000 scrapes of a file whose read hangs", HUNG,
           attacks.attack_hung_read),
    Attack("hung-reload", "a reload whose stat hangs, then TERM", f"{SERVED}; ends within 12 s",
           attacks.attack_hung_reload),
    Attack("stderr", "stderr is a pipe that nobody reads", f"{SERVED}; TERM ends it; {BACK}",
           attacks.attack_stderr),
    Attack("log", "timeouts of 0.00001 s and none in turns", LOUD, attacks.attack_log),
    Attack("log-flapping", "a target that is broken every other time", LOUD,
           attacks.attack_log_flapping),
    Attack("memory", "no address space is left", OUTAGE, attacks.attack_memory),
    Attack("threads", "40 threads, idle clients stay", OUTAGE, attacks.attack_threads),
    Attack("descriptors", "64 descriptors, idle clients stay", OUTAGE,
           attacks.attack_descriptors),
    Attack("descriptors-later", "64 descriptors from after the start on, idle clients stay",
           OUTAGE, attacks.attack_descriptors_later),
    Attack("bcrypt", "40 clients with wrong passwords of unknown users",
           f"{SERVED}; {IN}; {BACK}", attacks.attack_bcrypt),
    Attack("bcrypt-known", "40 clients with wrong passwords of a user at cost 10",
           f"{SERVED}; {IN}; {BACK}", attacks.attack_bcrypt_known),
    Attack("signals", "TERM and INT close together, many of them", "all runs end",
           attacks.attack_signals),
    Attack("faults", "targets that are ill, one after the other",
           "documented status and reason; at most 50 ms late; nothing is left",
           faults.attack_faults),
    Attack("slow-line", "500 clients that send a byte of the request line a second", SLOW,
           slow.attack_slow_line),
    Attack("slow-headers", "the same with a byte of the headers a second", SLOW,
           slow.attack_slow_headers),
    Attack("slow-handshake", "the same with a byte of the TLS handshake a second", SLOW,
           slow.attack_slow_handshake),
    Attack("no-handshake", "500 clients that never begin the TLS handshake", SLOW,
           slow.attack_no_handshake),
    Attack("slow-answer", "500 clients that read 1 MB slowly", SLOW, slow.attack_slow_answer),
    Attack("flood", "5,000 more connections than there may be",
           f"no healthy scrape fails; idle ones make room; {BACK}", slow.attack_flood),
    Attack("flood-full", "the same when none can make room",
           f"refused within a second, and counted; {BACK}", slow.attack_flood_full),
    Attack("reloads", "50 queued reloads", f"{SERVED}; the time of five", attacks.attack_reloads),
)  # fmt: skip


def run(attack: Attack, bench: Bench) -> list[Figure]:
    """Return the figures of an attack; one that cannot be run does not hold."""
    try:
        return attack.run(bench)
    except MissingError as error:
        return [Figure("not run", str(error), attack.bound, holds=not bench.require_all)]
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        return [Figure("not measured", str(error), attack.bound, holds=False)]


def rows(attack: Attack, figures: list[Figure]) -> Iterator[str]:
    """Yield the rows of an attack."""
    for figure in figures:
        verdict = "yes" if figure.holds else "**no**"
        cells = [attack.name, figure.what, figure.measured, figure.bound, verdict]
        yield "| " + " | ".join(cells) + " |"


def make_parser(description: str, attacks: Sequence[Attack]) -> argparse.ArgumentParser:
    """Return a parser of the flags that all programs with attacks have."""
    names = [attack.name for attack in attacks]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--expexp", type=Path, default=REPOSITORY / "expexp.py", metavar="FILE")
    parser.add_argument("--python", default=sys.executable, help="interpreter to run it with")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these attacks")
    parser.add_argument("--list", action="store_true", help="list the attacks, and exit")
    parser.set_defaults(repeats=1, slow_seconds=60.0, require_all=True)
    return parser


def perform(parser: argparse.ArgumentParser, attacks: Sequence[Attack]) -> int:
    """Run the attacks and print the table; return 1 if a bound does not hold."""
    options = parser.parse_args()
    python = shutil.which(options.python)
    if python is None or not options.expexp.is_file():
        parser.error("--python or --expexp: not found")
    if options.list:
        for attack in attacks:
            print(f"{attack.name:20} {attack.row}: {attack.bound}")
        return 0
    signal.signal(signal.SIGTERM, end)
    python = os.path.abspath(python)  # expexp runs in a folder of its own
    version = output_of([python, "-c", "import platform as p; print(p.python_version())"])
    print(f"expexp.py {describe_file(options.expexp)}; Python {version}; ", end="")
    print(f"processors {os.cpu_count()}; load at the start {os.getloadavg()[0]:.2f}.\n")
    print("| attack | measured | value | bound | holds |\n|---|---|---|---|---|", flush=True)
    failed = 0
    lengths = options.repeats, options.slow_seconds
    with open_bench(options.expexp.resolve(), python, *lengths) as bench:
        for attack in attacks:
            if options.only and attack.name not in options.only:
                continue
            begun = time.monotonic()
            figures = run(attack, bench._replace(require_all=options.require_all))
            print("\n".join(rows(attack, figures)), flush=True)
            print(f"{attack.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
            failed += sum(not figure.holds for figure in figures)
    print(f"\nBounds that do not hold: {failed}.")
    return int(bool(failed))


def main() -> int:
    """Attack as the command line says."""
    parser = make_parser("Attack an expexp.py on the loopback.", ATTACKS)
    parser.add_argument(
        "--signal-runs", type=int, default=200, dest="repeats", help="of the attack `signals` (200)"
    )
    parser.add_argument(
        "--slow-seconds", type=float, default=60, help="of each attack with slow clients (60)"
    )
    return perform(parser, ATTACKS)


if __name__ == "__main__":
    sys.exit(main())
