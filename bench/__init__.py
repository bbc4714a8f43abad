"""Benchmarks: what is measured, how, and with what uncertainty. Nothing imports this package."""
