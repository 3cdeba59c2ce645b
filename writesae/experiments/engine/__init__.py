"""What experiments share: edited futures, directions, firings, continuations."""
