"""``python -m writesae.cli``, as `accelerate launch -m` wants it."""

from writesae.cli import app

app()
