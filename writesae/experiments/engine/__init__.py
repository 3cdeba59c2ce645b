"""What experiments share: what is put in place of a write, directions, targets, mixtures."""
