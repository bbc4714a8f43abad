"""Computation: GPT-2, the implementations of its ops, the device."""
