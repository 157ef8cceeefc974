"""What spread experts do, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F


@contextmanager
def order_of_work() -> Iterator[list[str]]:
    """Messages that are sent and waited for, products (their rows), and numbers that the host reads."""
    done: list[str] = []
    send, multiply = dist.all_to_all_single, F.grouped_mm

    class Noted:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            done.append("wait")
            self.work.wait()

    def noted_send(*arguments: Any, **options: Any) -> Noted:
        done.append("send")
        return Noted(cast(dist.Work, send(*arguments, **options)))

    def noted_product(left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
        done.append(f"{left.shape[0] if right.ndim == 3 else left.shape[1]} rows")
        return multiply(left, right, **options)

    plain = torch.Tensor.tolist

    def noted_read(tensor: torch.Tensor) -> Any:
        done.append("read")
        return plain(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", noted_read)
        patch.setattr(dist, "all_to_all_single", noted_send)
        patch.setattr(F, "grouped_mm", noted_product)
        yield done
