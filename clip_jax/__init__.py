"""Does CLIP's out-of-distribution accuracy come from train-test similarity? See README.md."""

__version__ = '0.1.0'
