"""The report of `difference.py`: what is explained, and what is not, by kind."""

from __future__ import annotations

import collections
import itertools
from typing import NamedTuple

from difference_cases import Case, make_case, odd_tags
from difference_explained import (
    EXPLAINED,
    PARTS,
    Explanation,
    Outcome,
    without_words,
)

SAMPLES = 20  # kept of each group of differences


class Difference(NamedTuple):
    """What one case had for outcomes; `stable` if they differed at every attempt."""

    number: int
    old: Outcome
    new: Outcome
    stable: bool


class Group:
    """Differences of one explanation or one kind."""

    def __init__(self) -> None:
        self.count = 0
        self.lone: dict[str, list[Difference]] = {}  # by the only peculiarity of the case
        self.others: list[Difference] = []
        self.lone_tags: collections.Counter[str] = collections.Counter()
        self.all_tags: collections.Counter[str] = collections.Counter()
        self.words: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, case: Case, difference: Difference) -> None:
        """Count a difference, and keep it if there are few of its tag."""
        self.count += 1
        tags = odd_tags(case)
        self.all_tags.update(tags)
        samples = self.others
        if len(tags) == 1:
            self.lone_tags.update(tags)
            samples = self.lone.setdefault(tags[0], [])
        if difference.old.log != difference.new.log:
            self.words[first_difference(difference.old.log, difference.new.log)] += 1
        if len(samples) < SAMPLES:
            samples.append(difference)

    def samples(self, most: int) -> list[Difference]:
        """Return one sample for each peculiarity that stands alone, and some of the others."""
        alone = [samples[0] for samples in self.lone.values()]
        return [*alone, *self.others[:most]]

    def shown_tags(self) -> str:
        """Return the tags of the cases with one peculiarity; without such, the most frequent."""
        if self.lone_tags:
            common = self.lone_tags.most_common(40)
            return "alone: " + ", ".join(f"{tag} ({count})" for tag, count in common)
        common = self.all_tags.most_common(8)
        return "among others: " + ", ".join(f"{tag} ({count})" for tag, count in common)


def explain(case: Case, difference: Difference) -> tuple[list[Explanation], Outcome]:
    """Return the explanations that apply, and what the new outcome is without what they explain."""
    found: list[Explanation] = []
    new = difference.new
    for explanation in EXPLAINED:
        forgiven = explanation.forgive(case, difference.old, new)
        if forgiven != new:
            found.append(explanation)
            new = forgiven
    return found, new


class Report:
    """The differences, by explanation, or by kind where there is none."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.explained: dict[str, Group] = {}
        self.unexplained: dict[str, Group] = {}
        self.unstable: list[int] = []

    def add(self, difference: Difference) -> None:
        """Assign a difference to its explanations, or to its kind if something is left."""
        if not difference.stable:
            self.unstable.append(difference.number)
            return
        case = make_case(self._seed, difference.number)
        found, rest = explain(case, difference)
        if rest == difference.old:
            for explanation in found:
                self.explained.setdefault(explanation.name, Group()).add(case, difference)
            return
        left = difference._replace(new=rest)
        self.unexplained.setdefault(kind_of(case, left), Group()).add(case, left)

    def judged_groups(self) -> dict[str, Group]:
        """Return the groups about which Prometheus has something to say."""
        judged = {each.name for each in EXPLAINED if each.prometheus}
        explained = {name: group for name, group in self.explained.items() if name in judged}
        return {**explained, **self.unexplained}

    def show(self) -> None:
        """Print everything that was found."""
        for explanation in EXPLAINED:
            if explanation.name in self.explained:
                show_explained(explanation, self.explained[explanation.name])
        for name, group in sorted(self.unexplained.items(), key=lambda item: -item[1].count):
            show_unexplained(name, group)
        total = sum(group.count for group in self.unexplained.values())
        print(f"\nunexplained: {total} in {len(self.unexplained)} kinds", end="")
        print(f"; unstable: {len(self.unstable)} {self.unstable[:5]}")


def show_explained(explanation: Explanation, group: Group) -> None:
    """Print an explanation with its count and examples."""
    print(f"\nEXPLAINED {group.count} x {explanation.name}", end="")
    print(f" (such as {group.samples(1)[0].number})")
    print(f"    DESIGN: {explanation.design}")
    if explanation.prometheus:
        print(f"    Prometheus: {explanation.prometheus}")
    print(f"    {group.shown_tags()}")
    if explanation.forgive is not without_words:
        return
    for (old, new), count in group.words.most_common(12):
        print(f"    {count} x {shortened(old, new)}")
        print(f"    {' ' * len(str(count))} > {shortened(new, old)}")


def show_unexplained(name: str, group: Group) -> None:
    """Print a kind of differences with its tags and the first sample's differing parts."""
    print(f"\nUNEXPLAINED {group.count} x {name}")
    print(f"    cases {[sample.number for sample in group.samples(8)[:8]]}")
    print(f"    {group.shown_tags()}")
    sample = group.samples(1)[0]
    for part, old, new in differing_parts(sample.old, sample.new):
        print(f"    {part}: old {shortened(old, new)}")
        print(f"    {' ' * len(part)}  new {shortened(new, old)}")


def shortened(one: str, other: str) -> str:
    """Return the part of a text where it begins to differ from the other."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    start = max(0, same - 60)
    return f"{'...' if start else ''}{one[start : start + 160]}"


def differing_parts(old: Outcome, new: Outcome) -> list[tuple[str, str, str]]:
    """Return name, old and new value of the parts of two outcomes that differ."""
    parts: list[tuple[str, str, str]] = []
    for name, one, other in zip(PARTS, old.parts(), new.parts()):
        if one != other:
            parts.append((name, *first_difference(one, other)))
    if old.received_sorted != new.received_sorted:
        parts = [part for part in parts if part[0] != "order"]
    return parts


def first_difference(old: object, new: object) -> tuple[str, str]:
    """Return two values as text; of two sequences those items that differ first."""
    if isinstance(old, tuple) and isinstance(new, tuple):
        for one, other in itertools.zip_longest(old, new):
            if one != other:
                return repr(one), repr(other)
    return repr(old), repr(new)


def kind_of(case: Case, difference: Difference) -> str:
    """Return a name for the kind of a difference: what was, what is, or which parts differ."""
    old, new = difference.old, difference.new
    found = differing_parts(old, new)
    kinds = [f"{one} -> {other}" for name, one, other in found if name in ("status", "end")]
    if old.reasons != new.reasons:
        kinds.append(f"{' '.join(old.reasons) or '-'} -> {' '.join(new.reasons) or '-'}")
    if not kinds:
        kinds = [f"same statuses [{'+'.join(name for name, _, _ in found)}]"]
    return f"{case.direction}: {', '.join(kinds)}"
