"""Measuring a model without changing it."""
