"""The studies beside the paper, in the order of their sections of the page.

A study is one file: `products(graph)`, stage -> the products that it adds to the stage; `MAKERS`,
kind of product -> the function that makes it; `section(facts)`, its section of the page as (name,
title, short title, blocks), or None; and where it has something to warn of, `banner(facts)`, a
sentence on top of the page, or ''. The main line knows them only by this table, and the commands
import it to know all products: so a study imports JAX, SciPy and what takes seconds to import where
it works with them.
"""

from clip_jax.studies import dedup_audit, planted, preview, sensitivity

STUDIES = (preview, sensitivity, planted, dedup_audit)
