"""Models that turn images into tokens and back."""

from pathlib import Path

from arimg.nn import checkpoint
from arimg.nn.checkpoint import save
from arimg.tokenizers.vqvae import SCALES_256, SCALES_512, VQVAE, VQVAEOutput

__all__ = ["SCALES_256", "SCALES_512", "VQVAE", "VQVAEOutput", "load", "save"]


def load(path: str | Path) -> VQVAE:
    """Read a tokenizer written by `save`, or a plain state dict of the released kind; in evaluation mode."""
    state, entry = checkpoint.read(path)
    if entry is None:
        return VQVAE.from_state_dict(state)
    if entry["kind"] != "VQVAE":
        raise ValueError(f"expected a tokenizer in {str(path)!r}, got a {entry['kind']}")
    model = VQVAE(**entry["config"]).eval()
    checkpoint.load_checked(model, state, "VQVAE")
    return model
