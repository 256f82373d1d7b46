"""The stages, one module each, with a table MAKERS {kind of product: the function that makes it}."""
