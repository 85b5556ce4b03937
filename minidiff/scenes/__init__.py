"""Captioned 64 x 64 scenes of openly licensed emoji art: the data of the bundled model. See scenes.py."""
