"""The tuned lens: an affine translator for each layer, trained so that it predicts what the model does (2303.08112).

Layers change the basis of the stream, so a plain logit lens is biased at early ones. A translator before a layer maps
the stream there to what it would be after the last one, ``x + x A + b``, and is trained on ``KL(model || lens)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.gradients.backward import frozen
from writesae.jobs.arguments import named_kinds
from writesae.jobs.disk import remove_halves
from writesae.jobs.progress import Bars
from writesae.jobs.resumable import check_same
from writesae.jobs.tensors import checksum, read_tensors, write_tensors
from writesae.methods.cells import Cells
from writesae.methods.lensed import Place
from writesae.methods.lenses import LOGITS, kl, read_points
from writesae.model import HookedRecurrentModel, late_logits, unembedding
from writesae.models.fingerprint import same_weights
from writesae.stores.windows import Texts, Windows

LENS = "tuned_lens.safetensors"
CHECKPOINT = "checkpoint.safetensors"  # where a stopped training goes on


@dataclass(eq=False)
class TunedLens:
    """Translators of the residual stream, one for each boundary between layers that was trained.

    Boundary ``i`` lies before layer ``i``, that is, after layer ``i - 1``. After the last layer nothing is translated.

    Attributes:
        translators: boundary -> its affine map; ``weight`` and ``bias`` are what it adds to the identity.
        model_id, fingerprint: of the model; the fingerprint is of its last recurrent layer.
        n_layers: of the model.
        training: settings, and the KL that was reached.
    """

    translators: Mapping[int, nn.Linear]
    model_id: str
    fingerprint: str
    n_layers: int
    training: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"TunedLens({self.model_id}, before layers {sorted(self.translators)})"

    def translate(self, x: Float[Tensor, "n ..."], what: str, layer: int) -> Float[Tensor, "n ..."]:
        """The stream at a point as it would be after the last layer, in the dtype of ``x``.

        Raises:
            ValueError: the point is not the stream itself, or this boundary was not trained.
        """
        if what not in ("resid_pre", "resid_post"):
            raise ValueError(f"at={what!r}: a tuned lens translates the stream itself, resid_pre or resid_post")
        boundary = layer + (what == "resid_post")
        if boundary == self.n_layers:
            return x
        if boundary not in self.translators:
            raise ValueError(
                f"{what} of layer {layer}: this lens has translators before layers {sorted(self.translators)}; train "
                f"one there, tune_lens(..., layers=[{boundary}])"
            )
        return added(self.translators[boundary], x)

    def check_fits(self, model: HookedRecurrentModel) -> None:
        """Raise ValueError unless it was trained on this model."""
        if self.n_layers != model.n_layers or not same_weights(self.fingerprint, _fingerprint(model)):
            raise ValueError(
                f"this lens was trained on {self.model_id}, whose {self.n_layers} layers have other weights than "
                f"those of {model.model_id}: train one on this model, tune_lens(model, texts)"
            )

    def save(self, path: str | Path) -> Path:
        """Write it into one safetensors file, whole or not at all."""
        described = {name: getattr(self, name) for name in ("model_id", "fingerprint", "n_layers", "training")}
        write_tensors(Path(path), "tuned_lens", _tensors(self.translators), described)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> TunedLens:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or something else.
        """
        tensors, about = read_tensors(Path(path), "tuned_lens", "tuned lens", "save or fetch it again")
        boundaries = sorted(int(name.split(".")[0]) for name in tensors if name.endswith(".weight"))
        made = _translators(boundaries, len(tensors[f"{boundaries[0]}.bias"]), torch.device(device))
        _fill(made, tensors)
        return cls(made, about["model_id"], about["fingerprint"], about["n_layers"], about["training"])


@named_kinds
@torch.inference_mode(False)
def tune_lens(
    model: HookedRecurrentModel,
    texts: Texts,
    *,
    layers: Sequence[int] | None = None,
    context: int = 128,
    steps: int = 500,
    batch_size: int = 4,
    lr: float = 1e-3,
    seed: int = 0,
    out: str | Path | None = None,
    save_every: int = 100,
    progress: bool = True,
) -> TunedLens:
    """Train a tuned lens: one affine translator before each layer, by Adam on ``KL(model || lens)``.

    Translators begin as the identity, which is the logit lens, and are independent of each other. The learning rate
    falls linearly to zero. The model stays as it is.

    Args:
        model: the model.
        texts: a text, several, or token ids ``[n, pos]``.
        layers: before which layers; None for all.
        context: tokens of a window.
        steps: of the optimiser.
        batch_size: windows per step.
        lr: learning rate of the first step.
        seed: which windows are drawn.
        out: folder for the lens (``tuned_lens.safetensors``) and for what a stopped training goes on from; None keeps
            nothing on disk.
        save_every: steps from one saved state to the next.
        progress: show a bar.

    Raises:
        ValueError: not one window of text, or a folder that was begun by another training.
        IndexError: no such layer.
        FloatingPointError: the training diverged.

    >>> lens = ws.tune_lens(model, texts, steps=500, out="lens")
    >>> ws.logit_lens(model, "The state of the Union", lens=lens).plot()
    """
    chosen = list(range(model.n_layers)) if layers is None else sorted(set(layers))
    for layer in chosen:
        if not 0 <= layer < model.n_layers:
            raise IndexError(f"layer {layer}: this model has layers 0 to {model.n_layers - 1}")
    if steps < 1 or batch_size < 1 or not lr > 0:
        raise ValueError(f"steps={steps}, batch_size={batch_size}, lr={lr}: all must be above 0")
    windows = (Windows.of_rows(list(texts), context) if isinstance(texts, Tensor) else
               Windows.cut(model, texts, context)).enough(of="the text")  # fmt: skip
    settings = {"layers": chosen, "context": context, "steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    translators = _translators(chosen, model.W_E.shape[1], model.device)
    adam = torch.optim.Adam([p for one in translators.values() for p in one.parameters()], lr=lr)
    fingerprint = _fingerprint(model)
    state = _State(
        None if out is None else Path(out),
        {**settings, "fingerprint": fingerprint, "windows": checksum({"tokens": windows.tokens.cpu().long()})},
    )
    first = state.restore(translators, adam)
    reached: dict[int, float] = {}
    with Bars(progress) as bars:
        bar = bars.add("tuning a lens", steps, first)
        for step in range(first, steps):
            adam.param_groups[0]["lr"] = lr * (1 - step / steps)
            random = torch.Generator().manual_seed(seed * 1_000_003 + step)
            ids = windows.tokens[torch.randint(len(windows), (batch_size,), generator=random)]
            adam.zero_grad()
            reached = _backward(model, ids.to(model.device).long(), translators)
            adam.step()
            if not all(x == x for x in reached.values()):
                raise FloatingPointError(f"step {step}: the KL is not a number; lower lr={lr}")
            bar(step + 1, f"tuning a lens, KL {sum(reached.values()) / len(reached):.3f} nats")
            if (step + 1) % save_every == 0 and step + 1 < steps:
                state.save(step + 1, translators, adam)
    noted = settings | {"kl_of_last_step": {str(i): x for i, x in reached.items()}}
    lens = TunedLens(translators, model.model_id, fingerprint, model.n_layers, noted)
    if out is None:
        return lens
    if first < steps:  # the lens first: a training that is said to be over has one
        lens.save(Path(out) / LENS)
        state.save(steps, translators, adam)
    return TunedLens.load(Path(out) / LENS, model.device)


def _backward(
    model: HookedRecurrentModel, ids: Int[Tensor, "batch pos"], translators: Mapping[int, nn.Linear]
) -> dict[int, float]:
    """Gradients of the KL of each boundary, mean over all tokens of the batch, and the KLs themselves."""
    cells, reached = Cells.of(ids, None), dict.fromkeys(translators, 0.0)
    places = [Place("resid_pre", layer) for layer in translators]
    with torch.no_grad(), unembedding(model) as unembed, late_logits(model) as end:
        kept = read_points(model, ids, None, places, cells)
    with torch.enable_grad(), frozen(model.hf_model):
        for some in torch.arange(len(cells)).split(max(1, LOGITS // model.n_vocab)):
            with torch.no_grad():
                final = end.at(cells.rows[some], cells.columns[some]).float().log_softmax(-1)
            for layer, translator in translators.items():
                logits = unembed(added(translator, kept["resid_pre", layer][some].float()))
                loss = kl(final, logits.to(final.device).float().log_softmax(-1)).sum() / len(cells)
                loss.backward()
                reached[layer] += float(loss.detach())
    return reached


def added(translator: nn.Linear, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """``x + x A + b``, computed where the translator is and in its dtype."""
    return x + translator(x.to(translator.weight)).to(x)


def _translators(boundaries: Sequence[int], d_model: int, device: torch.device) -> dict[int, nn.Linear]:
    """Translators that change nothing yet."""
    made = {i: nn.Linear(d_model, d_model, device=device) for i in boundaries}
    for one in made.values():
        nn.init.zeros_(one.weight)
        nn.init.zeros_(one.bias)
    return made


def _tensors(translators: Mapping[int, nn.Linear]) -> dict[str, Tensor]:
    return {f"{i}.{name}": x for i, one in translators.items() for name, x in one.state_dict().items()}


@torch.no_grad()
def _fill(translators: Mapping[int, nn.Linear], tensors: Mapping[str, Tensor]) -> None:
    for i, one in translators.items():
        one.load_state_dict({name: tensors[f"{i}.{name}"] for name in ("weight", "bias")})


def _fingerprint(model: HookedRecurrentModel) -> str:
    return model.fingerprint(model.sites[-1].layer)


@dataclass(frozen=True)
class _State:
    """Where a training is, on disk: translators, and what Adam remembers of each.

    Attributes:
        folder: None keeps nothing.
        identity: everything that the result depends on.
    """

    folder: Path | None
    identity: Mapping[str, Any]

    def save(self, step: int, translators: Mapping[int, nn.Linear], adam: torch.optim.Adam) -> None:
        if self.folder is None:
            return
        tensors = _tensors(translators)
        for i, values in adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": x for name, x in values.items()}
        write_tensors(self.folder / CHECKPOINT, "training", tensors, {**self.identity, "step": step})

    def restore(self, translators: Mapping[int, nn.Linear], adam: torch.optim.Adam) -> int:
        """Continue from what is there; the number of steps that are done.

        Raises:
            ValueError: the folder was begun by another training, or its checkpoint is damaged.
        """
        if self.folder is None:
            return 0
        remove_halves(self.folder, CHECKPOINT, LENS)
        if not (self.folder / CHECKPOINT).exists():
            return 0
        tensors, about = read_tensors(
            self.folder / CHECKPOINT, "training", "checkpoint of a lens in training", "delete it to start anew"
        )
        check_same(self.folder, about, self.identity)
        _fill(translators, tensors)
        names = ("step", "exp_avg", "exp_avg_sq")
        n = sum(len(group["params"]) for group in adam.param_groups)
        moments = {i: {name: tensors[f"adam.{i}.{name}"] for name in names} for i in range(n)}
        adam.load_state_dict({**adam.state_dict(), "state": moments})
        return int(about["step"])
