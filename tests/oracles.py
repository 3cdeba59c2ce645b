"""Reference implementations by other people, to test ours against."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from torch import Tensor


def dplr_recurrence() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns fla's plain PyTorch loop for the generalized delta rule (diagonal plus low rank).

    Its signature is ``dplr_recurrence(q, k, v, alpha, beta, gk, initial_state=None, output_final_state=True)`` and it
    returns ``(o, final_state)``. Per head it computes::

        S_t = exp(gk_t) ⊙ S_{t-1} + beta_t (alpha_t^T S_{t-1}) + k_t v_t^T        o_t = S_t^T q_t / sqrt(d_key)

    | ours                 | fla's          |                                                                         |
    |----------------------|----------------|-------------------------------------------------------------------------|
    | erase read ``b``     | ``alpha``      | **swapped**: fla's first letter reads the state (before its decay) ...  |
    | erase write ``a``    | ``beta``       | ... and its second one writes; neither is the ``beta`` of a delta rule  |
    | ``log_decay``        | ``gk``         | always one number per key channel: expand a scalar one                  |
    | ``q``                | ``q * scale``  | fla multiplies ``q`` by ``d_key ** -0.5`` itself and has no switch      |

    Layout: heads before positions, ``q, k, alpha, beta, gk [batch, head, pos, d_key]`` and
    ``v, o [batch, head, pos, d_value]``; the states are ``[batch, head, d_key, d_value]``, as ours.

    Give it float32: it casts everything to that, float64 too, but for ``alpha``, which it leaves as it is.
    """
    # Importing it by its name would import the packages above it, which need triton and look for a GPU.
    # The file itself needs only torch and einops.
    fla = importlib.util.find_spec("fla")
    if fla is None or not fla.submodule_search_locations:
        raise ModuleNotFoundError('fla-core is not installed: pip install -c constraints.txt -e ".[test]"', name="fla")
    path = Path(fla.submodule_search_locations[0], "ops", "generalized_delta_rule", "dplr", "naive.py")
    spec = importlib.util.spec_from_file_location("fla_dplr_naive", path)
    assert spec is not None and spec.loader is not None
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    return naive.dplr_recurrence
