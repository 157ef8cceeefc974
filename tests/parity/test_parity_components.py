"""Published components against recorded outputs, losses and every gradient.

A fixture is a dictionary of tensors recorded from the published implementation at tiny sizes in fp32.
Values at padded positions are left out: padding is not part of what our models compute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rxt_dist.interchange.reference import (
    ReferenceDecoder,
    ReferenceEncoder,
    ReferenceMLMHead,
    ReferenceModule,
    load_reference,
)

FOLDER = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-5
AUX_SCALE = 0.01


def fixtures(prefix: str) -> list[str]:
    return sorted(path.name for path in FOLDER.glob(f"{prefix}*.pt"))


def read(name: str) -> dict[str, Any]:
    fixture: dict[str, Any] = torch.load(FOLDER / name, weights_only=True)
    return fixture


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert relative_error(ours, theirs) <= TOLERANCE, what


def assert_gradients(module: ReferenceModule, recorded: dict[str, torch.Tensor]) -> None:
    ours = module.reference_gradients()
    assert set(ours) == set(recorded)
    for name, gradient in recorded.items():
        assert_close(ours[name], gradient, name)


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    supervised = real[:, 1:]
    return F.cross_entropy(logits[:, :-1][supervised], ids[:, 1:][supervised])


def test_fixtures_are_present() -> None:
    assert fixtures("dec_")
    assert fixtures("enc_")
    assert fixtures("joint_")


@pytest.mark.parametrize("name", fixtures("dec_"))
def test_decoder(name: str) -> None:
    fixture = read(name)
    decoder = load_reference(fixture["cls"], fixture["config"], fixture["state_dict"])
    assert isinstance(decoder, ReferenceDecoder)
    ids, mask, stm = fixture["input_ids"], fixture["attention_mask"], fixture["stm"]
    real = mask.bool()
    output = decoder.run_padded(ids, mask, stm)
    logits = decoder.module.lm_head(output.hidden).view(*ids.shape, -1)
    assert_close(logits[real], fixture["logits"][real], "logits")
    assert_close(decoder.forward_padded(ids, None, stm), fixture["logits_nomask"], "logits without mask")
    ce = next_token_loss(logits, ids, real)
    assert_close(ce, fixture["ce"], "ce")
    total = ce
    if fixture["aux"] is None:
        assert output.aux_sum.item() == 0.0
    else:
        aux = output.aux_sum / ids.numel()
        assert_close(aux, fixture["aux"], "aux")
        total = ce + AUX_SCALE * aux
    assert_close(total, fixture["total"], "total")
    total.backward()
    assert_gradients(decoder, fixture["grads"])
    assert sum(p.numel() for p in decoder.module.parameters()) == fixture["params"]


@pytest.mark.parametrize("name", fixtures("dec_"))
def test_stored_memory_is_the_default(name: str) -> None:
    fixture = read(name)
    decoder = load_reference(fixture["cls"], fixture["config"], fixture["state_dict"])
    assert isinstance(decoder, ReferenceDecoder)
    ids = fixture["input_ids"]
    stored = fixture["state_dict"]["model.stm.memory"]
    assert torch.equal(decoder.forward_padded(ids), decoder.forward_padded(ids, stm=stored))


@pytest.mark.parametrize("name", fixtures("enc_"))
def test_encoder_and_mlm_head(name: str) -> None:
    fixture = read(name)
    encoder = load_reference(fixture["cls"], fixture["config"], fixture["state_dict"])
    head = load_reference("MLMHead", {}, fixture["head_state_dict"])
    assert isinstance(encoder, ReferenceEncoder)
    assert isinstance(head, ReferenceMLMHead)
    real = fixture["attention_mask"].bool()
    last, layers = encoder.forward_padded(fixture["input_ids"], fixture["attention_mask"])
    logits = head.forward_padded(last)
    assert_close(last[real], fixture["last"][real], "last")
    assert_close(layers[:, real], fixture["layers"][:, real], "layers")
    assert_close(logits[real], fixture["mlm_logits"][real], "MLM logits")
    without_mask, _ = encoder.forward_padded(fixture["input_ids"])
    assert_close(without_mask, fixture["last_nomask"], "last without mask")
    loss = F.cross_entropy(logits.flatten(0, 1), fixture["labels"].flatten())
    assert_close(loss, fixture["mlm_loss"], "MLM loss")
    loss.backward()
    assert_gradients(encoder, fixture["grads"])
    assert_gradients(head, fixture["head_grads"])


@pytest.mark.parametrize("name", fixtures("joint_"))
def test_joint_language_modelling(name: str) -> None:
    fixture = read(name)
    encoder, decoder, head = load_joint(fixture)
    decoder.module.embedding = encoder.module.embedding
    ids, mask = fixture["input_ids"], fixture["attention_mask"]
    real = mask.bool()
    last, layers = encoder.forward_padded(fixture["masked_ids"], mask)
    mlm_logits = head.forward_padded(last)
    assert_close(mlm_logits[real], fixture["encoder_logits"][real], "encoder logits")
    output = decoder.run_padded(ids, mask, layers.detach())
    logits = decoder.module.lm_head(output.hidden).view(*ids.shape, -1)
    assert_close(logits[real], fixture["decoder_logits"][real], "decoder logits")
    mlm = F.cross_entropy(mlm_logits.flatten(0, 1), fixture["labels"].flatten())
    # This trainer counted padding as targets too.
    ar = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    aux = output.aux_sum / ids.numel()
    total = mlm + ar + AUX_SCALE * aux
    for what, ours in {"mlm_loss": mlm, "ar_loss": ar, "aux": aux, "total": total}.items():
        assert_close(ours, fixture[what], what)
    total.backward()
    ours = {}
    for prefix, module in (("decoder", decoder), ("encoder", encoder), ("mlm_head", head)):
        ours.update({f"{prefix}.{key}": grad for key, grad in module.reference_gradients().items()})
    missing = set(fixture["grads"]) - set(ours)
    assert not missing
    assert set(ours) - set(fixture["grads"]) <= {"decoder.model.embedding.weight"}  # the shared table
    for key, gradient in fixture["grads"].items():
        assert_close(ours[key], gradient, key)


def load_joint(fixture: dict[str, Any]) -> tuple[ReferenceEncoder, ReferenceDecoder, ReferenceMLMHead]:
    """The joint fixture holds no configuration: sizes are those of the other fixtures."""
    states = fixture["state_dicts"]
    common = {
        "num_layers": 2,
        "vocab_size": 97,
        "embed_dim": 64,
        "ff_dim": 48,
        "att_heads": 8,
        "seq_len": 20,
        "stm_size": 20,
        "att_groups": 4,
        "att_query_groups": 4,
    }
    experts = {
        "use_moe": True,
        "num_experts": 6,
        "moe_top_k": 2,
        "num_shared_experts": 0,
        "use_vectorized_moe": False,
    }
    encoder = load_reference("RxTEncoder", {**common, "skip_memory_cross_attention": True}, states["encoder"])
    decoder = load_reference("RxTDecoder", {**common, **experts}, states["decoder"])
    head = load_reference("MLMHead", {"embed_dim": 64, "vocab_size": 97}, states["head"])
    assert isinstance(encoder, ReferenceEncoder)
    assert isinstance(decoder, ReferenceDecoder)
    assert isinstance(head, ReferenceMLMHead)
    return encoder, decoder, head
