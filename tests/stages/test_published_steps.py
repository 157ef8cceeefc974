"""Stage smat with a window of one interaction, on four recorded optimizer steps of padded batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from helpers.lanes import lane_config

from rxt_dist.data.batch import supervised_rows
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.interchange.reference import ReferenceDecoder, load_reference
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import DecoderOutput, SequenceLayout
from rxt_dist.stages import build_stage

FIXTURE = Path(__file__).parent.parent / "parity" / "fixtures" / "smat_steps.pt"
COMMON = {"num_layers": 2, "embed_dim": 64, "att_heads": 8, "seq_len": 20, "stm_size": 20,
          "att_groups": 4, "att_query_groups": 4}  # fmt: skip
TEXT = {**COMMON, "vocab_size": 97, "ff_dim": 48}
EXPERTS = {"use_moe": True, "num_experts": 6, "moe_top_k": 2, "num_shared_experts": 0,
           "use_vectorized_moe": False}  # fmt: skip
MEMORY = {**COMMON, "interlayer_att_groups": 4, "interlayer_att_query_groups": 4, "use_gated_residual": True,
          "residual_gate_type": "linear", "use_tanh_residual_gate": False}  # fmt: skip


def interactions(step: dict[str, torch.Tensor], present: bool) -> LaneInteractions:
    """The real tokens of a recorded batch [3, 20], one interaction a lane."""
    ids, mask = step["input_ids"], step["attention_mask"].bool()
    lengths = mask.sum(1).numpy()
    tokens = ids[mask]
    index = torch.from_numpy(supervised_rows(lengths, step["answer_lengths"].numpy()))
    lanes = len(ids)
    return LaneInteractions(
        tokens=tokens,
        layout=SequenceLayout.from_lengths(lengths),
        token_keys=torch.arange(len(tokens)),
        next_index=index,
        next_targets=tokens[index + 1],
        target_marks=torch.zeros(len(index), dtype=torch.uint8),
        present=torch.full((lanes,), present),
        reset=torch.zeros(lanes, dtype=torch.bool),
        visits=torch.arange(lanes),
        numbers=torch.ones(lanes, dtype=torch.int64),
    )


def test_four_published_steps() -> None:
    """Losses, gradient norms, and the memories that the answers read."""
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
    fixture = torch.load(FIXTURE, weights_only=True)
    states = fixture["state_dicts"]
    encoder = load_reference("RxTEncoder", {**TEXT, "skip_memory_cross_attention": True}, states["encoder"])
    decoder = load_reference("RxTDecoder", {**TEXT, **EXPERTS}, states["decoder"])
    memory = load_reference("RxTSelfInterlayerMemoryAttention", MEMORY, states["memory_attention"])
    assert isinstance(decoder, ReferenceDecoder)
    decoder.module.embedding = encoder.module.embedding
    config = lane_config(batch__lanes=3, model__stm_size=20, model__seq_len=20, model__vocab_size=97)
    parts: Any = SimpleNamespace(
        encoder=encoder.module, memory_attention=memory.module, decoder=decoder.module
    )
    module: Any = build_stage(parts, config, config.stages[0])
    read: list[torch.Tensor] = []

    def decode(stm: torch.Tensor, at: LaneInteractions) -> DecoderOutput:
        # The recorded balance term counts padding, which the stage does not have.
        read.append(stm.detach())
        output = decoder.run_padded(step["input_ids"], step["attention_mask"], stm)
        return replace(output, hidden=output.hidden[step["attention_mask"].bool().flatten()])

    module.decode = decode
    optimizer = torch.optim.AdamW(module.parameters(), **fixture["optimizer"])
    stm, previous = fixture["stm0"], fixture["steps"][0]
    for number, step in enumerate(fixture["steps"]):
        at = interactions(step, True)
        batch = WindowBatch(at.visits, 0, (interactions(previous, number > 0),), (at,))
        counts = {"answer": int(step["answer_lengths"].sum()), "tokens": step["input_ids"].numel()}
        loss, _, stm = module(batch, counts, stm)
        optimizer.zero_grad()
        loss.backward()
        for parameter in module.parameters():
            # The recorded optimizer passed over what the first step does not reach. For the engine's,
            # a gradient of zero is an update: weight decay applies.
            if number == 0 and parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        torch.testing.assert_close(loss, step["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(norm, step["grad_norm"], rtol=1e-5, atol=0, check_dtype=False)
        torch.testing.assert_close(read[-1], step["stm"], rtol=1e-5, atol=2e-6)
        assert torch.equal(stm, read[-1])
        previous = step
