"""The questions to the operating system: memory, ranks, forks."""
