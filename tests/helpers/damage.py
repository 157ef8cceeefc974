"""Damage to files, as disks and crashes do it."""

from __future__ import annotations

from pathlib import Path


def flip_bit(file: Path, position: float = 0.5, bit: int = 0) -> None:
    """Change one bit at ``position`` (0 to 1) of the file; size and times stay as they were."""
    content = bytearray(file.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


def truncate(file: Path, share: float = 0.5) -> None:
    """Keep only the beginning of the file."""
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def zero_hole(file: Path) -> None:
    """Zeros in the middle quarter, as a block that never reached the disk leaves them."""
    content = bytearray(file.read_bytes())
    start, stop = 3 * len(content) // 8, 5 * len(content) // 8 + 1
    content[start:stop] = bytes(stop - start)
    file.write_bytes(content)
