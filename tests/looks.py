"""The looks of the rules in figures, as the report passes them."""

from clip_jax.pruning import rules
from clip_jax.reporting import svg

LOOKS = svg.looks({name: rule.label for name, rule in rules.RULES.items()})
