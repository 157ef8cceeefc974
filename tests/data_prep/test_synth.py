"""Synthetic corpora: every answer is known, marks are true, words are single tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.shard import ShardOptions, build_dataset
from data_prep.synth import SynthOptions, write_corpus
from data_prep.synth_recall import OBJECTS, VALUES
from data_prep.train_tokenizer import train_tokenizer
from rxt_dist.data.format import ShardIndex, read_block
from rxt_dist.data.tokens import load_tokenizer

Run = Callable[..., tuple[int, str, str]]


def generate(folder: Path, **options: Any) -> tuple[list[str], list[list[dict[str, Any]]]]:
    write_corpus(folder, SynthOptions(**options))
    stories = [json.loads(line)["text"] for line in (folder / "stories.jsonl").open()]
    conversations = [json.loads(line)["interactions"] for line in (folder / "conversations.jsonl").open()]
    return stories, conversations


def marked(interaction: dict[str, Any]) -> tuple[str, int]:
    (mark,) = interaction["marks"]
    return interaction["answer"][mark["start"] : mark["end"]], mark["distance"]


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("synth") / "recall"
    return folder, *generate(folder, conversations=600, stories=300)


@pytest.mark.parametrize("profile", ["recall", "rich"])
def test_the_seed_decides_everything(tmp_path: Path, profile: Any) -> None:
    options = {"profile": profile, "conversations": 30, "stories": 30}
    first = generate(tmp_path / "a", seed=1, **options)
    assert generate(tmp_path / "b", seed=1, **options) == first
    assert generate(tmp_path / "c", seed=2, **options) != first
    larger = generate(tmp_path / "d", profile=profile, seed=1, conversations=40, stories=31)
    assert larger[0][:30] == first[0]
    assert larger[1][:30] == first[1]


@pytest.mark.parametrize("profile", ["recall", "rich"])
@pytest.mark.parametrize("facts", [1, 2, 5])
def test_every_marked_word_was_said_at_its_distance(tmp_path: Path, profile: Any, facts: int) -> None:
    """The word occurs `distance` interactions earlier and not in the question itself."""
    _, conversations = generate(
        tmp_path / "s", profile=profile, conversations=200, stories=0, facts_per_statement=facts,
        max_interactions=12,
    )  # fmt: skip
    seen = Counter[int]()
    for conversation in conversations:
        for turn, interaction in enumerate(conversation):
            if "marks" not in interaction:
                continue
            word, distance = marked(interaction)
            seen[distance] += 1
            mention = conversation[turn - distance]
            assert distance <= turn
            assert word in mention["query"] + " " + mention["answer"]
            assert word not in interaction["query"].split()
    assert seen[1]
    assert seen[2]
    assert seen[3]


def test_interactions_between_mention_and_question_do_not_mention_the_fact(
    recall: tuple[Path, list[str], list[list[dict[str, Any]]]],
) -> None:
    """In the recall profile a fact is known by its object, which no other fact of the conversation has."""
    for conversation in recall[2]:
        for turn, interaction in enumerate(conversation):
            if "marks" in interaction:
                _, distance = marked(interaction)
                (item,) = set(interaction["query"].split()) & set(OBJECTS)
                said = [t for t in range(turn) if item in conversation[t]["query"].split()]
                assert turn - said[-1] == distance


def test_recall_texts_are_single_spaced_lower_case_and_start_with_other_words(
    recall: tuple[Path, list[str], list[list[dict[str, Any]]]],
) -> None:
    _, stories, conversations = recall
    texts = stories + [i[key] for c in conversations for i in c for key in ("query", "answer")]
    words = set()
    for text in texts:
        assert text == text.lower()
        assert text == " ".join(text.split())
        assert text.split()[0] not in VALUES
        words |= set(text.split())
    assert set(VALUES) <= words
    assert len(words) < 110


@pytest.mark.parametrize("vocab_size", [600, 450])
def test_marked_words_are_the_same_single_token_everywhere(
    recall: tuple[Path, list[str], list[list[dict[str, Any]]]], tmp_path: Path, vocab_size: int
) -> None:
    folder, stories, conversations = recall
    inputs = [folder / "stories.jsonl", folder / "conversations.jsonl"]
    train_tokenizer(inputs, vocab_size, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    ids = {word: tokenizer.encode(" " + word).ids for word in VALUES}
    assert all(len(tokens) == 1 for tokens in ids.values())
    texts = stories + [i[key] for c in conversations for i in c for key in ("query", "answer")]
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        found = Counter(encoding.ids)
        for word, times in Counter(text.split()).items():
            if word in ids:
                assert found[ids[word][0]] == times, text


def test_sharded_marks_are_one_token_each(
    recall: tuple[Path, list[str], list[list[dict[str, Any]]]], tmp_path: Path
) -> None:
    folder, _, conversations = recall
    inputs = [folder / "stories.jsonl", folder / "conversations.jsonl"]
    train_tokenizer(inputs, 600, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    manifest = build_dataset(
        ShardOptions(
            kind="conversations", inputs=[folder / "conversations.jsonl"], tokenizer=tmp_path / "tokenizer",
            output=tmp_path / "d", val_fraction=0.0,
        )
    )  # fmt: skip
    assert manifest.shards[0].max_tokens <= 21
    index = ShardIndex.read(manifest.shards[0].index_path_in(tmp_path / "d"))
    data = manifest.shards[0].path_in(tmp_path / "d").read_bytes()
    blocks = [read_block(data, index, number) for number in range(len(index.blocks))]
    found = [block.document(i) for block in blocks for i in range(block.num_documents)]
    for tokens, conversation in zip(found, conversations, strict=True):
        for turn, interaction in enumerate(conversation):
            marks = [] if tokens.marks is None else tokens.marks[2 * turn + 1].tolist()
            values = [mark for mark in marks if mark]
            if "marks" not in interaction:
                assert values == []
                continue
            word, distance = marked(interaction)
            assert values == [distance]
            token = int(tokens.segments[2 * turn + 1][marks.index(distance)])
            assert tokenizer.decode([token]) == " " + word


def test_linear_weights_ask_for_older_facts(tmp_path: Path) -> None:
    def mean_distance(folder: Path, weights: Any) -> float:
        _, conversations = generate(
            folder, conversations=800, stories=0, min_interactions=8, distance_weights=weights
        )
        distances = [marked(i)[1] for c in conversations for i in c if "marks" in i]
        return sum(distances) / len(distances)

    assert mean_distance(tmp_path / "linear", "linear") > mean_distance(tmp_path / "uniform", "uniform") + 0.1


def test_options_shape_the_conversations(tmp_path: Path) -> None:
    _, conversations = generate(
        tmp_path / "s", conversations=300, stories=0, min_interactions=5, max_interactions=9, max_distance=2
    )
    assert {len(conversation) for conversation in conversations} == {5, 6, 7, 8, 9}
    assert {marked(i)[1] for c in conversations for i in c if "marks" in i} == {1, 2}
    _, conversations = generate(tmp_path / "t", conversations=50, stories=0, facts_per_statement=2)
    assert all(" and " in conversation[0]["query"] for conversation in conversations)


def test_overwritten_facts_are_asked_for_with_their_newest_value(tmp_path: Path) -> None:
    """A fact is known by its object: of all statements about it, the last one has the answer."""
    options = {"conversations": 300, "stories": 0, "min_interactions": 8, "max_interactions": 12}
    _, conversations = generate(tmp_path / "s", overwrite=0.7, **options)
    stale = 0
    for conversation in conversations:
        for turn, interaction in enumerate(conversation):
            if "marks" not in interaction:
                continue
            word, distance = marked(interaction)
            (item,) = set(interaction["query"].split()) & set(OBJECTS)
            about = [t for t in range(turn) if item in conversation[t]["query"].split()]
            assert turn - about[-1] == distance
            told = [conversation[t]["query"].split() for t in about if "marks" not in conversation[t]]
            assert word in told[-1]
            stale += len(told) > 1 and word not in told[-2]
    assert stale > 100
    _, never = generate(tmp_path / "never", overwrite=0.0, **options)
    _, default = generate(tmp_path / "default", **options)
    assert never == default != conversations


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_the_kinds_of_a_conversation_can_be_fewer_than_those_of_the_corpus(
    tmp_path: Path, kinds: int
) -> None:
    """The kind of a question is known by its first words."""
    _, conversations = generate(
        tmp_path / "s", kinds=kinds, conversations=150, stories=0, max_interactions=14
    )
    kind_of = {"what": "owner", "who": "owner", "where": "place", "how": "price"}
    found = []
    for conversation in conversations:
        asked = {kind_of[i["query"].split()[0]] for i in conversation if "marks" in i}
        stated = {"owner": " has the ", "place": " is in the ", "price": " paid "}
        queries = " ".join(i["query"] for i in conversation if "marks" not in i)
        told = {kind for kind, words in stated.items() if words in queries}
        assert asked <= told
        found.append(len(told))
    assert max(found) == kinds


def test_the_share_of_statements(tmp_path: Path) -> None:
    """Of the interactions after the first; the others stay in proportion."""
    shares = {}
    for share in (0.0, 0.2, 0.6):
        options = {"conversations": 300, "stories": 0, "min_interactions": 7, "max_interactions": 7}
        _, conversations = generate(tmp_path / str(share), state_share=share, **options)
        later = [i["query"] for conversation in conversations for i in conversation[1:]]
        stated = [q for q in later if q.endswith(" .") and q != "note this is fun ."]
        shares[share] = len(stated) / len(later)
    assert shares == pytest.approx({0.0: 0.0, 0.2: 0.2, 0.6: 0.6}, abs=0.03)


def test_values_are_balanced(recall: tuple[Path, list[str], list[list[dict[str, Any]]]]) -> None:
    asked = Counter(marked(i)[0] for c in recall[2] for i in c if "marks" in i)
    assert set(asked) == set(VALUES)
    assert max(asked.values()) / sum(asked.values()) < 0.1


def test_rich_texts_are_varied(tmp_path: Path) -> None:
    stories, conversations = generate(tmp_path / "s", profile="rich", conversations=300, stories=300)
    words = {word.strip('.,!?"').lower() for story in stories for word in story.split()}
    assert len(words) > 400
    assert len(set(stories)) == 300
    assert all(story.count(".") + story.count("!") >= 6 for story in stories)
    assert all("{" not in text and "_" not in text for text in stories)
    texts = stories + [i[key] for c in conversations for i in c for key in ("query", "answer")]
    assert not [t for t in texts for a, b in zip(t.split(), t.split()[1:], strict=False)
                if a.lower() == "a" and b[0].lower() in "aeiou"]  # fmt: skip
    assert len({marked(i)[0] for c in conversations for i in c if "marks" in i}) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--conversations", -1), "--conversations is -1"),
        (("--conversations", 0, "--stories", 0), "nothing to write"),
        (("--facts-per-statement", 0), "between 1 and 5"),
        (("--facts-per-statement", 6), "between 1 and 5"),
        (("--min-interactions", 0), "1 <= min <= max"),
        (("--min-interactions", 9), "1 <= min <= max"),
        (("--max-distance", 0), "--max-distance is 0"),
        (("--overwrite", 1.5), "--overwrite is 1.5; it must be between 0 and 1"),
        (("--overwrite", "nan"), "--overwrite is nan"),
        (("--overwrite", 0.5, "--profile", "rich"), "--overwrite needs --profile recall; found rich"),
        (("--kinds", 0), "--kinds is 0; it must be between 1 and 3"),
        (("--kinds", 4), "--kinds is 4; it must be between 1 and 3"),
        (("--kinds", 1, "--profile", "rich"), "--kinds needs --profile recall; found rich"),
        (("--state-share", -0.1), "--state-share is -0.1; it must be between 0 and 0.8"),
        (("--state-share", 0.9), "--state-share is 0.9; it must be between 0 and 0.8"),
        (("--state-share", "nan"), "--state-share is nan"),
        (("--profile", "poor"), "invalid choice"),
    ],
)
def test_bad_options_leave_nothing(
    run: Run, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    code, output, error = run("synth", "--output", tmp_path / "out", *arguments)
    assert (code, output) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_corpus_is_refused(run: Run, tmp_path: Path) -> None:
    arguments = ("synth", "--output", tmp_path / "out", "--conversations", 3, "--stories", 3)
    assert run(*arguments)[0] == 0
    code, _, error = run(*arguments)
    assert code == 2
    assert "exists and is not empty" in error
