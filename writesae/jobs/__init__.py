"""What long work needs, whatever it works on: files that are whole or not there, processes, progress, resuming."""
