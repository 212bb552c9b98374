"""Training of tokenizers and generators: resumable runs with EMA, logs and sample grids."""
