"""ops/causal_conv1d."""
