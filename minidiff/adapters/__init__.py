"""Adapters: small modules alongside a model's own, attached to its layers by hooks and taken off without a trace."""
