"""Conversations in memory, and training with memory as a plain loop: one conversation, one step at a time.

Nothing of the stage modules, the loader or the feed is used by the plain part; the components of the model
and the lane schedule are what it has in common with what is tested.

Shape legend: L memory layers, S STM slots, D embedding width, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rxt_dist.config import RunConfig, load_config
from rxt_dist.data.lane_loader import LaneInteractions, LaneLoader, WindowStep
from rxt_dist.data.lanes import LaneSchedule, LaneState
from rxt_dist.data.manifest import Split
from rxt_dist.data.pieces import InteractionPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import DecoderOutput, Memory, RxTModel, SequenceLayout, build_model
from rxt_dist.model.stm import draw_stm
from rxt_dist.randomness import derive_key, fold_in_tensor, signed_key
from rxt_dist.stages import build_stage
from rxt_dist.stages.lane_stage import Positions
from rxt_dist.stages.smat import SmatModule

VOCAB, SEQ_LEN, SLOTS = 41, 16, 6
PAD, UNK, BOS, EOS, MASK, QUERY, ANSWER = range(7)
FIRST_WORD = 7
KEY = 23  # of the stage, from which the lane schedule derives
SPECIAL = "{pad: 0, unk: 1, bos: 2, eos: 3, mask: 4, query: 5, answer: 6}"
SETTINGS = {
    "model.vocab_size": VOCAB,
    "model.special_tokens": SPECIAL,
    "model.seq_len": SEQ_LEN,
    "model.stm_size": SLOTS,
    "model.stm_init": "{distribution: standard, shared: false}",
    # An even mixture: what was written is read, and what was there before survives.
    "model.memory_attention.gate.bias_init": 0.0,
    "batch.lanes": 4,
}


@dataclass(frozen=True)
class Interaction:
    """[BOS] [Q] query..., [A] answer... [EOS], and a mark for every token."""

    tokens: list[int]
    answer: int
    """Tokens of the answer, [A] and [EOS] included; all of them are targets."""
    marks: list[int]

    @classmethod
    def of(
        cls, query: Sequence[int], answer: Sequence[int], marks: dict[int, int] | None = None
    ) -> Interaction:
        """From ordinary ids; ``marks``: word of the answer -> distance."""
        tokens = [BOS, QUERY, *query, ANSWER, *answer, EOS]
        found = [0] * len(tokens)
        for word, distance in (marks or {}).items():
            found[3 + len(query) + word] = distance
        return cls(tokens, len(answer) + 2, found)

    @property
    def targets(self) -> tuple[list[int], list[int], list[int]]:
        """Rows that predict, the tokens they should predict, and the marks of those."""
        first = len(self.tokens) - self.answer
        rows = list(range(first - 1, len(self.tokens) - 1))
        return rows, self.tokens[first:], self.marks[first:]


Conversation = list[Interaction]


def random_conversations(interactions: Sequence[int], seed: int = 1, longest: int = 5) -> list[Conversation]:
    """Conversations of these numbers of interactions, with up to ``longest`` words in a query or answer."""
    rng = np.random.default_rng(seed)

    def words() -> list[int]:
        return rng.integers(FIRST_WORD, VOCAB, int(rng.integers(1, longest + 1))).tolist()

    return [[Interaction.of(words(), words()) for _ in range(count)] for count in interactions]


def other_words(interaction: Interaction, by: int = 11) -> Interaction:
    """The same with every ordinary word replaced by another one."""
    words = [t if t < FIRST_WORD else FIRST_WORD + (t - FIRST_WORD + by) % (VOCAB - FIRST_WORD)
             for t in interaction.tokens]  # fmt: skip
    return Interaction(words, interaction.answer, interaction.marks)


class MemoryPieces:
    """What the lanes read of a dataset, from lists."""

    def __init__(
        self, conversations: Sequence[Conversation], prompts: Sequence[list[int]] | None = None
    ) -> None:
        """``prompts``: the system prompt of every conversation, empty for none."""
        self.conversations = conversations
        self.flat = [one for conversation in conversations for one in conversation]
        self.lengths = np.array([len(one.tokens) for one in self.flat], dtype=np.int32)
        self.answer_kept = np.array([one.answer for one in self.flat], dtype=np.int64)
        counts = np.array([len(conversation) for conversation in conversations], dtype=np.uint32)
        self.interaction_counts = counts
        self.interaction_starts = np.cumsum(counts.astype(np.int64)) - counts
        self.prompts = prompts or [[] for _ in conversations]
        self.prompt_kept = np.array([len(prompt) for prompt in self.prompts], dtype=np.int64)

    def read_tokens(self, pieces: np.ndarray) -> np.ndarray:
        return np.array([t for piece in pieces for t in self.flat[piece].tokens], dtype=np.int64)

    def lost(self, numbers: np.ndarray) -> np.ndarray:
        return np.zeros(len(numbers), dtype=np.bool_)

    lost_conversations = lost

    def damage(self) -> dict[tuple[int, int], str]:
        return {}

    def read_prompts(self, conversations: np.ndarray) -> np.ndarray:
        return np.array([t for number in conversations for t in self.prompts[number]], dtype=np.int64)

    def read_marks(self, pieces: np.ndarray) -> np.ndarray:
        return np.array([m for piece in pieces for m in self.flat[piece].marks], dtype=np.uint8)


def lane_config(stage: str = "{name: smat, steps: 4}", **settings: Any) -> RunConfig:
    """A run of one stage of a small model; ``__`` in a keyword stands for a dot."""
    own = {name.replace("__", "."): value for name, value in settings.items()}
    values = SETTINGS | {"stages": f"[{stage}]"} | own
    return load_config("tiny", [f"{key}={value}" for key, value in values.items()], require_data=False)


def lane_model(config: RunConfig, seed: int = 3) -> RxTModel:
    """A model in fp32 whose parameters are off special values (unit norms, zero biases)."""
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
    model = build_model(config.model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def lane_module(config: RunConfig, model: RxTModel | None = None) -> Any:
    """The module of the run's first stage, frozen as for training."""
    module = build_stage(model or lane_model(config), config, config.stages[0])
    module.freeze()
    return module


@contextmanager
def windows(
    source: Any, *, window: int, lanes: int = 4, rank: int = 0, ranks: int = 1, micro: int | None = None,
    look_back: bool = True, state: LaneState | None = None, system_prompts: bool = False,
) -> Iterator[Iterator[WindowStep]]:  # fmt: skip
    """The endless steps of one rank."""
    with LaneLoader(
        source,
        key=KEY,
        lanes=lanes,
        micro_lanes=micro or lanes // ranks,
        window=window,
        dp_rank=rank,
        dp_size=ranks,
        pad_id=PAD,
        stm_size=SLOTS,
        look_back=look_back,
        system_prompts=system_prompts,
        state=state,
    ) as loader:
        yield loader


def fresh_stm(config: RunConfig, visit: int) -> torch.Tensor:
    """The initial STM of one visit of a conversation: fp32 [L, 1, S, D]."""
    key = signed_key(derive_key(config.seed, "stm"))
    if config.model.stm_init.shared:
        return draw_stm(config.model, torch.tensor([key]))
    return draw_stm(config.model, fold_in_tensor(torch.tensor([visit]), key))


def plain_write(model: RxTModel, stm: torch.Tensor, interaction: Interaction) -> torch.Tensor:
    """The STM [L, 1, S, D] after one interaction."""
    layout = SequenceLayout.from_lengths([len(interaction.tokens)])
    encoded = model.encoder(torch.tensor(interaction.tokens), layout)
    return model.memory_attention(stm, encoded, layout)


@dataclass(frozen=True)
class Answer:
    """What the decoder made of one interaction: sums over its targets, and its balance value."""

    loss: torch.Tensor
    correct: int
    targets: int
    balance: torch.Tensor
    tokens: int
    hits: list[tuple[int, bool]]
    """Mark of every target and whether it was predicted."""


def plain_answer(model: RxTModel, stm: torch.Tensor, interaction: Interaction) -> Answer:
    """Decode one interaction with the STM [L, 1, S, D]."""
    layout = SequenceLayout.from_lengths([len(interaction.tokens)])
    output = model.decoder(torch.tensor(interaction.tokens), layout, Memory.of_stm(stm, layout))
    rows, wanted, marks = interaction.targets
    targets = torch.tensor(wanted)
    logits = output.hidden[rows] @ model.decoder.lm_head.weight.T + model.decoder.lm_head.bias
    right = (logits.argmax(-1) == targets).tolist()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    hits = list(zip(marks, right, strict=True))
    return Answer(loss, sum(right), len(rows), output.aux_sum, len(interaction.tokens), hits)


def plain_encoding(model: RxTModel, tokens: list[int]) -> torch.Tensor:
    """[L, N, D]."""
    return model.encoder(torch.tensor(tokens), SequenceLayout.from_lengths([len(tokens)]))


def plain_context_answer(model: RxTModel, read: list[torch.Tensor], interaction: Interaction) -> Answer:
    """The answer that reads encodings [L, N, D], laid side by side as if they were one STM [L, 1, S, D]."""
    if not read:
        width = model.config.embed_dim
        silent = _without_memory(model)
        return plain_answer(silent, torch.ones(len(model.decoder.layers), 1, 1, width), interaction)
    return plain_answer(model, torch.cat(read, dim=1).unsqueeze(1), interaction)


def _without_memory(model: RxTModel) -> RxTModel:
    """The same model whose cross-attention finds only zeros: what attention to nothing gives."""
    parameters = {
        name: torch.zeros_like(parameter) if ".cross_attention.kv." in name else parameter
        for name, parameter in model.decoder.named_parameters()
    }

    class Silent:
        encoder = model.encoder

        class decoder:  # noqa: N801 - stands in for the module of this name
            lm_head = model.decoder.lm_head

            def __new__(cls, *arguments: Any) -> Any:
                return torch.func.functional_call(model.decoder, parameters, arguments)

    return Silent  # type: ignore[return-value]


def plain_memories(model: RxTModel, stm: torch.Tensor, conversation: Conversation) -> list[torch.Tensor]:
    """The STM [L, 1, S, D] that each interaction is answered with, from a fresh one."""
    found = [stm]
    for interaction in conversation[:-1]:
        found.append(plain_write(model, found[-1], interaction))
    return found


@dataclass(frozen=True)
class Place:
    """One lane at one position of time."""

    visit: int
    conversation: int
    number: int


def timeline(
    source: Any,
    lanes: int,
    positions: int,
    key: int = KEY,
    sizes: Sequence[int] | None = None,
    weights: Sequence[int] = (1,),
) -> list[list[Place]]:
    """What every lane serves at every position: [position][lane]; ``sizes`` are those of the datasets."""
    counts = source.interaction_counts
    schedule = LaneSchedule(counts, key=key, lanes=lanes, sizes=sizes, weights=weights)
    window, _ = schedule.next_window(LaneState.initial(lanes, len(weights)), positions)
    return [
        [
            Place(int(window.visits[g, t]), int(window.conversations[g, t]), int(window.interactions[g, t]))
            for g in range(lanes)
        ]
        for t in range(positions)
    ]


def lane_values(values: torch.Tensor, at: LaneInteractions) -> list[torch.Tensor]:
    """Rows of a flat tensor [N, ...] by lane."""
    return list(values.split(at.layout.cu_seqlens.diff().tolist()))


class Recorder:
    """Keeps what a SMAT module decodes with, position by position, as long as it is attached."""

    def __init__(self, module: SmatModule) -> None:
        self.memories: list[torch.Tensor] = []
        self.hidden: list[list[torch.Tensor]] = []
        self.positions: list[LaneInteractions] = []
        advance, decode = module.advance, module.decode

        def advanced(stm: torch.Tensor, look_backs: Positions, positions: Positions) -> Any:
            self.positions.extend(positions)
            return advance(stm, look_backs, positions)

        def recorded(stm: torch.Tensor, at: LaneInteractions) -> DecoderOutput:
            output = decode(stm, at)
            lanes = self.positions[-1].layout.num_sequences
            self.memories.extend(stm.detach().clone().split(lanes, dim=1))
            values = lane_values(output.hidden.detach(), at)
            self.hidden.extend(values[start : start + lanes] for start in range(0, len(values), lanes))
            return output

        module.advance, module.decode = advanced, recorded  # type: ignore[method-assign]


class Lanes:
    """Windows run one after the other with the STM carried, as the trainer does, without updates."""

    def __init__(self, module: Any, config: RunConfig, lanes: int = 4) -> None:
        self.module = module
        model = config.model
        self.stm = torch.zeros(model.decoder.num_layers, lanes, model.stm_size, model.embed_dim)

    def step(self, step: WindowStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (with graph) and metrics of a step of a single rank; the micro-batches summed."""
        loss, metrics = [], []
        for batch in step.batches:
            one, values, carried = self.module(batch, step.counts, self.stm[:, batch.lanes])
            self.stm[:, batch.lanes] = carried
            loss.append(one)
            metrics.append(values)
        return torch.stack(loss).sum(), torch.stack(metrics).sum(0)


def gradients(module: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of every trainable parameter by name; fails where one is missing."""
    module.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, missing
    return {name: gradient.clone() for name, gradient in found.items()}


def size_of(found: dict[str, torch.Tensor], component: str) -> float:
    """Largest gradient of a component."""
    return max(float(g.abs().max()) for name, g in found.items() if name.startswith(component))


def stored_conversations(folder: Path, split: Split, seq_len: int) -> list[Conversation]:
    """The conversations of a dataset folder, as the lanes read them."""
    source = InteractionPieces(Dataset(folder, split), seq_len)
    found = []
    for start, end in pairwise(source.dataset.interaction_starts.tolist()):
        conversation = []
        for piece in range(start, end):
            where = np.array([piece])
            tokens, marks = source.read_tokens(where).tolist(), source.read_marks(where).tolist()
            conversation.append(Interaction(tokens, int(source.answer_kept[piece]), marks))
        found.append(conversation)
    return found
