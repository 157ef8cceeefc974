"""Lanes over several datasets, against a simulation that deals one conversation after the other."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from dataset_builder import random_conversations, write_dataset
from helpers.schedules import (
    FIELDS,
    KEY,
    assert_same,
    follow,
    joined_windows,
    lanes_strategy,
    unhurried,
    widths_strategy,
)
from hypothesis import given
from hypothesis import strategies as st

from rxt_dist.data import lanes as lanes_module
from rxt_dist.data import stream
from rxt_dist.data.conversations import MixedConversations, first_conversations
from rxt_dist.data.lanes import LaneSchedule, LaneState
from rxt_dist.data.manifest import fingerprint_of, load_manifest, write_manifest
from rxt_dist.data.mixing import turns
from rxt_dist.data.order import epoch_permutation
from rxt_dist.data.pieces import InteractionPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import DataError
from rxt_dist.randomness import derive_key

datasets_strategy = st.lists(
    st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(1, 5)), min_size=2, max_size=4
)
"""Interactions of the conversations of every dataset, and its weight."""


def schedule_of(datasets, lanes, key=KEY):
    counts = [count for own, _ in datasets for count in own]
    sizes, weights = [len(own) for own, _ in datasets], [weight for _, weight in datasets]
    return LaneSchedule(counts, key=key, lanes=lanes, sizes=sizes, weights=weights)


def run(datasets, lanes, widths, state=None):
    return joined_windows(
        schedule_of(datasets, lanes), state or LaneState.initial(lanes, len(datasets)), widths
    )


def dealt(datasets, epoch=0):
    """Visit, epoch and conversation, one after the other: every dataset has its own endless order, and who
    has the turn is found by adding up what each is owed."""
    first = np.cumsum([0, *(len(own) for own, _ in datasets)])

    def order(d, size):
        for in_epoch in itertools.count(epoch):
            for number in epoch_permutation(derive_key(KEY, "dataset", d), in_epoch, size):
                yield in_epoch, int(first[d] + number)

    orders = [order(d, len(own)) for d, (own, _) in enumerate(datasets)]
    divisor = np.gcd.reduce([weight for _, weight in datasets])
    weights = [weight // divisor for _, weight in datasets]
    owed, begin = [0] * len(datasets), epoch * int(first[-1])
    for visit in itertools.count():
        owed = [have + weight for have, weight in zip(owed, weights, strict=True)]
        turn = owed.index(max(owed))
        owed[turn] -= sum(weights)
        if visit >= begin % sum(weights):  # the turn of the first conversation follows from its number
            yield begin - begin % sum(weights) + visit, *next(orders[turn])


def simulation(datasets, lanes, positions, epoch=0):
    """The same schedule step by step."""
    counts = [count for own, _ in datasets for count in own]
    return follow(dealt(datasets, epoch), counts, lanes, positions)


# --- the schedule -----------------------------------------------------------------------------------------


@unhurried
@given(datasets_strategy, lanes_strategy, widths_strategy)
def test_the_schedule_is_the_simulation(datasets, lanes, widths):
    joined, _ = run(datasets, lanes, widths)
    assert_same(joined, simulation(datasets, lanes, sum(widths)))


@unhurried
@given(datasets_strategy, lanes_strategy, widths_strategy, st.integers(1, 5))
def test_a_schedule_that_begins_at_a_later_epoch(datasets, lanes, widths, epoch):
    """Every dataset begins that epoch; the numbers of the visits were never used in earlier ones."""
    joined, states = run(datasets, lanes, widths, LaneState.initial(lanes, len(datasets), epoch))
    assert_same(joined, simulation(datasets, lanes, sum(widths), epoch))
    assert joined["epochs"].min() >= epoch
    assert joined["visits"].min() == epoch * sum(len(own) for own, _ in datasets)
    restored = LaneState.from_dict(json.loads(json.dumps(states[-1].to_dict())))
    rest, _ = run(datasets, lanes, [7], restored)
    expected = simulation(datasets, lanes, sum(widths) + 7, epoch)
    assert_same(rest, {name: expected[name][:, sum(widths) :] for name in FIELDS})


def test_the_schedule_is_the_simulation_over_many_plans(monkeypatch):
    monkeypatch.setattr(lanes_module, "_CELLS_AHEAD", 1 << 12)
    rng = np.random.default_rng(0)
    sizes, weights = (1500, 40, 700), (7, 1, 2)
    datasets = [
        (np.clip(rng.lognormal(1.0, 1.0, n).round(), 1, 60).astype(int).tolist(), w)
        for n, w in zip(sizes, weights, strict=True)
    ]
    joined, _ = run(datasets, 50, [3] * 150)
    assert joined["epochs"].max() >= 3
    assert_same(joined, simulation(datasets, 50, 450))


@unhurried
@given(datasets_strategy, lanes_strategy)
def test_shares_are_exact_over_any_cycle(datasets, lanes):
    joined, _ = run(datasets, lanes, [60])
    first = np.cumsum([0, *(len(own) for own, _ in datasets)])
    conversation_of = dict(
        zip(joined["visits"].ravel().tolist(), joined["conversations"].ravel(), strict=True)
    )
    assert sorted(conversation_of) == list(range(len(conversation_of)))
    dataset_of = [
        int(np.searchsorted(first, conversation_of[visit], side="right")) - 1
        for visit in range(len(conversation_of))
    ]
    divisor = np.gcd.reduce([weight for _, weight in datasets])
    wanted = {d: weight // divisor for d, (_, weight) in enumerate(datasets)}
    length = sum(wanted.values())
    for start in range(len(dataset_of) - length):
        assert Counter(dataset_of[start : start + length]) == wanted


@unhurried
@given(datasets_strategy, lanes_strategy)
def test_every_interaction_is_served_once_in_each_epoch_of_its_dataset(datasets, lanes):
    total = sum(weight for _, weight in datasets)
    longest = max(max(own) for own, _ in datasets)
    # Visits until every dataset has begun its third epoch, all of them as long as the longest conversation.
    visits = max(2 * len(own) * total // weight + total for own, weight in datasets)
    joined, states = run(datasets, lanes, [longest * (visits // lanes + 2)])
    first = 0
    for (own, _), place in zip(datasets, states[-1].places, strict=True):
        assert place[0] >= 2
        inside = (joined["conversations"] >= first) & (joined["conversations"] < first + len(own))
        for epoch in (0, 1):
            here = inside & (joined["epochs"] == epoch)
            pairs = zip(joined["conversations"][here], joined["interactions"][here], strict=True)
            served = Counter((int(c), int(i)) for c, i in pairs)
            assert served == Counter((first + c, i) for c, n in enumerate(own) for i in range(n))
        first += len(own)


@unhurried
@given(datasets_strategy, st.sampled_from([8, 16]), st.lists(widths_strategy, min_size=8, max_size=8))
def test_ranks_that_cut_their_own_windows_hold_one_table(datasets, lanes, widths):
    expected = simulation(datasets, lanes, max(sum(cut) for cut in widths))
    for dp_size in (1, 2, 4, 8):
        share = lanes // dp_size
        for rank in range(dp_size):
            joined, _ = run(datasets, lanes, widths[rank])
            own = slice(rank * share, (rank + 1) * share)
            assert_same(
                {name: joined[name][own] for name in FIELDS},
                {name: expected[name][own, : sum(widths[rank])] for name in FIELDS},
            )


@unhurried
@given(datasets_strategy, lanes_strategy, st.integers(1, 12))
def test_restart_from_any_state_continues_identically(datasets, lanes, done):
    whole, _ = run(datasets, lanes, [1] * (done + 10))
    _, states = run(datasets, lanes, [1] * done)
    restored = LaneState.from_dict(json.loads(json.dumps(states[-1].to_dict())))
    rest, _ = run(datasets, lanes, [10], state=restored)
    assert_same(rest, {name: whole[name][:, done:] for name in FIELDS})


@unhurried
@given(datasets_strategy, lanes_strategy, st.lists(st.integers(0, 11), min_size=1, max_size=20))
def test_what_was_asked_before_does_not_matter(datasets, lanes, order):
    whole, states = run(datasets, lanes, [2] * 12)
    states = [LaneState.initial(lanes, len(datasets)), *states]
    schedule = schedule_of(datasets, lanes)
    for number in order:
        window, after = schedule.next_window(states[number], 2)
        found = {name: getattr(window, name) for name in FIELDS}
        assert_same(found, {name: whole[name][:, 2 * number : 2 * number + 2] for name in FIELDS})
        assert after.to_dict() == states[number + 1].to_dict()


def test_common_factors_of_the_weights_do_not_matter():
    left, right = ([([1, 2, 3], 2 * n), ([4, 1], 3 * n)] for n in (1, 7))
    assert_same(run(left, 3, [40])[0], run(right, 3, [40])[0])


def test_a_resume_does_not_replay_the_past(monkeypatch):
    datasets, epoch = [([3] * 700, 3), ([2] * 60, 1)], 200_000
    begin = LaneState.initial(16, 2, epoch)
    whole, states = run(datasets, 16, [50, 50], begin)
    assert set(states[0].places[:, 0].tolist()) == {epoch, epoch + 1}
    made = []

    def counted(key, epoch, count):
        made.append(epoch)
        return epoch_permutation(key, epoch, count)

    monkeypatch.setattr(stream, "epoch_permutation", counted)
    restored = LaneState.from_dict(json.loads(json.dumps(states[0].to_dict())))
    rest, _ = run(datasets, 16, [50], restored)
    assert_same(rest, {name: whole[name][:, 50:] for name in FIELDS})
    assert min(made) >= epoch
    assert len(made) <= 6


def test_an_epoch_is_permuted_once(monkeypatch):
    """Plans reach beyond the end of an epoch, so that one is made at most twice more."""
    made = []

    def counted(key, epoch, count):
        made.append((count, epoch))
        return epoch_permutation(key, epoch, count)

    monkeypatch.setattr(stream, "epoch_permutation", counted)
    rng = np.random.default_rng(1)
    datasets = [(rng.integers(1, 9, size).tolist(), weight) for size, weight in ((40_000, 2), (20_000, 1))]
    schedule, state = schedule_of(datasets, 32), LaneState.initial(32, 2)
    while state.epoch < 2:
        _, state = schedule.next_window(state, 2)
    assert set(made) == {(size, epoch) for size in (40_000, 20_000) for epoch in (0, 1, 2)}
    assert len(made) <= 14


ONE = [([4, 1, 2, 3, 5], 1), ([2, 1, 1, 3], 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"datasets": state["datasets"][:1]}, "it is of 1 datasets, this stage has 2"),
        (
            lambda state: {"datasets": [{"epoch": 0, "place": 5}, {"epoch": 0, "place": 0}]},
            "of another dataset",
        ),
        (lambda state: {"datasets": state["datasets"][::-1]}, "not those of this dataset"),
        (lambda state: {"visits": [visit + 1 for visit in state["visits"]]}, "not those of this dataset"),
        (lambda state: {"epochs": [epoch + 1 for epoch in state["epochs"]]}, "not those of this dataset"),
        (lambda state: {"conversations": state["conversations"][::-1]}, "not those of this dataset"),
        (
            lambda state: {"datasets": [{"epoch": 9, "place": 0}, {"epoch": 9, "place": 0}]},
            "not those of this",
        ),
    ],
)
def test_state_that_the_stream_does_not_give_is_refused(change, message):
    _, states = run(ONE, 2, [2, 1])
    state = states[-1].to_dict() | {"served": [0, 0]}
    schedule_of(ONE, 2).next_window(LaneState.from_dict(state), 1)
    with pytest.raises(DataError, match=message):
        schedule_of(ONE, 2).next_window(LaneState.from_dict(state | change(state)), 1)


def test_a_conversation_of_a_past_epoch_must_be_of_its_dataset():
    """Which one it was is not looked up: that would take the permutation of that epoch."""
    datasets = [([9, 1, 1], 1), ([9, 9, 9], 1)]
    _, states = run(datasets, 2, [1] * 60)
    found = 0
    for state in states:
        plain = state.to_dict()
        for lane, (conversation, epoch) in enumerate(
            zip(plain["conversations"], plain["epochs"], strict=True)
        ):
            if conversation == 0 and epoch < state.places[0, 0]:
                schedule_of(datasets, 2).next_window(LaneState.from_dict(plain), 1)
                other = [4 if number == lane else c for number, c in enumerate(plain["conversations"])]
                changed = LaneState.from_dict(plain | {"conversations": other})
                with pytest.raises(DataError, match="not those of this dataset"):
                    schedule_of(datasets, 2).next_window(changed, 1)
                found += 1
    assert found


def test_state_of_other_weights_or_another_seed_is_refused():
    _, states = run([([9] * 20, 1), ([9] * 20, 2)], 5, [12])
    for datasets, key in (([([9] * 20, 2), ([9] * 20, 1)], KEY), ([([9] * 20, 1), ([9] * 20, 2)], KEY + 1)):
        with pytest.raises(DataError, match="not those of this dataset, seed and stage"):
            schedule_of(datasets, 5, key).next_window(states[-1], 1)


# --- what is read -----------------------------------------------------------------------------------------

COUNTS, WEIGHTS = (11, 4, 7), (2, 3, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [
        write_dataset(
            tmp_path_factory.mktemp(f"talk{n}"), "conversations", random_conversations(count, seed=20 + n)
        )
        for n, count in enumerate(COUNTS)
    ]


def parts_of(folders, **options):
    return [InteractionPieces(Dataset(folder, "train", **options), 14) for folder in folders]


def test_everything_is_read_from_the_dataset_it_is_in(folders):
    source, alone = MixedConversations(parts_of(folders), WEIGHTS), parts_of(folders)
    assert source.interaction_counts.tolist() == [
        n for part in alone for n in part.interaction_counts.tolist()
    ]
    owner = [(part, piece) for part in alone for piece in range(len(part.lengths))]
    order = np.random.default_rng(0).permutation(len(owner))
    one = [(owner[i][0], np.array([owner[i][1]])) for i in order]
    assert source.read_tokens(order).tolist() == [
        t for part, at in one for t in part.read_tokens(at).tolist()
    ]
    assert source.read_marks(order).tolist() == [m for part, at in one for m in part.read_marks(at).tolist()]
    assert source.answer_kept[order].tolist() == [int(part.answer_kept[at[0]]) for part, at in one]
    talks = [(part, np.array([number])) for part in alone for number in range(len(part.interaction_counts))]
    order = np.random.default_rng(1).permutation(len(talks))
    expected = [part.read_prompts(at).tolist() for part, at in (talks[i] for i in order)]
    assert source.prompt_kept[order].tolist() == [len(prompt) for prompt in expected]
    assert source.read_prompts(order).tolist() == [token for prompt in expected for token in prompt]
    first = [source.interaction_starts[number] for number in range(sum(COUNTS))]
    begins = np.cumsum([0, *(len(part.lengths) for part in alone)])
    assert first == [
        begins[d] + part.interaction_starts[n] for d, part in enumerate(alone) for n in range(COUNTS[d])
    ]
    for read in (source.read_tokens, source.read_marks, source.read_prompts):
        assert read(order[:0]).tolist() == []


def test_the_arrays_of_the_parts_are_not_held_twice(folders):
    source = MixedConversations(parts_of(folders), WEIGHTS)
    for name in ("lengths", "supervised", "answer_kept", "prompt_kept", "interaction_counts"):
        assert all(np.shares_memory(getattr(part, name), getattr(source, name)) for part in source.parts)


def test_damage_is_of_the_dataset_it_is_in(tmp_path, folders):
    folder = write_dataset(tmp_path, "conversations", random_conversations(6, seed=5))
    shard = folder / "train" / "rxt-train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[520] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    source = MixedConversations(parts_of([folders[0], folder], skip_corrupt=True), (1, 1))
    lost = source.lost_conversations(np.arange(17))
    assert np.flatnonzero(lost).tolist() == [11, 12, 13]
    pieces = np.arange(source.interaction_starts[-1])
    assert np.flatnonzero(source.lost(pieces)).tolist() == list(
        range(source.interaction_starts[11], source.interaction_starts[14])
    )
    assert list(source.damage()) == [(Dataset(folder, "train").fingerprint, 0)]


def test_datasets_of_other_tokenizers_are_refused(tmp_path, folders):
    other = write_dataset(tmp_path, "conversations", random_conversations(3, seed=1))
    manifest = load_manifest(other).model_copy(update={"tokenizer_sha256": "1" * 64})
    write_manifest(other, manifest.model_copy(update={"fingerprint": fingerprint_of(manifest)}))
    with pytest.raises(DataError, match=f"{other} was not made with the tokenizer of {folders[0]}"):
        MixedConversations(parts_of([folders[0], other]), (1, 1))


@pytest.mark.parametrize("limit", [None, 1, 2, 5, 6, 9, 15, 22, 50])
def test_datasets_take_turns_in_an_evaluation(folders, limit):
    source = MixedConversations(parts_of(folders), WEIGHTS)
    first, left, expected = np.cumsum([0, *COUNTS]), [list(range(n)) for n in COUNTS], []
    for d in itertools.islice(itertools.cycle(turns(WEIGHTS)), 100):
        if left[d]:
            expected.append(int(first[d]) + left[d].pop(0))
    assert first_conversations(source, limit).tolist() == sorted(expected[:limit])
    assert first_conversations(source.parts[0], limit).tolist() == list(range(COUNTS[0]))[:limit]
