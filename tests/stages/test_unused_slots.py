"""Stage memory_attention: the label of slots beyond the end of an interaction."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.lanes import (
    PAD,
    SLOTS,
    Interaction,
    Lanes,
    MemoryPieces,
    fresh_stm,
    gradients,
    lane_config,
    lane_module,
    plain_write,
    random_conversations,
    timeline,
    windows,
)

from rxt_dist.config import RunConfig
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.interchange.reference import load_reference
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import RxTModel, SequenceLayout
from rxt_dist.stages import build_stage
from rxt_dist.stages.memory_attention import pad_interactions

COUNTS = [3, 1, 5, 2, 4]
LANES = 4
FIXTURE = Path(__file__).parent.parent / "parity" / "fixtures" / "memory_attention_step.pt"


def writing(**fields: Any) -> RunConfig:
    settings = "".join(f", {name}: {value}" for name, value in fields.items())
    return lane_config(f"{{name: memory_attention, steps: 4{settings}}}")


def source() -> MemoryPieces:
    """Interactions shorter and longer than the STM, and as long."""
    conversations = random_conversations(COUNTS, seed=4, longest=1)
    for number, conversation in enumerate(conversations):
        if number % 2:
            conversation[0] = Interaction.of([7, 8, 9, 10], [11])
    conversations[2][1] = Interaction([2, 5, 6, 3], 2, [0] * 4)
    found = MemoryPieces(conversations)
    assert {length > SLOTS for length in found.lengths} == {True, False}
    assert min(found.lengths) < SLOTS
    return found


def encoded(model: RxTModel, interaction: Interaction, padded: int) -> torch.Tensor:
    """Encoder layers [L, padded, D] of one padded interaction, layer by layer with an explicit mask."""
    tokens = torch.tensor(interaction.tokens + [PAD] * (padded - len(interaction.tokens)))
    real = torch.arange(padded) < len(interaction.tokens)
    found = []
    x = model.encoder.embedding(tokens)
    for layer in model.encoder.layers:
        _, normed = layer.attention_norm(x)
        x = x + attended(layer.attention, normed, real, model.encoder)
        x = x + layer.feed_forward(layer.feed_forward_norm(x)[1])
        found.append(x)
    return torch.stack(found)


def attended(attention: Any, x: torch.Tensor, real: torch.Tensor, encoder: Any) -> torch.Tensor:
    """Self-attention of all positions to the real ones."""
    d = encoder.head_width
    heads = attention.qkv.weight.shape[0] // d
    kv = (heads - x.shape[1] // d) // 2 if heads * d > x.shape[1] else 0
    assert kv, "the heads of the model must be those this loop expects"
    q, k, v = F.linear(x, attention.qkv.weight).view(len(x), heads, d).split([heads - 2 * kv, kv, kv], 1)
    inverse = 10000.0 ** (-torch.arange(0, d, 2) / d)
    angle = torch.arange(len(x))[:, None] * inverse

    def rotated(rows: torch.Tensor) -> torch.Tensor:
        even, odd = rows[..., ::2], rows[..., 1::2]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    q, k = rotated(q), rotated(k).repeat_interleave(q.shape[1] // kv, 1)
    v = v.repeat_interleave(q.shape[1] // kv, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / d**0.5
    weights = scores.masked_fill(~real, float("-inf")).softmax(-1)
    return attention.out(torch.einsum("hts,shd->thd", weights, v).flatten(1))


def plain_loss(
    config: RunConfig, module: Any, pieces: MemoryPieces, policy: str, window: int
) -> torch.Tensor:
    """Mean over all slots of all interactions, slot by slot."""
    model = SimpleNamespace(encoder=module.encoder, memory_attention=module.memory_attention)
    cosines = []
    for lane in range(LANES):
        stm = torch.zeros(0)
        for row in timeline(pieces, LANES, window):
            place = row[lane]
            interaction = pieces.conversations[place.conversation][place.number]
            before = fresh_stm(config, place.visit) if place.number == 0 else stm
            stm = plain_write(model, before, interaction)  # type: ignore[arg-type]
            new = 0.9 if place.number == 0 else 0.5 - 0.05 * place.number
            with torch.no_grad():
                layers = encoded(model, interaction, max(SLOTS, len(interaction.tokens)))  # type: ignore[arg-type]
            for slot in range(SLOTS):
                old = before.detach()[:, 0, slot]
                label = (1 - new) * old + new * layers[:, slot]
                if slot >= len(interaction.tokens) and policy == "kept":
                    label = old
                cosines.append(F.cosine_similarity(stm[:, 0, slot], label, dim=-1).mean())
    return -torch.stack(cosines).mean()


@pytest.mark.parametrize("policy", ["kept", "reference"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("micro", [4, 1])
def test_loss_and_gradients_are_those_of_a_plain_loop(policy: str, window: int, micro: int) -> None:
    config = writing(unused_slots=policy)
    module, reference, pieces = lane_module(config), lane_module(config), source()
    with windows(pieces, window=window, micro=micro, look_back=False) as loader:
        loss, metrics = Lanes(module, config).step(next(loader))
    expected = plain_loss(config, reference, pieces, policy, window)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    assert metrics[1] == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = gradients(module, loss), gradients(reference, expected)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in found.items():
        scale = max(wanted[name].abs().max(), 1e-4 * largest)
        assert (gradient - wanted[name]).abs().max() <= 1e-5 * scale, name


def test_the_policies_differ() -> None:
    losses = set()
    for policy in ("ignored", "kept", "reference"):
        config = writing(unused_slots=policy)
        with windows(source(), window=2, look_back=False) as loader:
            losses.add(round(Lanes(lane_module(config), config).step(next(loader))[0].item(), 6))
    assert len(losses) == 3


@pytest.mark.parametrize("policy", ["kept", "reference"])
def test_noise_on_the_labels_is_the_same_on_any_mesh(policy: str) -> None:
    config, silent = writing(unused_slots=policy, label_noise_level=0.5), writing(unused_slots=policy)
    losses = {}
    for name, own, micro, training in (
        ("noisy", config, 4, True),
        ("one lane at a time", config, 1, True),
        ("evaluation", config, 4, False),
        ("silent", silent, 4, True),
    ):
        module = lane_module(own).train(training)
        with windows(source(), window=2, micro=micro, look_back=False) as loader:
            losses[name] = Lanes(module, own).step(next(loader))[0].item()
    assert losses["one lane at a time"] == pytest.approx(losses["noisy"], rel=1e-5)
    assert losses["evaluation"] == losses["silent"]
    assert abs(losses["noisy"] - losses["silent"]) > 1e-4


def test_padding_is_read_by_nothing() -> None:
    """Real tokens are encoded as without padding, whatever the padding is."""
    config = writing(unused_slots="reference")
    module = lane_module(config)
    with windows(source(), window=1, look_back=False) as loader:
        at = next(loader).batches[0].positions[0]
    clean = module.encoder(at.tokens, at.layout)
    for pad in (PAD, 30):
        tokens, layout, rows = pad_interactions(at, 19, pad)
        assert layout.num_tokens == 19 * LANES
        layers = module.encoder(tokens, layout)
        torch.testing.assert_close(layers[:, rows], clean, rtol=1e-5, atol=1e-5)
        others = torch.ones(layout.num_tokens, dtype=torch.bool)
        others[rows] = False
        assert (tokens[others] == pad).all()


def flat(ids: torch.Tensor, mask: torch.Tensor) -> LaneInteractions:
    """Right-padded interactions [B, T] as lanes."""
    lengths = mask.sum(1).tolist()
    empty = torch.zeros(0, dtype=torch.int64)
    return LaneInteractions(
        tokens=ids[mask.bool()],
        layout=SequenceLayout.from_lengths(lengths),
        token_keys=torch.arange(int(mask.sum())),
        next_index=empty,
        next_targets=empty,
        target_marks=empty.to(torch.uint8),
        present=torch.ones(len(ids), dtype=torch.bool),
        reset=torch.zeros(len(ids), dtype=torch.bool),
        visits=torch.arange(len(ids)),
        numbers=torch.ones(len(ids), dtype=torch.int64),
    )


def test_four_published_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage itself, on recorded padded batches: losses, gradient norms and memories."""
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
    fixture = torch.load(FIXTURE, weights_only=True)
    states = fixture["state_dicts"]
    common = {"num_layers": 2, "embed_dim": 64, "att_heads": 8, "seq_len": 20, "stm_size": 20,
              "att_groups": 4, "att_query_groups": 4}  # fmt: skip
    text = {**common, "vocab_size": 97, "ff_dim": 48, "skip_memory_cross_attention": True}
    gates = {"interlayer_att_groups": 4, "interlayer_att_query_groups": 4, "use_gated_residual": True,
             "residual_gate_type": "linear", "use_tanh_residual_gate": False}  # fmt: skip
    encoder = load_reference("RxTEncoder", text, states["encoder"]).module
    cls = "RxTSelfInterlayerMemoryAttention"
    memory = load_reference(cls, {**common, **gates}, states["memory_attention"]).module
    stage = "{name: memory_attention, steps: 4, unused_slots: reference}"
    config = lane_config(stage, batch__lanes=3, model__stm_size=20, model__seq_len=20, model__vocab_size=97)
    model: Any = SimpleNamespace(encoder=encoder, memory_attention=memory)
    module: Any = build_stage(model, config, config.stages[0])
    module.freeze()
    optimizer = torch.optim.AdamW(memory.parameters(), **fixture["optimizer"])
    stm, padded = fixture["stm0"], 0
    for step in fixture["steps"]:
        at = flat(step["input_ids"], step["attention_mask"])
        padded += int((step["attention_mask"] == 0).sum())
        monkeypatch.setattr(module, "label_weights", lambda at, new=step["weights"][1]: torch.full((3,), new))
        batch = WindowBatch(at.visits, 0, (), (at,))
        loss, _, after = module(batch, module.local_counts(batch), stm)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        torch.testing.assert_close(loss, step["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(norm, step["grad_norm"], rtol=1e-5, atol=0, check_dtype=False)
        torch.testing.assert_close(after, step["new_stm"], rtol=1e-5, atol=1e-5)
        stm = after
    assert padded > 0, "without padding every policy would do"
