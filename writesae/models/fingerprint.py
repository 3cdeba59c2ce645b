"""A fingerprint of a layer's weights that knows its layer again in every dtype, and quantised.

Rounded numbers can't be hashed: some lie at the edge of two roundings, and float16 to bfloat16 rounds to other numbers
than float32 to bfloat16. So a fingerprint is a sketch, `N_NUMBERS` sums of all weights with random signs, which a
rounding moves a little and other weights move a lot. Before it stands a hash of the weights in bfloat16, which all SAEs
and stores made by 0.1.0 have alone::

    c1c240fedff031f8-007f...       -007f... for weights in float16, whose hash is not that of the others
                                   -007f...q for quantised ones, which lie further from their checkpoint
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from writesae.models.quantized import holds_codes
from writesae.models.wrappers import weights

N_NUMBERS = 16
BLOCK, AT_ONCE = 4096, 256  # weights per block; blocks worked on at once
STEP = 1 / 256  # what the numbers of a sketch are rounded to; two bytes each
TOLERANCE = 0.01  # of half precision: where the rounding is another, sketches differ by a step or two
TOLERANCE_QUANTISED = (
    0.95  # eight and four bits: 0.07 and 0.8 at most. A doubled scale moves it by 1, other weights by 5
)

_FORM = re.compile(rf"[0-9a-f]{{16}}|([0-9a-f]{{16}})?-[0-9a-f]{{{4 * N_NUMBERS}}}q?")


def fingerprint_of(weights: Iterable[tuple[str, Tensor]], *, quantised: bool = False) -> str:
    """The fingerprint of named weights. ``quantised``: they are what quantised layers compute with."""
    digest, sketch, exact = hashlib.sha256(), np.zeros(N_NUMBERS), not quantised
    for name, weight in sorted(weights, key=lambda pair: pair[0]):
        exact &= weight.dtype != torch.float16
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(rounded.view(torch.int16).numpy().tobytes())
        sketch += _sketch(f"{name}{list(weight.shape)}", rounded)
    if not np.isfinite(sketch).all():
        sketch[:] = np.iinfo(np.int16).min * STEP  # not the fingerprint of any weights in order
    steps = np.clip(np.rint(sketch / STEP), -(2**15), 2**15 - 1).astype(">i2")
    return f"{digest.hexdigest()[:16] if exact else ''}-{steps.tobytes().hex()}{'q' * quantised}"


def fingerprint_of_module(module: nn.Module) -> str:
    """The fingerprint of a module's weights as they act, adapters of PEFT included."""
    return fingerprint_of(weights(module), quantised=any(map(holds_codes, module.modules())))


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, each in whatever dtype it was loaded.

    One made by 0.1.0 can't be compared with that of float16 or quantised weights: it is taken as the same, with a
    warning.
    """
    if one == other or not (_FORM.fullmatch(one) and _FORM.fullmatch(other)):
        return one == other  # those of somebody's own models may have any form
    (hash_one, _, sketch_one), (hash_other, _, sketch_other) = (x.partition("-") for x in (one, other))
    if hash_one and hash_one == hash_other:
        return True
    if not sketch_one or not sketch_other:
        if hash_one and hash_other:
            return False
        warnings.warn(
            f"fingerprint {one if hash_one else other} was made by writesae 0.1.0, and can be checked only against "
            f"weights loaded in float32 or bfloat16. It is taken as that of this layer",
            stacklevel=3,
        )
        return True
    apart = float(np.abs(_numbers(sketch_one) - _numbers(sketch_other)).max())
    return apart < (TOLERANCE_QUANTISED if "q" in sketch_one + sketch_other else TOLERANCE)


def _numbers(sketch: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(sketch.removesuffix("q")), ">i2") * STEP


def _sketch(name: str, x: Tensor) -> np.ndarray:
    """``sum_i +-x_i / |x|`` and the norm's logarithm, with signs that follow from the tensor's name and shape.

    A number's sign is that of its place in a block times that of its block: so all sums are one product of matrices.
    """
    blocks = x.flatten().split(BLOCK)
    of_norm, of_places, of_blocks = _signs(name, 1), _signs(name + " places", BLOCK), _signs(name, len(blocks) + 1)[1:]
    squares, sums = 0.0, np.zeros(N_NUMBERS)
    for start in range(0, len(blocks), AT_ONCE):
        some = [block.double().numpy() for block in blocks[start : start + AT_ONCE]]
        rows = np.stack([np.pad(block, (0, BLOCK - len(block))) for block in some])
        squares += float((rows * rows).sum())
        sums += ((rows @ of_places) * of_blocks[start : start + AT_ONCE]).sum(0)
    norm = squares**0.5
    return of_norm[0] * np.log2(max(norm, 2.0**-60)) + (sums / norm if norm > 0 else 0.0)


def _signs(name: str, n: int) -> np.ndarray:
    """``[n, N_NUMBERS]`` of 1 and -1."""
    bits = np.frombuffer(hashlib.shake_256(name.encode()).digest(n * N_NUMBERS // 8), np.uint8)
    return 1.0 - 2.0 * np.unpackbits(bits).reshape(n, N_NUMBERS)
