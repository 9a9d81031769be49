"""Many samples of one model, fast."""
