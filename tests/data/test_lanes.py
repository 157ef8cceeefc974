"""The lane schedule against a simulation that asks every lane at every position of time what it does."""

import itertools
import json

import numpy as np
import pytest
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
from rxt_dist.data.lanes import LaneSchedule, LaneState
from rxt_dist.data.order import epoch_permutation
from rxt_dist.errors import DataError

counts_strategy = st.lists(st.integers(1, 7), min_size=1, max_size=25)


def run(counts, lanes, widths, state=None):
    schedule = LaneSchedule(counts, key=KEY, lanes=lanes)
    return joined_windows(schedule, state or LaneState.initial(lanes), widths)


def simulation(counts, lanes, positions):
    """The same schedule step by step."""
    stream = (
        (epoch, int(conversation))
        for epoch in itertools.count()
        for conversation in epoch_permutation(KEY, epoch, len(counts))
    )
    return follow(((visit, *held) for visit, held in enumerate(stream)), counts, lanes, positions)


@unhurried
@given(counts_strategy, lanes_strategy, widths_strategy)
def test_the_schedule_is_the_simulation(counts, lanes, widths):
    joined, _ = run(counts, lanes, widths)
    assert_same(joined, simulation(counts, lanes, sum(widths)))


@pytest.mark.parametrize(("lanes", "width"), [(64, 1), (250, 3), (1024, 4)])
def test_the_schedule_is_the_simulation_over_many_plans(lanes, width, monkeypatch):
    rng = np.random.default_rng(0)
    counts = np.clip(rng.lognormal(1.5, 1.0, 7000).round(), 1, 300).astype(np.uint32)
    monkeypatch.setattr(lanes_module, "_CELLS_AHEAD", 1 << 13)
    positions = 80_000 // lanes // width * width
    joined, _ = run(counts, lanes, [width] * (positions // width))
    assert joined["epochs"].max() >= 1
    assert_same(joined, simulation(counts.tolist(), lanes, positions))


@unhurried
@given(counts_strategy, st.sampled_from([8, 16]), st.lists(widths_strategy, min_size=8, max_size=8))
def test_ranks_that_cut_their_own_windows_hold_one_table(counts, lanes, widths):
    """Every rank computes the schedule by itself and has its lanes of it."""
    expected = simulation(counts, lanes, max(sum(cut) for cut in widths))
    for dp_size in (1, 2, 4, 8):
        share = lanes // dp_size
        for rank in range(dp_size):
            cut = widths[rank]
            joined, _ = run(counts, lanes, cut)
            own = slice(rank * share, (rank + 1) * share)
            assert_same(
                {name: joined[name][own] for name in FIELDS},
                {name: expected[name][own, : sum(cut)] for name in FIELDS},
            )


@unhurried
@given(counts_strategy, lanes_strategy)
def test_every_interaction_is_served_exactly_once_per_epoch(counts, lanes):
    everything = {(c, i) for c, n in enumerate(counts) for i in range(n)}
    # A lane that is late by a whole conversation still finishes the first two epochs in this time.
    joined, _ = run(counts, lanes, [(3 * sum(counts)) // lanes + 2 * max(counts)])
    for epoch in (0, 1):
        here = joined["epochs"] == epoch
        served = list(
            zip(joined["conversations"][here].tolist(), joined["interactions"][here].tolist(), strict=True)
        )
        assert len(served) == len(everything)
        assert set(served) == everything


@unhurried
@given(counts_strategy, lanes_strategy)
def test_interactions_of_a_conversation_follow_each_other_in_one_lane(counts, lanes):
    joined, _ = run(counts, lanes, [25])
    for lane in range(lanes):
        row = {name: joined[name][lane].tolist() for name in FIELDS}
        assert row["interactions"][0] == 0
        for now, then in itertools.pairwise(range(25)):
            if row["interactions"][then]:  # the same visit goes on
                assert row["interactions"][then] == row["interactions"][now] + 1
                assert all(
                    row[name][now] == row[name][then] for name in ("epochs", "conversations", "visits")
                )
            else:  # only after the end of the one before
                assert row["interactions"][now] == counts[row["conversations"][now]] - 1
                assert row["visits"][then] > row["visits"][now]


@unhurried
@given(counts_strategy, lanes_strategy, widths_strategy)
def test_windows_can_be_cut_anywhere(counts, lanes, widths):
    cut, states = run(counts, lanes, widths)
    whole, (last,) = run(counts, lanes, [sum(widths)])
    assert_same(cut, whole)
    assert states[-1].to_dict() == last.to_dict()


@unhurried
@given(counts_strategy, lanes_strategy, st.integers(1, 12))
def test_restart_from_any_state_continues_identically(counts, lanes, done):
    whole, _ = run(counts, lanes, [1] * (done + 10))
    _, states = run(counts, lanes, [1] * done)
    restored = LaneState.from_dict(json.loads(json.dumps(states[-1].to_dict())))
    rest, _ = run(counts, lanes, [10], state=restored)
    assert_same(rest, {name: whole[name][:, done:] for name in FIELDS})


@unhurried
@given(counts_strategy, lanes_strategy, st.lists(st.integers(0, 11), min_size=1, max_size=20))
def test_what_was_asked_before_does_not_matter(counts, lanes, order):
    """One schedule object gives the same window for a state whenever it is asked, in any order."""
    whole, states = run(counts, lanes, [2] * 12)
    states = [LaneState.initial(lanes), *states]
    schedule = LaneSchedule(counts, key=KEY, lanes=lanes)
    for number in order:
        window, after = schedule.next_window(states[number], 2)
        found = {name: getattr(window, name) for name in FIELDS}
        assert_same(found, {name: whole[name][:, 2 * number : 2 * number + 2] for name in FIELDS})
        assert after.to_dict() == states[number + 1].to_dict()


def count_permutations(monkeypatch):
    """Epochs whose permutation is computed from now on."""
    epochs = []

    def counted(key, epoch, count):
        epochs.append(epoch)
        return epoch_permutation(key, epoch, count)

    monkeypatch.setattr(stream, "epoch_permutation", counted)
    return epochs


def test_a_resume_does_not_replay_the_past(monkeypatch):
    counts, lanes, epoch = np.full(5000, 3), 16, 200_000
    permutation = epoch_permutation(KEY, epoch, 5000)
    taken = 4000
    late = LaneState.from_dict(
        {
            "datasets": [{"epoch": epoch, "place": taken}],
            "epochs": [epoch] * lanes,
            "conversations": permutation[taken - lanes : taken].tolist(),
            "served": [2] * lanes,
            "visits": list(range(epoch * 5000 + taken - lanes, epoch * 5000 + taken)),
        }
    )
    epochs = count_permutations(monkeypatch)
    window, _ = LaneSchedule(counts, key=KEY, lanes=lanes).next_window(late, 4)
    assert set(epochs) <= {epoch, epoch + 1}
    assert window.interactions.tolist() == [[2, 0, 1, 2]] * lanes
    assert window.conversations[:, 0].tolist() == permutation[taken - lanes : taken].tolist()
    assert window.conversations[:, 1].tolist() == permutation[taken : taken + lanes].tolist()


def test_an_epoch_is_permuted_once_and_planned_in_bounded_pieces(monkeypatch):
    counts = np.random.default_rng(3).integers(1, 9, 60_000).astype(np.uint32)
    epochs = count_permutations(monkeypatch)
    schedule, state = LaneSchedule(counts, key=KEY, lanes=32), LaneState.initial(32)
    assert schedule._counts is counts
    plans = set()
    while state.epoch < 2:
        _, state = schedule.next_window(state, 2)
        plan, _, _ = schedule._planned
        plans.add(plan)
        assert plan.cells.size <= 4 * lanes_module._CELLS_AHEAD
    assert sorted(set(epochs)) == [0, 1, 2]
    assert len(epochs) <= 7  # at most twice more where a plan looks past the end of an epoch
    assert len(plans) > 2


def test_windows_cannot_be_changed_by_who_reads_them():
    schedule = LaneSchedule([2, 3], key=KEY, lanes=2)
    window, state = schedule.next_window(LaneState.initial(2), 3)
    for array in (window.conversations, state.conversations, state.places):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 1


def test_visits_are_numbered_along_the_stream_without_gaps():
    joined, _ = run([2, 1, 3], 4, [40])
    visits = np.unique(joined["visits"])
    assert visits.tolist() == list(range(len(visits)))
    for visit in visits:
        here = joined["visits"] == visit
        assert len(np.unique(joined["conversations"][here])) == len(np.unique(joined["epochs"][here])) == 1
        assert joined["epochs"][here][0] == visit // 3


def test_a_window_does_not_change_the_state_it_starts_from():
    schedule, state = LaneSchedule([2, 3], key=KEY, lanes=2), LaneState.initial(2)
    _, state = schedule.next_window(state, 1)
    before = state.to_dict()
    schedule.next_window(state, 5)
    assert state.to_dict() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"visits": [visit + 1 for visit in state["visits"]]},
        lambda state: {"epochs": [epoch + 1 for epoch in state["epochs"]]},
        lambda state: {"conversations": [(number + 1) % 10 for number in state["conversations"]]},
        lambda state: {"datasets": [{"epoch": 0, "place": 0}]},
        lambda state: {name: state[name][:1] * 2 for name in ("conversations", "epochs", "visits")},
    ],
)
def test_state_that_the_stream_does_not_give_is_refused(change):
    schedule = LaneSchedule([4, 1, 2, 3, 5, 2, 1, 1, 3, 2], key=KEY, lanes=2)
    _, after = schedule.next_window(LaneState.initial(2), 8)
    state = after.to_dict() | {"served": [0, 0]}
    assert state["datasets"][0]["epoch"] == 0
    schedule.next_window(LaneState.from_dict(state), 1)
    with pytest.raises(DataError, match="not those of this dataset, seed and stage"):
        schedule.next_window(LaneState.from_dict(state | change(state)), 1)


def test_state_of_another_seed_is_refused():
    counts = [4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    _, state = LaneSchedule(counts, key=KEY, lanes=3).next_window(LaneState.initial(3), 5)
    with pytest.raises(DataError, match="not those of this dataset, seed and stage"):
        LaneSchedule(counts, key=KEY + 1, lanes=3).next_window(state, 1)


@pytest.mark.parametrize(
    ("counts", "message"), [([], "no conversations"), ([1, 0], "conversation 1 has no inter")]
)
def test_unusable_counts_are_refused(counts, message):
    with pytest.raises(DataError, match=message):
        LaneSchedule(counts, key=0, lanes=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": []}, r"found datasets \[\], valid is a list with integers"),
        ({"datasets": {"epoch": 0, "place": 0}}, "found datasets .*, valid is a list with integers"),
        ({"datasets": [[0, 0]]}, "found the place .* in datasets, valid is a list"),
        ({"datasets": [{"epoch": -1, "place": 0}]}, "valid is a list with integers >= 0 epoch and place"),
        ({"datasets": [{"epoch": 0, "place": True}]}, "valid is a list with integers >= 0 epoch and place"),
        ({"datasets": [{"epoch": 0}]}, "valid is a list with integers >= 0 epoch and place"),
        ({"datasets": [{"epoch": 0, "place": 0, "weight": 1}]}, "valid is a list with integers >= 0 epoch"),
        ({"served": 1}, "served is malformed"),
        ({"served": [0, True]}, "served is malformed"),
        ({"conversations": [-2, 0]}, "conversations is malformed"),
        ({"visits": None}, "visits is malformed"),
        ({"extra": 1}, "found the entries"),
        ({"visits": [0]}, "found lists of the lengths .*'visits': 1.*, valid is one entry a lane"),
    ],
)
def test_malformed_state_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        LaneState.from_dict(LaneState.initial(2).to_dict() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": [0, 3]}, "this one has 3 conversations"),
        ({"datasets": [{"epoch": 0, "place": 3}]}, "this one has 3 conversations"),
        ({"datasets": [{"epoch": 0, "place": 0}] * 2}, "it is of 2 datasets, this stage has 1"),
        ({"served": [0, 3], "conversations": [1, 2]}, "lane 1 has served 3 interactions of conversation 2"),
        ({"served": [1, 0]}, "lane 0 has served 1 interactions of conversation -1"),
        (LaneState.initial(3).to_dict(), "it has 3 lanes, this run has 2"),
    ],
)
def test_state_of_another_run_is_refused(change, message):
    state = LaneState.from_dict(LaneState.initial(2).to_dict() | change)
    with pytest.raises(DataError, match=message):
        LaneSchedule([4, 1, 2], key=0, lanes=2).next_window(state, 1)
