"""What every edit of the memory would do to a number that the model computes, from one backward pass."""

from writesae.gradients.backward import Gradient, LayerGradient, gradient
from writesae.gradients.batches import in_batches
from writesae.gradients.questions import Logit

__all__ = ["Gradient", "LayerGradient", "Logit", "gradient", "in_batches"]
