"""Captioned 128 x 128 scenes of openly licensed emoji art: the data of the bundled model. See scenes.py."""
