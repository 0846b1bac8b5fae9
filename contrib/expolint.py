#!/usr/bin/env python3
"""expolint lists what is wrong with Prometheus expositions, also what Prometheus tolerates.

    python3 contrib/expolint.py [--strict] [--content-type TYPE] FILE...

It reads text, OpenMetrics and protobuf from files, or from stdin for `-`. It prints each finding as
`file:line:column: message`, with the line and a caret under the place. `strict: ` marks what breaks
a rule of the format although Prometheus ingests the body.

Exit codes: 0 Prometheus ingests all files, 1 it refuses one or, with --strict, there is a finding,
2 a file cannot be read or the arguments are bad.

    from expolint import findings
    findings(body, content_type)

It needs Python 3.9 or later, and expexp.py beside it or in the folder above. Prometheus's own rules
are those of expexp's readers. This file adds the rules of the text format 0.0.4 and of OpenMetrics
1.0 that Prometheus does not enforce. In protobuf there are none.

Contents:
  1  Reading lines
  2  Reading families
  3  Judging families
  4  Findings
  5  Command line

Licensed under the Apache License, Version 2.0.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable, Final, NamedTuple

FOLDER: Final = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
try:
    from expexp import (
        NULS,
        NUMBER,
        OPENMETRICS_CONTENT_TYPE,
        TEXT,
        TEXT_CONTENT_TYPE,
        Dialect,
        ExpositionError,
        Label,
        Limits,
        Line,
        Metadata,
        Sample,
        ScrapeError,
        Source,
        choose_dialect,
        compile_run,
        excerpt,
        expected,
        find_line_end,
        is_openmetrics_body,
        no_tick,
        peek,
        point_at,
        read_input,
        read_line,
        read_quoted,
        refuse,
        scan,
        skip_blanks,
        tell,
        unescape,
        verify_exposition,
        words_of,
    )
except ModuleNotFoundError:
    sys.stderr.write("expolint.py needs expexp.py beside it or in the folder above\n")
    sys.exit(2)

__all__ = ["Finding", "findings", "main"]

# ==================================================================================================
# 1  Reading lines
# ==================================================================================================
# expexp's reader takes what Prometheus takes. A line is first read by a stricter dialect, then by
# Prometheus's own. What no dialect can say is looked for in the bytes of the line.


class Finding(NamedTuple):
    """One thing wrong with an exposition; `strict` if Prometheus ingests the body anyway.

    In protobuf the line is 0, and the column is the offset of a byte.
    """

    line: int
    column: int
    message: str
    strict: bool = False


class Reading(NamedTuple):
    """What a line says, where the next one begins, and what is wrong with this one."""

    end: int
    line: Line
    is_readable: bool
    findings: list[Finding]


STRICT_TEXT: Final = TEXT._replace(
    label_value=compile_run(rb'[^"\\\n]{1,256}|\\[\\"n]'), after_name=re.compile(rb"[ \t\n]|\Z")
)
FIRST_WORD: Final = re.compile(rb"[ \t]*#[ \t]*(?P<word>[A-Z]*\0)?")
HELP_ESCAPE: Final = re.compile(rb"\\[\\n]|(?P<other>\\)")


def to_finding(error: ExpositionError, strict: bool = False) -> Finding:
    """Return the finding that an error of expexp stands for."""
    return Finding(error.line, error.column or error.offset, error.message, strict)


def check_keyword(source: Source, pos: int) -> Iterator[ExpositionError]:
    """Yield the error for a NUL byte in the first word of a comment."""
    found = FIRST_WORD.match(source.body, pos)
    if found and found["word"]:
        yield refuse(
            source, found.start("word"), "expected no NUL byte in the first word of a comment"
        )


def check_help(source: Source, metadata: Metadata) -> Iterator[ExpositionError]:
    """Yield the error for an escape in HELP that the text format does not have."""
    start = find_line_end(source.body, metadata.pos) - len(metadata.text)
    for found in HELP_ESCAPE.finditer(metadata.text):
        if found["other"]:
            yield expected(source, start + found.start(), r"no escapes but \\ and \n")
            return


def check_commas(source: Source, pos: int, end: int) -> Iterator[ExpositionError]:
    """Yield the errors for labels without a comma between them or, in OpenMetrics, one too many."""
    quote = source.body.find(b'"', pos, end)
    while quote >= 0:
        after, _ = read_quoted(source, quote, TEXT.label_value)  # also fits names
        after = skip_blanks(source, scan(source, after, NULS))
        if source.dialect.openmetrics:
            if source.body.startswith(b",}", after):
                yield expected(source, after + 1, "a label name")
        elif peek(source, after) not in (b",", b"}", b"="):
            yield expected(source, after, '"," or "}"')
        quote = source.body.find(b'"', after, end)


def check_line(source: Source, pos: int, end: int, line: Line) -> Iterator[ExpositionError]:
    """Yield what the bytes of a line from `pos` to `end` show to be wrong."""
    yield from check_keyword(source, pos)
    is_text = not source.dialect.openmetrics
    if isinstance(line, Metadata) and line.keyword == b"HELP" and is_text:
        yield from check_help(source, line)
    elif isinstance(line, Sample):
        yield from check_commas(source, line.pos, end)
    if end > len(source.body) and source.body[pos:].strip(b" \t") and is_text:
        yield expected(source, len(source.body), "a newline")


def try_line(source: Source, pos: int) -> tuple[int, Line] | ExpositionError:
    """Return what `read_line` returns or raises."""
    try:
        return read_line(source, pos)
    except ExpositionError as error:
        return error


def read_strictly(source: Source, pos: int) -> Reading:
    """Return the line at `pos` with what is wrong with it."""
    findings = []
    strict = source if source.dialect.openmetrics else source._replace(dialect=STRICT_TEXT)
    read = try_line(strict, pos)
    if isinstance(read, ExpositionError):
        stricter = to_finding(read, strict=True)
        read = try_line(source, pos)
        if isinstance(read, ExpositionError):
            next_line = find_line_end(source.body, pos) + 1
            return Reading(next_line, None, False, [to_finding(read)])
        findings.append(stricter)
    end, line = read
    findings += [to_finding(error, strict=True) for error in check_line(source, pos, end, line)]
    return Reading(end, line, True, findings)


# ==================================================================================================
# 2  Reading families
# ==================================================================================================
# A family is a run of lines about one name.

#: A family of more samples is only judged line by line: what the checks need is kept in memory,
#: 500 bytes a sample.
MAX_JUDGED_SAMPLES: Final = 100_000

#: The suffixes of the samples of a type, by whether it is OpenMetrics. Other types have none.
SUFFIXES: Final[dict[tuple[bool, bytes], tuple[bytes, ...]]] = {
    (False, b"histogram"): (b"_bucket", b"_count", b"_sum"),
    (False, b"summary"): (b"", b"_count", b"_sum"),
    (True, b"counter"): (b"_total", b"_created"),
    (True, b"histogram"): (b"_bucket", b"_count", b"_sum", b"_created"),
    (True, b"gaugehistogram"): (b"_bucket", b"_gcount", b"_gsum"),
    (True, b"summary"): (b"", b"_count", b"_sum", b"_created"),
    (True, b"info"): (b"_info",),
}


class Row(NamedTuple):
    """A sample as its family sees it."""

    pos: int
    kind: bytes  #: the family's type, and what the sample's name adds to the family's
    value: float
    timestamp: bytes
    exemplar: list[Label] | None
    labels: str  #: those with a value, in order and as a text, without the special one
    special: bytes  #: the name of the label that tells the samples of one metric apart, if any
    bound: bytes  #: its value
    number: float  #: and that as a number, NaN where it is none, or a state


class Family:
    """A run of lines about one name."""

    def __init__(self, first: Sample | Metadata, dialect: Dialect) -> None:
        """Begin with what the first line says; it is still to be added."""
        self.name, self.pos, self.openmetrics = first.name, first.pos, dialect.openmetrics
        self.type, self.names = dialect.types[0], {first.name}
        self.metadata: list[Metadata] = []
        self.rows: list[Row] = []
        self.metrics: dict[tuple[str, bytes], list[Row]] = {}

    def takes(self, line: Sample | Metadata) -> bool:
        """Return whether this family goes on with `line`."""
        return line.name in ({self.name} if isinstance(line, Metadata) else self.names)

    def add(self, line: Sample | Metadata) -> None:
        """Take one more line."""
        if isinstance(line, Metadata):
            self.metadata.append(line)
            if line.keyword == b"TYPE":
                self.type = line.text
                suffixes = SUFFIXES.get((self.openmetrics, self.type), (b"",))
                self.names = {self.name + suffix for suffix in suffixes}
        elif len(self.rows) <= MAX_JUDGED_SAMPLES:
            row = self.make_row(line)
            self.rows.append(row)
            point = row.timestamp if self.openmetrics else b""
            self.metrics.setdefault((row.labels, point), []).append(row)

    def make_row(self, sample: Sample) -> Row:
        """Return what the rules ask of a sample. A label without a value is none."""
        pos, name, pairs, value, timestamp, exemplar = sample
        kind = self.type + name[len(self.name) :]
        special = {b"summary": b"quantile", b"stateset": self.name}.get(kind, b"")
        special = b"le" if kind.endswith(b"histogram_bucket") else special
        labels = {label.name: unescape(label.value) for label in pairs if label.value}
        bound = labels.pop(special, b"")
        number = float(bound) if kind != b"stateset" and NUMBER.fullmatch(bound) else math.nan
        rest = repr(sorted(labels.items()))
        return Row(pos, kind, float(value), timestamp, exemplar, rest, special, bound, number)


def read_families(source: Source) -> Iterator[Finding | Family]:
    """Yield what is wrong with lines, and the families, without those that cannot be read."""
    family = None
    pos = 0
    while pos <= len(source.body):
        reading = read_strictly(source, pos)
        yield from reading.findings
        pos = reading.end
        line = reading.line
        if not reading.is_readable:
            family = None
        if line is None:
            continue
        if family and not family.takes(line):
            yield family
            family = None
        family = family or Family(line, source.dialect)
        family.add(line)
    if family:
        yield family


# ==================================================================================================
# 3  Judging families
# ==================================================================================================
# One `check_*` function a rule, each with examples that pass and that do not, which the tests run.
# A check gets a family of well-formed lines, and those of its rows to look at: all in their order,
# or those of one metric (in OpenMetrics at one point in time). It yields where it found what.

Complaints = Iterator[tuple[int, str]]
Check = Callable[[Family, list[Row]], Complaints]


def check_metadata(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield what is repeated, comes after the first sample, or is not for the type.

    Good: `# HELP a x\n# TYPE a gauge\na 1\n`
    Bad: `# TYPE a gauge\n# TYPE a gauge\n`
    Bad: `a 1\n# TYPE a gauge\n`
    Good: `# TYPE a_s gauge\n# UNIT a_s s\n# EOF`
    Bad: `# TYPE a_s info\n# UNIT a_s s\n# EOF`
    """
    seen: set[bytes] = set()
    for pos, keyword, name, text in family.metadata:
        what = f'{keyword.decode()} of "{excerpt(name)}"'
        if keyword in seen:
            yield pos, f"found a second {what}"
        elif rows and pos > rows[0].pos:
            yield pos, f"expected the {what} before its samples"
        if keyword == b"UNIT" and text and family.type in (b"info", b"stateset"):
            yield pos, f"expected no unit for the type {family.type.decode()}"
        seen.add(keyword)


def check_labels(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield a bucket, quantile or state whose label is missing or no such thing.

    Good: `# TYPE a summary\na{quantile="0.5"} 1\n`
    Bad: `# TYPE a summary\na{quantile="2"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="x"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="inf"} 1\n# EOF`
    Bad: `# TYPE a stateset\na 1\n# EOF`
    """
    for row in rows:
        if row.kind == b"summary" and not 0 <= row.number <= 1:
            yield row.pos, 'expected a label "quantile", a number from 0 to 1'
        elif row.kind.endswith(b"_bucket") and math.isnan(row.number):
            yield row.pos, 'expected a label "le", a number or +Inf'
        elif row.number == math.inf and row.bound != b"+Inf" and family.openmetrics:
            yield row.pos, 'expected le="+Inf" in this form'
        elif row.kind == b"stateset" and not row.bound:
            yield row.pos, f'expected a label "{excerpt(row.special)}" for the state'


#: How the kinds end that count something whole, and those that are not negative.
COUNTS: Final = (b"_bucket", b"count")
TOTALS: Final = (b"_total", b"_sum", b"summary", *COUNTS)
CONSTANTS: Final = {b"info_info": (1.0,), b"stateset": (0.0, 1.0)}


def check_values(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield values that OpenMetrics does not allow for the type.

    Good: `# TYPE a counter\na_total 1.5\n# EOF`
    Bad: `# TYPE a counter\na_total NaN\n# EOF`
    Bad: `# TYPE a summary\na_count 1.5\n# EOF`
    Bad: `# TYPE a info\na_info 2\n# EOF`
    """
    for row in rows if family.openmetrics else ():
        # A quantile of NaN is one that is not known.
        negative = row.value < 0 if row.kind == b"summary" else not row.value >= 0
        if row.kind.endswith(COUNTS) and not row.value.is_integer():
            yield row.pos, "expected a whole number"
        elif negative and row.kind.endswith(TOTALS):
            yield row.pos, "expected a number that is not negative"
        elif row.kind == b"gaugehistogram_gsum" and math.isnan(row.value):
            yield row.pos, "expected a sum that is a number"
        elif row.value not in CONSTANTS.get(row.kind, (row.value,)):
            yield row.pos, f"expected 1, or for a state 0, in the type {family.type.decode()}"


MAX_EXEMPLAR: Final = 128  # characters, OpenMetrics 1.0 "Exemplars"


def check_exemplars(_: Family, rows: list[Row]) -> Complaints:
    r"""Yield exemplars that are too long, or on other samples than totals and buckets.

    Good: `# TYPE a counter\na_total 1 # {b="c"} 1\n# EOF`
    Bad: `# TYPE a gauge\na 1 # {b="c"} 1\n# EOF`
    """
    for row in rows:
        pairs = row.exemplar or ()
        if row.exemplar is not None and not row.kind.endswith((b"_total", b"_bucket")):
            yield row.pos, "expected no exemplar, save on a counter's total or a bucket"
        if sum(len((name + unescape(value)).decode()) for _, name, value in pairs) > MAX_EXEMPLAR:
            yield row.pos, f"expected at most {MAX_EXEMPLAR} characters in an exemplar's labels"


def check_series(_: Family, rows: list[Row]) -> Complaints:
    r"""Yield series that are there twice; in OpenMetrics, with the same timestamp.

    Good: `a{b="1",c="2"} 1\na{b="2",c="1"} 1\n`
    Bad: `a{b="1",c="2"} 1\na{c="2",b="1"} 1\n`
    """
    seen = set()
    for row in rows:
        if (row.kind, row.bound) in seen:
            yield row.pos, "found the same series twice"
        seen.add((row.kind, row.bound))


def check_order(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield OpenMetrics samples of one metric that do not stand together, or go back in time.

    Good: `# TYPE a gauge\na 1 1\na 2 2\n# EOF`
    Bad: `# TYPE a gauge\na 1 2\na 2 1\n# EOF`
    Bad: `# TYPE a gauge\na 1\na 2 1\n# EOF`
    Bad: `# TYPE a summary\na_sum{b="1"} 1\na_sum{b="2"} 1\na_count{b="1"} 1\n# EOF`
    """
    seen = {row.labels for row in rows[:1]}
    for before, row in zip(rows, rows[1:]) if family.openmetrics else ():
        if row.labels != before.labels:
            if row.labels in seen:
                yield row.pos, "expected the samples of one metric in one place"
            seen.add(row.labels)
        elif bool(row.timestamp) != bool(before.timestamp):
            yield row.pos, "expected a timestamp at every sample of a metric, or at none"
        elif row.timestamp and float(row.timestamp) < float(before.timestamp):
            yield row.pos, "expected no earlier timestamp than that of the sample before"


def check_bounds(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield buckets and quantiles that are not in ascending order.

    Good: `# TYPE a summary\na{quantile="0.5"} 1\na{quantile="0.9"} 1\n`
    Bad: `# TYPE a summary\na{quantile="0.9"} 1\na{quantile="0.5"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="+Inf"} 1\na_bucket{le="1"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="1"} 1\na_bucket{le="1.0"} 1\na_bucket{le="+Inf"} 1\n`
    """
    bounded = [row for row in rows if row.special]
    free = family.openmetrics and family.type == b"summary"
    for before, row in zip(bounded, bounded[1:]):
        if row.number <= before.number and row.bound != before.bound and not free:
            yield row.pos, "expected buckets and quantiles in ascending order"


def check_histograms(_: Family, rows: list[Row]) -> Complaints:
    r"""Yield the first thing that is wrong with each histogram.

    Good: `# TYPE a histogram\na_bucket{le="1"} 1\na_bucket{le="+Inf"} 2\na_count 2\n`
    Bad: `# TYPE a histogram\na_bucket{le="1"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="1"} 2\na_bucket{le="+Inf"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="+Inf"} 2\na_count 1\n`
    """
    values = [0.0, *(row.value for row in rows if row.special)]
    counts = [row.value for row in rows if row.kind.endswith(b"count")]
    if math.inf not in [row.number for row in rows]:
        yield rows[-1].pos, 'expected a bucket with le="+Inf"'
    elif values != sorted(values):
        yield rows[-1].pos, "expected no bucket with less in it than the one before"
    elif counts[:1] not in ([], values[-1:]):
        yield rows[-1].pos, 'expected as much in the count as in the bucket with le="+Inf"'


def check_sums(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield the sums of OpenMetrics histograms that cannot be, or are missing.

    Good: `# TYPE a histogram\na_bucket{le="+Inf"} 2\na_sum 3\na_count 2\n# EOF`
    Bad: `# TYPE a histogram\na_bucket{le="+Inf"} 2\na_count 2\n# EOF`
    Bad: `# TYPE a histogram\na_bucket{le="-1"} 0\na_bucket{le="+Inf"} 2\na_sum 3\na_count 2\n# EOF`
    """
    if not family.openmetrics:
        return
    sums = [row for row in rows if row.kind.endswith(b"sum")]
    negative = any(row.number < 0 for row in rows)
    if any(row.kind.endswith(b"count") for row in rows) != bool(sums):
        yield rows[-1].pos, "expected sum and count together, or neither"
    elif sums and negative and family.type == b"histogram":
        yield sums[0].pos, "expected no sum, since there is a negative bucket"
    elif sums and not negative and sums[0].value < 0:
        yield sums[0].pos, "expected no negative sum, since there is no negative bucket"


FAMILY_CHECKS: Final[Sequence[Check]] = (check_metadata, check_order)
METRIC_CHECKS: Final[Sequence[Check]] = (
    check_labels,
    check_values,
    check_exemplars,
    check_series,
    check_bounds,
)
HISTOGRAM_CHECKS: Final[Sequence[Check]] = (*METRIC_CHECKS, check_histograms, check_sums)


def complain(family: Family, taken: set[bytes]) -> Complaints:
    """Yield what is wrong with a family, whose names should not be taken."""
    for name in sorted(taken & {family.name, *family.names})[:1]:
        yield family.pos, f'found "{excerpt(name)}", which is a name of another family above'
    if len(family.rows) > MAX_JUDGED_SAMPLES:
        return
    for check in FAMILY_CHECKS:
        yield from check(family, family.rows)
    checks = HISTOGRAM_CHECKS if family.type.endswith(b"histogram") else METRIC_CHECKS
    for rows in family.metrics.values():
        for check in checks:
            yield from check(family, rows)


# ==================================================================================================
# 4  Findings
# ==================================================================================================

MAX_FINDINGS: Final = 100  # a reader needs no more, and memory is bounded


def judge_families(source: Source) -> Iterator[Finding]:
    """Yield what is wrong with lines, with families, and with all families together."""
    taken: set[bytes] = set()
    for found in read_families(source):
        if isinstance(found, Finding):
            yield found
            continue
        for pos, message in sorted(complain(found, taken)):
            yield to_finding(refuse(source, pos, message), strict=True)
        taken |= {found.name, *found.names}


def find_refusal(body: bytes, content_type: str) -> Iterator[Finding]:
    """Yield why Prometheus refuses the body, if it does."""
    try:
        verify_exposition(body, content_type)
    except ExpositionError as error:
        yield to_finding(error)


def find_all(body: bytes, content_type: str) -> Iterator[Finding]:
    """Yield the findings, some of them twice. A refusal by Prometheus comes first."""
    yield from find_refusal(body, content_type)
    dialect = choose_dialect(content_type)
    if dialect is None:  # protobuf: what follows a fault cannot be read
        return
    source = Source(body, dialect, no_tick)
    if dialect.openmetrics and not body:
        yield to_finding(expected(source, 0, '"# EOF"'), strict=True)
    yield from judge_families(source)


def findings(body: bytes, content_type: str) -> list[Finding]:
    """Return up to 100 findings in the order of the body, also the one for which it is refused.

    Differences from the Go library expfmt: blanks at the end of a line pass, as the text format
    says. Differences from prometheus_client's parser, which has bugs there: quoted names without
    metadata pass, escaped quotes and braces in exemplars, and integer after float timestamps. A
    label without a value is no label, so a series that has one may be there already. A series that
    is there twice without a timestamp of its own is refused. Names that the formats reserve (`__x`)
    pass: Prometheus ingests them, and exporters have them. Of a family of more than 100,000 samples
    only the lines are judged, since the rest would take too much memory.
    """
    found: dict[Finding, None] = {}
    for finding in find_all(body, content_type):
        found[finding] = None
        if len(found) == MAX_FINDINGS:
            break
    return sorted(found)


# ==================================================================================================
# 5  Command line
# ==================================================================================================


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options and files of a command line. Bad ones end the program with 2."""
    parser = argparse.ArgumentParser(
        prog="expolint.py",
        description="List what is wrong with Prometheus expositions.",
        allow_abbrev=False,
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 for any finding")
    parser.add_argument(
        "--content-type", default="", metavar="TYPE", help="by default the last line decides"
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="an exposition; - is stdin")
    return parser.parse_args(arguments)


def render_finding(name: str, line: bytes, finding: Finding) -> str:
    """Return `file:line:column: message` and the place, for protobuf `file: byte N: message`."""
    message = f"{'strict: ' if finding.strict else ''}{finding.message}\n"
    if not finding.line:
        return f"{name}: byte {finding.column}: {message}"
    return f"{name}:{finding.line}:{finding.column}: {message}{point_at(line, finding.column)}"


def render_findings(name: str, body: bytes, found: list[Finding]) -> str:
    """Return the findings of a file as text. The last line counts them, and has the verdict."""
    numbers = {finding.line for finding in found}
    lines = {n: line for n, line in enumerate(io.BytesIO(body), 1) if n in numbers}
    shown = [
        render_finding(name, lines.get(finding.line, b"").rstrip(b"\n"), finding)
        for finding in found
    ]
    more = " or more" if len(found) == MAX_FINDINGS else ""
    verdict = "accepted" if all(finding.strict for finding in found) else "refused"
    shown.append(f"{name}: findings: {len(found)}{more}, {verdict} by Prometheus\n")
    return "".join(shown)


def lint_file(name: str, arguments: argparse.Namespace) -> int:
    """Print the findings in a file. Return the exit code for it, 2 if it cannot be read. IO."""
    shown = "<stdin>" if name == "-" else excerpt(name, 200)
    failure = f"{shown}: cannot be read"
    try:
        body = read_input(name, Limits())
        by_end = OPENMETRICS_CONTENT_TYPE if is_openmetrics_body(body) else TEXT_CONTENT_TYPE
        found = findings(body, arguments.content_type or by_end)
        failure = "<stdout>: cannot be written"
        with open(1, "wb", closefd=False) as stdout:
            stdout.write(render_findings(shown, body, found).encode("utf-8", "replace"))
    except (OSError, ScrapeError) as error:
        tell(f"{failure}: {words_of(error)}\n")
        return 2
    return int(any(arguments.strict or not finding.strict for finding in found))


def main(argv: Sequence[str] | None = None) -> int:
    """Lint the files of these arguments, or of the command line's. Return the exit code."""
    arguments = parse_arguments(argv)
    return max(lint_file(name, arguments) for name in arguments.files)


if __name__ == "__main__":
    sys.exit(main())
