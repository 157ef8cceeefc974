"""What is drawn where it is used, and the losses of a memory write: kernels against plain operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.interpreter import interpreter  # noqa: F401

from rxt_dist.kernels import triton_support
from rxt_dist.kernels.noise import with_noise
from rxt_dist.kernels.random_triton import CONSTANT, NORMAL, UNIFORM, with_draws
from rxt_dist.model import SequenceLayout
from rxt_dist.randomness import fold_in_tensor, normal_tensor, uniform_tensor
from rxt_dist.stages.write_losses import write_losses


def random_keys(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape)


@pytest.mark.usefixtures("interpreter")
class TestDraws:
    @pytest.mark.parametrize("width", [1, 6, 33, 256])
    def test_noise_is_that_of_the_keys(self, width: int) -> None:
        keys = random_keys(2, 5)
        values = torch.randn(2, 5, width, requires_grad=True)
        found = with_noise(values, keys, 0.5)
        exact = values.double() + normal_tensor(keys, width).double() * 0.5
        assert (found - exact).abs().max() < 5e-6
        grad = torch.randn(2, 5, width)
        assert torch.equal(torch.autograd.grad(found, values, grad)[0], grad)

    def test_noise_is_rounded_as_its_values(self) -> None:
        keys, values = random_keys(3, 7), torch.randn(3, 7, 64).bfloat16()
        found = with_noise(values, keys, 0.1)
        noise = normal_tensor(keys, 64).double() * 0.1
        assert found.dtype == torch.bfloat16
        # The interpreter cuts numbers off, twice, where a GPU rounds them.
        assert ((found - (values + noise)).abs() <= 2**-6 * (values.abs() + noise.abs())).all()

    @pytest.mark.parametrize("kind", [CONSTANT, UNIFORM, NORMAL])
    @pytest.mark.parametrize(("slots", "width"), [(5, 24), (40, 128), (1, 3)])
    def test_lanes_are_drawn_anew(self, kind: int, slots: int, width: int) -> None:
        stm, keys = torch.randn(3, 4, slots, width), random_keys(4)
        where = torch.tensor([True, False, False, True])
        found = with_draws(stm, where, keys, kind, 0.3)
        assert torch.equal(found[:, ~where], stm[:, ~where])
        rows = fold_in_tensor(keys.view(1, -1, 1), torch.arange(3 * slots).view(3, 1, slots))
        if kind == CONSTANT:
            exact = torch.full_like(stm, 0.3)
        elif kind == UNIFORM:
            exact = uniform_tensor(fold_in_tensor(rows.unsqueeze(-1), torch.arange(width))) * 0.3
        else:
            exact = normal_tensor(rows, width) * 0.3
        assert (found - exact)[:, where].abs().max() < (3e-6 if kind == NORMAL else 1e-9)


def write_case(lengths: list[int], slots: int, width: int, *, noisy: bool) -> dict[str, Any]:
    layout, depth = SequenceLayout.from_lengths(lengths), 3
    tokens, lanes = sum(lengths), len(lengths)
    present = torch.tensor([lane != 1 for lane in range(lanes)])
    layers = torch.randn(depth, tokens, width).bfloat16()
    layers[:, layout.sequence_ids == 1] = float("nan")  # nothing is known of an absent lane's encoding
    before = torch.randn(depth, lanes, slots, width)
    before[0, 0, 0] = 0.0
    after = before + 0.3 * torch.randn(before.shape)
    after[0, 0, 0] = 0.0
    return {
        "after": after.requires_grad_(),
        "before": before.requires_grad_(),
        "layers": layers,
        "weights": torch.rand(lanes),
        "factors": 1.0 + torch.rand(lanes),
        "layout": layout,
        "present": present,
        "noise": random_keys(depth, tokens) if noisy else None,
        "level": 0.2 if noisy else 0.0,
    }


def losses_and_gradients(case: dict[str, Any]) -> list[torch.Tensor]:
    distance, difference = write_losses(**case)
    grads = torch.autograd.grad(0.7 * distance + 40.0 * difference, (case["after"], case["before"]))
    return [distance.detach(), difference.detach(), *grads]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    ("lengths", "slots", "width"),
    [([3, 2, 9], 5, 24), ([20, 1, 17, 1], 17, 128), ([4, 1, 1], 4, 1), ([1], 1, 40), ([2, 30, 3], 3, 2048)],
)
def test_losses_of_a_write(
    interpreter: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    slots: int,
    width: int,
    noisy: bool,
) -> None:
    torch.manual_seed(len(lengths) + width)
    case = write_case(lengths, slots, width, noisy=noisy)
    found = losses_and_gradients(case)
    monkeypatch.setattr(triton_support, "interpreted", False)
    wide = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in case.items()}  # fmt: skip
    wide["layers"] = case["layers"].double().nan_to_num()
    for name in ("after", "before"):
        wide[name] = case[name].detach().double().requires_grad_()
    for ours, exact in zip(found, losses_and_gradients(wide), strict=True):
        largest = (
            exact.abs() if exact.dim() == 0 else exact.abs().amax(-1, keepdim=True)
        )  # rows differ in size
        assert ((ours - exact).abs() <= 2e-5 * largest + 1e-9).all()


@pytest.mark.usefixtures("interpreter")
def test_only_the_memory_after_has_a_gradient_in_the_first_write() -> None:
    case = write_case([3, 2], 4, 16, noisy=False)
    case["before"].requires_grad_(False)
    sum(write_losses(**case)).backward()
    assert case["after"].grad is not None
    assert case["before"].grad is None
