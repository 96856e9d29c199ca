"""Captions to embeddings to batches, with a tiny T5 of random weights: nothing is downloaded."""

import json
import logging
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hpdm import cli, text
from hpdm.commands.embed import Embed
from hpdm.commands.sample import SampleOptions, sample
from hpdm.patch.draws import draw
from hpdm.patch.objective import denoising_error
from hpdm.sampling import SamplerOptions
from hpdm.text import EmbeddingInfo, EmbeddingStore, TextEncoder, collate_text, embed_captions
from tests.small import random_model, save_as_run, small_config

CAPTIONS = ["a red disc", "a blue triangle drifting up and to the left", "a ring"]
INFO = EmbeddingInfo("tiny-t5", 24, 32, "fp32")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> Path:
    """A T5 with its tokenizer, as models on the hub are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    tokens = Tokenizer(models.Unigram())
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokens.train_from_iterator(CAPTIONS * 5, trainer)
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=tokenizer.vocab_size, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(encoder_folder):
    return TextEncoder(encoder_folder, max_length=32)


def store_of(folder, captions=CAPTIONS, seed=0):
    """Embeddings of random values and lengths."""
    store = EmbeddingStore.create(folder, INFO)
    torch.manual_seed(seed)
    store.add(captions, [torch.randn(3 + n, 24) for n in range(len(captions))])
    return store


def test_the_encoder_gives_each_caption_its_rows_without_padding(encoder):
    together = encoder(CAPTIONS)
    assert encoder.info == INFO
    for caption, rows in zip(CAPTIONS, together):
        assert rows.shape == (len(encoder.tokenizer(caption)["input_ids"]), 24)
        assert rows.dtype is torch.float32
        torch.testing.assert_close(rows, encoder([caption])[0])  # alone there is nothing to pad
    assert not torch.allclose(together[0][0], together[1][0], atol=1e-3)
    torch.testing.assert_close(encoder([" a  red\ndisc "])[0], together[0])


def test_an_empty_caption_is_no_text(encoder):
    rows = encoder(["", CAPTIONS[0], "  "])
    assert [len(r) for r in rows] == [0, len(rows[1]), 0]
    assert encoder([""])[0].shape == (0, 24)


def test_long_captions_are_cut_and_named(encoder_folder, caplog):
    short = TextEncoder(encoder_folder, max_length=4)
    with caplog.at_level(logging.WARNING):
        rows = short([CAPTIONS[1], CAPTIONS[1]])
    assert [r.shape for r in rows] == [(4, 24)] * 2
    assert f"2 captions cut to 4 tokens, the first: {CAPTIONS[1]}" in caplog.text


def test_half_precision_is_near(encoder_folder, encoder):
    half = TextEncoder(encoder_folder, precision="bf16", max_length=32)
    (rows,), (full,) = half(CAPTIONS[:1]), encoder(CAPTIONS[:1])
    assert rows.dtype is torch.bfloat16
    assert (rows.float() - full).norm() < 0.05 * full.norm()


def test_without_transformers_the_extra_is_named(encoder_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers; install hpdm\[t2v\]"):
        TextEncoder(encoder_folder)


def test_encoders_that_are_not_there_are_named(tmp_path, encoder_folder):
    with pytest.raises(OSError, match=r"^encoder: got '.*nowhere', expected the folder of a T5 .* needs --download"):
        TextEncoder(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((encoder_folder / name).read_bytes())
    with pytest.raises(ValueError, match=r"^encoder: got '.*bare', which has no tokenizer beside the model$"):
        TextEncoder(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(
        ValueError, match=r"^encoder: got '.*bare', expected the folder of a T5 model and its tokenizer"
    ):
        TextEncoder(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"^max_length: got 0"):
        TextEncoder(encoder_folder, max_length=0)
    with pytest.raises(ValueError, match=r"^precision: got 'fp16', expected one of 'fp32', 'bf16'$"):
        TextEncoder(encoder_folder, precision="fp16")


def test_batches_of_texts_are_padded_behind_and_masked():
    texts = [torch.ones(3, 5), torch.full((17, 5), 2.0, dtype=torch.bfloat16), torch.empty(0, 5)]
    batch, mask = collate_text(texts)
    assert (batch.shape, batch.dtype, mask.shape, mask.dtype) == ((3, 32, 5), torch.float32, (3, 32), torch.bool)
    assert mask.sum(dim=1).tolist() == [3, 17, 0]
    assert batch.sum(dim=(1, 2)).tolist() == [15, 170, 0]
    assert batch[mask].all()
    assert collate_text(texts[:1], multiple=1)[0].shape == (1, 3, 5)
    assert collate_text(texts[2:])[1].tolist() == [[False] * 16]
    for wrong in ([], [torch.ones(3)], [torch.ones(3, 5), torch.ones(3, 4)]):
        with pytest.raises(ValueError, match=r"^texts: got shapes"):
            collate_text(wrong)


def test_a_store_finds_embeddings_by_caption(tmp_path):
    torch.manual_seed(0)
    rows = [torch.randn(n, 24) for n in (4, 1, 0)]
    store = EmbeddingStore.create(tmp_path / "e", INFO)
    store.add(CAPTIONS, rows)
    for opened in (store, EmbeddingStore(tmp_path / "e", width=24), pickle.loads(pickle.dumps(store))):
        assert len(opened) == 3
        assert all(torch.equal(opened[c], r) for c, r in zip(CAPTIONS, rows))
        assert torch.equal(opened[f" {CAPTIONS[0]}\n"], rows[0])
        assert CAPTIONS[0] in opened
        assert "a wolf" not in opened
        assert opened.missing(["a wolf", CAPTIONS[1], " a  wolf", "a bear"]) == ["a wolf", "a bear"]
    with pytest.raises(
        ValueError, match=r"^caption: 'a wolf' is not in .*e; run `hpdm data embed` with --data or --prompts first$"
    ):
        store["a wolf"]


def test_many_captions_over_several_files(tmp_path):
    store = EmbeddingStore.create(tmp_path, INFO)
    wanted = {}
    for n in range(5):
        captions = [f"caption {n} {i}" for i in range(40)]
        rows = [torch.full((i % 3, 24), float(100 * n + i)) for i in range(40)]
        store.add(captions, rows)
        wanted |= dict(zip(captions, rows))
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    assert all(torch.equal(EmbeddingStore(tmp_path)[c], r) for c, r in wanted.items())


def test_what_a_store_holds_is_checked(tmp_path):
    store = store_of(tmp_path)
    with pytest.raises(ValueError, match=r"has width 24 \(tiny-t5\), expected config.text_width = 1024"):
        EmbeddingStore(tmp_path, width=1024)
    with pytest.raises(ValueError, match=r"holds other embeddings \(max_length: 32 -> 64\); choose another folder"):
        EmbeddingStore.create(tmp_path, EmbeddingInfo("tiny-t5", 24, 64, "fp32"))
    with pytest.raises(ValueError, match=r"of them \[\(3, 8\)\] of another shape, expected 1 of \[S_i, 24\]"):
        store.add(["x"], [torch.zeros(3, 8)])
    with pytest.raises(FileNotFoundError, match=r"no index.json in .*gone, expected a folder that `hpdm data embed`"):
        EmbeddingStore(tmp_path / "gone")
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .* delete it and embed again"):
        EmbeddingStore(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(ValueError, match=r"index.json: format 2, from a newer version, expected at most 1"):
        EmbeddingStore(tmp_path)


def test_embedding_goes_on_where_it_stopped(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "SHARD_BYTES", 1)  # a file per batch
    store, calls = EmbeddingStore.create(tmp_path, encoder.info), []

    def stops(captions):
        if calls:
            raise KeyboardInterrupt
        calls.append(captions)
        return encoder(captions)

    stops.info = encoder.info
    with pytest.raises(KeyboardInterrupt):
        embed_captions(stops, store, [*CAPTIONS, CAPTIONS[0]], batch=1)
    assert calls == [[CAPTIONS[1]]]  # the longest first
    store = EmbeddingStore.create(tmp_path, encoder.info)
    progress = []
    assert embed_captions(encoder, store, CAPTIONS, 1, lambda *done: progress.append(done)) == 2
    assert progress == [(1, 2), (2, 2)]
    assert embed_captions(encoder, store, CAPTIONS) == 0
    for caption in CAPTIONS:
        torch.testing.assert_close(store[caption], encoder([caption])[0])
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_what_was_encoded_before_an_interruption_is_kept(encoder, tmp_path):
    store = EmbeddingStore.create(tmp_path, encoder.info)

    def stops(captions):
        if len(store.missing(CAPTIONS)) == 3 and captions == [CAPTIONS[2]]:
            raise KeyboardInterrupt
        return encoder(captions)

    with pytest.raises(KeyboardInterrupt):
        embed_captions(stops, store, CAPTIONS, batch=1)
    assert EmbeddingStore(tmp_path).missing(CAPTIONS) == [CAPTIONS[2]]


def test_the_command_embeds_a_set_and_prompts(encoder_folder, tmp_path, capsys):
    videos = tmp_path / "set"
    (videos / "A").mkdir(parents=True)
    for n, caption in enumerate([CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]]):
        (videos / "A" / f"{n}.mp4").write_bytes(b"never decoded")
        (videos / "A" / f"{n}.txt").write_text(caption)
    (tmp_path / "prompts.txt").write_text(f"{CAPTIONS[2]}\n\n{CAPTIONS[0]}\n")
    line = [
        "data",
        "embed",
        "--encoder",
        encoder_folder,
        "--out",
        tmp_path / "e",
        "--max-length",
        32,
        "--device",
        "cpu",
    ]

    def run(*more):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in (*line, *more)])
        return ended.value.code, capsys.readouterr()

    status, output = run("--data", videos)
    assert (status, "2 captions of width 24 (tiny-t5), 2 new" in output.out) == (0, True)
    status, output = run("--data", videos, "--prompts", tmp_path / "prompts.txt")
    assert (status, "3 captions of width 24 (tiny-t5), 1 new" in output.out) == (0, True)
    store = EmbeddingStore(tmp_path / "e")
    torch.testing.assert_close(store[CAPTIONS[2]], TextEncoder(encoder_folder)(CAPTIONS[2:])[0])
    with safe_open(next((tmp_path / "e").glob("*.safetensors")), "pt") as file:
        assert set(file.keys()) == {"keys", "starts", "rows"}
    status, output = run("--prompts", tmp_path / "none.txt")
    assert (status, "none.txt is not a file" in output.err) == (1, True)
    with pytest.raises(ValueError, match=r"^data: got neither --data nor --prompts"):
        Embed(encoder=str(encoder_folder), out=tmp_path / "e")


@pytest.fixture
def words_model():
    config = small_config(conditioning="text", text_width=24)
    return random_model(config), torch.randint(256, (3, 3, *config.resolution), dtype=torch.uint8)


def error(model, video, text, mask=None, **options):
    draws = draw(model.config, len(video), torch.Generator().manual_seed(1), **options)
    return denoising_error(model, video, None, draws, text=text, text_mask=mask)


def test_dropout_drops_a_clips_whole_text(words_model, tmp_path):
    model, video = words_model
    store = store_of(tmp_path)
    given = collate_text([store[c] for c in CAPTIONS])
    with_text, without = error(model, video, *given), error(model, video, None)
    assert (with_text != without).all()
    torch.testing.assert_close(error(model, video, *given, dropout=1.0), without)
    some = error(model, video, *given, dropout=0.5)
    dropped = torch.isclose(some, without).all(dim=1)
    torch.testing.assert_close(some, torch.where(dropped[:, None], without, with_text))
    assert 0 < dropped.sum() < 3


def test_captions_to_a_model_to_videos_of_prompts(encoder, encoder_folder, words_model, tmp_path):
    """All that conditions a model gets a gradient, absent text too; prompts are encoded now or were before, all one."""
    model, video = words_model
    store = EmbeddingStore.create(tmp_path, encoder.info)
    embed_captions(encoder, store, CAPTIONS, batch=1)
    batch, mask = collate_text([store[c] for c in CAPTIONS])
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    before = error(model, video, batch, mask, dropout=0.5, images=0.5).mean()
    before.backward()
    for name, p in model.conditioner.named_parameters():
        assert p.grad.abs().max() > 0, name
    optimizer.step()
    assert error(model, video, batch, mask, dropout=0.5, images=0.5).mean() < before
    save_as_run(model, tmp_path / "run")
    pictures = []
    for source in ({"encoder": str(encoder_folder)}, {"embeddings": tmp_path}):
        options = SampleOptions(
            run_folder=tmp_path / "run", out=tmp_path / "out", prompts=(CAPTIONS[0],), **source,
            sampler=SamplerOptions(steps=1, overlap="none", guidance=1.5), device="cpu",
        )  # fmt: skip
        assert [p.name for p in sample(options)] == ["a-red-disc_seed0.mp4"]
        pictures.append((tmp_path / "out" / "contact_sheet.png").read_bytes())
    assert pictures[0] == pictures[1]
