"""The studies that the paper does not have, in the order of their sections of the report page.

A study is one module with
  products(graph): stage -> the products that it adds to the stage
  MAKERS: kind of product -> the function that makes it
  section(facts): its section of the page as (name, title, short title, blocks), or None
  banner(facts): optional; a warning on top of the page, or ''
The pipeline uses studies only through this table. Every command imports them, so a study imports
JAX, SciPy and other slow modules inside functions.
"""

from clip_jax.studies import dedup_audit, planted, preview, sensitivity

STUDIES = (preview, sensitivity, planted, dedup_audit)
