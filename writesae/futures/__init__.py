"""What follows an edit of the memory: next-token distributions, the state, the text that the model writes."""

from writesae.futures.continuations import CommonRandomNumbers, go_on
from writesae.futures.divergence import divergence
from writesae.futures.replay import Futures, Native, Replayer, kl_from, stacked

__all__ = ["CommonRandomNumbers", "Futures", "Native", "Replayer", "divergence", "go_on", "kl_from", "stacked"]
