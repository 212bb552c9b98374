"""The command line: what it writes, and one sentence with exit code 2 where the user erred."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from arimg import models
from arimg.cli import main
from arimg.generators import VAR
from arimg.tokenizers import VQVAE

CLASSES = ("food/noto", "smileys/fluent", "smileys/noto")


@pytest.fixture(scope="module")
def bundle():
    torch.manual_seed(0)
    tokenizer = VQVAE(32, 8, 8, (1, 2), (1, 2, 4), blocks=1).eval()
    var = VAR(tokenizer, 3, depth=1, width=16, heads=1, shared_adaln=True).eval()
    torch.nn.init.normal_(var.head.weight)
    return models.Bundle(tokenizer, var, CLASSES, {"cfg": 1.0, "top_k": 8})


@pytest.fixture
def model(bundle, tmp_path):
    models.save(bundle, tmp_path / "model", dtype=None)
    return tmp_path / "model"


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def failure(capsys, *arguments):
    """The one sentence of a failing command."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


def test_generate_writes_the_pictures_of_the_seeds(model, bundle, tmp_path, capsys):
    out = tmp_path / "out.png"
    arguments = ["generate", "--class", "smileys/fluent", "--model", str(model), "-o", str(out)]
    assert main([*arguments, "--n", "4", "--seed", "3"]) == 0
    assert re.search(r"out\.png: 4 pictures in \d", capsys.readouterr().out)
    page = pixels(out)
    assert page.shape == (2 + 2 * 10, 2 + 2 * 10, 3)
    expected = bundle.var.generate([1], seed=5, cfg=1.0, top_k=8)[0].permute(1, 2, 0).mul(255).round()
    np.testing.assert_allclose(page[12:20, 2:10], expected.numpy(), atol=1)  # the third picture: seed 3 + 2
    assert main([*arguments, "--n", "1", "--seed", "5"]) == 0
    np.testing.assert_array_equal(pixels(out)[2:10, 2:10], page[12:20, 2:10])


def test_batches_and_overlap_change_nothing(model, tmp_path):
    def page(name, *arguments):
        out = tmp_path / name
        classes = ["--class", "smileys/fluent", "--class", "food/noto", "--n", "5", "--seed", "3"]
        assert main(["generate", *classes, "--model", str(model), "-o", str(out), *arguments]) == 0
        return pixels(out)

    whole = page("whole.png")
    batches = page("batches.png", "--batch", "3")  # the second has both classes, the last one picture
    assert whole.shape == (2 + 3 * 10, 2 + 4 * 10, 3)
    np.testing.assert_allclose(batches, whole, atol=1)
    np.testing.assert_array_equal(page("overlap.png", "--batch", "3", "--overlap"), batches)
    steps = page("steps.png", "--batch", "3", "--overlap", "--steps-grid")
    np.testing.assert_allclose(steps, page("steps.png", "--steps-grid"), atol=1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("finished", [0, 2])
def test_ctrl_c_keeps_the_batches_that_are_over(overlap, finished, model, tmp_path, capsys, monkeypatch):
    decode, calls = VQVAE.decode_features, []

    def decode_features(self, f_hat):
        calls.append(len(f_hat))
        if len(calls) > finished:
            raise KeyboardInterrupt
        return decode(self, f_hat)

    arguments = ["generate", "--class", "food/noto", "--n", "6", "--batch", "2", "--columns", "2"]
    arguments += ["--model", str(model), *["--overlap"] * overlap, "-o"]
    assert main([*arguments, str(tmp_path / "whole.png")]) == 0
    capsys.readouterr()
    monkeypatch.setattr(VQVAE, "decode_features", decode_features)
    assert main([*arguments, str(tmp_path / "part.png")]) == 130
    captured = capsys.readouterr()
    assert captured.err == "arimg: interrupted\n"
    if not finished:
        assert not (tmp_path / "part.png").exists()
        return
    assert "part.png: 4 of 6 pictures in" in captured.out
    whole, part = pixels(tmp_path / "whole.png"), pixels(tmp_path / "part.png")
    assert part.shape == (2 + 2 * 10, 2 + 2 * 10, 3)
    np.testing.assert_array_equal(part, whole[: len(part)])


def test_the_steps_grid_has_a_row_per_picture_and_a_column_per_scale(model, tmp_path):
    arguments = ["generate", "--class", "food/noto", "--n", "2", "--model", str(model)]
    main([*arguments, "-o", str(tmp_path / "final.png"), "--columns", "1"])
    assert main([*arguments, "-o", str(tmp_path / "steps.png"), "--steps-grid"]) == 0
    steps, final = pixels(tmp_path / "steps.png"), pixels(tmp_path / "final.png")
    assert steps.shape == (2 + 2 * 10, 2 + 3 * 10, 3)
    np.testing.assert_array_equal(steps[:, 20:], final)
    assert not np.array_equal(steps[2:10, 2:10], steps[2:10, 22:30])


def test_several_classes_and_class_numbers(model, tmp_path):
    arguments = ["generate", "--n", "1", "--seed", "1", "--model", str(model), "-o"]
    assert main([*arguments, str(tmp_path / "a.png"), "--class", "smileys/noto", "--class", "2"]) == 0
    assert pixels(tmp_path / "a.png").shape == (12, 22, 3)


def test_reconstruct_shows_the_original_beside_the_reconstruction(model, bundle, tmp_path, capsys):
    source = tmp_path / "in.png"
    Image.fromarray(np.full((8, 8, 3), 51, np.uint8)).save(source)
    assert main(["reconstruct", str(source), "--model", str(model)]) == 0
    page = pixels(tmp_path / "in-reconstructed.png")
    assert page.shape == (12, 22, 3) and (page[2:10, 2:10] == 51).all()
    expected = (
        bundle.tokenizer.reconstruct(torch.full((1, 3, 8, 8), 0.2))[0].permute(1, 2, 0).mul(255).round()
    )
    np.testing.assert_allclose(page[2:10, 12:20], expected.numpy(), atol=1)
    assert re.search(r"21 tokens, PSNR -?\d+\.\d\d dB", capsys.readouterr().out)


def test_classes_and_info(model, capsys):
    assert main(["classes", "--model", str(model)]) == 0
    assert capsys.readouterr().out.split() == list(CLASSES)
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_an_unknown_class_names_near_ones(model, tmp_path, capsys):
    said = failure(capsys, "generate", "--class", "smiley/fluent", "--model", model, "-o", tmp_path / "x.png")
    assert "unknown class 'smiley/fluent'; did you mean smileys/fluent" in said
    said = failure(capsys, "generate", "--class", "food", "--model", model)
    assert "food/noto" in said
    assert "arimg classes" in failure(capsys, "generate", "--class", "%%%", "--model", model)
    assert "--class NAME" in failure(capsys, "generate", "--model", model)
    assert not (tmp_path / "x.png").exists()


def test_missing_files_are_named(model, tmp_path, capsys):
    assert "no model 'nowhere'" in failure(capsys, "classes", "--model", "nowhere")
    assert "in.png" in failure(capsys, "reconstruct", tmp_path / "in.png", "--model", model)
    (tmp_path / "in.png").write_text("no picture")
    assert "not a readable image" in failure(capsys, "reconstruct", tmp_path / "in.png", "--model", model)
    (model / "tokenizer.safetensors").unlink()
    assert "tokenizer.safetensors" in failure(capsys, "classes", "--model", model)
    assert "its tokenizer" in failure(capsys, "classes", "--model", model / "var.safetensors")


def test_wrong_weights_name_the_key_and_the_shape(model, tmp_path, capsys):
    path = model / "var.safetensors"
    tensors = load_file(path)
    tensors["head.weight"] = tensors["head.weight"][:5].contiguous()
    about = models.metadata(path)
    save_file(tensors, path, about)
    said = failure(capsys, "classes", "--model", model)
    assert "head.weight" in said and "[32, 16]" in said and "[5, 16]" in said
    save_file(
        load_file(model / "tokenizer.safetensors"), path, models.metadata(model / "tokenizer.safetensors")
    )
    assert "VQVAE" in failure(capsys, "classes", "--model", model)


def test_stored_in_half_precision_a_model_stays_close(bundle, tmp_path):
    models.save(bundle, tmp_path)
    again = models.load(tmp_path)
    assert again.classes == CLASSES and again.sampling == bundle.sampling
    for a, b in zip(bundle.var.parameters(), again.var.parameters()):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-11, atol=2**-24)


def test_training_errors_are_sentences_too(tmp_path, capsys):
    arguments = ["train", "tokenizer", tmp_path / "none", "--out", tmp_path / "run"]
    assert "no such folder or tar" in failure(capsys, *arguments)
    assert "last scale of size / 8 = 8, got 5" in failure(capsys, *arguments, "--scales", "1,5")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "tokenizer", "x", "--out", "y", "--scales", "1,a"])
    assert "expected numbers like 1,2,4" in capsys.readouterr().err


def test_the_bundled_model_has_the_classes_of_its_card(capsys):
    if not (models.Path(models.__file__).parent / models.DEFAULT).is_dir():
        pytest.skip("this tree carries no bundled model yet")
    bundled = models.load()
    assert "smileys/fluent" in bundled.classes and bundled.tokenizer.image_size == (64, 64)
    assert json.loads(json.dumps(bundled.sampling)) == bundled.sampling
    folder = models.Path(models.__file__).parent / models.DEFAULT
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 16 * 2**20


def test_the_way_from_a_folder_to_a_picture(tmp_path, capsys):
    for i in range(6):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(path)
    run = f"{tmp_path / 'data'} --steps 2 --batch-size 4 --held-out 0"
    sizes = "--size 8 --vocab 16 --z-channels 8 --ch 8 --ch-mult 1,2 --scales 1,2,4"
    assert main(f"train tokenizer {run} {sizes} --out {tmp_path / 'tok'}".split()) == 0
    part = f"--tokenizer {tmp_path / 'tok' / 'tokenizer.safetensors'} --depth 1 --width 16 --heads 1"
    options = ["--weight", "b=2", "--show", "b", "--sampling", '{"cfg": 0.5}']
    assert main([*f"train var {run} {part} --out {tmp_path / 'var'}".split(), *options]) == 0
    trained = models.load(tmp_path / "var" / "model")
    assert trained.classes == ("a", "b") and trained.sampling == {"cfg": 0.5}
    out = tmp_path / "out.png"
    assert main(["generate", "--class", "b", "--model", str(tmp_path / "var" / "model"), "-o", str(out)]) == 0
    assert pixels(out).shape == (2 + 4 * 10, 2 + 4 * 10, 3)
    assert (tmp_path / "tok" / "grid-000002.png").exists() and (tmp_path / "var" / "grid-000002.png").exists()
