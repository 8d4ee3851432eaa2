"""meta.json, which makes a folder of token shards a dataset: its types, and what has to add up in it.

It is read as something that anyone may have written: every key is known, every value of its type, and file names are
those that we give, so that none leads out of the folder.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from classiclm.data.shards import file_size
from classiclm.errors import BAD_INPUT, Error
from classiclm.files import write_file

FORMAT, VERSION = "classiclm-shards", 1
META = "meta.json"
SPLITS = ("train", "val")
_LARGEST_META = 2**28  # bytes; the reports in it are short, and a shard takes some 400
FIX = "restore the file from a copy, or delete meta.json and give the same classiclm prepare command again"

Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Text = Annotated[str, Field(strict=True)]
Sum = Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]  # sha256
Weight = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class _Strict:
    """Every key is known and there."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class TokenizerMeta(_Strict):
    """The tokenizer whose ids the shards hold."""

    file: Literal["tokenizer.json"]
    sha256: Sum  # of the file
    fingerprint: Text  # of the tokenizer, however its file is laid out
    vocab_size: Annotated[int, Field(strict=True, gt=0, lt=2**31)]


@dataclass(frozen=True)
class Counts(_Strict):
    """How much there is of something."""

    tokens: Count
    documents: Count
    sequences: Count
    bytes: Count  # of the text, in UTF-8
    chars: Count


@dataclass(frozen=True)
class Splits(_Strict):
    """The counts of both splits."""

    train: Counts
    val: Counts


@dataclass(frozen=True)
class SourceMeta(_Strict):
    """One source: where it comes from, what reading met and cleaning did, what became of it."""

    name: Text
    origin: dict[str, Any]
    notes: dict[str, Any]
    steps: list[dict[str, Any]]
    splits: Splits


@dataclass(frozen=True)
class Shard(_Strict):
    """One .bin with its .idx, all of one source."""

    file: Annotated[str, Field(strict=True, pattern=r"^(train|val)-[0-9]{5,9}\.bin$")]
    split: Literal["train", "val"]
    source: Text
    bytes: Count  # of the .bin
    sha256: Sum
    index_sha256: Sum
    tokens: Count
    sequences: Count
    documents: Count
    text_bytes: Count
    chars: Count

    @property
    def index(self) -> str:
        """The name of the .idx."""
        return self.file.removesuffix(".bin") + ".idx"


@dataclass(frozen=True)
class Meta(_Strict):
    """What meta.json holds."""

    format: Literal["classiclm-shards"]
    version: Literal[1]
    tokenizer: TokenizerMeta
    dtype: Literal["uint16", "int32"]
    end_of_text: Annotated[int, Field(strict=True, ge=0, lt=2**31)] | None
    sequences: Literal["documents", "sentences"]  # what a sequence in an index is
    weights: dict[Text, Weight] | None
    splits: Splits
    sources: list[SourceMeta]
    shards: list[Shard]

    def shards_of(self, split: str) -> list[Shard]:
        """The shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == split]


def shard_stem(split: str, number: int) -> str:
    """The name of a split's shard 0, 1, ... without its ending."""
    return f"{split}-{number:05d}"


def write_meta(folder: Path, meta: Meta | Mapping[str, Any]) -> None:
    """Write meta.json, which makes the folder a dataset; its keys stand in the order they come in.

    Raises Error (exit 3) for what `load_meta` would refuse, (exit 4) if it cannot be written.
    """
    tree = dataclasses.asdict(meta) if isinstance(meta, Meta) else meta
    _refuse_first(folder / META, contradictions(_typed(folder / META, tree)))
    write_file(folder / META, json.dumps(tree, indent=1, allow_nan=False).encode() + b"\n")


def load_meta(folder: Path) -> Meta:
    """meta.json, checked in itself. Raises Error (exit 3) that names the key, or what does not add up."""
    meta = read_meta(folder)
    _refuse_first(folder / META, contradictions(meta))
    return meta


def _refuse_first(path: Path, whys: list[str]) -> None:
    if whys:
        more = f" (and {len(whys) - 1} more)" if len(whys) > 1 else ""
        raise Error(path, whys[0] + more, FIX, BAD_INPUT)


def read_meta(folder: Path) -> Meta:
    """meta.json, each value of its type; whether they fit one another, `contradictions` says. Raises Error (exit 3)."""
    path = folder / META
    if file_size(path) > _LARGEST_META:
        raise Error(path, f"has more than {_LARGEST_META:,} bytes", FIX, BAD_INPUT)
    try:
        tree = json.loads(path.read_bytes())
    except OSError as e:
        raise Error(path, f"cannot be read ({e.strerror or e})", FIX, BAD_INPUT) from e
    except (ValueError, RecursionError) as e:  # ValueError: no JSON, no UTF-8, a number of 5,000 digits
        raise Error(path, "is not JSON, or nested too deeply", FIX, BAD_INPUT) from e
    return _typed(path, tree)


def _typed(path: Path, tree: Any) -> Meta:
    version = tree.get("version") if isinstance(tree, dict) and tree.get("format") == FORMAT else VERSION
    if isinstance(version, int) and VERSION < version < 1000:
        raise Error(path, f"is of version {version}, and this classiclm reads {VERSION}", FIX, BAD_INPUT)
    try:
        return TypeAdapter(Meta).validate_python(tree)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "its content"
        why = " ".join(f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}".split())
        raise Error(path, why.encode(errors="replace").decode()[:300], FIX, BAD_INPUT) from e


def contradictions(meta: Meta) -> list[str]:
    """What in meta.json does not fit the rest of it, a line each."""
    return [*_of_tokens(meta), *_of_names(meta), *_of_shards(meta), *_of_sums(meta)]


def _of_tokens(meta: Meta) -> Iterator[str]:
    fitting = "uint16" if meta.tokenizer.vocab_size < 65_500 else "int32"
    if meta.dtype != fitting:
        yield f"dtype is {meta.dtype}, and {meta.tokenizer.vocab_size} tokens need {fitting}"
    if meta.end_of_text is not None and meta.end_of_text >= meta.tokenizer.vocab_size:
        yield f"end_of_text is {meta.end_of_text}, and there are {meta.tokenizer.vocab_size} tokens"


def _of_names(meta: Meta) -> Iterator[str]:
    places = {source.name: i for i, source in enumerate(meta.sources)}
    if len(places) < len(meta.sources):
        yield "sources has one name twice"
    named = {*(meta.weights or {}), *(shard.source for shard in meta.shards)}
    for name in sorted(named.difference(places)):
        yield f"sources has no {name!r}, which is named elsewhere"
    for name in sorted(set(places).difference(meta.weights or places)):
        yield f"weights has no {name!r}"
    order = [(SPLITS.index(shard.split), places.get(shard.source, -1)) for shard in meta.shards]
    if order != sorted(order):
        yield "shards are not ordered by split, then by source"
    for split in SPLITS:
        for i, shard in enumerate(meta.shards_of(split)):
            if shard.file != f"{shard_stem(split, i)}.bin":
                yield f"shards has {shard.file} in the place of {shard_stem(split, i)}.bin"


def _of_shards(meta: Meta) -> Iterator[str]:
    for shard in meta.shards:
        if shard.bytes != shard.tokens * np.dtype(meta.dtype).itemsize:
            yield f"{shard.file}: {shard.bytes} bytes are not {shard.tokens} tokens of {meta.dtype}"
        if not 1 <= shard.documents <= shard.sequences <= shard.tokens:
            counts = f"{shard.documents} documents, {shard.sequences} sequences and {shard.tokens} tokens"
            yield f"{shard.file}: there cannot be {counts}"
        if meta.sequences == "documents" and shard.documents != shard.sequences:
            yield f"{shard.file}: {shard.documents} documents are not {shard.sequences} sequences, and should be"


def _of_sums(meta: Meta) -> Iterator[str]:
    for split in SPLITS:
        per_source = {source.name: getattr(source.splits, split) for source in meta.sources}
        found: dict[str, Counter[str]] = {name: Counter() for name in per_source}
        for shard in meta.shards_of(split):
            found.setdefault(shard.source, Counter()).update(dataclasses.asdict(_counts(shard)))
        total: Counter[str] = Counter()
        for name, counts in per_source.items():
            yield from _differences(f"source {name!r}, {split}", counts, found[name])
            total.update(dataclasses.asdict(counts))
        yield from _differences(split, getattr(meta.splits, split), total)


def _counts(shard: Shard) -> Counts:
    return Counts(shard.tokens, shard.documents, shard.sequences, shard.text_bytes, shard.chars)


def _differences(what: str, stated: Counts, found: Counter[str]) -> Iterator[str]:
    for unit, n in dataclasses.asdict(stated).items():
        if n != found[unit]:
            yield f"{what}: {n} {unit} are stated, and its parts have {found[unit]}"
