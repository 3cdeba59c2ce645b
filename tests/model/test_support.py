"""The table of docs/support.md: made from the adapters and the list of architectures that the tests run over."""

from pathlib import Path

import pytest

from architectures import ARCHITECTURES
from writesae.hooks.families import FAMILIES, Family

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

CHECKPOINTS = {
    "Mamba": "transformers; `mamba` also the authors' own (`state-spaces/mamba-*`)",
    "Mamba-2": "transformers; `mamba2` also the authors' own (`state-spaces/mamba2-*`)",
    "RWKV-7": "flash-linear-attention; the authors' `.pth`",
    "RWKV-6": "flash-linear-attention; the authors' `.pth`",
    "DeltaNet": "flash-linear-attention",
    "Comba": "flash-linear-attention",
    "Gated DeltaProduct": "flash-linear-attention",
    "Mamba-3": "flash-linear-attention",
    "Mamba-3 with several inputs and outputs per head": "flash-linear-attention (`is_mimo`, without `is_outproj_norm`)",
    "Gated DeltaNet 2": "flash-linear-attention's layer",
    "Gated Linear Attention": "flash-linear-attention",
    "HGRN2": "flash-linear-attention",
    "Gated Slot Attention": "flash-linear-attention",
    "Kimi Delta Attention of flash-linear-attention": "flash-linear-attention",
    "RetNet": "flash-linear-attention",
    "Linear attention": "flash-linear-attention",
    "Gated DeltaNet of flash-linear-attention": "flash-linear-attention",
}
# What is independent of us and agrees: test_parity.py, test_oracles.py, test_models.py.
ORACLES = {
    "Gated DeltaNet": "transformers, fla naive",
    "Kimi Delta Attention": "transformers, fla naive",
    "Mamba": "transformers, mamba-ssm's reference",
    "Mamba-2": "transformers",
    "Lightning attention": "transformers",
    "mLSTM": "transformers",
    "RWKV-7": "`rwkv` (the authors'), fla naive",
    "RWKV-6": "`rwkv` (the authors'), fla naive",
    "DeltaNet": "fla naive",
    "Comba": "fla naive",
    "Gated DeltaProduct": "fla naive",
    "Mamba-3": "mamba-ssm's kernels, interpreted",
    "Mamba-3 with several inputs and outputs per head": "mamba-ssm's layer on its reference of a step",
    "Gated DeltaNet 2": "fla naive",
    "Gated Linear Attention": "fla naive",
    "HGRN2": "fla naive",
    "Gated Slot Attention": "fla naive",
    "Kimi Delta Attention of flash-linear-attention": "fla naive",
    "RetNet": "fla naive",
    "Linear attention": "fla naive",
    "Gated DeltaNet of flash-linear-attention": "fla naive",
}


def models(family: Family) -> list[str]:
    return [module.split(".")[-1].removeprefix("modeling_") for module in family.mixers]


def points(family: Family) -> list[str]:
    """Its hook points in any model, in firing order."""
    gated = any(a.gate for a in ARCHITECTURES if a.modeling_name in family.mixers)
    gate = ["z"] if gated and "z" not in family.seen_at else []
    return [*family.seen_at, *family.raw, *family.rule.inputs, "write", "state", "o", *gate]


def support_table() -> str:
    rows = [
        "| architecture | models | checkpoints | `hook_` | edits | prefill, pieces, decode | padding | oracle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        cells = [
            family.name,
            ", ".join(f"`{name}`" for name in models(family)),
            CHECKPOINTS.get(family.name, "transformers"),
            ", ".join(points(family)),
            "all",
            "yes",
            "left; right in prefill",
            ORACLES[family.name],
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_page_has_the_table() -> None:
    assert support_table() in PAGE.read_text("utf-8"), f"the table of docs/support.md should be:\n\n{support_table()}\n"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_model_is_in_the_list_that_the_tests_run_over(family: Family) -> None:
    tested = {architecture.modeling_name for architecture in ARCHITECTURES}
    assert set(family.mixers) <= tested


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_points_in_the_table_are_the_models(architecture) -> None:
    from writesae import HookedRecurrentModel

    model = HookedRecurrentModel(architecture.build())
    family = next(f for f in FAMILIES if f.mixers.get(architecture.modeling_name) == architecture.mixer)
    found = {name.rsplit("hook_", 1)[1] for name in model.hook_names if ".mixer." in name}
    assert found <= set(points(family))
    assert set(points(family)) - found <= {"z"}, "only a gate may be missing, where a model has none"
