# ruff: noqa: N806 (sizes are called by the letters of the shape legend)
"""A second opinion: the published components as plain loops over padded [B, T, D] batches.

Written from the formulas, with published tensor names and nothing of the package in it: every head, expert,
layer and token by itself. Slow, and meant to be read.

Shape legend: B sequences, T positions, S slots, L layers, D width, d head width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
State = Mapping[str, Tensor]
EPS = 1.1920929e-07
DEFAULTS: dict[str, Any] = {
    "num_layers": 12,
    "vocab_size": 20000,
    "embed_dim": 512,
    "ff_dim": 1536,
    "att_heads": 16,
    "seq_len": 1024,
    "stm_size": 1024,
    "att_groups": 1,
    "use_gated": True,
    "ff_activation": "swish",
    "use_rms_norm": True,
    "num_experts": 1,
    "moe_top_k": 1,
    "num_shared_experts": 1,
    "use_vectorized_moe": True,
    "moe_bias_mode": "global",
    "moe_shared_experts_bias_mode": "local",
    "dense_layer_dim": 1536,
    "head_norm_type": "layer_norm",
    "use_attention_output_bias": True,
    "rope_base": 10000,
    "rope_layout": "interleaved",
    "norm_type": "classic-rms",
    "norm_init_gate": -2.0,
    "norm_decay": 0.9,
    "residual_gate_type": "static",
    "residual_per_slot_gate": True,
    "residual_gate_slot_status_type": "mean",
    "use_tanh_residual_gate": True,
    "num_groups": 1,
}
ACTIVATIONS = {"swish": F.silu, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class Part:
    """A configuration with its defaults, and the tensors under a prefix."""

    def __init__(self, config: Mapping[str, Any], state: State, prefix: str = "") -> None:
        self.config, self.state, self.prefix = {**DEFAULTS, **config}, state, prefix

    def option(self, key: str) -> Any:
        return self.config.get(key)

    def under(self, name: str) -> Part:
        return Part(self.config, self.state, f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.state

    def tensor(self, name: str) -> Tensor:
        return self.state[f"{self.prefix}{name}"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.tensor(f"{name}.weight").T
        return y + self.tensor(f"{name}.bias") if self.has(f"{name}.bias") else y


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def layer_norm(x: Tensor, part: Part) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
    return centred / deviation * part.tensor("weight") + part.tensor("bias")


def norm(part: Part, x: Tensor) -> Tensor:
    return rms_norm(x, part.tensor("weight")) if part.option("use_rms_norm") else layer_norm(x, part)


def rotate(x: Tensor, part: Part) -> Tensor:
    """One head [B, T, d] by its positions."""
    d, T = x.shape[-1], x.shape[1]
    first, second = [], []
    for i in range(d // 2):
        theta = 1.0 / (part.option("rope_base") ** (torch.tensor(2.0 * i) / d))
        angle = (torch.arange(T, dtype=torch.float32) * theta).to(torch.float32)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first.append(x[..., 2 * i] * cos - x[..., 2 * i + 1] * sin)
        second.append(x[..., 2 * i] * sin + x[..., 2 * i + 1] * cos)
    if part.option("rope_layout") == "halves":
        return torch.stack(first + second, dim=-1)
    return torch.stack([member for pair in zip(first, second, strict=True) for member in pair], dim=-1)


def attend(
    part: Part, q_in: Tensor, kv_in: Tensor, visible: Tensor, *, turn_q: bool = False, turn_k: bool = False
) -> Tensor:
    """q_in [B, Tq, D], kv_in [B, Tk, D], visible bool broadcastable to [B, Tq, Tk] -> [B, Tq, D]."""
    d = part.option("embed_dim") // part.option("att_heads")
    q, k, v = part.linear("q_proj", q_in), part.linear("k_proj", kv_in), part.linear("v_proj", kv_in)
    query_heads, kv_heads = q.shape[-1] // d, k.shape[-1] // d
    turns = not part.option("use_nope")
    outputs = []
    for h in range(max(query_heads, kv_heads)):
        mine = h if query_heads >= kv_heads else h % query_heads
        theirs = h * kv_heads // query_heads if query_heads >= kv_heads else h
        qh, kh, vh = (x[..., n * d : (n + 1) * d] for x, n in ((q, mine), (k, theirs), (v, theirs)))
        if part.has("q_norm.weight"):
            qh, kh = rms_norm(qh, part.tensor("q_norm.weight")), rms_norm(kh, part.tensor("k_norm.weight"))
        if turn_q and turns:
            qh = rotate(qh, part)
        if turn_k and turns:
            kh = rotate(kh, part)
        scores = qh @ kh.transpose(1, 2) / math.sqrt(d)
        seen = visible.expand(scores.shape)
        weights = torch.where(seen, (scores - scores.amax(-1, keepdim=True).detach()).exp(), 0.0)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        outputs.append(weights @ vh)
    joined = torch.cat(outputs, dim=-1)
    if part.has("gate_proj.weight"):
        joined = joined * torch.sigmoid(part.linear("gate_proj", q_in))
    return part.linear("out_proj", joined)


def expert(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, part: Part) -> Tensor:
    """A feed-forward with weights [out, in]."""
    act = ACTIVATIONS[part.option("ff_activation")]
    h = x @ w1.T + (0.0 if b1 is None else b1)
    if part.option("use_gated"):
        half = h.shape[-1] // 2
        h = h[..., :half] * act(h[..., half:])
    else:
        h = act(h)
    return h @ w2.T + (0.0 if b2 is None else b2)


def dense(part: Part, x: Tensor) -> Tensor:
    first = "fc1.linear" if part.option("use_gated") else "fc1"
    names = (f"{first}.weight", f"{first}.bias", "fc2.weight", "fc2.bias")
    return expert(x, *(part.tensor(name) for name in names), part)


def nth_expert(part: Part, listed: str, stacked: str, e: int, x: Tensor) -> Tensor:
    if part.has(f"{listed}.{e}.fc2.weight"):
        return dense(part.under(f"{listed}.{e}"), x)
    b1 = part.tensor(f"{stacked}b1")[e] if part.has(f"{stacked}b1") else None
    b2 = part.tensor(f"{stacked}b2")[e] if part.has(f"{stacked}b2") else None
    w1, w2 = part.tensor(f"{stacked}w1")[e].T, part.tensor(f"{stacked}w2")[e].T
    return expert(x, w1, b1, w2, b2, part)


def moe(part: Part, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, D] -> (same, auxiliary value)."""
    rows = x.flatten(0, 1)
    E, K, S = (part.option(key) for key in ("num_experts", "moe_top_k", "num_shared_experts"))
    outputs: list[Tensor] = []
    counts, masses = [0] * E, [rows.new_zeros(()) for _ in range(E)]
    for row in rows:
        p = torch.softmax(part.linear("router.gate", row), dim=-1)
        chosen = sorted(range(E), key=lambda e, p=p: -p[e].item())[:K]
        total = sum(p[e] for e in chosen) + 1e-9
        y = sum(p[e] / total * nth_expert(part, "experts", "", e, row) for e in chosen)
        outputs.append(y + part.tensor("global_bias") if part.has("global_bias") else y)
        for e in chosen:
            counts[e] += 1
            masses[e] = masses[e] + p[e]
    N = len(rows)
    shares = [(n / (N * K + 1e-6), mass / max(n, 1e-6)) for n, mass in zip(counts, masses, strict=True)]
    aux = E * sum(f * P for f, P in shares)
    routed = torch.stack(outputs)
    if S == 0:
        return routed.view(x.shape), aux
    if S == 1:
        name = "shared_expert" if part.option("use_vectorized_moe") else "shared_experts.0"
        shared = dense(part.under(name), rows)
    else:
        g = torch.softmax(part.linear("shared_expert_gate", rows), dim=-1)
        shared = sum(g[:, s, None] * nth_expert(part, "shared_experts", "shared_", s, rows) for s in range(S))
        if part.has("shared_experts_bias"):
            shared = shared + part.tensor("shared_experts_bias")
        aux = aux + (g - 1 / S).abs().mean()
    if part.option("moe_use_weighted_shared_experts"):
        routed, shared = routed * K / (K + S), shared * S / (K + S)
    return (routed + shared).view(x.shape), aux


def feed_forward(part: Part, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return moe(part, x) if part.has("router.gate.weight") else (dense(part, x), None)


def layer(
    part: Part, x: Tensor, visible: Tensor, mask: Tensor | None, stm: Tensor | None, causal_cross: bool
) -> tuple[Tensor, Tensor | None]:
    n1 = norm(part.under("norm1"), x)
    x = x + attend(part.under("attention"), n1, n1, visible, turn_q=True, turn_k=True)
    if stm is not None and part.has("memory_cross_attention.q_proj.weight"):
        n2 = norm(part.under("norm2"), x)
        if mask is not None:
            n2 = n2 * mask[..., None].to(x.dtype)
        rows = norm(part.under("stm_norm"), stm) if part.has("stm_norm.weight") else stm
        rows = rows.expand(len(x), -1, -1)
        T, S = x.shape[1], rows.shape[1]
        sees = torch.ones(T, S, dtype=torch.bool)
        if causal_cross:
            sees = sees.tril()
        x = x + attend(part.under("memory_cross_attention"), n2, rows, sees, turn_q=True)
    y, aux = feed_forward(part.under("ff"), norm(part.under("norm3"), x))
    return x + y, aux


def decoder(
    config: Mapping[str, Any], state: State, ids: Tensor, mask: Tensor | None, stm: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(logits [B, T, V], auxiliary value or None) for a memory [L, B or 1, S, D] or [L, S, D]."""
    part = Part(config, state, "model.")
    stm = stm[:, None] if stm.dim() == 3 else stm
    x = part.tensor("embedding.weight")[ids]
    visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    causal_cross = bool(part.option("causal_cross") or part.option("legacy_causal_cross"))
    values: list[Tensor | None] = []
    for i in range(len(part.option("stateless_layers_config") or [])):
        x, aux = layer(part.under(f"stateless_layers.{i}"), x, visible, mask, None, causal_cross)
        values.append(aux)
    for i in range(part.option("num_layers")):
        x, aux = layer(part.under(f"layers.{i}"), x, visible, mask, stm[i], causal_cross)
        values.append(aux)
    for i in range(len(part.option("final_stateless_layers_config") or [])):
        x, _ = layer(part.under(f"final_stateless_layers.{i}"), x, visible, mask, None, causal_cross)
    if part.option("use_head_norm"):
        head = part.under("head_norm")
        layered = part.option("head_norm_type") == "layer_norm"
        x = layer_norm(x, head) if layered else rms_norm(x, head.tensor("weight"))
    present = [value for value in values if value is not None]
    return part.linear("head", x), sum(present) / len(present) if present else None


def encoder(
    config: Mapping[str, Any], state: State, ids: Tensor, mask: Tensor | None, stm: Tensor | None = None
) -> Tensor:
    """All layers [L, B, T, D]; reads ``stm`` where one is given."""
    part = Part(config, state, "model.")
    if stm is not None and stm.dim() == 3:
        stm = stm[:, None]
    x = part.tensor("embedding.weight")[ids]
    visible = (torch.ones_like(ids) if mask is None else mask).bool()[:, None]
    outputs = []
    for i in range(part.option("num_layers")):
        memory = None if stm is None else stm[i]
        x, _ = layer(part.under(f"layers.{i}"), x, visible, mask, memory, False)
        outputs.append(x)
    return torch.stack(outputs)


def mlm_head(state: State, hidden: Tensor) -> Tensor:
    part = Part({}, state)
    features = layer_norm(F.gelu(part.linear("dense", hidden)), part.under("layer_norm"))
    return part.linear("decoder", features)


class MemoryAttention:
    """One call is one update; ``averages`` are the running means of the norms, changed in training."""

    def __init__(self, cls: str, config: Mapping[str, Any], state: State, *, training: bool) -> None:
        self.part, self.cls, self.training = Part(config, state, "model."), cls, training
        self.averages = {key: value.clone() for key, value in state.items() if key.endswith("ema_rms")}

    def __call__(self, encoded: Tensor, mask: Tensor | None, stm: Tensor) -> Tensor:
        """encoded [L, B, T, D], mask [B, T], stm [L, B or 1, S, D] or [L, S, D] -> [L, B, S, D]."""
        stm = stm[:, None] if stm.dim() == 3 else stm
        stm = stm.expand(-1, encoded.shape[1], -1, -1)
        real = torch.ones(encoded.shape[1:3], dtype=torch.bool) if mask is None else mask.bool()
        means = self._means(stm)
        return torch.stack([self._layer(i, stm[i], encoded[i], real, means) for i in range(len(stm))])

    def _means(self, stm: Tensor) -> list[Tensor]:
        """What each layer reads of the mean over (its group of) layers, normed."""
        if "Interlayer" not in self.cls:
            return []
        groups = self.part.option("num_groups") if "Grouped" in self.cls else 1
        size = len(stm) // groups
        per_group = torch.stack([stm[g * size : (g + 1) * size].mean(0) for g in range(groups)])
        normed = self._norm("mean_stm_norm", per_group)
        return [normed[i // size] for i in range(len(stm))]

    def _layer(self, i: int, s: Tensor, e: Tensor, real: Tensor, means: list[Tensor]) -> Tensor:
        gated = self.part.option("use_gated_residual")
        every = torch.ones((), dtype=torch.bool).expand(1, 1, 1)
        u = s
        if self.cls == "RxTSelfMemoryAttention":
            n = self._norm(f"self_memory_norm_layers.{i}", s)
            new = attend(self.part.under(f"self_attention_layers.{i}"), n, n, every)
            wanted = self.part.option("use_gate_for_self_attention")
            u = self._mix(f"self_residual_gate_layers.{i}", wanted, s, new)
        elif means:
            n = self._norm(f"mean_memory_norm_layers.{i}", s)
            c = means[i]
            if self.cls != "RxTInterlayerMemoryAttention":
                c = self._mix(f"interlayer_gate_layers.{i}", gated, n, c)
            new = attend(self.part.under(f"mean_attention_layers.{i}"), n, c, every)
            u = self._mix(f"mean_residual_gate_layers.{i}", gated, s, new)
        q = self._norm(f"memory_norm_layers.{i}", u)
        name = f"memory_input_norm_layers.{i}.weight"
        kv = rms_norm(e, self.part.tensor(name)) if self.part.has(name) else e
        new = attend(self.part.under(f"attention_layers.{i}"), q, kv, real[:, None], turn_k=True)
        if self.part.option("disable_residual"):
            return new
        return self._mix(f"residual_gate_layers.{i}", gated, u, new)

    def _mix(self, name: str, gated: bool, old: Tensor, new: Tensor) -> Tensor:
        if not gated:
            return old + new
        gate, a = self.part.under(name), old + new
        kind, per_slot = self.part.option("residual_gate_type"), self.part.option("residual_per_slot_gate")
        if kind == "static":
            z = gate.tensor("gate")
        elif kind == "elementwise":
            z = gate.tensor("gate") * (
                a.mean(-1, keepdim=True) if per_slot else a.mean((-2, -1), keepdim=True)
            )
        else:
            linear = self.part.option("residual_gate_slot_status_type") == "linear"
            status = gate.linear("slot_status", a)[..., 0] if linear else a.mean(-1)
            z = gate.linear("gate", status)[..., None]
        if self.part.option("use_tanh_residual_gate"):
            g = torch.tanh(z)
            return (1 + g) * new + (1 - g) * old
        r = torch.sigmoid(z)
        return r * new + (1 - r) * old

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """x [..., B, S, D]."""
        part, kind = self.part.under(name), self.part.option("norm_type")
        if kind == "classic-rms":
            return rms_norm(x, part.tensor("weight"))
        if kind == "layer":
            y = layer_norm(x, part.under("norm"))
        else:
            rms = torch.sqrt((x * x).mean(-1, keepdim=True))
            if kind in ("adaptive", "positional"):
                rms = self._average(f"{part.prefix}ema_rms", kind, rms)
            y = x / torch.sqrt(rms + 1e-6)
        r = torch.sigmoid(part.tensor("gate"))
        return r * (y * part.tensor("scale")) + (1 - r) * x

    def _average(self, key: str, kind: str, rms: Tensor) -> Tensor:
        """The mean square root that a norm with a running mean divides by; ``rms`` [..., B, S, 1]."""
        if self.training:
            now = rms.detach()
            now = now.mean() if kind == "adaptive" else now.flatten(0, -3).mean(0)
            decay = self.part.option("norm_decay")
            self.averages[key] = decay * self.averages[key] + (1 - decay) * now
        elif kind == "adaptive":
            return rms
        return self.averages[key]
