"""Encoder–decoders: small Transformers by name, and any of transformers' from the hub or a folder."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..errors import InputError, first_line, nearest
from ..recipe import Model as ModelSection

POSITIONS = 1024  # sinusoidal, so they cost nothing to learn
# ReLU, sinusoidal positions, one matrix for all embeddings; after fairseq's architectures of these names, which normalize
# after each block. `norm_first` normalizes before it (Xiong et al., ICML 2020), as torch.nn.Transformer has it.
ARCHITECTURES = {
    # Wu et al., Revisit-MMT (ACL 2021), for Multi30k
    "transformer_tiny": dict(layers=4, d_model=128, ffn_dim=256, heads=4, dropout=0.3, norm_first=False),
    "transformer_iwslt_de_en": dict(layers=6, d_model=512, ffn_dim=1024, heads=4, dropout=0.3, norm_first=False),
}


class TranslationNetwork(nn.Module):
    """An encoder–decoder of transformers that gives logits [T, K] of the target tokens alone, padding left out.

    `forward` takes (sources [B, S], targets [B, L] shifted behind the start token, flat positions [T] of the real targets).
    """

    def __init__(self, transformer: PreTrainedModel):
        super().__init__()
        self.transformer = transformer
        self.pad = transformer.config.pad_token_id
        self.start = transformer.config.decoder_start_token_id
        self.end = transformer.config.eos_token_id
        self.num_classes = transformer.get_output_embeddings().weight.shape[0]
        self._positions: Tensor | None = None
        # The largest layer by far sees no padding: its inputs are chosen, not its outputs.
        transformer.get_output_embeddings().register_forward_pre_hook(self._choose)
        self.register_state_dict_post_hook(_untied)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        source, target, self._positions = inputs
        try:
            found = self.transformer(
                input_ids=source, attention_mask=(source != self.pad).long(), decoder_input_ids=target, use_cache=False
            )
        finally:
            self._positions = None
        return found.logits

    def _choose(self, layer: nn.Module, arguments: tuple):
        if self._positions is None:  # in generation
            return None
        return (arguments[0].flatten(0, 1).index_select(0, self._positions),)


def _untied(module: nn.Module, state: dict, prefix: str, metadata):
    """Copies of what is tied: safetensors writes no tensor twice, and a moving average would move it twice."""
    seen = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())


def check_name(section: ModelSection):
    """Raise InputError, with the nearest names, where no network has the recipe's name, or not its arguments."""
    if (
        not section.name.count("/")
        and section.name not in ARCHITECTURES
        and not Path(section.name).expanduser().is_dir()
    ):
        raise InputError(
            f"model.name: no translation network {section.name!r}{nearest(section.name, ARCHITECTURES)}; there are "
            f"{', '.join(ARCHITECTURES)}, and any encoder–decoder of transformers as a folder or hub id (user/name)"
        )
    if section.name in ARCHITECTURES:
        sizes_of(section)


def own_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with the recipe's network, or None where one is to be trained."""
    if section.name in ARCHITECTURES:
        return None
    return _had(AutoTokenizer.from_pretrained, section)


def vocabulary_size(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many pieces a recipe's network chooses from: the tokenizer's, and the unused ones that some networks have."""
    if section.name in ARCHITECTURES:
        return len(tokenizer)
    config = _had(AutoConfig.from_pretrained, section)
    return getattr(config, "decoder_vocab_size", None) or config.vocab_size


def create_network(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> TranslationNetwork:
    """The network of a recipe for a tokenizer's pieces, with new weights from torch's generator, or pretrained ones."""
    if section.name in ARCHITECTURES:
        if section.pretrained:
            raise InputError(f"model.pretrained: {section.name} has no pretrained weights: name a folder or a hub id")
        return TranslationNetwork(_small(section, tokenizer))
    if section.pretrained:
        return TranslationNetwork(_had(AutoModelForSeq2SeqLM.from_pretrained, section, **section.kwargs))
    config = _had(AutoConfig.from_pretrained, section, **section.kwargs)
    return TranslationNetwork(AutoModelForSeq2SeqLM.from_config(config))


def save_translator(network: TranslationNetwork, tokenizer: PreTrainedTokenizerBase, folder: Path):
    """Write network and tokenizer as transformers' `from_pretrained` reads them."""
    logging.disable_progress_bar()
    network.transformer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # written so that the owner alone may read
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)


def load_translator(folder: Path) -> tuple[TranslationNetwork, PreTrainedTokenizerBase]:
    """The network and the tokenizer in a run's folder, on the CPU. Raises InputError where there are none."""
    folder = Path(folder).expanduser()
    files = ("config.json", "tokenizer_config.json", "tokenizer.json")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise InputError(f"{folder}: no translation network here: {', '.join(missing)} of a finished run not there")
    logging.disable_progress_bar()
    try:
        return TranslationNetwork(AutoModelForSeq2SeqLM.from_pretrained(folder)), AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the library raises whatever its readers raise
        line = first_line(error)
        raise InputError(f"{folder}: the network cannot be loaded: {line}") from None


def _had(read, section: ModelSection, **arguments):
    """What `read` makes of the recipe's folder or hub id."""
    name = Path(section.name).expanduser()
    logging.disable_progress_bar()
    try:
        return read(str(name) if name.is_dir() else section.name, **arguments)
    except Exception as error:  # the library raises whatever its readers raise
        line = first_line(error)
        there = f"the folder {name} holds" if name.is_dir() else f"there is no folder {name}, and the hub has"
        raise InputError(f"model.name: {there} no encoder–decoder that can be read: {line}") from None


def sizes_of(section: ModelSection) -> dict:
    """What a network of ARCHITECTURES is made of. Raises InputError where `kwargs` do not fit."""
    sizes = ARCHITECTURES[section.name] | section.kwargs
    if unknown := sorted(set(sizes) - set(ARCHITECTURES[section.name])):
        known = ARCHITECTURES[section.name]
        hint = f"only {', '.join(known)}{nearest(unknown[0], known)}"
        raise InputError(f"model.kwargs: {section.name} has no {unknown[0]!r}, {hint}")
    if any(not isinstance(sizes[name], int) or sizes[name] < 1 for name in ("layers", "d_model", "ffn_dim", "heads")):
        raise InputError(
            f"model.kwargs: layers, d_model, ffn_dim and heads should be whole numbers from 1 on, got {sizes}"
        )
    if sizes["d_model"] % sizes["heads"] or sizes["d_model"] % 2:
        raise InputError(
            f"model.kwargs: d_model {sizes['d_model']} must be even and a multiple of heads {sizes['heads']}"
        )
    if not isinstance(sizes["dropout"], int | float) or not 0 <= sizes["dropout"] < 1:
        raise InputError(f"model.kwargs: dropout should be a number from 0 to below 1, got {sizes['dropout']!r}")
    if not isinstance(sizes["norm_first"], bool):
        raise InputError(f"model.kwargs: norm_first should be true or false, got {sizes['norm_first']!r}")
    return sizes


def _small(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    sizes = sizes_of(section)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    special = dict(pad_token_id=pad, eos_token_id=end, decoder_start_token_id=end, forced_eos_token_id=None)
    stacks = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _stack(sizes).items()}
    # The same Transformer twice: Marian's layers normalize after each block, Pegasus' before it.
    of_marian, of_pegasus = (MarianConfig, MarianMTModel), (PegasusConfig, PegasusForConditionalGeneration)
    make_config, make_model = of_pegasus if sizes["norm_first"] else of_marian
    config = make_config(
        vocab_size=len(tokenizer),
        d_model=sizes["d_model"],
        dropout=sizes["dropout"],
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=POSITIONS,
        **stacks,
        **special,
    )
    model = make_model(config)
    initialize(model)
    # What is padded is never said; the end comes when it is chosen.
    model.generation_config = GenerationConfig(**special, bad_words_ids=[[pad]])
    return model


def _stack(sizes: dict) -> dict[str, int]:
    return {"layers": sizes["layers"], "ffn_dim": sizes["ffn_dim"], "attention_heads": sizes["heads"]}


@torch.no_grad()
def initialize(model: PreTrainedModel):
    """Weights as fairseq draws them: Xavier's uniform ones, embeddings with standard deviation d_model^-½, no bias."""
    embeddings = model.get_input_embeddings()
    tied = embeddings.weight.data_ptr()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.data_ptr() != tied:
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(embeddings.weight, std=1.0 / math.sqrt(embeddings.embedding_dim))
    embeddings.weight[model.config.pad_token_id].zero_()
