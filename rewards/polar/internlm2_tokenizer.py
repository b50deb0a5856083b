"""The tokenizer of a released POLAR checkpoint, built from its SentencePiece model without the folder's own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.polar.backends import DiscriminatorError
from rewards.polar.serialise import MARKER, SEPARATOR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "▁"
BPE_MODEL = 2
CONTROL, USER_DEFINED = 3, 4
"""Types of SentencePiece pieces."""


def released_tokenizer(folder: Path, reward_token_id: int | None) -> PreTrainedTokenizerFast:
    """The folder's tokenizer as a plain fast one.

    Raises DiscriminatorError if it cannot be built, lacks a marker, or has the final marker at another id than
    `reward_token_id` (config.json's).
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings: dict[str, Any] = _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "tokenizer.model").is_file():
        backend = from_sentencepiece(folder / "tokenizer.model", settings.get("added_tokens_decoder", {}))
        _add_bos_and_eos(backend, settings)
    else:
        raise DiscriminatorError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: _text(settings.get(name, default)) for name, default in _SPECIAL.items()},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    for marker in (SEPARATOR, MARKER):
        ids = tokenizer.encode(marker, add_special_tokens=False)
        if len(ids) != 1:
            raise DiscriminatorError(f"{folder}: the tokenizer splits {marker} into {len(ids)} tokens")
        if marker == MARKER and reward_token_id is not None and ids[0] != reward_token_id:
            raise DiscriminatorError(f"{folder}: {MARKER} is token {ids[0]}, config.json reads at {reward_token_id}")
    return tokenizer


_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def from_sentencepiece(file: Path, added: dict[str, Any]) -> Any:
    """A byte-fallback BPE `tokenizers.Tokenizer`. `added` (id -> token) renames pieces: `<|reward|>` has an old slot.

    Raises DiscriminatorError for another kind of SentencePiece model.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    if proto.trainer_spec.model_type != BPE_MODEL:
        raise DiscriminatorError(f"{file} is no BPE model")
    names = {int(place): token for place, token in added.items()}
    pieces = [names[i]["content"] if i in names else piece.piece for i, piece in enumerate(proto.pieces)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise DiscriminatorError(f"{file}: added_tokens_decoder gives two pieces one name")
    whole = {i for i, piece in enumerate(proto.pieces) if piece.type in (CONTROL, USER_DEFINED)} | set(names)
    scores = {piece: proto.pieces[i].score for i, piece in enumerate(pieces)}
    merges = generate_merges(ids, scores, skip_tokens={pieces[i] for i in whole})
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=True)
    )
    for i in sorted(whole):
        special = names[i].get("special", True) if i in names else proto.pieces[i].type == CONTROL
        token = AddedToken(pieces[i], normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    prefixed = proto.normalizer_spec.add_dummy_prefix
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces] if prefixed else [spaces])
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*decoding, decoders.Strip(content=" ", left=1)] if prefixed else decoding  # the space that was prepended
    )
    return tokenizer


def _add_bos_and_eos(tokenizer: Any, settings: dict[str, Any]) -> None:
    from tokenizers import processors

    before = [_text(settings.get("bos_token", "<s>"))] if settings.get("add_bos_token", True) else []
    after = [_text(settings.get("eos_token", "</s>"))] if settings.get("add_eos_token", False) else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*before, *after)],
    )


def _text(token: Any) -> str:
    """A special token as text: tokenizer_config.json writes it plainly or as an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise DiscriminatorError(f"{file} is no JSON: {error}") from error
    return found
