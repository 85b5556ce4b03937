"""Metrics of generated pictures: alignment with words and pictures, KID, people's preference; and how far training moved the weights."""
