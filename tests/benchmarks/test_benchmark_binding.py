"""The binding benchmark asks what it says, and finds what it is there to show."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.binding import OBJECTS, VALUES, Conversations, main


def test_every_object_is_stated_once_with_a_value_of_its_own_and_asked_for() -> None:
    drawn = Conversations.draw(300, 5, torch.Generator().manual_seed(1))
    pairs: set[tuple[int, int]] = set()
    for statements, questions, values in zip(drawn.statements, drawn.questions, drawn.values, strict=True):
        asked = questions[:, 5].tolist()
        stated = [(row[3].item(), row[6].item()) for row in statements]
        assert stated == list(zip(asked, values.tolist(), strict=True))
        assert len(set(asked)) == len(set(values.tolist())) == 5
        pairs |= set(stated)
    assert len(pairs) == OBJECTS * VALUES


@pytest.mark.slow
@pytest.mark.parametrize(("context", "lowest", "highest"), [("0", 0.4, 0.6), ("250", 0.95, 1.0)])
def test_only_encodings_read_first_lead_to_binding(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    context: str,
    lowest: float,
    highest: float,
) -> None:
    monkeypatch.setattr("sys.argv", ["binding.py", "--context-steps", context])
    assert main() == 0
    recall = float(re.findall(r"[\d.]+", capsys.readouterr().out)[-1])
    assert lowest <= recall <= highest
