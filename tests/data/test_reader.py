import gc
import logging
import re
import resource
import threading

import numpy as np
import pytest
from dataset_builder import (
    ANSWER,
    BOS,
    EOS,
    QUERY,
    conversation,
    document,
    random_conversations,
    write_dataset,
)
from hypothesis import given
from hypothesis import strategies as st

from rxt_dist.data.files import LocalFiles
from rxt_dist.data.format import ShardIndex
from rxt_dist.data.manifest import fingerprint_of, load_manifest, write_manifest
from rxt_dist.data.pieces import InteractionPieces, TextPieces, longest_first
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import DataError


@pytest.fixture(scope="module")
def documents():
    return [document(2 + (i * 7) % 23, seed=i) for i in range(30)]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory, documents):
    return write_dataset(tmp_path_factory.mktemp("text"), "text", documents)


@pytest.fixture(scope="module")
def conversations():
    return random_conversations(25, seed=3)


@pytest.fixture(scope="module")
def conversation_folder(tmp_path_factory, conversations):
    return write_dataset(
        tmp_path_factory.mktemp("conversations"), "conversations", conversations[:20], conversations[20:]
    )


def test_every_document_is_read_back_in_any_order(text_folder, documents):
    dataset = Dataset(text_folder, "train")
    assert (dataset.kind, dataset.num_documents) == ("text", 30)
    assert dataset.document_tokens.tolist() == [len(d) for d in documents]
    for i in np.random.default_rng(0).permutation(30).tolist():
        tokens = dataset.text_document(i)
        assert tokens.dtype == np.int64
        assert tokens.tolist() == documents[i].tolist()


def test_every_interaction_is_read_back(conversation_folder, conversations):
    for split, expected in (("train", conversations[:20]), ("val", conversations[20:])):
        dataset = Dataset(conversation_folder, split)
        assert dataset.num_documents == len(expected)
        for i, item in enumerate(expected):
            has_system = item.roles[0] == 0
            system = item.segments[0].tolist() if has_system else []
            assert dataset.system_prompt(i).tolist() == system
            assert dataset.interactions[i] == len(item.segments) // 2
            for j in range(int(dataset.interactions[i])):
                found = dataset.interaction(i, j)
                at = 2 * j + has_system
                assert found.query.tolist() == item.segments[at].tolist()
                assert found.answer.tolist() == item.segments[at + 1].tolist()
                if item.marks is not None:
                    assert found.marks.tolist() == item.marks[at + 1].tolist()
                elif found.marks is not None:  # another conversation of the block is marked
                    assert not found.marks.any()


def test_uint32_vocabulary(tmp_path):
    documents = [document(9, seed=i, vocab=100_000) for i in range(5)]
    dataset = Dataset(write_dataset(tmp_path, "text", documents, vocab=100_000), "train")
    assert [dataset.text_document(i).tolist() for i in range(5)] == [d.tolist() for d in documents]


def test_empty_split(text_folder, tmp_path):
    dataset = Dataset(text_folder, "val")
    assert dataset.num_documents == 0
    with pytest.raises(DataError, match="has no val documents"):
        TextPieces(dataset, 8)
    folder = write_dataset(tmp_path, "conversations", random_conversations(2, 0))
    with pytest.raises(DataError, match="has no val conversations"):
        InteractionPieces(Dataset(folder, "val"), 8)


def test_wrong_kind(text_folder, conversation_folder):
    with pytest.raises(DataError, match="holds text, this stage needs conversations"):
        InteractionPieces(Dataset(text_folder, "train"), 8)
    with pytest.raises(DataError, match="holds conversations, this stage needs text"):
        TextPieces(Dataset(conversation_folder, "train"), 8)


def test_few_open_shards_suffice(text_folder, documents, monkeypatch):
    monkeypatch.setattr(LocalFiles, "open_shards", 1)
    dataset = Dataset(text_folder, "train")
    for i in [0, 29, 1, 15, 28, 0]:
        assert dataset.text_document(i).tolist() == documents[i].tolist()
    source = TextPieces(dataset, 64)
    expected = np.concatenate([documents[i] for i in (29, 3, 11)])
    assert source.read_tokens(np.array([29, 3, 11])).tolist() == expected.tolist()


def test_a_read_over_many_shards_needs_few_files(tmp_path, monkeypatch):
    items = random_conversations(60, seed=2)
    folder = write_dataset(tmp_path, "conversations", items, documents_per_shard=1)
    source = InteractionPieces(Dataset(folder, "train"), 64)
    everything = np.random.default_rng(0).permutation(len(source.lengths))
    tokens, marks = source.read_tokens(everything), source.read_marks(everything)
    monkeypatch.setattr(LocalFiles, "open_shards", 4)
    fresh = InteractionPieces(Dataset(folder, "train"), 64)
    del source
    gc.collect()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (folder / "manifest.json").open() as probe:
        lowest_free = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 20, limits[1]))
    try:
        assert fresh.read_tokens(everything).tolist() == tokens.tolist()
        assert fresh.read_marks(everything).tolist() == marks.tolist()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_threads_read_the_same(text_folder, documents):
    dataset, failures = Dataset(text_folder, "train"), []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 30, 300).tolist():
            if dataset.text_document(i).tolist() != documents[i].tolist():
                failures.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- damage -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path):
    """A dataset of 3 shards with 3 blocks of 3 documents each; documents 9..17 are in the second shard."""
    documents = [document(40 + i, seed=i) for i in range(27)]
    folder = write_dataset(tmp_path, "text", documents, documents_per_shard=9)
    return folder, folder / "train" / "rxt-train-000001.tar", documents


def block_span(shard, block):
    row = ShardIndex.read(shard.with_suffix(".idx")).blocks[block]
    return int(row["offset"]), int(row["bytes"])


def damage(path, offset, change):
    data = bytearray(path.read_bytes())
    change(data, offset)
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("place", ["payload", "header", "other header byte"])
def test_a_flipped_bit_is_found_before_its_block_is_delivered(fresh, place):
    folder, shard, documents = fresh
    start, size = block_span(shard, 1)
    inside = {"payload": size - 600, "header": 3, "other header byte": 130}[place]

    def flip(data, offset):
        data[offset] ^= 4

    damage(shard, start + inside, flip)
    dataset = Dataset(folder, "train")
    for i in [*range(12), *range(15, 27)]:  # every other block is still good
        assert dataset.text_document(i).tolist() == documents[i].tolist()
    for i in (12, 13, 14):
        with pytest.raises(DataError, match=rf"{re.escape(str(shard))} is damaged: block 1: crc32"):
            dataset.text_document(i)
    with pytest.raises(DataError, match="block 1"):  # also in the middle of a larger read
        TextPieces(dataset, 64).read_tokens(np.array([0, 13, 20]))


def test_zeroed_header_and_overwritten_block(fresh):
    folder, shard, _ = fresh
    start, _ = block_span(shard, 2)

    def zero(data, offset):
        data[offset : offset + 512] = bytes(512)

    damage(shard, start, zero)
    with pytest.raises(DataError, match="block 2"):
        Dataset(folder, "train").text_document(17)


@pytest.mark.parametrize("keep", ["member boundary", "inside", "nothing"])
def test_truncated_shard(fresh, keep):
    folder, shard, _ = fresh
    start, _ = block_span(shard, 1)
    size = {"member boundary": start, "inside": start + 700, "nothing": 0}[keep]
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(
        DataError, match=rf"{re.escape(str(shard))} is damaged: it has {size} bytes, the manifest says"
    ):
        Dataset(folder, "train")


def test_shard_truncated_after_the_start_of_the_run(fresh):
    folder, shard, _ = fresh
    dataset = Dataset(folder, "train")
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match="it has 1000 bytes"):
        dataset.text_document(9)


def test_missing_shard_and_missing_index(fresh):
    folder, shard, _ = fresh
    dataset = Dataset(folder, "train")
    shard.unlink()
    with pytest.raises(DataError, match=rf"{re.escape(str(shard))}: cannot open the shard: No such file"):
        dataset.text_document(9)
    with pytest.raises(DataError, match="cannot open the shard: No such file"):
        Dataset(folder, "train")
    (folder / "train" / "rxt-train.idx").unlink()
    with pytest.raises(DataError, match=r"train/rxt-train\.idx: cannot read the index: No such file"):
        Dataset(folder, "train")


def rewrite_index(folder, **arrays):
    """Give the index of split train other arrays, and the manifest its hash."""
    path = folder / "train" / "rxt-train.idx"
    index = ShardIndex.read(path)
    values = {name: arrays.get(name, getattr(index, name)) for name in index.__dataclass_fields__}
    changed = {"split_indices": {"train": ShardIndex(**values).write(path)}}
    manifest = load_manifest(folder).model_copy(update=changed)
    write_manifest(folder, manifest.model_copy(update={"fingerprint": fingerprint_of(manifest)}))


def test_lengths_that_differ_from_the_index_are_refused(tmp_path):
    text = write_dataset(tmp_path / "text", "text", [document(20, 0), document(10, 1)])
    rewrite_index(text, document_tokens=np.array([19, 11], np.uint32))
    with pytest.raises(DataError, match=r"rxt-train-000000\.tar is damaged: block 0: its lengths"):
        Dataset(text, "train").text_document(0)
    talk = write_dataset(tmp_path / "talk", "conversations", [conversation([([7, 8, 9], [7, 8])])])
    rewrite_index(
        talk,
        query_tokens=np.array([4], np.uint32),
        answer_tokens=np.array([5], np.uint32),
    )
    with pytest.raises(DataError, match="block 0: its lengths"):
        Dataset(talk, "train").interaction(0, 0)


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        ("text", "blocks"),
        ("text", "documents"),
        ("conversations", "blocks"),
        ("conversations", "documents"),
        ("conversations", "interactions"),
    ],
)
def test_counts_of_shards_that_differ_from_the_index_are_refused(tmp_path, kind, unit):
    """A unit of one shard is called one of the next: the sums and all hashes agree."""
    items = {
        "text": [document(20, i) for i in range(9)],
        "conversations": [conversation([([7], [8])] * 2) for _ in range(9)],
    }[kind]
    folder = write_dataset(tmp_path, kind, items, documents_per_shard=3, block_documents=2)
    manifest = load_manifest(folder)
    first, second, third = manifest.shards
    moved = [
        first.model_copy(update={unit: getattr(first, unit) + 1}),
        second.model_copy(update={unit: getattr(second, unit) - 1}),
    ]
    manifest = manifest.model_copy(update={"shards": [*moved, third]})
    write_manifest(folder, manifest.model_copy(update={"fingerprint": fingerprint_of(manifest)}))
    with pytest.raises(DataError, match=r"rxt-train\.idx has other counts than the manifest"):
        Dataset(folder, "train")


def test_token_ids_outside_of_the_vocabulary_are_refused(tmp_path):
    folder = write_dataset(tmp_path, "text", [document(20, 0), np.array([BOS, 1000, EOS])])
    with pytest.raises(DataError, match="block 0: token id 1000, but the vocabulary has 1000"):
        Dataset(folder, "train").text_document(0)


# --- pieces -----------------------------------------------------------------------------------------------


def test_text_pieces_split_long_documents(text_folder, documents):
    source = TextPieces(Dataset(text_folder, "train"), 8)
    expected = [d[start : start + 8].tolist() for d in documents for start in range(0, len(d), 8)]
    assert source.lengths.tolist() == [len(e) for e in expected]
    assert source.supervised.tolist() == [len(e) - 1 for e in expected]
    assert 1 in source.lengths
    for i, tokens in enumerate(expected):
        piece = source.read(i)
        assert (piece.tokens.tolist(), piece.first_target) == (tokens, 1)
    order = np.random.default_rng(1).permutation(len(expected))
    assert source.read_tokens(order).tolist() == [t for i in order for t in expected[i]]


def test_fingerprint_tells_pieces_apart(text_folder, conversation_folder):
    train = Dataset(text_folder, "train")
    talk = Dataset(conversation_folder, "train"), Dataset(conversation_folder, "val")
    sources = [TextPieces(train, 8), TextPieces(train, 16), *(InteractionPieces(t, 8) for t in talk)]
    assert len({s.fingerprint for s in sources}) == 4
    assert TextPieces(Dataset(text_folder, "train"), 8).fingerprint == sources[0].fingerprint


def test_interaction_pieces(conversation_folder, conversations):
    dataset = Dataset(conversation_folder, "train")
    source = InteractionPieces(dataset, 64)
    assert source.truncated == 0
    pairs = []
    for item in conversations[:20]:
        segments = [s.tolist() for s, role in zip(item.segments, item.roles, strict=True) if role]
        pairs += list(zip(segments[::2], segments[1::2], strict=True))
    assert len(source.lengths) == len(pairs)
    for i, (query, answer) in enumerate(pairs):
        piece = source.read(i)
        assert piece.tokens.tolist() == query + answer
        assert piece.first_target == len(query) + 1  # [A] is not a target, [EOS] is
        assert source.supervised[i] == len(answer) - 1


def brute_force_longest_first(query, answer, limit):
    while query + answer > limit:
        if query >= answer:
            query -= 1
        else:
            answer -= 1
    return query, answer


@given(st.integers(2, 60), st.integers(2, 60), st.integers(8, 70))
def test_longest_first_lengths(query, answer, limit):
    found = longest_first(np.array([query]), np.array([answer]), limit)
    assert tuple(int(x[0]) for x in found) == brute_force_longest_first(query, answer, limit)


@pytest.mark.parametrize("seq_len", [8, 9, 13, 20])
def test_truncated_interactions_keep_the_right_ends(tmp_path, caplog, seq_len):
    items = random_conversations(20, seed=5, max_part=20)
    folder = write_dataset(tmp_path, "conversations", items)
    dataset = Dataset(folder, "train")
    with caplog.at_level(logging.WARNING):
        source = InteractionPieces(dataset, seq_len)
        for i in range(len(source.lengths)):
            source.read(i)
    number = cut = 0
    for conv in range(len(items)):
        for j in range(int(dataset.interactions[conv])):
            whole, piece = dataset.interaction(conv, j), source.read(number)
            query, answer = brute_force_longest_first(len(whole.query), len(whole.answer), seq_len)
            kept_query, kept_answer = piece.tokens[:query].tolist(), piece.tokens[query:].tolist()
            assert kept_query == whole.query[:query].tolist()
            assert kept_query[:2] == [BOS, QUERY]
            assert kept_answer[0] == ANSWER
            assert kept_answer[-1] == EOS
            assert kept_answer[1:] == whole.answer[len(whole.answer) - answer + 1 :].tolist()
            assert len(piece.tokens) <= seq_len
            assert piece.first_target == query + 1
            if whole.marks is not None:
                marks = source.read_marks(np.array([number]))
                assert marks[query + 1 :].tolist() == whole.marks[len(whole.answer) - answer + 1 :].tolist()
            cut += len(piece.tokens) < len(whole.query) + len(whole.answer)
            number += 1
    assert source.truncated == cut > 0
    everything = np.arange(number)
    assert source.read_tokens(everything).tolist() == [t for i in everything for t in source.read(i).tokens]
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"{cut} of {number} train interactions are longer than seq_len {seq_len}" in warnings[0].message


def test_nothing_is_logged_when_nothing_is_cut(conversation_folder, caplog):
    InteractionPieces(Dataset(conversation_folder, "train"), 64)
    assert not caplog.records
