"""Conversations: the memory that training would have written, batches, streams, limits, errors."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import lanes
from inference_samples import (
    ANSWER,
    BOS,
    EOS,
    FIRST_WORD,
    LAYERS,
    QUERY,
    SEQ_LEN,
    SLOTS,
    VARIANTS,
    WIDTH,
    bytes_tokenizer,
    model_config,
    prefer,
    random_ids,
    sample_model,
    sample_stm,
    words,
    words_tokenizer,
)
from safetensors.torch import save_file

from rxt_dist.errors import CheckpointError, ConfigError, DataError, RxtError
from rxt_dist.inference import Conversation, Reply, Sampling, generate
from rxt_dist.inference.decoding import Continuation
from rxt_dist.interchange.pretrained import Pretrained
from rxt_dist.model import Memory, RxTModel, SequenceLayout
from rxt_dist.model.stm import initial_stm

DRAWN = Sampling(temperature=1.5, top_k=30, top_p=0.97)


def talk(model: RxTModel, seed: int = 0) -> Conversation:
    return Conversation(model, words_tokenizer(), seed=seed)


def query(seed: int, count: int = 5) -> str:
    return words(random_ids(count, seed))


def written(model: RxTModel, stm: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """The memory after an interaction, by the components alone."""
    layout = SequenceLayout.from_lengths([len(ids)])
    with torch.no_grad():
        after: torch.Tensor = model.memory_attention(stm, model.encoder(torch.tensor(ids), layout), layout)
    return after


def plain_greedy(model: RxTModel, stm: torch.Tensor, ids: list[int], limit: int) -> list[int]:
    """The answer to a prompt: everything computed anew for every token."""
    answer: list[int] = []
    while len(answer) < limit and EOS not in answer:
        layout = SequenceLayout.from_lengths([len(ids) + len(answer)])
        tokens = torch.tensor([*ids, *answer])
        with torch.no_grad():
            hidden = model.decoder(tokens, layout, Memory.of_stm(stm, layout)).hidden[-1]
            answer.append(int(model.decoder.lm_head(hidden).argmax()))
    return answer


@pytest.mark.parametrize("shared", [True, False])
def test_a_conversation_is_what_training_reads_and_writes(shared: bool) -> None:
    """20 interactions: logits of every answer and the memory before each are those of the SMAT stage."""
    init = f"{{distribution: normal, std: 0.5, shared: {str(shared).lower()}}}"
    config = lanes.lane_config(model__stm_init=init, model__seq_len=24)
    model = lanes.lane_model(config)
    module = lanes.lane_module(config, model)
    plan = [
        (random_ids(1 + i % 5, 2 * i), random_ids(i % 4, 2 * i + 1)) for i in range(20)
    ]  # some answers are empty
    plan = [([t % 30 + FIRST_WORD for t in q], [t % 30 + FIRST_WORD for t in a]) for q, a in plan]
    source = lanes.MemoryPieces([[lanes.Interaction.of(q, a) for q, a in plan]])
    recorder = lanes.Recorder(module)
    with lanes.windows(source, window=len(plan), lanes=1) as steps:
        lanes.Lanes(module, config, lanes=1).step(next(steps))
    initial = None if shared else lanes.fresh_stm(config, 0)
    conversation = Conversation(
        model, words_tokenizer(config.model.vocab_size), seed=config.seed, initial=initial
    )
    for number, (asked, answered) in enumerate(plan):
        torch.testing.assert_close(conversation.stm, recorder.memories[number], rtol=1e-5, atol=1e-5)
        hidden = recorder.hidden[number][0][2 + len(asked) : -1]
        with torch.no_grad():
            expected = model.decoder.lm_head(hidden)
        continuation = Continuation(model.decoder, 1, conversation.stm)
        forced = [continuation.feed([conversation.prompt(words(asked))])]
        forced += [continuation.step(torch.tensor([token])) for token in answered]
        torch.testing.assert_close(torch.cat(forced), expected, rtol=1e-5, atol=1e-5)
        logits = conversation.replay(words(asked), words(answered))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert conversation.writes == len(plan)


def test_the_memory_a_run_starts_from_is_that_of_its_seed() -> None:
    config = lanes.lane_config(model__stm_init="{distribution: normal, std: 0.5, shared: true}", seed=11)
    model = lanes.lane_model(config)
    for seed, same in ((11, True), (12, False)):
        conversation = Conversation(model, words_tokenizer(config.model.vocab_size), seed=seed)
        assert torch.equal(conversation.stm, lanes.fresh_stm(config, 0)) == same


def test_a_stored_memory_is_where_conversations_begin_if_they_share_one() -> None:
    components = frozenset({"encoder", "decoder", "memory_attention"})
    for shared in (True, False):
        model = sample_model(model_config(stm_init={"distribution": "standard", "shared": shared}))
        found = Pretrained(model, words_tokenizer(), components, sample_stm(1))
        conversation = Conversation.begin(found, seed=5)
        assert torch.equal(conversation.stm, sample_stm(1) if shared else initial_stm(model.config, 5))
        conversation.ask(query(1), max_tokens=2)
        conversation.reset()
        assert torch.equal(conversation.stm, Conversation.begin(found, seed=5).stm)
    with pytest.raises(CheckpointError, match="has no encoder, which this needs; found: decoder, memory_"):
        Conversation.begin(Pretrained(model, words_tokenizer(), components - {"encoder"}, None))


@pytest.mark.parametrize("name", ["moe", "stateless", "reverse", "gated-qk-norm", "no-rope", "causal-cross"])
def test_greedy_answers_and_memories_are_those_of_plain_decoding(name: str) -> None:
    model = sample_model(VARIANTS[name])
    prefer(model, EOS, -1.0)
    conversation = talk(model)
    for number in range(3):
        before, text = conversation.stm, query(number)
        prompt = [BOS, QUERY, *random_ids(5, number), ANSWER]
        reply = conversation.ask(text, max_tokens=12)
        assert reply.tokens == plain_greedy(model, before, prompt, 12)
        assert reply.text == words([t for t in reply.tokens if t >= FIRST_WORD])
        torch.testing.assert_close(
            conversation.stm, written(model, before, [*prompt, *reply.tokens]), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("sampling", "end"), [(Sampling(), -1e4), (DRAWN, 0.0)])
def test_a_batch_is_its_conversations_alone(sampling: Sampling, end: float) -> None:
    """Other lengths, other ends (by [EOS] or ``seq_len``), another order: the same tokens and memories."""
    model = sample_model(model_config())
    prefer(model, EOS, end)
    texts = [[query(10 * turn + i, 1 + (17 * i + turn) % 31) for i in range(5)] for turn in range(3)]
    together, alone = ([talk(model, seed) for seed in range(5)] for _ in range(2))
    lengths = set()
    for turn, asked in enumerate(texts):
        order = [(i + turn) % 5 for i in range(5)]
        replies = generate([together[i] for i in order], [asked[i] for i in order], sampling=sampling)
        for i, reply in zip(order, replies, strict=True):
            assert reply == alone[i].ask(asked[i], sampling=sampling)
            lengths.add(len(reply.tokens))
            torch.testing.assert_close(together[i].stm, alone[i].stm, rtol=1e-5, atol=1e-5)
    assert len(lengths) > 5, "the answers must end at different steps for this to say anything"


def test_what_is_drawn_follows_from_the_seed() -> None:
    model = sample_model(model_config())
    texts = [[talk(model, seed).ask(query(1), sampling=DRAWN).text for _ in range(2)] for seed in (1, 2)]
    assert texts[0][0] == texts[0][1] != texts[1][0] == texts[1][1]
    again = talk(model, 1)
    first = again.ask(query(1), sampling=DRAWN, max_tokens=20).tokens
    second = again.ask(query(1), sampling=DRAWN, max_tokens=20).tokens
    assert first != second, "the next interaction draws other numbers"


def test_every_step_draws_another_number() -> None:
    """A model to which all words are alike: its answers are the random numbers."""
    model = sample_model(model_config())
    with torch.no_grad():
        model.decoder.lm_head.weight.zero_()
        model.decoder.lm_head.bias.fill_(-1e4)
        model.decoder.lm_head.bias[FIRST_WORD:] = 0.0
    batch = [talk(model, seed) for seed in range(8)]
    replies = generate(batch, ["w11"] * 8, sampling=Sampling(temperature=1.0), max_tokens=30)
    for reply in replies:
        assert len(set(reply.tokens)) > 10
    for step in range(30):
        assert len({reply.tokens[step] for reply in replies}) > 2
    assert generate(batch, ["w11"] * 8, sampling=Sampling(temperature=1.0), max_tokens=30) != replies


def test_an_answer_that_ends_at_once() -> None:
    model = sample_model(model_config())
    prefer(model, EOS, 1e4)
    conversation = talk(model)
    before = conversation.stm
    assert conversation.ask(query(1)) == Reply("", [EOS], complete=True)
    expected = written(model, before, [BOS, QUERY, *random_ids(5, 1), ANSWER, EOS])
    torch.testing.assert_close(conversation.stm, expected, rtol=1e-5, atol=1e-5)


def test_an_answer_that_never_ends_is_stopped_by_the_limit_or_the_longest_sequence() -> None:
    model = sample_model(model_config())
    prefer(model, EOS, -1e4)
    conversation = talk(model)
    reply = conversation.ask(query(1), max_tokens=7)
    assert (len(reply.tokens), reply.complete) == (7, False)
    for limit in (None, 1000):
        reply = conversation.ask(query(1), max_tokens=limit)
        assert (len(reply.tokens), reply.complete) == (SEQ_LEN - 8, False)
    batch = [talk(model, seed) for seed in range(3)]
    replies = generate(batch, [query(1, 5), query(2, 20), query(3, SEQ_LEN - 4)])
    assert [len(reply.tokens) for reply in replies] == [SEQ_LEN - 8, SEQ_LEN - 23, 1]


def test_twenty_interactions_in_a_row() -> None:
    conversation = talk(sample_model(model_config()))
    seen = []
    for number in range(20):
        conversation.ask(query(number), sampling=DRAWN, max_tokens=8)
        assert conversation.stm.isfinite().all()
        assert conversation.stm.dtype == torch.float32
        seen.append(conversation.stm)
    assert conversation.writes == 20
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_a_stream_gives_the_same_answer_in_whole_characters() -> None:
    config = model_config(vocab_size=267)
    model = sample_model(config)
    pieces: list[str] = []
    streaming, asking = (Conversation(model, bytes_tokenizer(), seed=4) for _ in range(2))
    for number in range(4):
        stream = streaming.stream(f"größe {number} 日本", sampling=DRAWN)
        assert stream.reply is None
        pieces = list(stream)
        reply = asking.ask(f"größe {number} 日本", sampling=DRAWN)
        assert stream.reply == reply
        assert "".join(pieces) == reply.text
        assert torch.equal(streaming.stm, asking.stm)
    assert len(pieces) > 1


def test_an_abandoned_stream_leaves_the_memory_as_it_was() -> None:
    model = sample_model(model_config())
    prefer(model, EOS, -1e4)
    conversation = talk(model)
    before = conversation.stm
    stream = conversation.stream(query(1))
    assert next(stream)
    del stream
    assert conversation.stm is before
    assert conversation.writes == 0
    assert conversation.ask(query(1)) == talk(model).ask(query(1))


def test_a_stream_that_was_overtaken_does_not_write() -> None:
    model = sample_model(model_config())
    prefer(model, EOS, -1e4)
    conversation = talk(model)
    stream = conversation.stream(query(1), max_tokens=5)
    next(stream)
    conversation.ask(query(2), max_tokens=3)
    after = conversation.stm
    with pytest.raises(ConfigError, match="went on before this answer was finished"):
        list(stream)
    assert conversation.stm is after


def test_a_system_prompt_is_written_before_the_first_query() -> None:
    model = sample_model(model_config())
    conversation = talk(model)
    before = conversation.stm
    conversation.init_stm(query(9))
    expected = written(model, before, [BOS, *random_ids(5, 9)])
    torch.testing.assert_close(conversation.stm, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="the memory holds 1 interactions; reset it first"):
        conversation.init_stm(query(9))
    conversation.reset()
    assert torch.equal(conversation.stm, before)
    assert conversation.writes == 0
    conversation.ask(query(1), max_tokens=3)
    with pytest.raises(ConfigError, match="reset it first"):
        conversation.init_stm(query(9))


def test_a_conversation_goes_on_from_its_file(tmp_path: Path) -> None:
    model = sample_model(model_config())
    whole, first = talk(model, 5), talk(model, 5)
    expected = [whole.ask(query(n), sampling=DRAWN, max_tokens=9) for n in range(4)]
    found = [first.ask(query(n), sampling=DRAWN, max_tokens=9) for n in range(2)]
    first.save(tmp_path / "memory.safetensors")
    second = talk(model, 99)
    second.load(tmp_path / "memory.safetensors")
    found += [second.ask(query(n), sampling=DRAWN, max_tokens=9) for n in range(2, 4)]
    assert found == expected
    assert torch.equal(second.stm, whole.stm)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors"]


def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    conversation = talk(sample_model(model_config()))
    before = conversation.stm
    good = {"stm": torch.zeros(LAYERS, 1, SLOTS, WIDTH), "seed": torch.tensor(1), "writes": torch.tensor(2)}
    path = tmp_path / "memory"
    cases = [
        ({**good, "stm": torch.zeros(LAYERS, 1, SLOTS + 1, WIDTH)}, r"stm has shape .* this model needs"),
        ({**good, "stm": torch.full((LAYERS, 1, SLOTS, WIDTH), torch.nan)}, "stm holds numbers that are not"),
        ({key: good[key] for key in ("stm", "seed")}, r"writes has shape none \(missing\)"),
        ({**good, "more": torch.zeros(2)}, "more has shape .* no such entry"),
    ]
    for tensors, message in cases:
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message) as error:
            conversation.load(path)
        assert str(path) in str(error.value)
    path.write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        conversation.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        conversation.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be written"):
        conversation.save(tmp_path / "absent" / "memory")
    assert conversation.stm is before


def test_bad_arguments_are_refused_and_change_nothing() -> None:
    model = sample_model(model_config())
    conversation, other = talk(model), talk(sample_model(model_config()))
    before = conversation.stm
    most = SEQ_LEN - 4

    def refused(kind: type[RxtError], message: str, queries: list[str], who: list[Conversation]) -> None:
        with pytest.raises(kind, match=message):
            generate(who, queries)

    refused(DataError, f"the query has {SEQ_LEN} tokens .* at most {SEQ_LEN - 1} fit", [query(1, most + 1)],
            [conversation])  # fmt: skip
    refused(ConfigError, "queries: found 2; valid: one for each of 1", ["w11", "w12"], [conversation])
    refused(ConfigError, "found one twice", ["w11", "w12"], [conversation, conversation])
    refused(ConfigError, "found several models", ["w11", "w12"], [conversation, other])
    with pytest.raises(ConfigError, match="max_tokens: found 0; valid: 1 or more"):
        conversation.ask("w11", max_tokens=0)
    with pytest.raises(DataError, match="the system prompt has"):
        conversation.init_stm(query(1, SEQ_LEN))
    with pytest.raises(DataError, match="the interaction has"):
        conversation.replay(query(1, 10), query(2, SEQ_LEN))
    with pytest.raises(ConfigError, match="seed: found -1; valid: 0 to"):
        talk(model, -1)
    assert conversation.stm is before
    assert conversation.writes == 0
    assert generate([], []) == []
    assert len(conversation.ask(query(1, most)).tokens) == 1


def test_weights_that_are_not_finite_are_an_error_and_not_an_answer() -> None:
    model = sample_model(model_config())
    prefer(model, FIRST_WORD, float("nan"))
    conversation = talk(model)
    before = conversation.stm
    with pytest.raises(CheckpointError, match="logits are not finite"):
        conversation.ask(query(1))
    assert conversation.stm is before


def test_bf16_answers_with_a_memory_in_fp32() -> None:
    model = sample_model(model_config()).to(torch.bfloat16)
    conversation = talk(model)
    for number in range(3):
        assert conversation.ask(query(number), sampling=DRAWN, max_tokens=6).tokens
        assert conversation.stm.dtype == torch.float32
    exact = talk(sample_model(model_config()))
    exact.replay(query(1), query(2))
    conversation.reset()
    conversation.replay(query(1), query(2))
    assert (conversation.stm - exact.stm).abs().max() < 0.05 * exact.stm.abs().max()


def test_generate_is_at_hand_in_the_package() -> None:
    import rxt_dist
    from rxt_dist import generate as lazily

    assert rxt_dist.generate is lazily is generate
