"""The model's own last norm and head, for any vector of its residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from writesae.hooks.residual import giving
from writesae.hooks.scope import LOCK, owning
from writesae.model.attaching import HookedModel
from writesae.models.wrappers import bare


@dataclass(eq=False)
class Unembedding:
    """What the model makes of its residual stream after the last layer.

    All layers give the vector that is asked about, and the model goes on from there by its own code: so lanes are
    mixed, and logits scaled or capped, as the model does it.

    Attributes:
        model: the model.
        output: what the last layer gave in the pass; which form it has.
    """

    model: HookedModel
    output: Any = None

    @property
    def stream(self) -> Float[Tensor, "batch pos ..."]:
        """The residual stream at the end of the pass.

        Raises:
            RuntimeError: the pass went by without its last layer being seen.
        """
        if self.output is None:
            raise RuntimeError("the last layer was not seen: run the model as it is, without torch.compile around it")
        return self.output if isinstance(self.output, Tensor) else self.output[0]

    def __call__(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n vocab"]:
        """The logits of some vectors, as if each were the stream after the last layer. Gradients pass through.

        Raises:
            ValueError: the stream has another shape, as where it has several lanes.
        """
        stream = self.stream
        if x.shape[1:] != stream.shape[2:]:
            raise ValueError(
                f"vectors of shape {list(x.shape[1:])} do not fit the last norm, which takes the residual stream, "
                f"{list(stream.shape[2:])} per token: ask at resid_pre or resid_post"
            )
        given = x.to(stream.device, stream.dtype)[:, None]  # each as a text of one token
        output = given if isinstance(self.output, Tensor) else (given, *self.output[1:])
        tokens = torch.zeros(len(x), 1, dtype=torch.long, device=self.model.device)
        with giving(self.model.blocks, output):
            return bare(self.model.hf_model)(input_ids=tokens, use_cache=False).logits[:, 0]


@contextmanager
def unembedding(model: HookedModel) -> Iterator[Unembedding]:
    """See in a pass in the block how layers give the stream; afterwards any vector can be unembedded.

    >>> with unembedding(model) as unembed:
    ...     _, cache = model.run_with_cache(ids)
    >>> unembed(cache["resid_post", 1][0])          # [pos, vocab]
    """
    found = Unembedding(model)
    with owning(everywhere=False) as call:

        def keep(_layer: nn.Module, _args: Any, output: Any) -> None:
            if call.here:
                found.output = output

        with LOCK:
            handle = model.blocks[-1].register_forward_hook(keep)
        with handle:
            yield found
