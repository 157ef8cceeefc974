"""Synthetic corpora whose answers can only be known from memory.

A conversation states facts, chats, and asks for facts stated or mentioned earlier. The word of the answer
that carries the fact is marked with its distance: how many interactions ago the fact was last mentioned
(a question with its answer counts as a mention). A fact is a new combination of known words, so only the
conversation itself can tell it. Facts may be overwritten: then the newest value is asked for, and the
distance counts from where it was stated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

from data_prep.output import OutputFolder
from data_prep.progress import progress_bar
from data_prep.synth_recall import KINDS, RecallProfile
from data_prep.synth_rich import RichProfile
from data_prep.synth_types import Fact
from rxt_dist.errors import DataError

PROFILES = ("recall", "rich")
DISTANCE_WEIGHTS = ("uniform", "linear")
MAX_FACTS_PER_STATEMENT = 5

_P_FILLER = 0.2  # share of interactions after the first


class Profile(Protocol):
    """The words of a corpus."""

    def facts(self, random: Random) -> list[Fact]:
        """All facts that one conversation may state, none contradicting another."""

    def state(self, random: Random, facts: list[Fact]) -> tuple[str, str]:
        """An interaction (query, answer) that states ``facts``; the answer repeats none of them."""

    def filler(self, random: Random) -> tuple[str, str]:
        """An interaction that says nothing to remember."""

    def story(self, random: Random) -> str:
        """A short text in the same words."""


@dataclass(frozen=True, kw_only=True)
class SynthOptions:
    """What to generate."""

    profile: Literal["recall", "rich"] = "recall"
    conversations: int = 1000
    stories: int = 1000
    seed: int = 0
    facts_per_statement: int = 1
    min_interactions: int = 3
    max_interactions: int = 8
    max_distance: int = 8
    distance_weights: Literal["uniform", "linear"] = "uniform"
    """How the distance of a question is drawn: all available ones alike, or in proportion to the distance."""

    overwrite: float = 0.0
    """Share of the later statements that give a fact stated before another value."""

    state_share: float = 0.2
    """Share of the interactions after the first that state facts, as long as there are any to state."""

    kinds: int = len(KINDS)
    """Kinds of facts in one conversation of the recall profile."""

    def check(self) -> None:
        """Raise :class:`DataError` for a value out of range."""
        for name in ("conversations", "stories"):
            if getattr(self, name) < 0:
                raise DataError(f"--{name} is {getattr(self, name)}; it must be at least 0")
        if self.conversations + self.stories == 0:
            raise DataError("--conversations and --stories are both 0; there is nothing to write")
        if not 1 <= self.facts_per_statement <= MAX_FACTS_PER_STATEMENT:
            raise DataError(
                f"--facts-per-statement is {self.facts_per_statement}; "
                f"it must be between 1 and {MAX_FACTS_PER_STATEMENT}"
            )
        if not 1 <= self.min_interactions <= self.max_interactions:
            raise DataError(
                f"--min-interactions is {self.min_interactions} and --max-interactions is "
                f"{self.max_interactions}; 1 <= min <= max must hold"
            )
        if self.max_distance < 1:
            raise DataError(f"--max-distance is {self.max_distance}; it must be at least 1")
        if not 0.0 <= self.overwrite <= 1.0:
            raise DataError(f"--overwrite is {self.overwrite}; it must be between 0 and 1")
        if not 0.0 <= self.state_share <= 1.0 - _P_FILLER:
            raise DataError(
                f"--state-share is {self.state_share}; it must be between 0 and {1.0 - _P_FILLER}"
            )
        if not 1 <= self.kinds <= len(KINDS):
            raise DataError(f"--kinds is {self.kinds}; it must be between 1 and {len(KINDS)}")
        for name, used in (("overwrite", self.overwrite > 0), ("kinds", self.kinds < len(KINDS))):
            if used and self.profile != "recall":
                raise DataError(f"--{name} needs --profile recall; found {self.profile}")


def write_corpus(output: Path, options: SynthOptions) -> None:
    """Write ``output/stories.jsonl`` and ``output/conversations.jsonl``, one record at a time.

    Record ``i`` depends on the options and ``i`` only, so a larger corpus begins with the smaller one.

    Raises:
        DataError: an option is out of range, or ``output`` exists and is not empty.
    """
    options.check()
    profile = _profile(options)
    with OutputFolder(output) as folder:
        _write(folder / "stories.jsonl", _stories(profile, options))
        _write(folder / "conversations.jsonl", _conversations(profile, options))


def _profile(options: SynthOptions) -> Profile:
    return RecallProfile(options.kinds) if options.profile == "recall" else RichProfile()


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file, progress_bar(path.name, "record") as bar:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            bar.update()


def _random(options: SynthOptions, purpose: str, number: int) -> Random:
    from rxt_dist.randomness import derive_key  # imports torch: other commands should not pay for it

    return Random(derive_key(options.seed, "synth", options.profile, purpose, number))


def _stories(profile: Profile, options: SynthOptions) -> Iterator[dict[str, Any]]:
    for number in range(options.stories):
        identity = f"{options.profile}-{options.seed}-story-{number:08d}"
        yield {"id": identity, "text": profile.story(_random(options, "story", number))}


def _conversations(profile: Profile, options: SynthOptions) -> Iterator[dict[str, Any]]:
    for number in range(options.conversations):
        identity = f"{options.profile}-{options.seed}-conversation-{number:08d}"
        random = _random(options, "conversation", number)
        yield {"id": identity, "interactions": list(_conversation(profile, options, random))}


def _conversation(profile: Profile, options: SynthOptions, random: Random) -> Iterator[dict[str, Any]]:
    unused = profile.facts(random)
    mentioned: dict[Fact, int] = {}  # stated facts -> interaction of the last mention
    for turn in range(random.randint(options.min_interactions, options.max_interactions)):
        by_distance: dict[int, list[Fact]] = {}
        for fact, last in mentioned.items():
            if turn - last <= options.max_distance:
                by_distance.setdefault(turn - last, []).append(fact)
        can_state = len(unused) >= options.facts_per_statement
        match _move(random, options.state_share, can_state=can_state, can_ask=bool(by_distance)):
            case "state":
                facts = [unused.pop() for _ in range(options.facts_per_statement)]
                if options.overwrite and mentioned and random.random() < options.overwrite:
                    unused.append(facts.pop())
                    facts.append(_overwrite(random, mentioned))
                mentioned.update(dict.fromkeys(facts, turn))
                query, answer = profile.state(random, facts)
                yield {"query": query, "answer": answer}
            case "ask":
                distance = _draw_distance(random, sorted(by_distance), options.distance_weights)
                fact = random.choice(by_distance[distance])
                mentioned[fact] = turn
                yield _ask(random, fact, distance)
            case _:
                query, answer = profile.filler(random)
                yield {"query": query, "answer": answer}


def _overwrite(random: Random, mentioned: dict[Fact, int]) -> Fact:
    """Take one of the ``mentioned`` facts out; returns what replaces it."""
    old = random.choice(list(mentioned))
    assert old.rewrite is not None
    del mentioned[old]
    return old.rewrite(random)


def _move(
    random: Random, state_share: float, *, can_state: bool, can_ask: bool
) -> Literal["state", "ask", "filler"]:
    """The first interaction states (there is nothing to ask yet); later ones mostly ask."""
    drawn = random.random()
    if can_state and drawn < state_share:
        return "state"
    if can_ask:
        return "filler" if drawn >= 1.0 - _P_FILLER else "ask"
    return "state" if can_state else "filler"


def _draw_distance(random: Random, distances: list[int], weights: str) -> int:
    return random.choices(distances, distances if weights == "linear" else None)[0]


def _ask(random: Random, fact: Fact, distance: int) -> dict[str, Any]:
    question = random.choice(fact.questions)
    start = len(question.before)
    mark = {"start": start, "end": start + len(question.value), "distance": distance}
    answer = question.before + question.value + question.after
    return {"query": question.query, "answer": answer, "marks": [mark]}
