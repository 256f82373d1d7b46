"""The stages, one module each; MAKERS maps a kind of product to the function that makes it."""
