"""Proves that a change of the code changes no number: two trees do the same work on one machine, and every tensor is compared bit for bit."""
