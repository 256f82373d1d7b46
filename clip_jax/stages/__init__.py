"""One file a stage: a table {kind of product: function}, each function as a paragraph of the
method.
"""
