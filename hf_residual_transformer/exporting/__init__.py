"""Writes models for runtimes that do not need PyTorch."""
