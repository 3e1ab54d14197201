"""Pieces of words: a joint byte-pair encoding, as transformers' tokenizers keep it."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, END = "<pad>", "</s>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al., ACL 2016) of at most `vocab_size` pieces over `texts`: every text has one reading.

    `</s>` ends each sequence and starts the decoder's; a function of the texts alone.
    """
    tokenizer = Tokenizer(models.BPE())
    # Bytes know no unknown letter, and the pieces of a sentence join to that very sentence.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], target: bool = False) -> list[list[int]]:
    """Each text's pieces with the end's, as the language of sources or of targets is encoded."""
    if not texts:
        return []
    given = {"text_target": texts} if target else {"text": texts}
    return tokenizer(**given, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]


def decode(tokenizer: PreTrainedTokenizerBase, sequences) -> list[str]:
    """The texts that sequences of pieces stand for."""
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]
