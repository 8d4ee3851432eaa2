"""Faults on purpose: every call of a save fails or kills in turn, protocols are broken, bits flipped, runs killed."""
