"""What `trust_remote_code=True` opens in a checkpoint that carries its code: the residual classes, by name.

Where the package hf-residual-transformer is installed, they are its own; otherwise those of the files beside this one,
which are copies of the package's (Apache-2.0, https://github.com/hf-residual-transformer/hf-residual-transformer).
"""

# Both imports are of one function, the `__getattr__` of a module, which makes a class when it is asked for by name.
try:
    from hf_residual_transformer.classes import __getattr__
except ImportError:
    from .classes import __getattr__

__all__ = ["__getattr__"]
