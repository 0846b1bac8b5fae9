"""The judge of `difference.py`: a real Prometheus that scrapes the bytes of a case directly."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from difference_cases import Case, Steps
from difference_explained import Outcome
from difference_peers import GOOD_ANSWER, LOOPBACK, OTHER_PATH, Certificates, Target

START_SECONDS = 30
SCRAPE_SECONDS = 2
INTERVAL_SECONDS = 5
BATCH = 1000  # targets of one Prometheus
CASE_NUMBER = re.compile(rb"[?&]case=([0-9]+)")
#: Go's client makes these; other errors of a scrape are about the body's text.
TRANSPORT_ERROR = re.compile(r'Get "|unexpected EOF|chunk|reset|closed|deadline|status')


class Verdict(NamedTuple):
    """What Prometheus made of a case."""

    up: bool
    error: str


def is_served(outcome: Outcome) -> bool:
    """Return whether a client of expexp has got a scrape: status 200 and the whole body."""
    return outcome.statuses[:1] == (200,) and "aborted" not in outcome.reasons


def disagrees(case: Case, outcome: Outcome, verdict: Verdict) -> bool:
    """Return whether expexp serves what Prometheus refuses, or refuses what it takes."""
    if case.module.startswith("u") and not TRANSPORT_ERROR.search(verdict.error):
        return verdict.up and not is_served(outcome)
    return verdict.up != is_served(outcome)


def is_judged(case: Case) -> bool:
    """Return whether Prometheus can be asked about a case: the client stays, and wants a body."""
    others = {"client goes", "HEAD"}
    return case.direction == "target" and not case.waits and others.isdisjoint(case.tags)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        return int(listener.getsockname()[1])


def scrape_job(case: Case, ports: Sequence[int]) -> dict[str, Any]:
    """Return a job for one case: cases of one job would share connections."""
    is_tls = "t" in case.module
    job: dict[str, Any] = {
        "job_name": str(case.number),
        "scheme": "https" if is_tls else "http",
        "params": {"case": [str(case.number)]},
        "static_configs": [{"targets": [f"{LOOPBACK}:{ports[is_tls]}"]}],
    }
    if is_tls:
        job["tls_config"] = {"insecure_skip_verify": True}
    return job


def configuration(cases: Sequence[Case], ports: Sequence[int]) -> str:
    """Return a configuration that scrapes every case once an interval."""
    limits = {"scrape_interval": f"{INTERVAL_SECONDS}s", "scrape_timeout": f"{SCRAPE_SECONDS}s"}
    jobs = [scrape_job(case, ports) for case in cases]
    return json.dumps({"global": limits, "scrape_configs": jobs})


@contextlib.contextmanager
def running_prometheus(config: str, folder: Path) -> Iterator[int]:
    """Start Prometheus; yield the port of its API; end it and remove its data."""
    data = folder / "prometheus"
    data.mkdir()
    file = data / "prometheus.yml"
    file.write_text(config)
    port = free_port()
    command = (
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={data / 'data'}",
        f"--web.listen-address={LOOPBACK}:{port}",
        "--log.level=error",
    )
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
    try:
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(data)


def read_targets(port: int) -> list[Any]:
    """Return the active targets of a Prometheus; none while it starts."""
    try:
        with urllib.request.urlopen(
            f"http://{LOOPBACK}:{port}/api/v1/targets", timeout=5
        ) as answer:
            found: list[Any] = json.load(answer)["data"]["activeTargets"]
            return found
    except OSError:
        return []


def first_verdicts(port: int, count: int) -> dict[int, Verdict]:
    """Return the outcome of each target's first scrape, by the case's number."""
    verdicts: dict[int, Verdict] = {}
    end = time.monotonic() + START_SECONDS
    while len(verdicts) < count and time.monotonic() < end:
        time.sleep(0.3)
        for target in read_targets(port):
            number = int(target["labels"]["job"])
            if target["health"] != "unknown" and number not in verdicts:
                verdicts[number] = Verdict(target["health"] == "up", target["lastError"])
    return verdicts


def judge(cases: Sequence[Case], certificates: Certificates) -> dict[int, Verdict]:
    """Let Prometheus scrape the bytes of the cases; return its verdicts by number."""
    verdicts: dict[int, Verdict] = {}
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        target = Target(certificates)
        target.find_script = script_finder({case.number: case.target for case in batch})
        target.start()
        text = configuration(batch, target.ports)
        with running_prometheus(text, certificates.folder) as port:
            verdicts.update(first_verdicts(port, len(batch)))
    return verdicts


def script_finder(scripts: Mapping[int, Steps]) -> Any:
    """Return a function that finds the script of a request by the case's number in it."""

    def find(head: bytes) -> Steps:
        """Return the case's script, or a good answer where a redirect leads to."""
        found = CASE_NUMBER.search(head)
        if OTHER_PATH.match(head) or not found:
            return GOOD_ANSWER
        return scripts.get(int(found[1]), GOOD_ANSWER)

    return find
