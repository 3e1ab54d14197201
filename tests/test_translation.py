"""Translation below the run: text, pieces, batches by tokens, networks, and PS-KD over tokens."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from corpora import pairs, small_recipe, write_plain, write_table
from pskd_timm import METHODS, Batch, InputError, compare
from pskd_timm.losses import sparse_cross_entropy
from pskd_timm.optim import lr_at, make_optimizer
from pskd_timm.store import store_bytes
from pskd_timm.tasks import open_task
from pskd_timm.tasks import translation as room
from pskd_timm.tasks.translation import TranslationTask
from pskd_timm.translation.batches import TokenBatches, by_length
from pskd_timm.translation.network import load_translator
from pskd_timm.translation.sentences import Sentences
from pskd_timm.translation.text import clean, read_corpus
from pskd_timm.translation.tokenizer import decode, encode, train_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("corpus"), train=120, valid=20, test2016=12, test2017=8)


@pytest.fixture(scope="module")
def task(corpus):
    return open_task(small_recipe(corpus))


def refused(folder, **overrides):
    with pytest.raises(InputError) as error:
        task = open_task(small_recipe(folder, **overrides))
        task.check(task.network(), 1)
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


# Text


def test_cleaning_drops_soft_hyphens_and_makes_every_white_space_one_blank():
    assert clean("  Ein\u00a0\tHaus\u00adboot\u200b \n") == "Ein Hausboot"
    assert clean("Ein Hund", lowercase=True) == "ein hund"


def test_plain_files_tables_with_two_columns_and_translation_columns_give_the_same_pairs(tmp_path):
    made = pairs(30)
    write_plain(tmp_path / "plain", train=30, valid=3, test=3)
    for name, row in (
        ("columns", lambda de, en: {"de": de, "en": en}),
        ("nested", lambda de, en: {"translation": {"de": de, "en": en}}),
    ):
        for split in ("train", "validation", "test"):
            write_table(tmp_path / name / f"{split}-00000-of-00001.jsonl", [row(*pair) for pair in made])
    found = [read_corpus(small_recipe(tmp_path / name)) for name in ("plain", "columns", "nested")]
    assert [corpus.train.sources for corpus in found] == [[de for de, _ in made]] * 3
    assert [corpus.train.targets for corpus in found] == [[en for _, en in made]] * 3


def test_a_row_without_one_of_the_languages_is_a_pair_with_an_empty_side(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"translation": {"de": de, "en": en}} for de, en in pairs(6)]
    for split in ("train", "validation", "test"):
        write_table(tmp_path / "lines" / f"{split}.jsonl", [{"translation": {"de": "Hund"}}, *rows])
    assert read_corpus(small_recipe(tmp_path / "lines")).train.targets[0] == ""
    # What a data set of Python's objects keeps of such a row has no key for it.
    table = Dataset.from_dict({"translation": [{"de": "Hund", "en": None}, *(row["translation"] for row in rows)]})
    DatasetDict({split: table for split in ("train", "validation", "test")}).save_to_disk(str(tmp_path / "saved"))
    assert read_corpus(small_recipe(tmp_path / "saved")).train.targets[0] == ""


def test_tables_beside_plain_files_are_named_as_unread(tmp_path, capsys):
    folder = write_plain(tmp_path, train=6, valid=2, test=2)
    write_table(folder / "train.jsonl", [{"de": "a", "en": "b"}])
    assert len(read_corpus(small_recipe(folder)).train) == 6
    assert "plain files are read, train.jsonl beside them not" in capsys.readouterr().err


def test_a_split_in_two_folders_is_refused_with_both(tmp_path):
    for folder in ("raw", "tok"):
        (tmp_path / "plain" / folder).mkdir(parents=True)
        write_plain(tmp_path / "plain" / folder, train=6, valid=2, test=2)
        (tmp_path / "tables" / folder).mkdir(parents=True)
        write_table(tmp_path / "tables" / folder / "train.jsonl", [{"de": "a", "en": "b"}])
    for kind, name in (("plain", "test.de"), ("tables", "train.jsonl")):
        said = refused(tmp_path / kind)
        assert f"raw/{name} and " in said and f"tok/{name} are both the split" in said
    assert len(read_corpus(small_recipe(tmp_path / "plain" / "raw")).train) == 6


def test_parquet_files_named_after_splits_are_these_splits(tmp_path):
    import pandas as pd

    made = pairs(6)
    for split in ("train", "validation", "test2016", "test2017"):
        frame = pd.DataFrame(made, columns=["de", "en"])
        frame.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert list(read_corpus(small_recipe(tmp_path)).tests) == ["test2016", "test2017"]


def test_the_languages_may_be_turned_round_and_test_splits_chosen(corpus):
    turned = read_corpus(
        small_recipe(
            corpus, translation__source_lang="en", translation__target_lang="de", translation__test_splits=["test2017"]
        )
    )
    assert turned.train.sources[0] == pairs(1)[0][1] and list(turned.tests) == ["test2017"]


def test_damaged_corpora_are_told_in_a_line(tmp_path):
    folder = write_plain(tmp_path / "uneven", train=5, valid=2, test=2)
    with (folder / "train.en").open("a") as file:
        file.write("one more\n")
    assert "train.de has 5 lines, train.en 6" in refused(folder)
    (folder / "train.en").unlink()
    assert "has no train.en beside it" in refused(folder)
    folder = write_plain(tmp_path / "latin", train=5, valid=2, test=2)
    (folder / "train.de").write_bytes("a\nfünf\n".encode("latin-1"))
    assert re.search(r"train.de line 2: not UTF-8", refused(folder))
    write_table(tmp_path / "columns" / "train.jsonl", [{"german": "a", "english": "b"}])
    assert "no column 'de'" in (said := refused(tmp_path / "columns", data__test=False, data__holdout_fraction=0.5))
    assert "english, german" in said or "german, english" in said
    write_table(tmp_path / "keys" / "train.jsonl", [{"translation": {"de": "a", "fr": "b"}}])
    assert "have de, fr, not 'en'" in refused(tmp_path / "keys", data__test=False, data__holdout_fraction=0.5)
    write_table(tmp_path / "rows" / "train.jsonl", [{"translation": "a"}])
    assert "row 1 of split train holds 'a' under 'translation'" in refused(
        tmp_path / "rows", data__test=False, data__holdout_fraction=0.5
    )
    write_table(tmp_path / "numbers" / "train.jsonl", [{"de": "a", "en": 3}])
    assert "row 1 of split train holds '3' under 'en', which is no text" in refused(
        tmp_path / "numbers", data__test=False, data__holdout_fraction=0.5
    )
    (tmp_path / "empty").mkdir()
    assert "neither Parquet or JSON files nor plain ones" in refused(tmp_path / "empty")
    assert "nowhere is not there: --data.path" in refused(tmp_path / "nowhere")
    for name in ("train.fr", "train.en"):
        (tmp_path / "empty" / name).write_text("a\n")
    assert "it has train.en, train.fr: translation.source_lang and target_lang name" in refused(tmp_path / "empty")
    folder = write_plain(tmp_path / "broken", train=2)
    (folder / "train.parquet").write_bytes(b"PAR1 not really")
    (folder / "train.de").unlink()
    (folder / "train.en").unlink()
    assert f"data.path: {folder / 'train.parquet'}: cannot be read" in refused(
        folder, data__test=False, data__holdout_fraction=0.5
    )


def test_missing_splits_are_told_with_what_there_is(tmp_path, corpus):
    folder = write_plain(tmp_path / "a", train=5, test=2)
    assert "no validation split among test, train to choose" in refused(folder)
    folder = write_plain(tmp_path / "b", train=5, valid=2)
    assert "no test split among train, valid" in refused(folder)
    assert "no split 'test2018'" in refused(corpus, translation__test_splits=["test2018"])


def test_test_pairs_that_are_training_pairs_too_are_counted(tmp_path, capsys):
    folder = write_plain(tmp_path, train=20, valid=2, test=2, test_other=3)
    for side, lang in enumerate(("de", "en")):
        known = (folder / f"train.{lang}").read_text().splitlines()
        (folder / f"test.{lang}").write_text("\n".join(known[:4] + [("ganz neu", "quite new")[side]]) + "\n")
        (folder / f"test_other.{lang}").write_text("\n".join(reversed(known)) + f"\n{lang}\n")
    open_task(small_recipe(folder))
    said = capsys.readouterr().err
    assert "4 of the 5 pairs of test are training pairs too" in said
    assert "20 of the 21 pairs of test_other are training pairs too" in said


def test_empty_and_too_long_pairs_are_left_out_of_training_counted_and_named(tmp_path, capsys):
    folder = write_plain(tmp_path, train=20, valid=2, test=2)
    lines = (folder / "train.de").read_text().splitlines()
    lines[3], lines[7] = " \u00ad ", "Hund " * 60
    (folder / "train.de").write_text("\n".join(lines) + "\n")
    task = open_task(small_recipe(folder))
    said = capsys.readouterr().err
    assert "1 of 20 pairs with an empty side: 4" in said  # as the lines of a file are counted
    assert "1 of 20 pairs longer than translation.max_length 40: 8" in said
    assert len(task.train.targets) == len(task.train.pairs) == 18


def test_empty_pairs_of_the_scored_parts_are_scored_and_named(tmp_path, capsys):
    folder = write_plain(tmp_path, train=20, valid=4, test=6)
    lines = (folder / "test.en").read_text().splitlines()
    lines[2] = lines[5] = ""
    (folder / "test.en").write_text("\n".join(lines) + "\n")
    task = open_task(small_recipe(folder))
    said = [line for line in capsys.readouterr().err.splitlines() if "scored" in line]
    assert said == ["pskd-timm: data: scored as they are, 2 of 6 pairs of test with an empty side: 3, 6"]
    assert len(task.evaluated["test"].targets) == 6


def test_named_pairs_are_counted_as_in_the_data_also_where_only_some_are_drawn(tmp_path, capsys):
    folder = write_plain(tmp_path, train=40, valid=4, test=6)
    lines = (folder / "train.en").read_text().splitlines()
    lines[9::10] = [""] * 4
    (folder / "train.en").write_text("\n".join(lines) + "\n")
    open_task(small_recipe(folder, data__limit_train=30))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "empty" in line]
    named = said.rpartition(": ")[2].split(", ")
    assert f"{len(named)} of 30 pairs" in said and {int(name) for name in named} <= {10, 20, 30, 40}
    open_task(small_recipe(folder, data__holdout_fraction=0.5, data__test=False))
    said = [line for line in capsys.readouterr().err.splitlines() if "empty" in line]
    assert sorted(name for line in said for name in line.rpartition(": ")[2].split(", ")) == ["10", "20", "30", "40"]
    assert all("of train with" in line for line in said if "scored" in line)


def test_a_held_out_part_takes_the_place_of_the_validation_split_and_of_an_unread_test_part(corpus):
    task = open_task(small_recipe(corpus, data__test=False, data__holdout_fraction=0.1))
    assert task.splits == ("holdout",)
    assert len(task.evaluated["holdout"].targets) == 12 and len(task.train.targets) == 108
    assert open_task(small_recipe(corpus)).splits == ("test2016", "test2017", "valid")


def test_settings_of_images_are_refused_by_name(corpus):
    assert "translation.batch_tokens says how many" in refused(corpus, batch_size=32)
    for key, value in {
        "augment.mixup": 0.2,
        "augment.hflip": 0.5,
        "data.image_size": 32,
        "data.label_noise": 0.1,
        "model.channels_last": True,
        "model.compile": "default",
        "keep_probabilities": "float32",
    }.items():
        assert f"{key}: task translation does not read it" in refused(corpus, **{key: value})


def test_methods_that_need_a_second_input_of_a_class_are_refused_and_not_among_the_recipes_methods(corpus):
    recipe = small_recipe(corpus)
    assert recipe.methods == [name for name in METHODS if name not in ("cskd", "dlb")]
    with pytest.raises(InputError, match="cskd compares two inputs of one class, which task translation has not"):
        recipe.check_method("cskd")


# Pieces


def test_the_names_of_a_sentences_pieces_read_as_the_sentence():
    text = "Zwei Männer gehen über die Straße."
    tokenizer = train_tokenizer([text] * 4, 400, 100)
    raw = room.piece_names(tokenizer, len(tokenizer) + 2)
    names = room.readable_names(tokenizer, raw)
    read = "".join(names[piece] for piece in encode(tokenizer, [text])[0][:-1])
    assert read == "␣" + text.replace(" ", "␣")
    assert names[-2:] == raw[-2:] and names[tokenizer.eos_token_id] == "</s>"
    assert names[raw.index("Ã")] == "Ã"  # half of a letter


def test_pieces_join_to_the_sentence_whatever_is_in_it_and_depend_on_the_training_text_alone():
    texts = [text for pair in pairs(200) for text in pair]
    first, second = (train_tokenizer(texts, 320, 100) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) <= 320
    odd = ["Hund", "¿Qué? 日本語 🙂 x\u0301", "don't  stop", "a , b ."]
    assert decode(first, encode(first, odd)) == odd
    assert all(pieces[-1] == first.eos_token_id for pieces in encode(first, odd))


def test_the_joint_encoding_is_trained_on_the_training_part_only(tmp_path):
    folder = write_plain(tmp_path, train=60, valid=3, test=3)
    before = open_task(small_recipe(folder)).tokenizer.get_vocab()
    for name in ("valid", "test"):
        (folder / f"{name}.en").write_text("unheard unheard unheard\n" * 3)
    assert open_task(small_recipe(folder)).tokenizer.get_vocab() == before


# Batches


def test_padded_sentences_are_those_of_a_plain_loop():
    lists = [[5, 6, 7], [8], [9, 10]]
    sentences = Sentences.of(lists)
    table, positions = sentences.padded(torch.tensor([2, 0]), 0)
    assert table.tolist() == [[9, 10, 0], [5, 6, 7]]
    assert table.flatten()[positions].tolist() == [9, 10, 5, 6, 7]
    assert sentences.places(torch.tensor([2, 0])).tolist() == [4, 5, 0, 1, 2]
    assert [sentences.take(torch.tensor([2, 0])).padded(torch.tensor([i]), 0)[0][0].tolist() for i in (0, 1)] == [
        [9, 10],
        [5, 6, 7],
    ]


def loaders(world_size, batch_tokens=60, seed=3):
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(2, 12, (100,), generator=generator).tolist() for _ in range(2))
    sides = [Sentences.of([[7] * n for n in lengths]) for lengths in (source, target)]
    return [TokenBatches(*sides, batch_tokens, 0, 1, seed, "cpu", rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_global_batches_are_the_same_on_any_number_of_ranks_and_hold_every_pair_once(world_size):
    alone, together = loaders(1)[0], loaders(world_size)
    for epoch in (0, 1):
        shares = [loader.rank_batches(epoch) for loader in together]
        whole = [sorted(torch.cat(parts).tolist()) for parts in zip(*shares, strict=True)]
        assert whole == [sorted(batch.tolist()) for batch in alone.rank_batches(epoch)]
        assert sorted(sum(whole, [])) == list(range(100))
        assert len(whole) == alone.steps == math.ceil(len(alone.targets.tokens) / 60)
        for step, batch in enumerate(whole):
            size = int(alone.targets.lengths[batch].sum())
            assert together[0].global_size(epoch, step) == size
            assert abs(size - len(alone.targets.tokens) / alone.steps) <= alone.targets.lengths.max()
    assert [b.tolist() for b in alone.rank_batches(0)] != [b.tolist() for b in alone.rank_batches(1)]
    assert [b.tolist() for b in loaders(1, seed=4)[0].rank_batches(0)] != [b.tolist() for b in alone.rank_batches(0)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_uneven_shares_and_micro_batches_weigh_to_the_mean_over_all_target_tokens(world_size):
    together = loaders(world_size)
    each_token = torch.rand(len(together[0].targets.tokens), dtype=torch.float64)
    for step in range(together[0].steps):
        size, total, seen = together[0].global_size(0, step), 0.0, []
        for loader in together:
            ids = loader.rank_batches(0)[step:]
            for batch in next(iter(loader.batches(ids, 0, 2))):
                weight = len(batch.labels) * world_size / size
                total += weight * each_token[batch.index].mean() / world_size  # DDP averages over ranks
                seen.append(batch.index)
        torch.testing.assert_close(total, each_token[torch.cat(seen)].mean(), rtol=1e-12, atol=0)
        assert len(torch.cat(seen)) == size


def test_the_rows_of_batches_are_the_places_of_their_tokens_in_the_training_targets(task):
    loader = task.loader(task.network(), "cpu", 0, 1, False)
    ids = loader.rank_batches(0)
    steps = list(loader.batches(ids, 0, 1))
    assert torch.equal(loader.rows(ids), torch.cat([batch.index for (batch,) in steps]))
    assert sorted(loader.rows(ids).tolist()) == list(range(task.num_rows)) and len(loader.rows([])) == 0
    for (batch,) in steps[:3]:
        assert torch.equal(batch.labels, task.labels[batch.index])
        source, target, positions = batch.inputs
        # Behind the start token a target is its own labels, one place later.
        followed = torch.cat([target[:, 1:], torch.zeros(len(target), 1, dtype=torch.int64)], 1).flatten()[positions]
        ends = batch.labels == task.tokenizer.eos_token_id
        assert torch.equal(followed[~ends], batch.labels[~ends]) and (target[:, 0] == task.network().start).all()


def test_batches_of_similar_lengths_have_little_padding():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, 30, (2000,), generator=generator)
    source = (target + torch.randint(-3, 4, (2000,), generator=generator)).clamp_min(2)
    padded = sum(int(target[b].max()) * len(b) for b in by_length(source, target, 500))
    assert padded < 1.1 * target.sum()


# Networks


def test_logits_are_those_of_the_padded_network_at_the_real_targets(task):
    network = task.network().eval()
    batch = task.loader(network, "cpu", 0, 1, False).batch(torch.arange(6))
    source, target, positions = batch.inputs
    whole = network.transformer(
        input_ids=source, attention_mask=(source != network.pad).long(), decoder_input_ids=target
    ).logits
    torch.testing.assert_close(network(batch.inputs), whole.flatten(0, 1)[positions])
    # What stands behind a sentence changes nothing about it.
    alone = task.loader(network, "cpu", 0, 1, False).batch(torch.tensor([0]))
    torch.testing.assert_close(network(alone.inputs), network(batch.inputs)[: len(alone.labels)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_of_the_encoder_is_torchs_that_normalizes_first_or_last(corpus, norm_first):
    kwargs = small_recipe(corpus).model.kwargs | {"norm_first": norm_first}
    network = open_task(small_recipe(corpus, **{"model.kwargs": kwargs})).network().eval()
    layer = network.transformer.model.encoder.layers[0]
    sizes = kwargs["d_model"], kwargs["heads"], kwargs["ffn_dim"]
    theirs = torch.nn.TransformerEncoderLayer(*sizes, dropout=0.0, batch_first=True, norm_first=norm_first).eval()
    ours = layer.self_attn
    projections = [ours.q_proj, ours.k_proj, ours.v_proj]
    parts = {"self_attn.out_proj": ours.out_proj, "linear1": layer.fc1, "linear2": layer.fc2}
    parts |= {"norm1": layer.self_attn_layer_norm, "norm2": layer.final_layer_norm}
    state = {f"{name}.{kind}": getattr(part, kind) for name, part in parts.items() for kind in ("weight", "bias")}
    state |= {
        f"self_attn.in_proj_{kind}": torch.cat([getattr(p, kind) for p in projections]) for kind in ("weight", "bias")
    }
    theirs.load_state_dict(state)
    inputs = torch.randn(3, 7, kwargs["d_model"], generator=torch.Generator().manual_seed(0))
    found = layer(inputs, attention_mask=None)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, theirs(inputs))


def test_initial_weights_are_drawn_as_fairseq_does_and_depend_on_the_seed_alone(corpus, task):
    one, same = task.network(), open_task(small_recipe(corpus)).network()
    other = open_task(small_recipe(corpus, seed=1)).network()
    first = one.transformer.model.encoder.layers[0].fc1.weight
    assert torch.equal(first, same.transformer.model.encoder.layers[0].fc1.weight)
    assert not torch.equal(first, other.transformer.model.encoder.layers[0].fc1.weight)
    assert first.abs().max() <= math.sqrt(6 / (16 + 32))
    embeddings = one.transformer.get_input_embeddings().weight.detach()
    assert embeddings.std().item() == pytest.approx(16**-0.5, rel=0.1) and not embeddings[one.pad].any()
    assert embeddings.data_ptr() == one.transformer.get_output_embeddings().weight.data_ptr()


def test_tied_weights_stay_tied_through_a_state_dict_and_a_copy(task):
    import copy

    network = task.network()
    copied = copy.deepcopy(network)
    copied.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()})
    assert not copied.transformer.get_output_embeddings().weight.any()
    assert network.transformer.get_output_embeddings().weight.any()
    assert copied.transformer.get_input_embeddings().weight is copied.transformer.get_output_embeddings().weight
    pointers = [tensor.data_ptr() for tensor in network.state_dict().values()]
    assert len(pointers) == len(set(pointers))  # safetensors takes it


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_saved_network_is_read_back_by_transformers_and_here(corpus, tmp_path, norm_first):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    kwargs = small_recipe(corpus).model.kwargs | {"norm_first": norm_first}
    task = open_task(small_recipe(corpus, **{"model.kwargs": kwargs}))
    network = task.network().eval()
    task.save(network, tmp_path)
    batch = task.loader(network, "cpu", 0, 1, False).batch(torch.arange(5))
    assert torch.equal(task.load(tmp_path).eval()(batch.inputs), network(batch.inputs))
    theirs, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("eins zwei.")["input_ids"] == encode(task.tokenizer, ["eins zwei."])[0]
    assert theirs.config.vocab_size == task.num_classes
    sources = batch.inputs[0]
    options = dict(attention_mask=(sources != network.pad).long(), num_beams=2, max_new_tokens=8)
    assert torch.equal(theirs.generate(sources, **options), network.transformer.generate(sources, **options))
    with pytest.raises(InputError, match="no translation network here"):
        load_translator(tmp_path / "nothing")


def test_a_network_that_is_not_there_is_named_as_the_folder_that_is_missing(corpus, tmp_path):
    name = str(tmp_path / "runs" / "mine")
    assert f"model.name: there is no folder {name}, and the hub has no" in refused(corpus, model__name=name)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert f"model.name: the folder {name} holds no encoder–decoder" in refused(corpus, model__name=name)


def test_a_network_of_transformers_trains_from_a_folder_with_its_own_tokenizer(task, corpus, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    task.tokenizer.save_pretrained(tmp_path)
    config = T5Config(
        vocab_size=len(task.tokenizer) + 20,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=task.tokenizer.pad_token_id,
        eos_token_id=task.tokenizer.eos_token_id,
        decoder_start_token_id=task.tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    own = open_task(small_recipe(corpus, **{"model.name": str(tmp_path), "model.pretrained": True, "model.kwargs": {}}))
    network = own.network()
    assert own.num_classes == network.num_classes == len(task.tokenizer) + 20
    batch = own.loader(network, "cpu", 0, 1, False).batch(torch.arange(4))
    logits = network.eval()(batch.inputs)
    source, target, positions = batch.inputs
    whole = network.transformer(input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=target).logits
    torch.testing.assert_close(logits, whole.flatten(0, 1)[positions])
    F.cross_entropy(logits, batch.labels).backward()


def test_unknown_networks_and_arguments_are_refused_with_the_nearest(corpus):
    assert "did you mean transformer_tiny?" in refused(corpus, **{"model.name": "transformer_tni"})
    assert "did you mean dropout?" in refused(corpus, **{"model.kwargs": {"dropuot": 0.1}})
    assert "should be true or false, got 'yes'" in refused(corpus, **{"model.kwargs": {"norm_first": "yes"}})
    assert "multiple of heads" in refused(corpus, **{"model.kwargs": {"d_model": 30, "heads": 4}})
    assert "has no pretrained weights" in refused(corpus, **{"model.pretrained": True})


def test_too_small_batches_and_too_few_positions_are_refused(corpus):
    assert "translation.batch_tokens 5: batches of" in refused(corpus, translation__batch_tokens=5)
    assert "exceeds the 1024 positions" in refused(corpus, translation__max_length=2000)


def test_a_full_store_beyond_a_share_of_memory_is_refused_with_the_two_ways_out(corpus, monkeypatch):
    task = open_task(small_recipe(corpus, **{"pskd.store_topk": None}))
    size = store_bytes(task.num_rows, task.num_classes, "float32")
    monkeypatch.setattr(room.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else size * 4 - 4)
    with pytest.raises(InputError) as error:
        task.check(task.network(), 1)
    assert "store_topk 20" in str(error.value) and "teacher snapshot" in str(error.value)
    monkeypatch.setattr(room.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else size * 4)
    task.check(task.network(), 1)
    assert store_bytes(435_122, 10_000, "float16", 1, 20) <= 45e6  # Multi30k's


# Learning rate


def test_the_learning_rate_rises_linearly_and_falls_with_the_inverse_square_root_of_the_step(corpus):
    optim = small_recipe(corpus, **{"optim.lr": 0.5, "optim.warmup_steps": 10}).optim
    rates = [lr_at(step, 7, 20, optim) for step in range(140)]
    for step, rate in enumerate(rates, 1):
        assert rate == pytest.approx(0.5 * min(step / 10, math.sqrt(10 / step)))


def test_adam_takes_the_recipes_betas_and_a_schedule_without_warm_up_is_refused(corpus, task):
    optimizer = make_optimizer(task.network(), small_recipe(corpus).optim)
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    with pytest.raises(InputError, match="needs warmup_steps"):
        small_recipe(corpus, **{"optim.warmup_steps": 0})
    with pytest.raises(InputError, match="say the same"):
        small_recipe(corpus, **{"optim.warmup_epochs": 1})


# PS-KD over tokens


def test_the_sparse_cross_entropy_and_its_gradient_are_those_of_the_whole_target():
    torch.manual_seed(0)
    logits = torch.randn(6, 30, dtype=torch.float64, requires_grad=True)
    classes, weights = torch.randint(30, (6, 4)), torch.rand(6, 4, dtype=torch.float64)
    classes[:, 1] = classes[:, 0]  # a class may stand there twice
    rest = torch.rand(6, dtype=torch.float64)
    target = rest[:, None].repeat(1, 30).scatter_add(1, classes, weights)
    each, log_p = sparse_cross_entropy(logits, classes, weights, rest)
    expected = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(log_p, logits.log_softmax(1))
    scale = torch.rand(6, dtype=torch.float64)
    found = torch.autograd.grad((each * scale).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad((expected * scale).sum(), logits)[0])


def steps_of(task, teacher, epochs=3, alpha=0.6):
    """Losses and logits of PS-KD over a few epochs without dropout, as the run computes them."""
    network = task.network().eval()  # dropout would hide what is compared
    settings = {"store_topk": 4, "store_dtype": "float32"} if teacher == "store" else {}
    method = METHODS["pskd"](alpha=alpha, teacher=teacher, **settings)
    sizes = {"num_samples": task.num_rows, "num_classes": task.num_classes, "num_epochs": epochs}
    method.setup(**sizes, device="cpu", labels=task.labels, model=network)
    loader = task.loader(network, "cpu", 0, 1, False)
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    for epoch in range(epochs):
        ids = loader.rank_batches(epoch)
        method.begin_epoch(epoch, loader.rows(ids))
        for (batch,) in loader.batches(ids, epoch, 1):
            loss, logits = method.loss(network, batch)
            yield epoch, batch, loss, logits, network
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        method.end_epoch()


def test_topk_ps_kd_over_tokens_is_an_independent_computation_with_a_row_for_each_target_token(task):
    k, last = 4, {}
    for epoch, batch, loss, logits, _ in steps_of(task, "store"):
        alpha, expected = 0.6 * (epoch + 1) / 3, 0.0
        log_p = logits.detach().double().log_softmax(1)
        for token, (row, label) in enumerate(zip(batch.index.tolist(), batch.labels.tolist(), strict=True)):
            target = torch.zeros(task.num_classes, dtype=torch.float64)
            if row in last:
                kept = dict(sorted(last[row].items(), key=lambda item: -item[1])[:k])
                target += max(0.0, 1.0 - sum(kept.values())) / (task.num_classes - k)
                target[list(kept)] = torch.tensor(list(kept.values()), dtype=torch.float64)
            else:
                target[label] = 1.0
            target *= alpha
            target[label] += 1.0 - alpha
            expected -= float(target @ log_p[token]) / len(batch.labels)
            last[row] = dict(enumerate(log_p[token].exp().tolist()))
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert len(last) == task.num_rows


def test_snapshot_ps_kd_over_tokens_asks_the_network_of_the_last_epochs_end(task):
    import copy

    snapshot, now = None, 0
    for epoch, batch, loss, logits, network in steps_of(task, "snapshot"):
        if epoch != now:
            now, snapshot = epoch, copy.deepcopy(network)
        alpha = 0.6 * (epoch + 1) / 3
        target = F.one_hot(batch.labels, task.num_classes).double()
        with torch.no_grad():
            teacher = snapshot(batch.inputs).double().softmax(1) if snapshot else target
        target = (1 - alpha) * target + alpha * teacher
        expected = -(target * logits.detach().double().log_softmax(1)).sum(1).mean()
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("method", ["baseline", "label_smoothing", "tfkd"])
def test_the_other_methods_losses_over_tokens_are_torchs(task, method):
    network = task.network().eval()
    batch = task.loader(network, "cpu", 0, 1, False).batch(torch.arange(9))
    made = METHODS[method](**({"epsilon": 0.2} if method == "label_smoothing" else {}))
    made.setup(num_samples=task.num_rows, num_classes=task.num_classes, num_epochs=2, device="cpu", model=network)
    loss, logits = made.loss(network, batch)
    assert logits.shape == (len(batch.labels), task.num_classes)
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=0.2 if method == "label_smoothing" else 0.0)
    if method == "tfkd":
        q = torch.full_like(logits, 0.01 / (task.num_classes - 1)).scatter(1, batch.labels[:, None], 0.99)
        kl = F.kl_div(logits.log_softmax(1), (q / 20).softmax(1), reduction="batchmean")
        expected = 0.9 * expected + 0.1 * kl
    torch.testing.assert_close(loss, expected)
    assert isinstance(batch, Batch)


def test_the_validation_split_chooses_the_best_epoch_also_where_it_is_named_among_the_tests(tmp_path):
    folder = write_plain(tmp_path, train=40, valid=10, test_2016=10)
    splits = {"translation__validation_split": "valid", "translation__test_splits": ["valid", "test_2016"]}
    task = TranslationTask(small_recipe(folder, **splits))
    assert task.splits == ("test_2016", "valid")


def test_a_trained_teacher_is_refused_before_the_baseline_is_trained_for_it(tmp_path):
    folder = write_plain(tmp_path, train=40, valid=10, test_2016=10)
    recipe = small_recipe(folder, tfkd__teacher="baseline", output_dir=str(tmp_path / "runs"))
    with pytest.raises(InputError, match="a trained teacher is a network for images: with task translation"):
        compare(recipe, ["tfkd"])
    assert not (tmp_path / "runs").exists()
