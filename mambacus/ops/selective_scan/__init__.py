"""ops/selective_scan."""
