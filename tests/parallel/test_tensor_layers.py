"""What tensor-parallel ranks hold and compute of single layers, against whole ones and by brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.expert_cases import canonical_values
from helpers.launch import run_function
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rxt_dist.config import AttentionConfig, MoEConfig, load_config
from rxt_dist.interchange.native import COMPONENTS, NativeReader
from rxt_dist.interchange.pretrained import save_pretrained
from rxt_dist.kernels import triton_support
from rxt_dist.kernels.cross_entropy import linear_cross_entropy
from rxt_dist.model import SequenceLayout, build_model
from rxt_dist.model.attention import SelfAttention
from rxt_dist.model.canonical import canonical_parts
from rxt_dist.model.heads import LMHead
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.model import RxTModel, empty_model
from rxt_dist.model.moe import MoE
from rxt_dist.parallel import tensor_vocab
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.parallelize import parallelize
from rxt_dist.parallel.regions import enter_parts, join_slices, leave_parts, slice_of, take_slice
from rxt_dist.parallel.tensor_attention import TensorSelfAttention, deal_heads
from rxt_dist.parallel.tensor_layers import TensorRank
from rxt_dist.parallel.tensor_moe import SlicedMoE
from rxt_dist.parallel.tensor_vocab import TensorLMHead

RANKS, WIDTH, VOCABULARY = 3, 24, 10
HEADS = [(12, 6), (12, 3), (6, 2), (6, 1), (3, 3), (3, 6), (2, 6), (4, 12), (1, 3)]


@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(1, 12))
def test_every_rank_has_the_partners_of_its_heads(small: int, times: int, reverse: bool, size: int) -> None:
    larger = small * times
    query, kv = (small, larger) if reverse else (larger, small)
    if larger % size:
        return
    pairs = []
    for rank in range(size):
        own_query, own_kv = deal_heads(query, kv, rank, size)
        held = max(len(own_query.numbers), len(own_kv.numbers))
        assert held == larger // size
        for head in range(held):
            # The rule of a whole attention, on the heads that are here.
            q = head % len(own_query.numbers) if query < kv else head
            k = head if query < kv else head * len(own_kv.numbers) // held
            pairs.append((own_query.numbers[q], own_kv.numbers[k]))
        for side in (own_query, own_kv):
            if side.dealt:
                assert len(side.numbers) == side.total // size
                assert side.rows(2) == range(2 * side.numbers[0], 2 * (side.numbers[-1] + 1))
    rule = [(h % query, h) if query < kv else (h, h * kv // query) for h in range(larger)]
    assert pairs == rule


def test_heads_are_copied_only_where_they_must_be() -> None:
    assert deal_heads(8, 4, 1, 2)[1].numbers == [2, 3]
    assert deal_heads(8, 2, 1, 4) == (deal_heads(8, 8, 1, 4)[0], (2, [0], False))
    assert deal_heads(4, 8, 1, 2)[0] == (4, [0, 1, 2, 3], False)
    assert deal_heads(4, 8, 1, 4)[0] == (4, [2, 3], False)


def layers() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for query, kv in HEADS:
        heads = AttentionConfig(query_heads=query, kv_heads=kv, gated=query != 6, qk_norm=True)
        found[f"{query} {kv}"] = SelfAttention(WIDTH, 4, heads, causal=True)
    for shared in (0, 1, 2):
        dim = 6 if shared else None
        config = MoEConfig(num_experts=4, top_k=2, num_shared_experts=shared, shared_expert_dim=dim)
        found[f"moe {shared}"] = MoE(config, WIDTH, 12, gated=shared != 1, activation="silu")
    for layer in found.values():
        initialise(layer, 4)
        with torch.no_grad():
            for number, parameter in enumerate(layer.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return found


def fill(part: nn.Module, whole: nn.Module) -> None:
    source = canonical_values(whole, dict(whole.named_parameters()))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, pieces in canonical_parts(part).items():
            for piece in pieces:
                flat = part.get_parameter(name).view(-1)
                piece.of(flat).copy_(piece.taken_from(source[piece.name]))


def run(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, MoE):
        out: torch.Tensor = layer(x)[0]
        return out
    out = layer(x, SequenceLayout.from_lengths([len(x) - 2, 2]).self_attention, None)
    return out


def inputs(rows: int) -> torch.Tensor:
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))
    return x.requires_grad_()


def compute(folder: Path) -> None:
    """Every layer on every rank: output, gradients of the input and of what is held."""
    tensor = TensorRank(dist.get_rank(), RANKS, dist.group.WORLD)
    found: dict[str, Any] = {}
    for name, whole in layers().items():
        part: nn.Module
        part = SlicedMoE(whole, tensor) if isinstance(whole, MoE) else TensorSelfAttention(whole, tensor)  # type: ignore[arg-type]
        fill(part, layers()[name])
        x = inputs(7)
        out = run(part, x)
        (out * torch.arange(WIDTH)).sum().backward()
        gradients: dict[str, list[Any]] = {}
        for parameter, pieces in canonical_parts(part).items():
            flat = part.get_parameter(parameter).grad.view(-1)  # type: ignore[union-attr]
            for piece in pieces:
                box = piece.of(flat).view(piece.box.sizes)
                gradients.setdefault(piece.name, []).append((list(piece.box.starts), box))
        found[name] = {"out": out.detach(), "x": x.grad, "gradients": gradients}
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_layers_are_the_whole_ones(tmp_path: Path) -> None:
    assert run_function(RANKS, compute, tmp_path) == [0] * RANKS
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for name, whole in layers().items():
        x = inputs(7)
        out = run(whole, x)
        (out * torch.arange(WIDTH)).sum().backward()
        wanted = canonical_values(whole, {n: p.grad for n, p in whole.named_parameters()})  # type: ignore[arg-type,misc]
        for found in (rank[name] for rank in ranks):
            torch.testing.assert_close(found["out"], out.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["x"], x.grad, rtol=1e-4, atol=1e-3)
            assert found["gradients"].keys() == wanted.keys()
        for key, gradient in wanted.items():
            total, times = torch.zeros_like(gradient), torch.zeros_like(gradient)
            for starts, box in (box for rank in ranks for box in rank[name]["gradients"][key]):
                place = tuple(slice(s, s + n) for s, n in zip(starts, box.shape, strict=True))
                total[place] += box
                times[place] += 1
            assert bool((times > 0).all()), (name, key)
            # Whole gradients are the same on all ranks; those of a part of the computation add up.
            partial = ".experts." in f".{key}" or "_norm" in key or (times.max() > 1 and _copied(name, key))
            expected = gradient if partial else gradient * times
            scale = gradient.abs().max()
            assert (total - expected).abs().max() <= 1e-5 * scale * RANKS, (name, key)


def _copied(name: str, key: str) -> bool:
    """Whether all ranks hold the weights of these heads, because some of them are needed by several."""
    if name.startswith("moe"):
        return False
    query, kv = map(int, name.split())
    side = {"q.weight": query, "k.weight": kv, "v.weight": kv}.get(key)
    return side == min(query, kv) != max(query, kv)


def regions(folder: Path) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    found = {}
    for rows in range(8):
        x = torch.arange(2.0 * rows).view(rows, 2).requires_grad_()
        own = take_slice(x, group)
        assert torch.equal(own, x[slice_of(rows, group)])
        joined = join_slices(own * (rank + 1), rows, group)
        (joined * torch.arange(2.0 * rows).view(rows, 2)).sum().backward()
        found[str(rows)] = (joined.detach(), x.grad)
    y = torch.ones(2, 3).requires_grad_()
    total = leave_parts(enter_parts(y, group).T * (rank + 1), group)  # a gradient that is not contiguous
    total.sum().backward()
    found["sum"] = (total.detach(), y.grad)
    torch.save(found, folder / f"{rank}.pt")


def test_slices_of_any_number_of_rows_are_joined(tmp_path: Path) -> None:
    assert run_function(RANKS, regions, tmp_path) == [0] * RANKS
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for rows in range(8):
            joined, gradient = found[str(rows)]
            count = -(-rows // RANKS)
            factor = torch.tensor([[row // count + 1.0] for row in range(rows)]).view(rows, 1)
            values = torch.arange(2.0 * rows).view(rows, 2)
            assert torch.equal(joined, values * factor)
            assert torch.equal(gradient, values * factor)
        total, gradient = found["sum"]
        assert torch.equal(total, torch.full((3, 2), 6.0))
        assert torch.equal(gradient, torch.full((2, 3), 6.0))


def head_of(rows: int) -> tuple[LMHead, torch.Tensor, torch.Tensor]:
    """A head, inputs and targets; the first two rows of the vocabulary are equal, so that logits tie."""
    config = load_config("tiny", [f"model.embed_dim={WIDTH}"], require_data=False).model
    head = LMHead(config.model_copy(update={"vocab_size": VOCABULARY}))
    initialise(head, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.weight[VOCABULARY - 1] = head.weight[0]
        head.bias[VOCABULARY - 1] = head.bias[0]
    hidden = torch.randn(rows, WIDTH, generator=generator)
    hidden[: rows // 3] = head.weight[0].detach()  # ties of the first and the last token win here
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    targets[: rows // 3 : 2], targets[1 : rows // 3 : 2] = 0, VOCABULARY - 1
    return head, hidden.requires_grad_(), targets


def heads(folder: Path, size: int, interpreted: bool) -> None:
    triton_support.interpreted = interpreted
    tensor = TensorRank(dist.get_rank(), size, dist.group.WORLD)
    found = {}
    for rows, chunk in ((0, 4), (13, 4), (13, 100)):
        whole, hidden, targets = head_of(rows)
        head = TensorLMHead(whole, tensor)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
        fill(head, whole)
        tensor_vocab.CROSS_ENTROPY_CHUNK = chunk
        loss, correct = head(hidden, targets)
        (3 * loss).backward()
        with torch.no_grad():
            logits = head(hidden)
        held = head.cuts()["weight"][0].boxes
        found[f"{rows} {chunk}"] = {
            "loss": loss.detach(), "correct": correct, "hidden": hidden.grad, "weight": head.weight.grad,
            "bias": head.bias.grad, "logits": logits, "held": [list(box.sizes) for box in held],
        }  # fmt: skip
    torch.save(found, folder / f"{dist.get_rank()}.pt")


# Of 6 ranks the last one holds padding only.
@pytest.mark.parametrize(("size", "interpreted"), [(3, False), (4, False), (6, False), (6, True)])
def test_cross_entropy_over_a_divided_vocabulary(tmp_path: Path, size: int, interpreted: bool) -> None:
    if interpreted and torch.cuda.is_available():
        pytest.skip("Triton is imported for the GPU, not for its interpreter")
    assert run_function(size, heads, tmp_path, size, interpreted) == [0] * size
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    count = -(-VOCABULARY // size)
    for rows, chunk in ((0, 4), (13, 4), (13, 100)):
        whole, hidden, targets = head_of(rows)
        loss, correct = linear_cross_entropy(hidden, whole.weight, whole.bias, targets, chunk)
        (3 * loss).backward()
        assert rows == 0 or 0 < correct < rows
        for rank, found in enumerate(one[f"{rows} {chunk}"] for one in ranks):
            torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
            assert found["correct"] == correct
            torch.testing.assert_close(found["hidden"], hidden.grad, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["logits"], F.linear(hidden, whole.weight, whole.bias).detach())
            for name in ("weight", "bias"):
                gradient, part = whole.get_parameter(name).grad, found[name]
                assert gradient is not None
                own = gradient[rank * count :][:count]
                torch.testing.assert_close(part[: len(own)], own, rtol=1e-5, atol=1e-5)
                assert not part[len(own) :].any()


def draw(folder: Path, size: int, expert_size: int, native: Path | None) -> None:
    from helpers.engines import join_deepspeed

    join_deepspeed()
    mesh = Mesh(size, size, expert_size)
    model = build_model(model_config(), 6, lambda whole: parallelize(whole, mesh, dist.get_rank()))
    if native is not None:
        assert NativeReader(native).load_weights(model) == []
    found = []
    for name, parts in canonical_parts(model).items():
        flat = model.get_parameter(name).detach().view(-1)
        found += [(part.name, list(part.box.starts), part.of(flat).view(part.box.sizes)) for part in parts]
    torch.save((found, sum(p.numel() for p in model.parameters())), folder / f"{dist.get_rank()}.pt")


def model_config() -> Any:
    overrides = [
        "model.vocab_size=41",
        "model.decoder.attention={query_heads: 4, kv_heads: 1, gated: true, qk_norm: true}",
        "model.memory_attention.attention={query_heads: 2, kv_heads: 4, gated: true}",
        "model.decoder.moe.num_shared_experts=2",
        "model.decoder.stateless_layers=[dense]",
        "model.decoder.dense_layer_dim=64",
        "model.query_key_init_scale=0.5",
    ]
    return load_config("tiny", overrides, require_data=False).model


@pytest.mark.parametrize(("size", "expert_size", "imported"), [(2, 1, False), (4, 2, False), (2, 2, True)])
def test_initial_and_imported_values_are_those_of_the_whole_model(
    tmp_path: Path, size: int, expert_size: int, imported: bool
) -> None:
    whole = build_model(model_config(), 8 if imported else 6)
    native = tmp_path / "native" if imported else None
    if native is not None:
        save_pretrained(native, whole, tokenizer=None, components=COMPONENTS)
    assert run_function(size, draw, tmp_path, size, expert_size, native) == [0] * size
    wanted = canonical_values(whole, {n: p.detach() for n, p in whole.named_parameters()})
    covered = {name: torch.zeros(values.shape) for name, values in wanted.items()}
    for rank in range(size):
        found, held = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert held < sum(values.numel() for values in wanted.values()) * (0.75 if size == 2 else 0.55)
        for name, starts, values in found:
            place = tuple(slice(s, s + n) for s, n in zip(starts, values.shape, strict=True))
            assert torch.equal(values, wanted[name][place]), name
            covered[name][place] += 1
    assert all(bool((times > 0).all()) for times in covered.values())


def test_a_whole_model_is_whole() -> None:
    model = empty_model(model_config())
    assert isinstance(model, RxTModel)
    for name, parts in canonical_parts(model).items():
        assert sum(part.held for part in parts) == model.get_parameter(name).numel()
        assert all(part.held == part.numel for part in parts)
