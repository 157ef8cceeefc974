"""The manifest of a dataset: what it holds, and the fingerprint that identifies it.

A dataset folder is ``manifest.json`` (written last), ``tokenizer/tokenizer.json`` and, for every shard,
``<split>/<name>`` with its index ``<split>/<name without .tar>.idx``. The indices of all shards of a split
are in ``<split>/rxt-<split>.idx`` once more, so that a reader opens one file and not thousands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rxt_dist.errors import DataError
from rxt_dist.files import fsync_folder, write_synced

MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT_VERSION = 2
_VERSION_OF_SHARD_INDICES = 1
"""Had no split indices."""
_READABLE = (_VERSION_OF_SHARD_INDICES, FORMAT_VERSION)
MAX_MANIFEST_BYTES = 256 << 20

Kind = Literal["text", "conversations"]
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
DropReason = Literal["short", "long", "duplicate"]

_SHA256 = r"^[0-9a-f]{64}$"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardInfo(_Record):
    """One shard (a tar file) and its index."""

    name: str = Field(pattern=r"^rxt-(train|val)-[0-9]{6}\.tar$")
    """File name of the tar inside the folder of its split."""
    split: Split
    bytes: int = Field(ge=0)
    """Size of the tar."""
    sha256: str = Field(pattern=_SHA256)
    idx_sha256: str = Field(pattern=_SHA256)
    blocks: int = Field(ge=1)
    documents: int = Field(ge=1)
    """Documents of a text shard; conversations of a conversation shard."""
    conversations: int = Field(ge=0)
    interactions: int = Field(ge=0)
    tokens: int = Field(ge=1)
    """All tokens, special tokens included."""
    max_tokens: int = Field(ge=1)
    """Tokens of the longest document (text) or of the longest interaction (conversations)."""

    def path_in(self, dataset: Path) -> Path:
        """Path of the tar in the dataset folder ``dataset``."""
        return dataset / self.split / self.name

    def index_path_in(self, dataset: Path) -> Path:
        """Path of the index in the dataset folder ``dataset``."""
        return self.path_in(dataset).with_suffix(".idx")


class IndexInfo(_Record):
    """An index on the disk."""

    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=_SHA256)


class SourceInfo(_Record):
    """One input file of the dataset, or one Hugging Face dataset (then of its rows as JSON lines)."""

    name: str
    sha256: str = Field(pattern=_SHA256)
    bytes: int = Field(ge=0)
    records: int = Field(default=0, ge=0)
    """Records in the file."""
    documents: int = Field(default=0, ge=0)
    """Documents or conversations that they became, both splits."""
    tokens: int = Field(default=0, ge=0)
    """Tokens of these, special tokens included."""


class Filters(_Record):
    """What was left out when the dataset was built."""

    min_tokens: int | None = Field(default=None, ge=1)
    """Shorter documents (pieces, conversations) were dropped; None: none."""
    drop_longer: int | None = Field(default=None, ge=1)
    """Longer records were dropped, before any was truncated or split; None: none."""
    dedup: bool = False
    """Whether repeated records were dropped."""
    dropped: dict[DropReason, int] = Field(default_factory=dict)
    """Records dropped as too long or as repeated, documents dropped as too short."""


class SplitCounts(_Record):
    """Totals of one split."""

    documents: int = Field(ge=0)
    conversations: int = Field(ge=0)
    interactions: int = Field(ge=0)
    tokens: int = Field(ge=0)
    truncated: int = Field(ge=0)
    """Documents, interactions and system texts that lost tokens to ``--max-tokens``."""
    split: int = Field(default=0, ge=0)
    """Documents that are pieces of a longer one, made by ``--split-documents``."""


class Manifest(_Record):
    """Everything a reader must know before it opens a shard."""

    format_version: int
    dataset_id: str
    kind: Kind
    created_by: str
    dtype: Literal["uint16", "uint32"]
    byte_order: Literal["little"]
    vocab_size: int = Field(ge=1)
    special_tokens: dict[str, int]
    tokenizer_sha256: str = Field(pattern=_SHA256)
    max_tokens: int | None = Field(default=None, ge=1)
    """Limit that documents or interactions were truncated to; None: nothing was truncated."""
    split_documents: int | None = Field(default=None, ge=1)
    """Size that longer documents were split into; None: no document was split."""
    filters: Filters = Filters()
    val_fraction: float = Field(ge=0.0, lt=1.0)
    source: list[SourceInfo]
    counts: dict[Split, SplitCounts]
    shards: list[ShardInfo]
    split_indices: dict[Split, IndexInfo] = Field(default_factory=dict)
    """The split index of every split that has shards; none in a dataset of format version 1."""
    fingerprint: str = Field(pattern=_SHA256)

    def shards_of(self, split: Split) -> list[ShardInfo]:
        """The shards of one split, in reading order."""
        return [shard for shard in self.shards if shard.split == split]


def compute_fingerprint(
    *,
    kind: Kind,
    dtype: str,
    vocab_size: int,
    special_tokens: Mapping[str, int],
    tokenizer_sha256: str,
    shards: Sequence[ShardInfo],
    split_indices: Mapping[Split, IndexInfo],
) -> str:
    """SHA-256 over the canonical JSON of all that determines what a reader delivers."""
    content: dict[str, Any] = {
        "kind": kind,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "special_tokens": dict(special_tokens),
        "tokenizer_sha256": tokenizer_sha256,
        "shards": [vars(shard) for shard in shards],  # there may be 100,000, and copies take time
    }
    if split_indices:
        content["split_indices"] = {split: vars(info) for split, info in split_indices.items()}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def fingerprint_of(manifest: Manifest) -> str:
    """The fingerprint that the other fields of ``manifest`` imply."""
    return compute_fingerprint(
        kind=manifest.kind,
        dtype=manifest.dtype,
        vocab_size=manifest.vocab_size,
        special_tokens=manifest.special_tokens,
        tokenizer_sha256=manifest.tokenizer_sha256,
        shards=manifest.shards,
        split_indices=manifest.split_indices,
    )


def split_index_name(split: Split) -> str:
    """File name of the index of a whole split, in the folder of the split."""
    return f"rxt-{split}.idx"


def load_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json`` (not the files it names: see ``verify_dataset``).

    Raises:
        DataError: no such folder or manifest, not JSON, an unknown version, wrong fields, or a
            fingerprint that does not match the content.
    """
    return parse_manifest(read_manifest(folder), str(folder / MANIFEST_FILE))


def read_manifest(folder: Path) -> bytes:
    """The content of ``folder/manifest.json``. Raises DataError if there is none, or a far too large one."""
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise DataError(f"{folder} is not a dataset: no such folder")
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST_FILE}: it is not a dataset, or an incomplete one")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}"
        )
    return path.read_bytes()


def parse_manifest(data: bytes, name: str, *, known: bool = False) -> Manifest:
    """A manifest from the content of its file, which messages call ``name``; see :func:`load_manifest`.

    ``known``: these bytes have been checked before, so that the fingerprint is not computed again.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise DataError(_problem(data, name, error)) from error
    if manifest.format_version not in _READABLE:
        raise DataError(_other_version(name, manifest.format_version))
    has_indices = manifest.format_version != _VERSION_OF_SHARD_INDICES
    expected = {shard.split for shard in manifest.shards} if has_indices else set()
    if set(manifest.split_indices) != expected:
        raise DataError(f"{name} is damaged: split_indices are not those of the splits that have shards")
    if not known and manifest.fingerprint != fingerprint_of(manifest):
        raise DataError(f"{name} is damaged: its fingerprint does not match its content")
    return manifest


def _problem(data: bytes, name: str, error: ValidationError) -> str:
    """What is wrong with a manifest that is not valid: another version has other fields."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as malformed:
        return f"{name} is damaged: not JSON ({malformed})"
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in _READABLE:
        return _other_version(name, version)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return f"{name} is damaged: {field}: {first['msg']}"


def _other_version(name: str, version: object) -> str:
    valid = " and ".join(str(readable) for readable in _READABLE)
    return f"{name} has format_version {version!r}; this version of rxt-dist reads {valid}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` atomically: temporary file, fsync, rename, fsync of the folder."""
    path = folder / MANIFEST_FILE
    temporary = folder / f".{MANIFEST_FILE}.tmp"
    content = json.dumps(manifest.model_dump(), indent=2, sort_keys=True, ensure_ascii=False)
    write_synced(temporary, content + "\n")
    temporary.replace(path)
    fsync_folder(folder)
