"""Editing: pictures that start from a picture. Each file is one idea and drives the denoising loop from outside."""
