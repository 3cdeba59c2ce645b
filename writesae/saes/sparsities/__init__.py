"""How pre-activations become activations: which atoms are active, and how strongly.

Letters: ``pre [..., n_atoms]``, activations ``a_i >= 0``.

    topk         a = ReLU(pre) of the k largest of each matrix                  (the paper, section 2)
    batch_topk   a = ReLU(pre) of the k B largest of a batch of B matrices      (Bussmann et al. 2024); for a matrix by
                 itself those above ``threshold``, the smallest that was active in training
    jumprelu     a = pre where pre > theta_i, learnt                            (Rajamanoharan et al. 2024b)
    gated        a = 1[pre > 0] ReLU(exp(r_i) (pre - b_enc) + b_mag)            (Rajamanoharan et al. 2024a)

Others can be added from outside: see `register_sparsity`.
"""

from writesae.saes.sparsities.base import SPARSITIES, Sparsity, register_sparsity, sparsity_named
from writesae.saes.sparsities.choosing import Choosing
from writesae.saes.sparsities.thresholds import Thresholds

__all__ = ["SPARSITIES", "Choosing", "Sparsity", "Thresholds", "register_sparsity", "sparsity_named"]
