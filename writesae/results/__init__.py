"""What experiments return, and the statistics behind it."""
