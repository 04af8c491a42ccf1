"""ops/linear."""
