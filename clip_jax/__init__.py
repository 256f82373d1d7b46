"""clip_jax: does CLIP's out-of-distribution accuracy come from train-test similarity?

(see README)
"""

__version__ = '0.1.0'
