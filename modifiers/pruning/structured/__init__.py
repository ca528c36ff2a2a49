"""Removing whole heads and channels, so that the dense model is smaller."""
