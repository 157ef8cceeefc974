"""The recall profile: a closed vocabulary of short words, one question asks for one fact.

All text is lower case, words and punctuation are separated by single spaces, and no text begins with a name
or a value. A byte-level BPE tokenizer joins a word with the space before it, so every name and value is the
same single token wherever it occurs, and recall can be scored on one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from data_prep.synth_types import Fact, Question

NAMES = ("ann", "ben", "cal", "dan", "eva", "fay", "gus", "ida", "joe", "kim")
COLOURS = ("red", "tan", "blue", "pink", "gold", "grey", "teal", "lime")
OBJECTS = ("cup", "hat", "box", "pen", "key", "bag", "fan", "mug", "map", "kite")
PLACES = ("hall", "barn", "shed", "yard", "cave", "pond", "park", "loft")
NUMBERS = ("one", "two", "three", "four", "five", "six", "nine", "ten")
VALUES = NAMES + COLOURS + PLACES + NUMBERS

_LEADS = ("note that", "i hear that")
_REPLIES = ("okay .", "i see .")
_FILLERS = (
    ("how are you ?", "i am fine ."),
    ("is it late ?", "no , it is not ."),
    ("do you like it here ?", "yes , i do ."),
    ("can you hear me ?", "yes , i can ."),
    ("note this is fun .", "i see that ."),
)


KINDS = ("owner", "place", "price")


class RecallProfile:
    """See the module's text. Each conversation has facts of ``kinds`` of the :data:`KINDS`: of one kind, all
    values can answer every question, and only which object has which tells."""

    def __init__(self, kinds: int = len(KINDS)) -> None:
        self._kinds = kinds

    def facts(self, random: Random) -> list[Fact]:
        """Ten facts; every object and every name occurs in at most one of them."""
        names = random.sample(NAMES, len(NAMES))
        kinds = KINDS if self._kinds == len(KINDS) else random.sample(KINDS, self._kinds)
        return [self._fact(random, kinds, names.pop(), item) for item in random.sample(OBJECTS, len(OBJECTS))]

    def _fact(self, random: Random, kinds: Sequence[str], name: str, item: str) -> Fact:
        kind = random.choice(kinds)
        if kind == "owner":
            return self._owner(name, item, random.choice(COLOURS))
        if kind == "place":
            return self._place(item, random.choice(PLACES))
        return self._price(name, item, random.choice(NUMBERS))

    def _owner(self, name: str, item: str, colour: str) -> Fact:
        return Fact(
            clause=f"{name} has the {colour} {item}",
            restated=f"the {colour} {item} is with {name}",
            questions=(
                Question(f"what colour is the {item} of {name} ?", f"the {item} is ", colour, " ."),
                Question(f"who has the {colour} {item} ?", "it is with ", name, " ."),
            ),
            rewrite=lambda random: self._owner(name, item, _another(random, COLOURS, colour)),
        )

    def _place(self, item: str, place: str) -> Fact:
        return Fact(
            clause=f"the {item} is in the {place}",
            restated=f"you can see the {item} in the {place}",
            questions=(Question(f"where is the {item} ?", "it is in the ", place, " ."),),
            rewrite=lambda random: self._place(item, _another(random, PLACES, place)),
        )

    def _price(self, name: str, item: str, number: str) -> Fact:
        return Fact(
            clause=f"{name} paid {number} for the {item}",
            restated=f"the {item} of {name} was {number}",
            questions=(Question(f"how much was the {item} of {name} ?", "it was ", number, " ."),),
            rewrite=lambda random: self._price(name, item, _another(random, NUMBERS, number)),
        )

    def state(self, random: Random, facts: list[Fact]) -> tuple[str, str]:
        """``note that <fact> and <fact> .``"""
        clauses = " and ".join(fact.clause for fact in facts)
        return f"{random.choice(_LEADS)} {clauses} .", random.choice(_REPLIES)

    def filler(self, random: Random) -> tuple[str, str]:
        """One of five fixed interactions."""
        return random.choice(_FILLERS)

    def story(self, random: Random) -> str:
        """Two to four facts, stated, then each restated or asked for and answered."""
        facts = self.facts(random)[: random.randint(2, 4)]
        sentences = [f"{random.choice(_LEADS)} {fact.clause} ." for fact in facts]
        random.shuffle(facts)
        for fact in facts:
            question = random.choice(fact.questions)
            if random.random() < 0.5:
                sentences.append(f"so {fact.restated} .")
            else:
                sentences.append(f"{question.query} {question.before}{question.value}{question.after}")
        return " ".join(sentences)


def _another(random: Random, words: tuple[str, ...], word: str) -> str:
    return random.choice([other for other in words if other != word])
