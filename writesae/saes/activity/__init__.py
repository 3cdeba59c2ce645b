"""Where atoms are active: in one text, and most strongly in a corpus."""
