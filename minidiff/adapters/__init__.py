"""What personalising changes in a model: small modules of their own, attached beside its layers by hooks and taken off without a trace."""
