"""Send generated requests and answers to two files of expexp, and list what differs.

The old file is that of commit 9a5c971, the working file the one in this repository. Both run with
the same configuration and lead to the same scripted target. A difference is explained by a line of
DESIGN.md, or the exit code is 1.

    difference.py --cases 2000          all kinds of cases, fewer of them
    difference.py --only 123            one case, shown in full
    difference.py --prometheus          let a real Prometheus scrape what differs
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import queue
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from difference_cases import Case, make_case, odd_tags
from difference_explained import EXPLAINED, PARTS, Outcome
from difference_peers import (
    GOOD_ANSWER,
    Certificates,
    Process,
    client_address,
    converse,
    good_steps,
    make_certificates,
)
from difference_prometheus import Verdict, disagrees, is_judged, is_served, judge
from difference_report import Difference, Report, differing_parts, explain

OLD_COMMIT = "9a5c971"
ROOT = Path(__file__).resolve().parent.parent
ATTEMPTS = 2  # a difference must be there each time
RACE_ATTEMPTS = 8  # where time decides
LOG_SECONDS = 0.2  # for the last line of a case's log to be written
WANTED_DATE = re.compile(rb"\r\nDate: \w{3}, \d\d \w{3} 2\d{3} \d\d:\d\d:\d\d GMT\r\n")
TIMEOUT = re.compile(rb"(\r\nX-Prometheus-Scrape-Timeout-Seconds: )[0-9.]+\r\n")
CHUNKED = re.compile(rb"\r\ntransfer-encoding: chunked\r\n", re.IGNORECASE)
SIZE_LINE = re.compile(rb"([0-9a-f]+)\r\n")
OTHER_CLIENT = re.compile(r"\S+ (127\.\d+\.\d+\.\d+)[ :]")


class Pair(NamedTuple):
    """The old process and the new one, and the certificates of both."""

    old: Process
    new: Process
    certificates: Certificates


def join_chunks(answer: bytes) -> bytes:
    """Return an answer with its chunks joined: where one ends depends on time."""
    head, blank, rest = answer.partition(b"\r\n\r\n")
    if not blank or not CHUNKED.search(head + b"\r\n"):
        return answer
    body: list[bytes] = []
    while found := SIZE_LINE.match(rest):
        size = int(found[1], 16)
        piece = rest[found.end() : found.end() + size]
        body.append(piece)
        rest = rest[found.end() + size + 2 :]
        if size == 0:
            body.append(b"[last chunk]")
            break
    return head + blank + b"".join(body) + rest


def normal_answer(process: Process, answer: bytes) -> bytes:
    """Return what a client received, without what varies from run to run."""
    return join_chunks(process.hide_names(WANTED_DATE.sub(b"\r\nDate: NOW\r\n", answer)))


def normal_head(process: Process, head: bytes) -> bytes:
    """Return what a target received, without what varies from run to run."""
    return process.hide_names(TIMEOUT.sub(rb"\1SECONDS\r\n", head))


def run_case(pair: Pair, process: Process, case: Case) -> Outcome:
    """Return the outcome of a case with one process, its log still empty."""
    process.target.prepare(case.target or GOOD_ANSWER)
    context = pair.certificates.client if case.client_tls else None
    source = client_address(case.number)
    talk = converse(process.ports[case.listener], source, context, case.client)
    if talk.end == "reset by us":
        time.sleep(0.02)  # the process may not have found out yet
    received = tuple(normal_head(process, head) for head in process.target.settle())
    return Outcome(normal_answer(process, talk.answer), talk.end, received, ())


def lines_of_case(process: Process, case: Case) -> list[str]:
    """Return the new log lines, without those that name the client of another case."""
    own = client_address(case.number)
    found: list[str] = []
    for line in process.read_log():
        other = OTHER_CLIENT.match(line)
        if not other or other[1] == own:
            found.append(line)
    return found


def compare_once(pair: Pair, case: Case, pool: Any) -> tuple[Outcome, Outcome]:
    """Run a case with both processes; return their outcomes with their logs."""
    if case.waits:
        old, new = pool.map(lambda process: run_case(pair, process, case), (pair.old, pair.new))
    else:
        old = run_case(pair, pair.old, case)
        new = run_case(pair, pair.new, case)
    old_log = lines_of_case(pair.old, case)
    new_log = lines_of_case(pair.new, case)
    end = time.monotonic() + (LOG_SECONDS if old == new else 0.02)
    while old_log != new_log and time.monotonic() < end:
        time.sleep(0.01)
        old_log += lines_of_case(pair.old, case)
        new_log += lines_of_case(pair.new, case)
    return old._replace(log=tuple(old_log)), new._replace(log=tuple(new_log))


def settle_module(process: Process, module: str) -> None:
    """Scrape a module successfully, so that its next failure is news again."""
    process.target.prepare(GOOD_ANSWER)
    converse(process.ports["plain"], "127.0.0.1", None, good_steps(module))
    process.target.settle()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        if any("127.0.0.1 - GET" in line for line in process.read_log()):
            return
        time.sleep(0.005)


def is_race(case: Case, old: Outcome, new: Outcome) -> bool:
    """Return whether time may decide what differs: whether bytes arrive before the close."""
    gone = {"client goes", "cut by a reset"}
    return old._replace(end=new.end) == new or not gone.isdisjoint(case.tags)


def compare(pair: Pair, case: Case, pool: Any) -> Difference | None:
    """Run a case until both outcomes agree, a few times at most; return how they differ."""
    old_outcomes: list[Outcome] = []
    new_outcomes: list[Outcome] = []
    attempts = ATTEMPTS
    while len(old_outcomes) < attempts:
        old, new = compare_once(pair, case, pool)
        if old == new and not old_outcomes:
            return None
        if is_race(case, old, new):
            attempts = RACE_ATTEMPTS
        old_outcomes.append(old)
        new_outcomes.append(new)
        for process in (pair.old, pair.new):
            settle_module(process, case.module or "v")
        if set(old_outcomes) & set(new_outcomes):
            return Difference(case.number, old_outcomes[0], new_outcomes[0], False)
    return Difference(case.number, old_outcomes[0], new_outcomes[0], True)


# --- workers


def work(pair: Pair, seed: int, numbers: Sequence[int], results: Any) -> None:
    """Compare cases in a process of its own; put differences and counts into the queue."""
    pair.old.target.start()
    pair.new.target.start()
    done = 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for number in numbers:
            found = compare(pair, make_case(seed, number), pool)
            if found:
                results.put(found)
            done += 1
            if done % 50 == 0:
                results.put(50)
    results.put(done % 50)
    results.put(None)


@contextlib.contextmanager
def running_pairs(old: Path, working: Path, folder: Path, count: int) -> Iterator[list[Pair]]:
    """Start pairs of processes; end them afterwards."""
    certificates = make_certificates(folder)
    with contextlib.ExitStack() as cleanup:
        pairs: list[Pair] = []
        for number in range(count):
            started: list[Process] = []
            for name, path in (("old", old), ("new", working)):
                process = Process(f"{name}{number}", path, certificates)
                cleanup.callback(process.stop)
                started.append(process)
            pairs.append(Pair(started[0], started[1], certificates))
        yield pairs


def all_differences(
    pairs: Sequence[Pair], seed: int, numbers: Sequence[int]
) -> Iterator[Difference]:
    """Yield the differences of all cases, and tell how far the work is."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = []
    for position, pair in enumerate(pairs):
        share = numbers[position :: len(pairs)]
        worker = context.Process(target=work, args=(pair, seed, share, results), daemon=True)
        worker.start()
        workers.append(worker)
    done, ended, started, told = 0, 0, time.monotonic(), time.monotonic()
    while ended < len(workers):
        try:
            found = results.get(timeout=5)
        except queue.Empty:
            check_alive(pairs, workers)
            continue
        if isinstance(found, Difference):
            yield found
        elif found is None:
            ended += 1
        else:
            done += found
        if time.monotonic() - told > 10:
            told = time.monotonic()
            rate = done / (told - started)
            print(f"{done} of {len(numbers)} cases, {rate:.0f} a second", file=sys.stderr)
    for worker in workers:
        worker.join()


def check_alive(pairs: Sequence[Pair], workers: Sequence[Any]) -> None:
    """Exit if a process has ended that must not."""
    for process in [each for pair in pairs for each in (pair.old, pair.new)]:
        if not process.is_running():
            sys.exit(f"{process.name} has ended")
    if any(worker.exitcode for worker in workers):
        sys.exit("a worker has ended")


# --- one case in full


def show_case(case: Case, difference: Difference | None, pair: Pair, pool: Any) -> None:
    """Print a case and its outcomes in full."""
    print(f"case {case.number}: {case.direction}, tags: {', '.join(case.tags)}")
    print(f"listener {case.listener}, TLS {case.client_tls}, module {case.module!r}")
    for name, steps in (("client", case.client), ("target", case.target)):
        for step in steps:
            print(f"    {name} {step.action} {step.data!r} {step.seconds or ''}")
    old, new = (difference.old, difference.new) if difference else compare_once(pair, case, pool)
    for name, outcome in (("old", old), ("new", new)):
        print(f"{name}: {outcome.summary()}")
        for part, value in zip(PARTS, outcome.parts()):
            print(f"    {part}: {value!r}")
    if difference:
        found, rest = explain(case, difference)
        for explanation in found:
            print(f"explained: {explanation.name}: {explanation.design}")
        for part, one, other in differing_parts(difference.old, rest):
            print(f"unexplained {part}: old {one}\n{' ' * len(part)}              new {other}")
    verdict = "they differ" if difference and difference.stable else "they agree"
    print(f"{verdict}{'' if not difference or difference.stable else ' at times'}")


# --- Prometheus


def judge_differences(report: Report, seed: int, certificates: Certificates, most: int) -> None:
    """Let Prometheus scrape samples of the differences towards targets, and print what it says."""
    chosen: dict[str, list[Difference]] = {}
    for name, group in report.judged_groups().items():
        samples = [each for each in group.samples(most) if is_judged(make_case(seed, each.number))]
        if samples:
            chosen[name] = samples
    numbers = {each.number for samples in chosen.values() for each in samples}
    verdicts = judge([make_case(seed, number) for number in sorted(numbers)], certificates)
    newer = {each.name for each in EXPLAINED if each.is_newer}
    wrong: set[int] = set()
    explained: set[int] = set()
    for name, samples in chosen.items():
        print(f"\nPROMETHEUS on {name}")
        for difference in samples:
            case = make_case(seed, difference.number)
            if not print_verdict(case, difference, verdicts.get(difference.number)):
                (explained if name in newer else wrong).add(difference.number)
    print(f"\nPrometheus was asked about {len(numbers)} cases and disagrees on", end=" ")
    print(f"{len(explained)} as explained, on {len(wrong - explained)} others")


def print_verdict(case: Case, difference: Difference, verdict: Verdict | None) -> bool:
    """Print what old, new and Prometheus made of a case; return whether the last two agree."""
    served = [
        "served" if is_served(outcome) else "refused"
        for outcome in (difference.old, difference.new)
    ]
    line = f"    {case.number} {case.module}: old {served[0]}, new {served[1]}, Prometheus "
    if verdict is None:
        print(f"{line}silent")
        return False
    is_wrong = disagrees(case, difference.new, verdict)
    opinion = "DISAGREES" if is_wrong else "agrees"
    tags = ", ".join(odd_tags(case))
    print(f"{line}{'up' if verdict.up else 'down'}: {opinion}: {tags} {verdict.error[-100:]}")
    return not is_wrong


def judge_new(pair: Pair, seed: int, numbers: Sequence[int]) -> int:
    """Compare both files with Prometheus on target cases; return 1 if the new one disagrees."""
    pair.old.target.start()
    pair.new.target.start()
    cases = [case for case in (make_case(seed, number) for number in numbers) if is_judged(case)]
    verdicts = judge(cases, pair.certificates)
    wrong = 0
    rows: dict[str, list[str]] = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for case in cases:
            old, new = compare_once(pair, case, pool)
            verdict = verdicts.get(case.number)
            if verdict and new.received and disagrees(case, new, verdict):
                wrong += 1
                was = "too" if disagrees(case, old, verdict) else "not"
                line = f"{case.number} {case.module}: {new.summary()}; the old {was}; Prometheus "
                line += f"{'up' if verdict.up else 'down'} {verdict.error[-120:]}"
                rows.setdefault(", ".join(odd_tags(case)), []).append(line)
    for tags, lines in sorted(rows.items(), key=lambda row: row[0].count(",")):
        print(f"{len(lines)} x {tags}\n    {lines[0]}")
    print(f"cases: {len(cases)}, verdicts: {len(verdicts)}, disagreements: {wrong}")
    return int(wrong > 0)


# --- command line


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--working", type=Path, default=ROOT / "expexp.py", help="the new file")
    add("--old", type=Path, help=f"the old file; the default is that of commit {OLD_COMMIT}")
    add("--cases", type=int, default=100_000, help="how many cases")
    add("--first", type=int, default=0, help="number of the first case")
    add("--seed", type=int, default=1, help="what all cases are made from")
    add("--workers", type=int, default=4, help="pairs of processes that work side by side")
    add("--only", type=int, help="run one case, and show it in full")
    add(
        "--prometheus",
        type=int,
        nargs="?",
        const=5,
        default=0,
        metavar="SAMPLES",
        help="let Prometheus scrape so many samples of each kind of difference",
    )
    add("--judge", action="store_true", help="compare the new file with Prometheus instead")
    add("--list", action="store_true", help="list the cases and their tags, run none")
    return parser.parse_args()


def write_old_file(folder: Path) -> Path:
    """Write the file of the old commit to the folder; return its path."""
    path = folder / "expexp_old.py"
    command = ["git", "-C", str(ROOT), "show", f"{OLD_COMMIT}:expexp.py"]
    path.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return path


def list_cases(seed: int, numbers: Sequence[int]) -> None:
    """Print number, direction and tags of cases."""
    for number in numbers:
        case = make_case(seed, number)
        print(f"{number}\t{case.direction}\t{', '.join(case.tags)}")


def run_only(pair: Pair, seed: int, number: int) -> int:
    """Run one case and show it; return 1 if the outcomes differ."""
    pair.old.target.start()
    pair.new.target.start()
    case = make_case(seed, number)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        difference = compare(pair, case, pool)
        show_case(case, difference, pair, pool)
    return int(bool(difference and difference.stable))


def run_all(pairs: Sequence[Pair], seed: int, numbers: Sequence[int], most: int) -> int:
    """Compare all cases and print what differs; return 1 if a difference is unexplained."""
    started = time.monotonic()
    report = Report(seed)
    for difference in all_differences(pairs, seed, numbers):
        report.add(difference)
    report.show()
    if most:
        judge_differences(report, seed, pairs[0].certificates, most)
    seconds = time.monotonic() - started
    print(f"cases: {len(numbers)} in {seconds:.0f} s, {len(numbers) / seconds:.0f} a second")
    return int(bool(report.unexplained))


def main() -> int:
    """Do what the command line asks for; return the exit code."""
    options = parse_arguments()
    numbers = range(options.first, options.first + options.cases)
    if options.list:
        list_cases(options.seed, numbers)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old = options.old or write_old_file(folder)
        count = 1 if options.judge or options.only is not None else options.workers
        with running_pairs(old, options.working, folder, count) as pairs:
            if options.judge:
                return judge_new(pairs[0], options.seed, numbers)
            if options.only is not None:
                return run_only(pairs[0], options.seed, options.only)
            return run_all(pairs, options.seed, numbers, options.prometheus)


if __name__ == "__main__":
    sys.exit(main())
