"""The demo: a name is told once; which write holds it, and what the model says when that write is changed."""

from writesae.demo.show import run

__all__ = ["run"]
