"""What the operating system is asked: memory, ranks, forks."""
