"""What out-of-core mode tells of itself."""
