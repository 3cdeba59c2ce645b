"""From a store or from data in memory to a trained SAE."""
