"""Routed experts from NVMe: memory holds the ones in use, the disk all of them."""
