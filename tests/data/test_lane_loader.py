import itertools
import json

import numpy as np
import pytest
import torch
from dataset_builder import ANSWER, EOS, PAD, conversation, random_conversations, write_dataset

from rxt_dist.data.conversations import MixedConversations, conversation_datasets
from rxt_dist.data.lane_loader import LaneInteractions, LaneLoader, lane_schedule
from rxt_dist.data.lanes import LaneState
from rxt_dist.data.pieces import InteractionPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.model.layout import SequenceLayout

LANES, WINDOW, KEY = 8, 3, 17
STM_SIZE = 6  # some interactions are longer
PER_LANE = ("present", "reset", "visits", "numbers")


def pieces_of(folder, talks):
    found = InteractionPieces(Dataset(write_dataset(folder, "conversations", talks), "train"), 14)
    assert 0 < found.truncated < len(found.lengths)
    return found


@pytest.fixture(scope="module", params=["one dataset", "three datasets"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes")
    if request.param == "one dataset":
        return pieces_of(folder, random_conversations(13, seed=2))
    parts = [
        pieces_of(folder / str(count), random_conversations(count, seed=30 + count)) for count in (13, 5, 7)
    ]
    return MixedConversations(parts, (3, 1, 2))


def first_state(source, lanes=LANES):
    return LaneState.initial(lanes, len(conversation_datasets(source)[0]))


def loader(source, *, dp_rank=0, dp_size=1, micro_lanes=None, **options):
    options = {"lanes": LANES, "window": WINDOW, "key": KEY, "stm_size": STM_SIZE} | options
    micro_lanes = micro_lanes or options["lanes"] // dp_size
    return LaneLoader(
        source, dp_rank=dp_rank, dp_size=dp_size, micro_lanes=micro_lanes, pad_id=PAD, **options
    )


def per_lane(one: LaneInteractions):
    """Everything about each lane of a micro-batch as plain values."""
    result = []
    bounds = one.layout.cu_seqlens.tolist()
    for lane, (start, stop) in enumerate(itertools.pairwise(bounds)):
        chosen = (one.next_index >= start) & (one.next_index < stop)
        assert one.layout.positions[start:stop].tolist() == list(range(stop - start))
        result.append(
            {
                "tokens": one.tokens[start:stop].tolist(),
                "keys": one.token_keys[start:stop].tolist(),
                "index": (one.next_index[chosen] - start).tolist(),
                "targets": one.next_targets[chosen].tolist(),
                "marks": one.target_marks[chosen].tolist(),
            }
            | {name: getattr(one, name)[lane].item() for name in PER_LANE}
        )
    return result


def global_steps(source, steps, *, dp_size=1, micro_lanes=None, state=None, **options):
    """What all ranks together hold: per step {lane: [look-back, position 0, ...]}, counts, state."""
    loaders = [
        loader(source, dp_rank=r, dp_size=dp_size, micro_lanes=micro_lanes, state=state, **options)
        for r in range(dp_size)
    ]
    result = []
    for _ in range(steps):
        lanes, parts = {}, [next(one) for one in loaders]
        assert all(p.counts == parts[0].counts for p in parts)
        assert all(p.state.to_dict() == parts[0].state.to_dict() for p in parts)
        for batch in (b for p in parts for b in p.batches):
            look_back = batch.look_backs[:1]
            columns = [per_lane(one) for one in (*look_back, *batch.positions)]
            assert all(len(column) == len(batch.lanes) for column in columns)
            lanes |= {int(g): [column[i] for column in columns] for i, g in enumerate(batch.lanes)}
        assert list(lanes) == list(range(LANES))
        result.append((lanes, parts[0].counts, parts[0].position_counts, parts[0].state.to_dict()))
    for one in loaders:
        one.close()
    return result


def test_a_window_holds_what_the_schedule_says(source):
    schedule = lane_schedule(source, key=KEY, lanes=LANES)
    state, look_backs, marks = first_state(source), 0, 0
    for lanes, _, _, _ in global_steps(source, 8):
        window, state = schedule.next_window(state, WINDOW)
        for lane, (look_back, *positions) in lanes.items():
            for w, found in enumerate(positions):
                conv, number = int(window.conversations[lane, w]), int(window.interactions[lane, w])
                piece = int(source.interaction_starts[conv]) + number
                expected = source.read(piece)
                assert found["tokens"] == expected.tokens.tolist()
                assert found["present"]
                assert found["reset"] == (number == 0)
                assert (found["numbers"], found["visits"]) == (number, window.visits[lane, w])
                first = expected.first_target - 1  # [A] is supervised too
                assert found["targets"] == expected.tokens[first:].tolist()
                assert found["targets"][0] == ANSWER
                assert found["targets"][-1] == EOS
                assert found["index"] == list(range(first - 1, len(expected.tokens) - 1))
                assert found["marks"] == source.read_marks(np.array([piece]))[first:].tolist()
                marks += sum(found["marks"])
            assert look_back["targets"] == []
            assert look_back["present"] == (not positions[0]["reset"])
            look_backs += look_back["present"]
    assert look_backs > 0
    assert marks > 0


def test_the_look_back_is_the_interaction_before_the_window(source):
    steps = global_steps(source, 8)
    for (before, *_), (lanes, *_) in itertools.pairwise(steps):
        for lane, (look_back, first, *_) in lanes.items():
            if first["reset"]:
                assert look_back["tokens"] == [PAD]
                assert not look_back["present"]
                assert not look_back["reset"]
            else:
                last = before[lane][-1]
                for name in ("tokens", "keys", "numbers", "visits", "reset", "present"):
                    assert look_back[name] == last[name]


def test_at_the_start_no_lane_has_a_look_back(source):
    with loader(source) as one:
        look_back = next(one).batches[0].look_backs[0]
    assert not look_back.present.any()
    assert look_back.tokens.tolist() == [PAD] * LANES
    assert look_back.next_index.shape == (0,)


def test_the_look_back_can_be_left_out(source):
    with_it, without = global_steps(source, 4), global_steps(source, 4, look_back=False)
    assert [{g: row[1:] for g, row in lanes.items()} for lanes, *_ in with_it] == [
        lanes for lanes, *_ in without
    ]


@pytest.mark.parametrize(("dp_size", "micro_lanes"), [(1, 2), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)])
def test_the_global_step_is_the_same_on_every_layout(source, dp_size, micro_lanes):
    assert global_steps(source, 6, dp_size=dp_size, micro_lanes=micro_lanes) == global_steps(source, 6)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_counts_are_what_the_batches_hold(source, dp_size):
    for lanes, counts, position_counts, _ in global_steps(source, 6, dp_size=dp_size, micro_lanes=1):
        assert len(position_counts) == WINDOW
        for w in range(WINDOW):
            column = [row[1 + w] for row in lanes.values()]
            assert position_counts[w] == {
                "tokens": sum(len(found["tokens"]) for found in column),
                "answer": sum(len(found["targets"]) for found in column),
                "slots": sum(min(len(found["tokens"]), STM_SIZE) for found in column),
                "interactions": len(column),
                "resets": sum(found["reset"] for found in column),
            }
        assert counts == {name: sum(c[name] for c in position_counts) for name in counts}


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("done", [1, 4])
def test_resume_at_another_layout_continues_the_same_sequence(source, dp_size, done):
    expected = global_steps(source, 7)
    first = global_steps(source, done, dp_size=2)
    state = LaneState.from_dict(first[-1][3])
    assert first + global_steps(source, 7 - done, dp_size=dp_size, micro_lanes=1, state=state) == expected


@pytest.mark.parametrize(
    ("chain", "prefetch"),
    [
        ((1, 2, 4, 1), (2, 0, 1, 2)),
        ((2, 4, 1), (0, 0, 0)),
        ((1, 8, 2, 4), (1, 2, 0, 1)),
        ((4, 2, 8), (2, 2, 2)),
    ],
)
def test_a_run_that_changes_its_ranks_again_and_again_serves_one_sequence(source, chain, prefetch):
    """Each part starts from what the one before left behind, as JSON."""
    found, state = [], None
    for number, (dp_size, prefetch_steps) in enumerate(zip(chain, prefetch, strict=True)):
        options = {"micro_lanes": 1 if number % 2 else None, "prefetch_steps": prefetch_steps}
        found += global_steps(source, 3, dp_size=dp_size, state=state, **options)
        state = LaneState.from_dict(json.loads(json.dumps(found[-1][3])))
    assert found == global_steps(source, 3 * len(chain))


def test_ranks_share_the_lanes_without_talking(source):
    """The (lane, conversation, interaction) table of a step, read from the tokens that ranks hold."""
    where = {tuple(source.read(p).tokens.tolist()): p for p in range(len(source.lengths))}
    assert len(where) == len(source.lengths)
    schedule, state = lane_schedule(source, key=KEY, lanes=LANES), first_state(source)
    expected = []
    for _ in range(6):
        window, state = schedule.next_window(state, WINDOW)
        expected.append((source.interaction_starts[window.conversations] + window.interactions).tolist())
    for dp_size in (1, 2, 4, 8):
        for rank in range(dp_size):
            share = LANES // dp_size
            with loader(source, dp_rank=rank, dp_size=dp_size) as one:
                for table in expected:
                    (batch,) = next(one).batches
                    assert batch.lanes.tolist() == list(range(rank * share, (rank + 1) * share))
                    columns = [[where[tuple(f["tokens"])] for f in per_lane(p)] for p in batch.positions]
                    rows = [list(row) for row in zip(*columns, strict=True)]
                    assert rows == table[rank * share : (rank + 1) * share]


def test_windows_of_one_hold_the_same_as_windows_of_three(source):
    wide, narrow = global_steps(source, 4), global_steps(source, 12, window=1)
    for step, (lanes, *_) in enumerate(wide):
        for lane, (_, *positions) in lanes.items():
            assert positions == [narrow[3 * step + w][0][lane][1] for w in range(WINDOW)]


def test_keys_tell_visits_interactions_positions_and_stages_apart(source):
    keys = [
        k
        for lanes, *_ in global_steps(source, 12)
        for row in lanes.values()
        for f in row[1:]
        for k in f["keys"]
    ]
    assert len(set(keys)) == len(keys)
    other = [
        k for lanes, *_ in global_steps(source, 2, key=18) for row in lanes.values() for k in row[1]["keys"]
    ]
    assert set(keys).isdisjoint(other)


def test_data_without_marks(tmp_path):
    folder = write_dataset(tmp_path, "conversations", [conversation([([8], [9, 10])] * 3)] * 2)
    with loader(InteractionPieces(Dataset(folder, "train"), 16), lanes=2) as one:
        found = next(one).batches[0].positions[0]
    assert found.target_marks.dtype == torch.uint8
    assert found.target_marks.tolist() == [0] * 8


def test_moving_a_window_moves_everything(source):
    with loader(source) as one:
        batch = next(one).batches[0].to("meta")
    assert batch.lanes.is_meta
    for part in (*batch.look_backs, *batch.positions):
        for value in vars(part).values():
            assert (value.positions if isinstance(value, SequenceLayout) else value).is_meta


@pytest.mark.parametrize(("lanes", "dp_size", "micro_lanes"), [(8, 3, 1), (8, 2, 3), (0, 1, 1), (8, 1, -2)])
def test_lanes_that_do_not_divide_are_refused(source, lanes, dp_size, micro_lanes):
    with pytest.raises(ConfigError, match=r"batch\.lanes"):
        loader(source, lanes=lanes, dp_size=dp_size, micro_lanes=micro_lanes)


def test_an_empty_window_is_refused(source):
    with pytest.raises(ConfigError, match="window: found 0"):
        loader(source, window=0)


def test_state_of_another_number_of_lanes_is_refused(source):
    with (
        loader(source, state=first_state(source, 4)) as one,
        pytest.raises(DataError, match="it has 4 lanes, this run has 8"),
    ):
        next(one)
