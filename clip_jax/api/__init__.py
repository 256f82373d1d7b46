"""The Python API: the parts of the experiment as functions on arrays and files.

They call the same code as the commands. Errors that a user can correct are InputError and
ConfigError (clip_jax.core.errors), both ValueErrors.
"""
