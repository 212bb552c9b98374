"""JPEG-LM: its codec, its grammar and its generations."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import released
from arimg.generators import Sampler
from arimg.systems.jpeg_lm import JpegModel
from arimg.tokenizers.jpeg import PAD, VOCABULARY, Jpeg, Place
from conftest import Backend
from system_checks import close, same_tokens_emulated, spread, tokens_of, turns_of


def photograph(size: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with edges and some noise, uint8 [S, S, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    parts = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(0.3, 2.5, (3, 3))]
    edge = ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1)[..., None] * rng.uniform(-80, 80, 3)
    pixels = 128 + 60 * np.stack(parts, -1) + edge + rng.normal(0, 6, (size, size, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def changed_blocks(codec: Jpeg, scan: bytes, broken: bytes) -> int:
    """How many of the 16 x 16 blocks of the picture differ by more than rounding."""
    a, b = (codec.pixels(s).astype(int) for s in (scan, broken))
    n = codec.size // 16
    return int((abs(a - b).reshape(n, 16, n, 16, 3).max((1, 3, 4)) > 4).sum())


def model(longest: int = 90) -> JpegModel:
    torch.manual_seed(0)
    return spread(JpegModel(3, size=32, longest=longest, depth=2, width=32, heads=1, dropout=0.0))


def test_scan_and_head_decode_as_the_whole_file_does() -> None:
    codec, pixels = Jpeg(256), photograph(256)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=25, subsampling=2, restart_marker_blocks=1)
    scan = codec.scan(pixels)
    assert codec.head + scan == out.getvalue()
    whole = np.array(Image.open(io.BytesIO(out.getvalue())).convert("RGB"))
    assert np.array_equal(codec.pixels(scan), whole)
    markers = [i for i in range(len(scan) - 1) if scan[i] == 0xFF and scan[i + 1] & 0xF8 == 0xD0]
    assert len(markers) == 255
    images = torch.from_numpy(np.stack([pixels, photograph(256, 1)])).permute(0, 3, 1, 2).float() / 255
    tokens = codec.encode(images)
    assert (tokens[0] == PAD).any() or (tokens[1] == PAD).any()
    assert torch.equal(codec.decode(tokens)[0], torch.from_numpy(whole).permute(2, 0, 1).float() / 255)


def test_a_marker_behind_each_block_keeps_an_error_in_its_block() -> None:
    """One byte of a scan is changed, in nine places of three pictures. Markers cost about a fifth more."""
    changed, sizes = {}, {}
    for restart in (True, False):
        codec, counts = Jpeg(256, restart=restart), []
        scans = [codec.scan(photograph(256, seed)) for seed in range(3)]
        for scan in scans:
            for share in (0.25, 0.5, 0.75):
                first = int(share * len(scan))
                at = next(i for i in range(first, len(scan)) if legible(scan[i - 1 : i + 2]))
                broken = scan[:at] + bytes([scan[at] ^ 0x7E]) + scan[at + 1 :]
                counts.append(changed_blocks(codec, scan, broken))
        changed[restart], sizes[restart] = counts, sum(map(len, scans))
    assert max(changed[True]) <= 9 and sum(changed[True]) > 0, changed
    assert sorted(changed[False])[4] > 60, changed
    assert 1.1 < sizes[True] / sizes[False] < 1.4, sizes


def legible(three: bytes) -> bool:
    """The byte in the middle belongs to no marker and stays none when it is changed."""
    return not {0, 0xFF} & set(three) and three[1] ^ 0x7E not in (0, 0xFF)


def test_half_a_scan_is_the_upper_half_of_the_picture() -> None:
    codec, pixels = Jpeg(64), photograph(64)
    scan = codec.scan(pixels)
    markers = [i for i in range(len(scan) - 1) if scan[i] == 0xFF and scan[i + 1] & 0xF8 == 0xD0]
    half = codec.pixels(scan[: markers[7] + 2])
    whole = codec.pixels(scan)
    assert np.array_equal(half[:31], whole[:31])  # the last row is smoothed with the missing colours below
    assert not np.array_equal(half[32:], whole[32:])


def test_the_grammar_accepts_every_real_scan_and_nothing_behind_it() -> None:
    codec = Jpeg(48)
    for seed in range(10):
        place, scan = Place(), codec.scan(photograph(48, seed))
        for n, byte in enumerate(scan):
            assert codec.grammar.allowed(place)[byte], (seed, n)
            assert codec.grammar.allowed(place, len(scan) + 300 - n)[byte]
            place = codec.grammar.step(place, byte)
        assert place.marker == 3 and not codec.grammar.allowed(place).any()
    with pytest.raises(ValueError, match="expected a byte that the JPEG grammar allows, got 255"):
        codec.grammar.step(Place(marker=3), 255)


def test_generated_bytes_always_decode_and_without_the_grammar_they_are_no_scan() -> None:
    m = model()
    tokens = tokens_of(turns_of(m, sampler=Sampler()))
    for row in tokens.tolist():
        data, place = [t for t in row if t != PAD], Place()
        assert row[len(data) :] == [PAD] * (len(row) - len(data)) and data[-2:] == [0xFF, 0xD9]
        for byte in data:
            place = m.codec.grammar.step(place, byte)  # raises where a byte may not stand
        assert place.marker == 3
    assert m.codec.decode(tokens).shape == (3, 3, 32, 32)
    free = tokens_of(turns_of(m, sampler=Sampler(), grammar=False))
    place, legal = Place(), 0
    for byte in free[0].tolist():
        if not m.codec.grammar.allowed(place)[byte]:
            break
        place, legal = m.codec.grammar.step(place, byte), legal + 1
    assert legal < 90
    assert m.decode(None, [free]).shape == (3, 3, 32, 32)  # type: ignore[arg-type]


def test_the_budget_brings_every_picture_to_its_end() -> None:
    codec, rng = Jpeg(32), np.random.default_rng(0)
    for budget in (40, 60, 90):
        for _ in range(3):
            place, count = Place(), 0
            while place.marker != 3:
                place = codec.grammar.step(
                    place, int(rng.choice(np.flatnonzero(codec.grammar.allowed(place, budget - count))))
                )
                count += 1
            assert count <= budget


def test_cached_logits_are_the_uncached_ones_and_rows_are_their_own() -> None:
    m = model()
    turns = turns_of(m)
    tokens = tokens_of(turns)
    cached = torch.cat([turn.logits for turn in turns], 1)
    with torch.no_grad():
        assert close(cached, m(torch.tensor([1, 0, 2]), tokens[:, :-1]))
    lengths = (check_rows_padded(m, tokens) != PAD).sum(1)
    assert lengths.min() > 30


def check_rows_padded(m: JpegModel, together: torch.Tensor) -> torch.Tensor:
    """A row alone ends when its own picture does."""
    for b, (label, seed) in enumerate(((1, 9), (0, 3), (2, 8))):
        alone = tokens_of(turns_of(m, [label], seed=torch.tensor([seed])))[0]
        assert torch.equal(alone, together[b, : len(alone)]) and (together[b, len(alone) :] == PAD).all()
    return together


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return tokens_of(turns_of(model(longest=44), [1]))


def test_the_same_bytes_on_every_backend(backend: Backend, expected: torch.Tensor) -> None:
    if backend.device == "cpu":
        assert torch.equal(tokens_of(turns_of(model(longest=44), [1])), expected)


def test_at_full_size_its_shapes_are_those_of_a_llama_of_7b() -> None:
    with torch.device("meta"):
        big = JpegModel(1000, size=256, longest=12288, depth=32, width=4096, heads=32, hidden=11008)
    assert released.shapes_of(big) == released.llamagen(32, 4096, 11008, vocab=VOCABULARY)
    assert len(big.layout) == 12288


def test_it_learns_the_bytes_of_a_picture() -> None:
    torch.manual_seed(0)
    m = JpegModel(2, size=32, longest=200, depth=2, width=64, heads=2, dropout=0.0, class_dropout=0.0)
    pixels = np.stack([photograph(32, s) for s in (0, 1)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    examples, labels = m.encode(images), torch.tensor([0, 1])
    optimizer = torch.optim.Adam(m.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = m.loss(examples, labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    again = m.eval().pictures(torch.tensor([0, 1]), sampler=Sampler(top_k=1))
    assert torch.equal(again, m.codec.decode(examples))


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a size that is a multiple of 16, got 40"):
        Jpeg(40)
    with pytest.raises(ValueError, match="expected pictures of at most 20 bytes"):
        JpegModel(2, size=32, longest=20, depth=1, width=32, heads=1).encode(torch.rand(1, 3, 32, 32))


def test_the_whole_model_draws_the_same_on_emulated_cuda() -> None:
    same_tokens_emulated(model(longest=44), [1, 0])
    same_tokens_emulated(model(longest=44), [1, 0], sampler=Sampler(top_k=1))
