import heapq
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxt_dist.data.lanes import LaneSchedule, LaneState
from rxt_dist.data.order import epoch_permutation
from rxt_dist.errors import DataError

KEY = 5
FIELDS = ("epochs", "conversations", "interactions", "visits")
counts_strategy = st.lists(st.integers(1, 7), min_size=1, max_size=25)
lanes_strategy = st.integers(1, 9)


def run(counts, lanes, widths, state=None):
    """All windows joined: {field: [G, sum of widths]}, and the state after each window."""
    schedule, state = LaneSchedule(counts, key=KEY, lanes=lanes), state or LaneState.initial(lanes)
    windows, states = [], []
    for width in widths:
        window, state = schedule.next_window(state, width)
        assert window.resets.shape == (lanes, width)
        windows.append(window)
        states.append(state)
    joined = {name: np.concatenate([getattr(w, name) for w in windows], axis=1) for name in FIELDS}
    return joined, states


def event_simulation(counts, lanes, positions):
    """The same schedule from first principles: a heap of (time at which the lane is free, lane)."""
    stream = (
        (epoch, int(conversation))
        for epoch in itertools.count()
        for conversation in epoch_permutation(KEY, epoch, len(counts))
    )
    served = {}
    heap = [(0, lane) for lane in range(lanes)]
    for visit, (epoch, conversation) in enumerate(stream):
        time, lane = heapq.heappop(heap)
        if time >= positions:
            return served
        for interaction in range(counts[conversation]):
            served[lane, time + interaction] = (epoch, conversation, interaction, visit)
        heapq.heappush(heap, (time + counts[conversation], lane))
    raise AssertionError


@given(counts_strategy, lanes_strategy, st.integers(1, 30))
def test_the_schedule_is_the_event_simulation(counts, lanes, positions):
    joined, _ = run(counts, lanes, [positions])
    expected = event_simulation(counts, lanes, positions)
    for lane, position in itertools.product(range(lanes), range(positions)):
        found = tuple(int(joined[name][lane, position]) for name in FIELDS)
        assert found == expected[lane, position]


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


@given(counts_strategy, lanes_strategy, st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_windows_can_be_cut_anywhere(counts, lanes, widths):
    cut, states = run(counts, lanes, widths)
    whole, (last,) = run(counts, lanes, [sum(widths)])
    for name in FIELDS:
        np.testing.assert_array_equal(cut[name], whole[name])
    assert states[-1].to_dict() == last.to_dict()


@given(counts_strategy, lanes_strategy, st.integers(1, 12))
def test_restart_from_any_state_continues_identically(counts, lanes, done):
    whole, _ = run(counts, lanes, [1] * (done + 10))
    _, states = run(counts, lanes, [1] * done)
    restored = LaneState.from_dict(json.loads(json.dumps(states[-1].to_dict())))
    rest, _ = run(counts, lanes, [10], state=restored)
    for name in FIELDS:
        np.testing.assert_array_equal(rest[name], whole[name][:, done:])


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
    ("counts", "message"), [([], "no conversations"), ([1, 0], "conversation 1 has no inter")]
)
def test_unusable_counts_are_refused(counts, message):
    with pytest.raises(DataError, match=message):
        LaneSchedule(counts, key=0, lanes=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "epoch is malformed"),
        ({"place": [0]}, "place is malformed"),
        ({"served": 1}, "served is malformed"),
        ({"served": [0, True]}, "served is malformed"),
        ({"conversations": [-2, 0]}, "conversations is malformed"),
        ({"visits": None}, "visits is malformed"),
        ({"extra": 1}, "found the entries"),
    ],
)
def test_malformed_state_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        LaneState.from_dict(LaneState.initial(2).to_dict() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": [0, 3]}, "this one has 3 conversations"),
        ({"place": 3}, "this one has 3 conversations"),
        ({"served": [0, 3], "conversations": [1, 2]}, "lane 1 has served 3 interactions of conversation 2"),
        ({"served": [1, 0]}, "lane 0 has served 1 interactions of conversation -1"),
        ({"visits": [0]}, r"it has \[1, 2\] lanes, this run has 2"),
    ],
)
def test_state_of_another_run_is_refused(change, message):
    state = LaneState.from_dict(LaneState.initial(2).to_dict() | change)
    with pytest.raises(DataError, match=message):
        LaneSchedule([4, 1, 2], key=0, lanes=2).next_window(state, 1)
