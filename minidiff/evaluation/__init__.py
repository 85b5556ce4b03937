"""How good pictures are, in numbers: alignment with words and pictures, KID, and the judge of the bundled scenes."""
