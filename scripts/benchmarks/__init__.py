"""Benchmarks of extfs and its peers: ratios within one run, never absolute promises."""
