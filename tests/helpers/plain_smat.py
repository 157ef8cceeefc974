"""Stage smat as a plain loop: all lanes in one process, a graph a lane, torch's AdamW and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from helpers.lanes import MemoryPieces, fresh_stm, plain_answer, plain_write, stored_conversations, timeline
from torch import nn

from rxt_dist.config import RunConfig, stage_optimizer
from rxt_dist.data.reader import Dataset
from rxt_dist.model import RxTModel, SequenceLayout
from rxt_dist.randomness import derive_key

NEVER = 10**9


class PlainSmat:
    """The steps of stage ``index`` of a run.

    A component that is still frozen is computed with copies of its weights that take no gradient. Its
    parameters join the optimizer at their step, without a history.
    """

    def __init__(self, config: RunConfig, model: RxTModel, index: int, steps: int) -> None:
        self.config, self.model, self.steps = config, model, steps
        self.stage = config.stages[index]
        self.settings = stage_optimizer(config, self.stage)
        mixed = config.data.datasets("conversations")
        length = config.model.seq_len
        stored = [stored_conversations(Path(one.path), "train", length) for one in mixed]
        self.prompts = [
            dataset.system_prompt(number).tolist()[:length]
            for dataset in (Dataset(Path(one.path), "train") for one in mixed)
            for number in range(dataset.num_documents)
        ]
        self.source = MemoryPieces([talk for dataset in stored for talk in dataset])
        self.window, self.lanes = config.batch.window, config.batch.lanes or 0
        key = derive_key(config.seed, "stage", "smat", index)
        sizes, weights = [len(dataset) for dataset in stored], [one.weight for one in mixed]
        self.places = timeline(self.source, self.lanes, steps * self.window, key, sizes, weights)
        self.carried: dict[int, torch.Tensor] = {}
        self.prompts_written = 0
        self._optimizers: dict[int, torch.optim.AdamW] = {}

    def start(self, component: str) -> int:
        if component in self.stage.frozen:
            return NEVER
        return getattr(self.stage.unfreeze, component, None) or 0

    def groups(self) -> dict[int, list[nn.Parameter]]:
        """Parameters by the step from which they train; the embedding has the first of its two."""
        found: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            component = name.partition(".")[0]
            if component == "mlm_head" or not parameter.requires_grad:
                continue
            start = self.start(component)
            if name == "encoder.embedding.weight":
                start = min(self.start("encoder"), self.start("decoder"))
            found.setdefault(start, []).append(parameter)
        return found

    def rate(self, number: int, start: int) -> float:
        """Learning rate of a group: its own linear warm-up under the cosine of the stage."""
        warmup = self.settings.warmup_steps
        progress = max(0, number - warmup) / max(1, self.steps - warmup)
        floor = self.settings.min_lr_ratio
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.settings.lr * cosine * min(1.0, (number - start + 1) / max(1, warmup))

    def answers(self, number: int) -> list:
        """The answers of one step; leaves behind what the lanes carry."""
        found = []
        for lane in range(self.lanes):
            stm = self.carried.get(lane)
            for places in self.places[number * self.window : (number + 1) * self.window]:
                place = places[lane]
                conversation = self.source.conversations[place.conversation]
                prompt = self.prompts[place.conversation] if self.stage.system_prompts else []
                if place.number == 0:
                    stm = fresh_stm(self.config, place.visit)
                    if prompt:
                        stm = self._write_prompt(stm, prompt, number)
                else:
                    assert stm is not None
                    with self._frozen(number, "encoder", "memory_attention"):
                        stm = plain_write(self.model, stm, conversation[place.number - 1])
                with self._frozen(number, "decoder"):
                    found.append(plain_answer(self.model, stm, conversation[place.number]))
            assert stm is not None
            self.carried[lane] = stm.detach()
        return found

    def step(self, number: int) -> dict[str, float]:
        """Train one step; its losses, as sums over the whole step divided by its counts."""
        answers = self.answers(number)
        targets, tokens = sum(a.targets for a in answers), sum(a.tokens for a in answers)
        answer_loss = torch.stack([a.loss for a in answers]).sum() / targets
        balance = torch.stack([a.balance for a in answers]).sum() / tokens
        loss = answer_loss + 0.01 * balance
        self.model.zero_grad()
        loss.backward()
        trained = {start: group for start, group in self.groups().items() if start <= number}
        parameters = [parameter for group in trained.values() for parameter in group]
        for parameter in parameters:
            if parameter.grad is None:  # no lane has a past: as zero, it counts as an update
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        for start, group in trained.items():
            optimizer = self._optimizer(start, group)
            optimizer.param_groups[0]["lr"] = self.rate(number, start)
            optimizer.step()
        return {
            "loss": loss.item(),
            "answer_loss": answer_loss.item(),
            "answer_accuracy": sum(a.correct for a in answers) / targets,
            "aux_loss": balance.item(),
            "grad_norm": norm.item(),
            "tokens": tokens,
        }

    def _optimizer(self, start: int, group: list[nn.Parameter]) -> torch.optim.AdamW:
        if start not in self._optimizers:
            settings = self.settings
            self._optimizers[start] = torch.optim.AdamW(
                group, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
            )
        return self._optimizers[start]

    def _write_prompt(self, stm: torch.Tensor, prompt: list[int], number: int) -> torch.Tensor:
        self.prompts_written += 1
        with self._frozen(number, "encoder", "memory_attention"):
            layout = SequenceLayout.from_lengths([len(prompt)])
            return self.model.memory_attention(stm, self.model.encoder(torch.tensor(prompt), layout), layout)

    @contextmanager
    def _frozen(self, number: int, *components: str) -> Iterator[None]:
        """Inside, the parameters of those of ``components`` that are frozen at step ``number`` are constants;
        the embedding only for this use of it."""
        off = [
            parameter
            for component in components
            if self.start(component) > number
            for parameter in self.model.get_submodule(component).parameters()
            if parameter.requires_grad
        ]
        for parameter in off:
            parameter.requires_grad_(False)
        yield
        for parameter in off:
            parameter.requires_grad_(True)
