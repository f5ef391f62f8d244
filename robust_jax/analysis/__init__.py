"""Measurements of a network: arrays in, arrays out."""
