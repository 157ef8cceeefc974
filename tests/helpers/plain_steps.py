"""The optimizer steps of helpers/expert_cases.py by autograd in one process.

What they have in common with those of the engines besides data and initial weights is the model (whole
experts) and, for the lanes, the schedule; losses, counts and updates are written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from helpers import naive
from helpers.expert_cases import (
    CLIP,
    OPTIMIZERS,
    STEPS,
    UNITS,
    WINDOW,
    Case,
    canonical_values,
    conversations,
    text_batch,
    whole_model,
)
from helpers.lanes import (
    Answer,
    fresh_stm,
    plain_answer,
    plain_context_answer,
    plain_encoding,
    plain_write,
    timeline,
)

from rxt_dist.model import SequenceLayout
from rxt_dist.model.moe import MoE

TASKS = ("mlm_loss", "ar_loss", "answer_loss")


class PlainRouter:
    """What a router computed in a step, token by token, and what follows from it for the next one."""

    def __init__(self, moe: MoE, name: str) -> None:
        self.moe, self.name = moe, name
        self.logits: list[torch.Tensor] = []
        """[N, E] of every pass of the step, with their graph."""
        self.shares = [1.0 / moe.config.num_experts] * moe.config.num_experts
        moe.router.proj.register_forward_hook(
            lambda module, arguments, out: self.logits.append(out[:, : moe.config.num_experts])
        )

    def switch(self) -> torch.Tensor:
        """E times the sum over experts of the share of the step before and the mean probability now."""
        means = torch.softmax(torch.cat(self.logits), dim=1).mean(dim=0)
        return len(self.shares) * sum(share * mean for share, mean in zip(self.shares, means, strict=True))

    def z(self) -> torch.Tensor:
        return torch.cat(self.logits).exp().sum(dim=1).log().pow(2).mean()

    def update(self) -> None:
        config, bias = self.moe.config, self.moe.router.selection_bias
        loads = [0] * config.num_experts
        for row in torch.softmax(torch.cat(self.logits).detach(), dim=1):
            scores = (row if bias is None else row + bias).tolist()
            for expert in sorted(range(len(scores)), key=lambda e: -scores[e])[: config.top_k]:
                loads[expert] += 1
        mean = sum(loads) / len(loads)
        self.shares = [load / sum(loads) for load in loads]
        if bias is not None and config.bias_update_rate is not None:
            for expert, load in enumerate(loads):
                bias[expert] += config.bias_update_rate * ((load < mean) - (load > mean))


class Plain:
    """The steps of a case in one process: autograd over the whole batch and torch's own optimizers."""

    def __init__(self, case: Case, optimizer: str) -> None:
        self.case, self.config = case, case.config()
        self.model = whole_model(case)
        self.margin = float("inf")
        self.unused: bool | None = None
        """Whether no token chose the last expert; None if no token was routed."""
        self.routers = [
            PlainRouter(moe, name) for name, moe in self.model.named_modules() if isinstance(moe, MoE)
        ]
        for plain in self.routers:
            plain.moe.router.register_forward_hook(self._look)
        self.start = {"smat, decoder joins": 1, "smat, frozen decoder": STEPS}.get(case.stage, 0)
        self.carried: dict[int, torch.Tensor] = {}
        self.source = conversations(case)
        self.places = timeline(self.source, UNITS, STEPS * WINDOW)
        self.settings = dict(OPTIMIZERS[optimizer]["params"])
        self.settings.pop("torch_adam", None)
        self.kind = getattr(torch.optim, optimizer)
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def _look(self, router: Any, arguments: Any, routing: Any) -> None:
        """The least distance between what chooses an expert and what the best one has that was not chosen."""
        logits = F.linear(arguments[0].detach(), router.proj.weight.detach())
        bias = router.selection_bias
        scores = logits if bias is None else logits.softmax(1) + bias
        best = scores.topk(router.top_k + 1).values
        self.margin = min(self.margin, float((best[:, -2] - best[:, -1]).min()))
        unused = not bool((routing.experts == logits.shape[1] - 1).any())
        self.unused = unused if self.unused is None else self.unused and unused

    def groups(self) -> dict[int, dict[str, torch.nn.Parameter]]:
        """Trained parameters by the step from which they train; the embedding goes with the encoder."""
        found: dict[int, dict[str, torch.nn.Parameter]] = {}
        components = {
            "joint_lm": ("encoder", "decoder", "mlm_head"),
            "memory_attention": ("memory_attention",),
            "context_sft": ("encoder", "decoder"),
        }.get(self.case.stage, ("encoder", "decoder", "memory_attention"))
        for name, parameter in self.model.named_parameters():
            if name.startswith(components):
                start = self.start if name.startswith("decoder") else 0
                found.setdefault(start, {})[name] = parameter
        return found

    def loss(self, number: int) -> torch.Tensor:
        for router in self.routers:
            router.logits.clear()
        if self.case.stage == "joint_lm":
            packs = [text_batch(self.case, range(unit, unit + 1), number) for unit in range(UNITS)]
            values = naive.means(self.model, packs)
        elif self.case.stage == "memory_attention":
            return self._write_loss(number)
        else:
            read = self._context_answers if self.case.stage == "context_sft" else self._lane_answers
            values = _answer_means(read(number))
        task = torch.stack([values[name] for name in TASKS if name in values]).sum()
        moe = self.config.model.decoder.moe
        assert moe is not None
        if moe.aux_loss == "reference":
            balance = values["aux_loss"]
        else:
            balance = torch.stack([router.switch() for router in self.routers]).mean()
        z = torch.stack([router.z() for router in self.routers]).mean()
        return task + moe.aux_loss_scale * balance + moe.z_loss_weight * z

    def _write_loss(self, number: int) -> torch.Tensor:
        """Distances of written slots to their labels, and the size of the changes."""
        cosines, changes, slots = [], [], 0
        for lane in range(UNITS):
            stm = self.carried.get(lane)
            for places in self.places[number * WINDOW : (number + 1) * WINDOW]:
                place = places[lane]
                interaction = self.source.conversations[place.conversation][place.number]
                before = fresh_stm(self.config, place.visit) if place.number == 0 else stm
                assert before is not None
                with torch.no_grad():
                    layout = SequenceLayout.from_lengths([len(interaction.tokens)])
                    encoded = self.model.encoder(torch.tensor(interaction.tokens), layout)
                stm = self.model.memory_attention(before, encoded, layout)
                new = 0.9 if place.number == 0 else max(0.05, 0.5 - 0.05 * place.number)
                used = min(self.config.model.stm_size, len(interaction.tokens))
                label = (1 - new) * before.detach()[:, 0, :used] + new * encoded[:, :used]
                cosines.append(F.cosine_similarity(stm[:, 0, :used], label, dim=-1).mean(dim=0).sum())
                changes.append((place.number + 1) ** 0.5 * (stm - before).square().mean())
                slots += used
            assert stm is not None
            self.carried[lane] = stm.detach()
        return -torch.stack(cosines).sum() / slots + 0.3 * torch.stack(changes).mean()

    def _context_answers(self, number: int) -> Iterator[Answer]:
        for lane in range(UNITS):
            read: list[torch.Tensor] = []
            for places in self.places[number * WINDOW : (number + 1) * WINDOW]:
                place = places[lane]
                conversation = self.source.conversations[place.conversation]
                if place.number == 0:
                    read = []
                else:
                    read.append(plain_encoding(self.model, conversation[place.number - 1].tokens))
                yield plain_context_answer(self.model, read, conversation[place.number])

    def _lane_answers(self, number: int) -> Iterator[Answer]:
        for lane in range(UNITS):
            stm = self.carried.get(lane)
            for places in self.places[number * WINDOW : (number + 1) * WINDOW]:
                place = places[lane]
                conversation = self.source.conversations[place.conversation]
                if place.number == 0:
                    stm = fresh_stm(self.config, place.visit)
                else:
                    assert stm is not None
                    stm = plain_write(self.model, stm, conversation[place.number - 1])
                yield self._answer(stm, conversation[place.number], number)
            assert stm is not None
            self.carried[lane] = stm.detach()

    def _answer(self, stm: torch.Tensor, interaction: Any, number: int) -> Answer:
        frozen = [p for p in self.model.decoder.parameters() if number < self.start]
        for parameter in frozen:
            parameter.requires_grad_(False)
        answer = plain_answer(self.model, stm, interaction)
        for parameter in frozen:
            parameter.requires_grad_(True)
        return answer

    def step(self, number: int) -> tuple[float, float, dict[str, torch.Tensor]]:
        """Loss, norm and gradients (before clipping) of one step, which it also makes."""
        self.model.zero_grad()
        loss = self.loss(number)
        loss.backward()
        trained = {start: group for start, group in self.groups().items() if start <= number}
        gradients = {}
        for group in trained.values():
            for name, parameter in group.items():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients[name] = parameter.grad.clone()
        members = [parameter for group in trained.values() for parameter in group.values()]
        norm = float(torch.nn.utils.clip_grad_norm_(members, CLIP))
        for start, group in trained.items():
            if start not in self.optimizers:
                self.optimizers[start] = self.kind(list(group.values()), **self.settings)
            self.optimizers[start].step()
        if number >= self.start:
            for router in self.routers if self.case.stage != "memory_attention" else []:
                router.update()
        return loss.item(), norm, gradients

    def canonical(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``values`` of parameters by canonical name."""
        return canonical_values(self.model, values)


def _answer_means(found: Iterator[Answer]) -> dict[str, torch.Tensor]:
    answers = list(found)
    loss = torch.stack([a.loss for a in answers]).sum() / sum(a.targets for a in answers)
    balance = torch.stack([a.balance for a in answers]).sum() / sum(a.tokens for a in answers)
    return {"answer_loss": loss, "aux_loss": balance}
