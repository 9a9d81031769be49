"""How dropout calls are found and followed while an untouched model runs."""
