"""Get a tokenizer: from the hub or a directory, or trained on the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raytx.errors import DataError, RecipeError
from raytx.tasks.base import Row
from raytx_hf.architecture import expanded

if TYPE_CHECKING:
    from raytx_hf.model import HFModel, TrainedTokenizer

END = "<|endoftext|>"
INSIDE = "##"
"""Marks a piece that goes on with a word."""
TEXT_COLUMNS = ("text", "text_pair")

Texts = Callable[[], Iterator[str]]
"""Reads the training texts from the first on, as often as it is called."""


def fitted(model: HFModel, rows: Callable[[], Iterator[Row]], config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the component asks for; one to be trained reads the rows' text columns."""
    asked = model.tokenizer if model.tokenizer is not None else model.path
    assert asked is not None
    if not isinstance(asked, str):
        return _train(asked, lambda: _texts(rows), config, task=model.task)
    revision = model.revision if asked == model.path else None
    try:
        return opened(expanded(asked), revision=revision or "main", trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model: no tokenizer at {asked}: {' '.join(str(error).split())[:300]}") from None


def opened(place: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(place), **options)


def _texts(rows: Callable[[], Iterator[Row]]) -> Iterator[str]:
    for row in rows():
        yield from (row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str) and row[column])


def _train(asked: TrainedTokenizer, texts: Texts, config: PreTrainedConfig, *, task: str) -> PreTrainedTokenizerBase:
    """Train a tokenizer. The same texts, in whatever process, give the same one to the byte."""
    if next(texts(), None) is None:
        raise DataError("no row has text to train the tokenizer on")
    special = _special_tokens(asked.train, task)
    if config.is_encoder_decoder and task != "causal-lm":
        special["eos_token"] = special["sep_token"]  # where T5 and BART look for what to classify by
    train = {"bpe": _bpe, "wordpiece": _wordpiece}[asked.train]
    tokenizer = train(texts, asked.vocab_size or config.vocab_size, _unique(list(special.values())))
    if task != "causal-lm":
        tokenizer.post_processor = _template(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=_input_names(config), **special)


def _input_names(config: PreTrainedConfig) -> list[str]:
    """BERT and its kin tell a pair's texts apart by an embedding; other families take no token_type_ids."""
    types = (getattr(config, "type_vocab_size", None) or 0) > 1
    return ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]


def _special_tokens(algorithm: str, task: str) -> dict[str, str]:
    """A decoder needs the end of a document; a classifier BERT's five. Byte-level BPE knows every byte: no [UNK]."""
    if task == "causal-lm":
        special = {"bos_token": END, "eos_token": END, "pad_token": END}
    else:
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return special if algorithm == "bpe" else special | {"unk_token": "[UNK]"}


def _bpe(texts: Texts, vocab_size: int, special: list[str]) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(special)
    if vocab_size < least:
        raise RecipeError(f"model.tokenizer.vocab_size={vocab_size}: byte-level BPE needs at least {least}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer=trainer)
    return tokenizer


def _wordpiece(texts: Texts, vocab_size: int, special: list[str]) -> Tokenizer:
    """WordPiece as BERT has it (Devlin et al. 2018).

    The trainer numbers the pieces inside words (##a, ##b) as it meets them in a hash map, another way in each process,
    and decides between equally frequent merges by these numbers. So the pieces are found first and given in order, as
    if they were special, and the vocabulary learned from there becomes that of a tokenizer where they are not.
    """
    characters = _learned(texts, 0, special)
    pieces = sorted(token for token in characters if token.startswith(INSIDE) and token not in special)
    tokenizer = _words(_learned(texts, vocab_size, special + pieces))
    tokenizer.add_special_tokens(special)
    return tokenizer


def _learned(texts: Texts, vocab_size: int, given: list[str]) -> dict[str, int]:
    """Return the WordPiece vocabulary of so many tokens, or of every character's where these are more."""
    tokenizer = _words({})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=given, continuing_subword_prefix=INSIDE, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer=trainer)
    return tokenizer.get_vocab()


def _words(vocabulary: dict[str, int]) -> Tokenizer:
    """Return a WordPiece tokenizer that reads as BERT's: lower case, Chinese characters one by one."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _template(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    return processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )


def _unique(tokens: list[str]) -> list[str]:
    return list(dict.fromkeys(tokens))
