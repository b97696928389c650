"""Decoding on the device: what a step computes for all slots, and how it draws their next tokens."""
