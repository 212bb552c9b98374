"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block(number, tmp_path, monkeypatch):
    from arimg import models
    from arimg.generators import VAR
    from arimg.tokenizers import VQVAE

    if "models.load()" in BLOCKS[number] and not (Path(models.__file__).parent / models.DEFAULT).is_dir():
        pytest.skip("this tree carries no bundled model yet")
    monkeypatch.chdir(tmp_path)
    # Small stand-ins under the names of the released checkpoints.
    tokenizer = VQVAE(vocab_size=1024, z_channels=8, ch=32)
    torch.save(tokenizer.state_dict(), "vae_ch160v4096z32.pth")
    torch.save(VAR(tokenizer, depth=2).state_dict(), "var_d16.pth")
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_generation_page_runs():
    """Its blocks one after another, as a reader would."""
    text = (ROOT / "docs" / "generation.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/generation.md", "exec"), names)
    assert names["tokens"].shape == (2, 16)
    assert names["pictures"].shape == (8, 3, 8, 8)
    assert [tuple(t.shape) for t in names["scales"]] == [(3, 1), (3, 4), (3, 16)]


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), f"README links to {target}"
