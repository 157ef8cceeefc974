"""Joint language-model objective on packed pieces: masked-LM for the encoder, next token for the decoder.

The encoder reads the masked sequence; its detached outputs of every layer are the memory that the
decoder reads while it predicts the next token of the unmasked sequence. ``components`` reduces this to
the separate pre-trainings: ``encoder`` keeps only the masked-LM loss, ``decoder`` only the
autoregressive one, with a constant initial memory behind frozen cross-attention.

Shape legend: N tokens, D embedding width, L decoder layers with memory, S memory slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.data.batch import TextBatch
from rxt_dist.kernels.noise import with_noise
from rxt_dist.kernels.permute import take_rows
from rxt_dist.model import Memory, RxTModel, SequenceLayout
from rxt_dist.model.stm import initial_stm
from rxt_dist.randomness import uniform_tensor
from rxt_dist.stages.base import StageModule, Term, layer_keys, router_weights, uses


class TextStageModule(StageModule):
    """``joint_lm`` and ``interaction_sft``: they differ only in data and in what is supervised."""

    def __init__(self, model: RxTModel, config: RunConfig, stage: StageConfig) -> None:
        super().__init__()
        self.stage = stage
        self.with_encoder = uses(stage.components, "encoder")
        self.with_decoder = uses(stage.components, "decoder")
        self.weights = {}
        if self.with_encoder:
            self.encoder = model.encoder
            self.mlm_head = model.mlm_head
            self.weights |= {"mlm_loss": stage.encoder_loss_scale, "mlm_accuracy": 0.0}
        if self.with_decoder:
            self.decoder = model.decoder
            scale = stage.decoder_loss_scale
            self.weights |= {"ar_loss": scale, "ar_accuracy": 0.0, **router_weights(config, scale)}
        self._constant_stm: torch.Tensor | None = None
        if not self.with_encoder:
            self._constant_stm = initial_stm(config.model, config.seed)

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Memory cross-attention of a decoder that trains alone: what it reads never changes."""
        if self.with_decoder and not self.with_encoder:
            for layer in self.decoder.layers:
                for part in (layer.cross_norm, layer.stm_norm, layer.cross_attention):
                    if isinstance(part, nn.Module):
                        yield from part.parameters()

    def local_counts(self, batch: TextBatch) -> dict[str, int]:
        return {
            "tokens": batch.tokens.numel(),
            "masked": batch.masked_index.numel(),
            "next": batch.next_index.numel(),
        }

    def run(self, batch: TextBatch, stm: torch.Tensor | None) -> tuple[dict[str, Term], torch.Tensor | None]:
        return self.terms(batch), None

    def terms(self, batch: TextBatch) -> dict[str, Term]:
        """Sums of one micro-batch by metric name."""
        terms: dict[str, Term] = {}
        layers = None
        if self.with_encoder:
            layers = self.encoder.outputs(batch.masked_tokens, batch.layout)
            loss, correct = self.mlm_head(take_rows(layers[-1], batch.masked_index), batch.masked_targets)
            terms["mlm_loss"] = Term(loss, "masked")
            terms["mlm_accuracy"] = Term(correct, "masked")
        if self.with_decoder:
            memory = self.memory(layers, batch.layout, batch.token_keys)
            output = self.decoder(batch.tokens, batch.layout, memory)
            loss, correct = self.decoder.lm_head(
                take_rows(output.hidden, batch.next_index), batch.next_targets
            )
            terms["ar_loss"] = Term(loss, "next")
            terms["ar_accuracy"] = Term(correct, "next")
            terms |= self.router_terms(output.aux_sum, output.z_sum)
        return terms

    def memory(
        self, layers: Sequence[torch.Tensor] | None, layout: SequenceLayout, token_keys: torch.Tensor | None
    ) -> Memory:
        """Memory the decoder reads: detached encoder layers, L of [N, D], or the constant initial STM.

        While training, slots are dropped and noise is added as the stage says; both are pure functions
        of ``token_keys`` [N] and the layer.
        """
        if layers is None:
            assert self._constant_stm is not None
            weight = next(self.decoder.parameters())
            return Memory.of_stm(self._constant_stm.to(weight), layout)
        states = [layer.detach() for layer in layers]
        stage = self.stage
        if self.training and token_keys is not None and (stage.slot_dropout > 0 or stage.noise_level > 0):
            return Memory.of_sequence(self._disturb(torch.stack(states), token_keys), layout)
        return Memory.of_sequence(states, layout)

    @property
    def generates(self) -> bool:
        return self.with_decoder

    def next_token_logits(self, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """Logits of the token after each sequence: [B, V], in the dtype of the weights.

        The memory is what training would have given: the encoder's layers of the tokens so far.
        """
        layers = self.encoder.outputs(tokens, layout) if self.with_encoder else None
        output = self.decoder(tokens, layout, self.memory(layers, layout, None))
        last = layout.cu_seqlens[1:].long() - 1
        logits: torch.Tensor = self.decoder.lm_head(output.hidden[last])
        return logits

    def _disturb(self, states: torch.Tensor, token_keys: torch.Tensor) -> torch.Tensor:
        stage = self.stage
        if stage.slot_dropout > 0:
            keys = layer_keys(token_keys, "slot_dropout", states.shape[0])
            kept = uniform_tensor(keys) >= stage.slot_dropout
            states = states * kept.unsqueeze(-1)
        if stage.noise_level > 0:
            keys = layer_keys(token_keys, "noise", states.shape[0])
            states = with_noise(states, keys, stage.noise_level)
        return states
